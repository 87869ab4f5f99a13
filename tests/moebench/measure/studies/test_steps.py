"""moebench.measure.studies.steps measures every step, with the bytes and operations of the shape."""

from types import SimpleNamespace

import pytest
import torch

from experts.steps import Steps
from moebench.measure.studies import run, steps
from moebench.measure.studies.products import CountedCall
from moebench.measure.timing import TimingPolicy
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config

CPU = torch.device("cpu")
CASE = Case(
    num_tokens=24,
    n_routed_experts=4,
    n_activated_experts=2,
    dim=32,
    moe_inter_dim=16,
    dtype="float32",
    expert_activation="quick_geglu",
    expert_bias=True,
)


@pytest.fixture(scope="module")
def works() -> list[CountedCall]:
    config, inputs, parameters = moe_config(CASE), make_inputs(CASE, CPU), make_parameters(CASE, CPU)
    return list(steps.memory_bound(inputs, parameters, config, copy_bytes=1 << 16))


def test_no_step_is_forgotten(works: list[CountedCall]) -> None:
    named = {work.name.partition(" (")[0] for work in works}
    assert {name for name in vars(Steps) if not name.startswith("_")} <= named


def test_bytes(works: list[CountedCall]) -> None:
    by_name = {work.name: work for work in works}
    assert by_name["gather_rows"].num_bytes == (24 + 48) * 32 * 4
    assert by_name["activate"].num_bytes == 48 * (32 + 16) * 4


def test_everything_runs_and_has_a_speed(works: list[CountedCall]) -> None:
    for work in works:
        row = steps.measure_step(work, CPU, TimingPolicy(0.5, time_cap_s=0.01))
        assert row["ms"] > 0
        assert row.get("gb_per_s", row.get("tflops")) > 0


def test_the_faster_of_two_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> None: ...

    def fast() -> None: ...

    times = {slow: 4.0, fast: 2.0}
    monkeypatch.setattr(steps.timing, "time_stages", lambda stages, *_: SimpleNamespace(time_ms=times[stages[0]]))
    policy = TimingPolicy(0.5, time_cap_s=0.01)
    for call, other in ((slow, fast), (fast, slow)):
        row = steps.measure_step(CountedCall("te", call, num_flops=10**9, other=other), CPU, policy)
        assert (row["ms"], row["tflops"]) == (2.0, 0.5)
        assert row["ms_by_place_of_sizes"] == {"host": times[call], "device": times[other]}
    assert "ms_by_place_of_sizes" not in steps.measure_step(CountedCall("gmm", slow, num_flops=1), CPU, policy)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt-5"], "--model gpt-5: it must be one of"),
        (["--shape", "128/8/2048"], "--shape 128/8/2048: it must be four positive numbers"),
        (["--shape", "e8k16d64i64"], "--shape e8k16d64i64: it must be four positive numbers"),
        (["--shape", "8/16/64/64"], "--shape 8/16/64/64: it must be four positive numbers"),
        (["--shape", "8/2/64/64", "--model", "olmoe"], "--model olmoe and --shape 8/2/64/64: give one of them"),
        (["--backend", "cutlass"], "--backend cutlass: it must be one of torch_mm,"),
        (["--backend", "gmm", "--device", "cpu"], "--backend gmm: grouped_gemm"),
        (["--device", "gpu"], "--device 'gpu': it must be cpu, cuda or cuda:N"),
        (["--out", "no/such/file.json"], "--out no/such/file.json: there is no folder no/such; make it"),
        (
            ["--num-tokens", "0"],
            "Invalid value for '--num-tokens': ",
        ),
        (
            ["--nosuch\x1b[31m"],
            r"No such option: --nosuch\x1b[31m. See `python -m moebench.measure.studies.steps --help`.",
        ),
    ],
)
def test_bad_usage_is_one_line_with_the_value_and_the_rule(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, *arguments)
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    assert line.startswith(said)


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the program as `python -m moebench.measure.studies.steps` does."""
    monkeypatch.setattr("sys.argv", ["steps.py", *arguments])
    run(steps.main, "moebench.measure.studies.steps")
