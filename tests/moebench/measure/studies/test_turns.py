"""moebench.measure.studies.turns compares backends turn by turn, and loses no case that was measured."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebench.errors import UsageError
from moebench.measure.cache import Workload
from moebench.measure.studies import turns
from moebench.measure.timing import TimingPolicy
from moebench.results.stats import MIN_SAMPLES
from moebench.workload.case import Case
from moebench.workload.selection import select

CPU = torch.device("cpu")
SHORT = TimingPolicy(0.5, time_cap_s=0.0)
SIZES = "n_routed_experts = 4\nn_activated_experts = 2\ndim = 32\nmoe_inter_dim = 16\n"
CASE = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=32, moe_inter_dim=16, dtype="float32")


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    grid = '[[grid]]\nbackend = ["loop", "torch_mm"]\ndtype = "float32"\nmode = ["forward", "train"]\nnum_tokens = 8\n'
    (tmp_path / "small.toml").write_text(f'name = "small"\n{grid}routing = ["zipf", "one-hot", "empty:0.9"]\n{SIZES}')
    return str(tmp_path / "small.toml")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that lets the calls named a, b, … take these milliseconds; it returns the order of samples."""

    def take(**milliseconds: Iterator[float]) -> list[str]:
        order: list[str] = []

        @contextmanager
        def make_sampler(stages: str, *_: Any) -> Iterator[SimpleNamespace]:
            def sample(count: int) -> SimpleNamespace:
                assert count == 1
                order.append(stages)
                return SimpleNamespace(totals_ms=[next(milliseconds[stages])])

            yield SimpleNamespace(sample=sample)

        monkeypatch.setattr(turns, "make_sampler", make_sampler)
        return order

    return take


def call(name: str) -> Any:
    return SimpleNamespace(stages=name, clear=lambda: None)


def test_each_turn_has_every_call_and_the_order_alternates(sampled: Callable[..., list[str]]) -> None:
    order = sampled(a=iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), b=iter([10.0, 20.0, 30.0, 40.0, 50.0, 60.0]))
    found = turns.take_turns([call("a"), call("b")], CPU, SHORT)
    assert found == [(float(n), 10.0 * n) for n in range(1, 7)]
    assert "".join(order) == "abbaabbaabba"


def test_turns_end_when_every_ratio_is_precise(sampled: Callable[..., list[str]]) -> None:
    """The ratio is precise although the times of both calls drift together."""
    drift = [1.0 + n for n in range(100)]
    sampled(
        a=iter(drift), b=iter([2 * ms for ms in drift]), c=iter([3 * ms * (1 + n % 2) for n, ms in enumerate(drift)])
    )
    policy = TimingPolicy(0.01, time_cap_s=60.0, least_samples=8)
    found = turns.take_turns([call("a"), call("b")], CPU, policy)
    assert len(found) == 8
    assert turns.ratios_of(found, 1) == (0.5, 0.5, 0.5)
    with pytest.raises(StopIteration):  # the third call's ratio is not precise: turns go on until no times are left
        turns.take_turns([call("a"), call("c")], CPU, policy)


def test_a_time_cap_leaves_enough_turns_for_an_interval(sampled: Callable[..., list[str]]) -> None:
    sampled(a=iter([1.0, 9.0] * 10), b=iter([1.0] * 20))
    assert len(turns.take_turns([call("a"), call("b")], CPU, SHORT)) == MIN_SAMPLES


