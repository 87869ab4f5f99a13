"""The kernel that quantises weights in both layouts, and the code of the kernels that transpose while they quantise.

test_fp8.py runs this file in Triton's interpreter.
"""

import re
from pathlib import Path

import pytest
import torch

from experts.steps import Permutation
from tests.experts.compiled import assemble, compile_launches
from tests.experts.layers import BF16, F16, INTERPRETED
from tests.experts.test_fp8 import hard_rows, on_every_setup, same

pytest.importorskip("triton")


@pytest.mark.parametrize("halves", [1, 2])
@on_every_setup
def test_both_layouts_of_the_weights_have_the_numbers_of_each(device: str, dtype: torch.dtype, halves: int) -> None:
    from experts.fp8 import quantise

    b_LPQ = torch.stack([hard_rows(144, 416, dtype), hard_rows(144, 416, dtype) * 3]).to(device)
    both = quantise.quantise_weights_both(b_LPQ, halves)
    for found, right in zip(
        both, (quantise.quantise_weights(b_LPQ, halves), quantise.quantise_weights_back(b_LPQ, halves)), strict=True
    ):
        assert same(found.values, right.values)
        assert same(found.scales, right.scales)
        assert (found.q_halves, found.p_halves) == (right.q_halves, right.p_halves)
    again = quantise.quantise_weights_both(b_LPQ * 2, halves, *both)
    assert [one.values.data_ptr() for one in again] == [one.values.data_ptr() for one in both]
    assert same(both[1].scales, 2 * quantise.quantise_weights_back(b_LPQ, halves).scales)


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_kernels_compile_for_sm90_without_spilling(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of them load and store 16 bytes at a time, and registers are left for two programs at a time."""
    from experts.fp8 import quantise, turned

    compiled = compile_launches(monkeypatch, tmp_path, quantise, turned)
    num_rows, k, experts, dim, inter = 512, 8, 128, 2048, 2880
    maps = [torch.zeros(num_rows, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    blocks = turned.row_blocks(permutation)
    x_TD, h_NH = torch.zeros(num_rows // k, dim, dtype=dtype), torch.zeros(num_rows, 2 * inter, dtype=dtype)

    def check(name: str) -> None:
        code = compiled[name]
        assert re.search(r"ld\.global\.v4\.b32", code)
        assert re.search(r"st\.global\.v4\.b32", code)
        said = assemble(code, tmp_path)
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None
        assert int(registers[1]) <= 128

    quantise.quantise_weights_both(torch.zeros(2, dim, 2 * inter, dtype=dtype), 2)
    check("quantise_matrices")
    turned.turn(x_TD, blocks, permutation, gather=True, by_column=True)
    check("turn_rows")
    turned.turn(h_NH, blocks, permutation, gather=False, by_column=False, halves=2)
    check("turn_rows")
