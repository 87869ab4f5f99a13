"""moebench.steps: that it measures every step, with the bytes and operations of the shape."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts import MoEConfig
from experts.steps import Steps, steps_on
from moebench import steps
from moebench.case import Case
from moebench.inputs import make_inputs, make_parameters, moe_config
from moebench.timing import TimingPolicy

ROOT = Path(__file__).parents[2]
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
def works() -> list[steps.Work]:
    config, inputs, parameters = moe_config(CASE), make_inputs(CASE, CPU), make_parameters(CASE, CPU)
    permutation = steps_on(CPU).sort_by_expert(inputs.indices_TK, 0, 4)
    return [
        *steps.memory_bound(inputs, parameters, config, copy_bytes=1 << 16),
        *steps.products_alone(inputs, parameters, config, permutation),
        *steps.layers(inputs, parameters, config),
    ]


def test_no_step_is_forgotten(works: list[steps.Work]) -> None:
    named = {work.name.partition(" (")[0] for work in works}
    assert {name for name in vars(Steps) if not name.startswith("_")} <= named


def test_bytes_and_operations(works: list[steps.Work]) -> None:
    by_name = {work.name: work for work in works}
    assert by_name["gather_rows"].num_bytes == (24 + 48) * 32 * 4
    assert by_name["activate"].num_bytes == 48 * (32 + 16) * 4
    assert by_name["products, forward"].num_flops == by_name["torch_mm, forward"].num_flops == 6 * 48 * 32 * 16
    assert by_name["products, train"].num_flops == 3 * 6 * 48 * 32 * 16


def test_everything_runs_and_has_a_speed(works: list[steps.Work]) -> None:
    for work in works:
        row = steps.measure(work, CPU, TimingPolicy(0.5, time_cap_s=0.01))
        assert row["ms"] > 0
        assert row.get("gb_per_s", row.get("tflops")) > 0


def test_layers_leave_gradients_of_one_step() -> None:
    """A train step that added to the last one's gradients would be timed with the addition."""
    config: MoEConfig = moe_config(CASE)
    inputs, parameters = make_inputs(CASE, CPU), make_parameters(CASE, CPU)
    train = next(work for work in steps.layers(inputs, parameters, config) if "train" in work.name).call
    layer = train.__defaults__[0]  # type: ignore[attr-defined]
    train()
    first = layer.down_projs.grad.clone()
    train()
    assert torch.equal(layer.down_projs.grad, first)


def test_an_unknown_model_is_one_line() -> None:
    command = [sys.executable, "-m", "moebench.steps", "--model", "gpt-5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "--model gpt-5: it must be one of" in " ".join(done.stderr.split())
