"""moebench.measure.studies.block times the whole block and each part, and knows the routers of models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from experts.block import MoEBlock
from moebench.measure.studies import block, run
from moebench.measure.studies.block import BLOCKS, work_of
from moebench.measure.timing import TimingPolicy
from moebench.workload.case import Case
from moebench.workload.inputs import moe_config
from moebench.workload.models import MODELS

CPU = torch.device("cpu")
POLICY = TimingPolicy(0.5, time_cap_s=0.01)
CASE = Case(num_tokens=24, n_routed_experts=16, n_activated_experts=4, dim=32, moe_inter_dim=16, dtype="float32")


@pytest.fixture
def milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the calls of the block, the router, the shared experts and the experts take 10, 1, 2 and 5 ms in turn."""
    times = iter([10.0, 1.0, 2.0, 5.0] * 8)

    def timed(*_: Any) -> SimpleNamespace:
        ms = next(times)
        return SimpleNamespace(time_ms=ms, time_ms_low=ms - 0.5, time_ms_high=ms + 0.5)

    monkeypatch.setattr(block.timing, "time_stages", timed)


@pytest.mark.usefixtures("milliseconds")
def test_the_share_is_the_experts_time_over_the_blocks() -> None:
    row = block.measure_block(work_of(CASE, BLOCKS["deepseek-v3"], "loop", CPU), "train", CPU, POLICY)
    parts = [row[name] for name in ("block_ms", "router_ms", "shared_ms", "experts_ms", "rest_ms", "experts_share")]
    assert parts == [10.0, 1.0, 2.0, 5.0, 2.0, 0.5]
    assert (row["block_ms_low"], row["block_ms_high"]) == (9.5, 10.5)


@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
def test_the_parts_together_compute_the_block(backend: str) -> None:
    """The parts get the block's own tokens and routing, so their outputs add up to the block's output."""
    work = work_of(CASE, BLOCKS["deepseek-v3"], backend, CPU)
    outputs = {name: compute()[1] for name, _, compute in work.calls()}
    torch.testing.assert_close(outputs["block"], outputs["shared"] + outputs["experts"])
    torch.testing.assert_close(outputs["router"], work.weights_TK)
    assert len({(work_of(CASE, BLOCKS["deepseek-v3"], name, CPU)).load for name in ("loop", "torch_mm")}) == 1


def test_a_train_step_gives_each_module_its_gradients_once() -> None:
    """Gradients of the step before do not add up, and a part's step touches no other part."""
    work = work_of(CASE, BLOCKS["deepseek-v3"], "loop", CPU)
    for name, module, compute in work.calls():
        work.block.zero_grad(set_to_none=True)
        step = block._train(module, compute)
        step()
        first = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
        step()
        assert first.keys() == {key for key, _ in module.named_parameters()}, name
        assert all(torch.equal(first[key], p.grad) for key, p in module.named_parameters() if p.grad is not None)
        others = [p for p in work.block.parameters() if not any(p is own for own in module.parameters())]
        assert all(p.grad is None for p in others), name


def test_a_forward_keeps_no_graph() -> None:
    seen = []
    block._forward(lambda: seen.append(torch.is_grad_enabled()))()
    assert seen == [False]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_router_and_shared_experts_of_a_model_fit_its_experts(name: str) -> None:
    config = moe_config(Case(model=name, num_tokens=1, **MODELS[name]))  # type: ignore[arg-type]
    with torch.device("meta"):
        made = MoEBlock(config, BLOCKS[name], torch.nn.Identity())
    widths = {
        "qwen3-next-80b": 512,
        "deepseek-v3": 2048,
        "deepseek-v2-lite": 2816,
        "kimi-k2": 2048,
        "glm-4.5-air": 1408,
    }
    width = 0 if made.shared_experts is None else made.shared_experts.down_proj.shape[0]
    assert width == widths.get(name, 0)
    assert made.router.weight.shape == (config.n_routed_experts, config.dim)


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the program as `python -m moebench.measure.studies.block` does."""
    monkeypatch.setattr("sys.argv", ["block.py", *arguments])
    run(block.main, "moebench.measure.studies.block")


@pytest.mark.usefixtures("milliseconds")
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_the_program_prints_a_table_and_writes_the_rows(
    suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / f"block{suffix}"
    monkeypatch.setenv("COLUMNS", "120")
    shape = ["--shape", "e16k4d32i16", "--like", "deepseek-v3", "--dtype", "float32", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, *shape, "--num-tokens", "8", "--num-tokens", "16", "--backend", "loop", "--out", str(out))
    printed = capsys.readouterr().out
    assert ended.value.code in (None, 0)
    assert printed.count("e16k4d32i16") == 4
    assert printed.count("50%") == 4
    if suffix == ".json":
        written = json.loads(out.read_text())
        assert written["environment"]["device"] == "cpu"
        rows = pd.DataFrame(written["rows"])
    else:
        rows = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
        assert set(rows["torch"]) == {torch.__version__}
    assert rows["num_tokens"].tolist() == [8, 8, 16, 16]
    assert rows["mode"].tolist() == ["forward", "train"] * 2
    assert rows["experts_share"].tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt-5"], "--model gpt-5: it must be one of qwen3-30b-a3b,"),
        (["--like", "gpt-5"], "--like gpt-5: it must be one of qwen3-30b-a3b,"),
        (["--mode", "both"], "--mode both: it must be forward or train"),
        (["--out", "block.txt"], "--out block.txt: it must end in .csv, .json, .parquet"),
        (["--shape", "8/2"], "--shape 8/2: it must be experts, top-k, dim and inter"),
        (["--shape", "e8k2d16i8", "--backend", "cutlass"], "--backend cutlass: there is no backend 'cutlass'"),
        (["--shape", "e8k2d16i8", "--dtype", "int8"], "{'n_routed_experts': 8,"),
        (
            ["--shape", "e12k2d16i8", "--like", "deepseek-v3", "--device", "cpu"],
            "the shape: n_expert_groups = 8 does not divide n_routed_experts = 12",
        ),
        (
            ["--shape", "e8k2d16i8", "--backend", "torch_mm", "--dtype", "float64", "--device", "cpu"],
            "--backend torch_mm: grouped_mm takes float32, bfloat16 and float16, not float64",
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
