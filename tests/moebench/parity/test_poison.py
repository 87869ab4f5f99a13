"""Memory that no code wrote holds NaN while a backend is checked."""

import pytest
import torch

from moebench.parity.poison import poisoned

CPU = torch.device("cpu")


def test_memory_that_nobody_wrote_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        with poisoned(CPU):
            assert torch.empty(5, 7, dtype=dtype).isnan().all()
            assert torch.empty_like(torch.zeros(3, dtype=dtype)).isnan().all()
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_poison_is_gone_after_an_error():
    def fail():
        with poisoned(CPU):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
