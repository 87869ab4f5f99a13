"""The canary passes in a healthy process, and fails once a backend has changed the process's arithmetic."""

import pytest
import torch

from moebench.measure.canary import Unhealthy, sing

CPU = torch.device("cpu")


def test_a_healthy_process_sings():
    sing(CPU)


@pytest.mark.parametrize("factor", [1 + 1e-4, 0.0, float("nan")])
def test_a_wrong_result_is_found(monkeypatch, factor):
    silu = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda *given: silu(*given) * factor)
    with pytest.raises(Unhealthy, match="the canary's output is off by"):
        sing(CPU)


def test_a_wrong_gradient_is_found(monkeypatch):
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    silu = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: Lost.apply(silu(x)))
    with pytest.raises(Unhealthy, match="input gradient"):
        sing(CPU)


def test_another_default_dtype_is_found():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(Unhealthy, match=r"the default dtype is torch\.float64"):
            sing(CPU)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_switched_off_are_found():
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        sing(CPU)
