"""Packing of messages between ranks, as far as one process can test it."""

import pytest
import torch

from experts.dispatch.collectives import pack_choices, unpack_choices
from tests.experts.layers import BF16, F16, F32, F64


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("num_choices", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5])
def test_choices_arrive_as_they_were_sent(num_rows: int, num_choices: int, dtype: torch.dtype) -> None:
    """With an odd number of choices, or with at most one row, a part may not be aligned to its element size."""
    weights_RK = torch.rand(num_rows, num_choices).to(dtype)
    indices_RK = torch.randint(-1, 9, (num_rows, num_choices))
    for weights, indices in ((weights_RK, indices_RK), (as_columns(weights_RK), as_columns(indices_RK))):
        packed = pack_choices(weights, indices)
        assert packed.shape == (num_rows, num_choices * (4 + dtype.itemsize))
        found_weights, found_indices = unpack_choices(packed, dtype)
        assert torch.equal(found_weights, weights_RK)
        assert torch.equal(found_indices, indices_RK)


def as_columns(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values with a last stride that is not 1, although a single row or column is contiguous."""
    return torch.empty_strided(tensor.shape, (1, 7), dtype=tensor.dtype).copy_(tensor)


def test_an_index_beyond_int32_does_not_become_another_experts() -> None:
    """On a GPU nothing checks the indices. Such an index contributes nothing, on whichever rank it arrives."""
    indices_RK = torch.tensor([[1 << 40, 3], [-(1 << 40), (1 << 32) + 2]])
    _, found = unpack_choices(pack_choices(torch.rand(2, 2), indices_RK), F32)
    assert found.tolist() == [[2**31 - 1, 3], [-1, 2**31 - 1]]