@pytest.mark.parametrize(("first_ms", "slower"), [([1.1] * 6, True), ([1.1, 1.1, 1.1, 1.1, 1.1, 0.9], False)])
def test_a_ratio_is_marked_if_its_whole_interval_is_above_1(
    monkeypatch: pytest.MonkeyPatch, first_ms: list[float], slower: bool
) -> None:
    monkeypatch.setattr(turns, "take_turns", lambda *_: [(ms, 1.0) for ms in first_ms])
    (row,) = turns.measure_case(CASE, ["torch_mm", "loop"], Workload(CPU), SHORT)
    assert (row["backend"], row["other"], row["ratio"]) == ("torch_mm", "loop", 1.1)
    assert (row["time_ms"], row["other_time_ms"], row["slower"]) == (1.1, 1.0, slower)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_wrong_backend_has_no_ratio(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "backends"))
    case = CASE.model_copy(update={"mode": mode})
    right, wrong = turns.measure_case(case, ["loop", "torch_mm", "faulty:SwappedExperts"], Workload(CPU), SHORT)
    assert (right["status"], right["difference"] < 1e-5) == ("ok", True)
    assert wrong["status"] == "mismatch"
    assert "ratio" not in wrong


def test_a_backend_that_cannot_run_is_named() -> None:
    (row,) = turns.measure_case(CASE, ["loop", "torch_mm_mxfp8"], Workload(CPU), SHORT)
    assert row["status"] == "unsupported"
    assert row["detail"].startswith("torch_mm_mxfp8: ")


def test_every_case_is_in_the_file_when_it_ends(
    sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second case runs out of memory and the last one is stopped."""
    out, measure_case, cases = tmp_path / "out.json", turns.measure_case, list[Case]()

    def measured(case: Case, *others: Any) -> Iterator[dict[str, Any]]:
        cases.append(case)
        if len(cases) == 2:
            raise torch.OutOfMemoryError("60 GiB")
        if len(cases) == 6:
            raise KeyboardInterrupt
        return measure_case(case, *others)

    monkeypatch.setattr(turns, "measure_case", measured)
    with pytest.raises(KeyboardInterrupt):
        turns.main(sweep, device="cpu", time_cap_s=0.0, out=out)
    found = json.loads(out.read_text())
    assert [row["status"] for row in found["rows"]] == ["ok", "oom", "ok", "ok", "ok"]
    assert [row["case_id"] for row in found["rows"]] == [case.case_id for case in cases[:5]]
    assert found["rows"][1]["detail"] == "60 GiB"
    assert (found["environment"]["device"], found["time_cap_s"]) == ("cpu", 0.0)
    assert "oom: 60 GiB" in capsys.readouterr().out


def test_a_spent_budget_starts_no_case(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    turns.main(sweep, device="cpu", time_budget=0.0)
    assert capsys.readouterr().out == "0 of 6 cases; 0 ratios, 0 of them wholly above 1\n"
    turns.main(sweep, filters=["routing=zipf"], device="cpu", time_cap_s=0.0, time_budget=9.0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 cases; 2 ratios, ")


def test_one_case_can_be_measured_again(sweep: str, tmp_path: Path) -> None:
    (wanted,) = {job.case.case_id for job in select(sweep, (), ["routing=zipf", "mode=train"], ())}
    turns.main(sweep, case=[wanted], device="cpu", time_cap_s=0.0, out=tmp_path / "out.json")
    assert [row["case_id"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [wanted]


def test_what_the_study_cannot_compare(sweep: str) -> None:
    with pytest.raises(UsageError, match="there is only loop; name two backends"):
        turns.main(sweep, only=["loop"], device="cpu")
    with pytest.raises(UsageError, match="backend none: "):
        turns.main(sweep, only=["loop", "none"], device="cpu")
    with pytest.raises(UsageError, match="on one rank"):
        turns.main("gpu-ep2", only=["loop", "torch_mm"], device="cpu")


def test_the_sweep_skewed_wide_compares_triton_with_torch_mm_on_all_models_of_gpu_wide() -> None:
    jobs, wide = select("skewed-wide", (), (), ()), select("gpu-wide", (), ("routing=uniform",), ())
    assert {job.case.model for job in jobs} == {job.case.model for job in wide}
    assert [job.backend for job in jobs[:2]] == ["triton", "torch_mm"]
    assert jobs[0].case == jobs[1].case
