"""Which make of the steps (eager or fused) runs on which device, and how the environment overrides the choice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts import ConfigError, steps
from experts.steps import eager, make_of_steps, steps_on
from tests.experts.layers import BF16, F32, F64, layer, moe_config

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("asked", "has_triton", "device", "dtype", "make"),
    [
        ("", True, CUDA, BF16, "fused"),
        ("", True, CUDA, None, "fused"),
        ("", True, CUDA, F64, "eager"),
        ("", False, CUDA, BF16, "eager"),
        ("", True, CPU, F32, "eager"),
        ("", True, META, F32, "eager"),
        ("eager", True, CUDA, BF16, "eager"),
        ("fused", True, CPU, F32, "fused"),
        ("fused", True, CPU, F64, "eager"),
        ("fused", False, CUDA, BF16, "fused"),
        ("fused", True, META, F32, "eager"),
    ],
)
def test_the_make_follows_environment_triton_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    has_triton: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    make: str,
) -> None:
    """If fused steps are requested and Triton is missing, the choice stays fused. Its import then raises."""
    monkeypatch.setenv("EXPERTS_STEPS", asked)
    monkeypatch.setattr(steps, "_has_triton", lambda: has_triton)
    assert make_of_steps(device, dtype) == make


def test_both_makes_have_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for make in ("eager", "fused"):
        monkeypatch.setenv("EXPERTS_STEPS", make)
        found = steps_on(CPU, F32)
        assert found.__name__ == f"experts.steps.{make}"  # type: ignore[attr-defined]
        assert all(callable(getattr(found, name)) for name in vars(steps.Steps) if not name.startswith("_"))


def test_the_error_for_an_unknown_make_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTS_STEPS", "triton")
    with pytest.raises(ConfigError, match=r"^EXPERTS_STEPS = 'triton' in the environment; give 'eager' or 'fused'"):
        make_of_steps(CPU, F32)


def test_the_repr_of_a_layer_names_the_make(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "engine=torch_mm, steps=eager" in repr(layer("torch_mm", moe_config()))
    assert "steps" not in repr(layer("loop", moe_config()))
    monkeypatch.setenv("EXPERTS_STEPS", "fused")
    assert "engine=torch_mm, steps=fused" in repr(layer("torch_mm", moe_config()))


def test_eager_steps_do_not_import_triton() -> None:
    code = (
        "import sys, torch, experts.permutation as p; before = 'triton' in sys.modules; "
        "p.permute(torch.ones(2, 4), p.sort_by_expert(torch.zeros(2, 1, dtype=torch.int64), 0, 1)); "
        "print(before, 'triton' in sys.modules, 'experts.steps.fused' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after, fused = done.stdout.split()
    assert (before, fused) == (after, "False")


def test_the_eager_gradient_of_routing_weights_is_not_rounded_to_their_dtype() -> None:
    """The gradient of a bias may be added to it before it is rounded."""
    config = moe_config(expert_activation="relu2")
    permutation = eager.sort_by_expert(torch.tensor([[1, 0], [2, -1], [1, 3]]), 0, 4)
    h_NI, grad_NI = (torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    weights_TK = torch.rand(3, 2).to(BF16)
    found, right = (
        eager.activate_backward(h_NI, grad_NI, permutation, weights, None, config, again=False)[2]
        for weights in (weights_TK, weights_TK.float())
    )
    assert torch.equal(found, right)
