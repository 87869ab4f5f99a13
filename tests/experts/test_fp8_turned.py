"""The kernel that quantises weights in both layouts, and the code of the kernels that transpose while they quantise.

test_fp8.py runs this file in Triton's interpreter.
"""

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from experts.fp8.blocks import E4M3, E5M2
from experts.steps import Permutation, eager
from tests.experts.compiled import assemble, compile_launches
from tests.experts.layers import BF16, F16, INTERPRETED
from tests.experts.test_fp8 import exact_matrices, exact_rows, hard_rows, on_every_setup, permutation_of, same

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


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_both_kernels_that_transpose_rows_give_the_same_bits(
    dtype: torch.dtype, fmt: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel for Hopper finds scales and their reciprocals in other instructions."""
    from experts.fp8 import turned

    if not turned.runs_on_hopper(torch.device("cuda"), 1):
        pytest.skip("needs a Hopper GPU (SM90)")
    for num_tokens, width in ((1, 464), (130, 16), (900, 2880)):
        permutation = permutation_of(num_tokens, "cuda")
        blocks = turned.row_blocks(permutation)
        num_blocks = int(blocks.listed[0])
        x_TD = hard_rows(num_tokens + 5, width, dtype).cuda()[:num_tokens]
        x_TD[num_tokens // 2, 1], x_TD[num_tokens // 3, 3] = torch.nan, torch.inf
        x_TD[:, 2::7] *= 1e-30
        x_ND = eager.gather_rows(x_TD, permutation)
        for gather, by_column, halves in itertools.product((False, True), (False, True), (1, 2)):
            found = []
            for hopper in (True, False):
                monkeypatch.setattr(turned, "runs_on_hopper", lambda device, num_rows, hopper=hopper: hopper)
                rows = x_TD if gather else x_ND
                made = turned.turn(rows, blocks, permutation, gather, by_column, halves, dtype=fmt)
                found.append([part[:num_blocks].view(torch.uint8) for part in (made.values, made.scales)])
            assert all(map(torch.equal, *found)), (num_tokens, gather, by_column, halves)


@pytest.mark.gpu
def test_every_tile_of_many_is_computed_once() -> None:
    """There are several rounds of tiles, and the last one is not full. The last tile of an expert has fewer rows."""
    from experts.fp8 import products, quantise

    indices_TK = torch.rand(3000, 16, generator=torch.Generator().manual_seed(1)).topk(4).indices.cuda()
    indices_TK[indices_TK == 3] = -1
    permutation = eager.sort_by_expert(indices_TK, 0, 16)
    x_TD = torch.randn(3000, 272, device="cuda", dtype=BF16)
    matrices = quantise.quantise_weights(torch.randn(16, 272, 1680, device="cuda", dtype=BF16), 2)
    rows = quantise.quantise_and_gather(x_TD, permutation)
    found = products.product(rows, matrices, permutation, 750.0, BF16)
    exact, weights = exact_rows(rows), exact_matrices(matrices)
    for expert, (start, end) in enumerate(itertools.pairwise([0, *permutation.offsets_L.tolist()])):
        right = exact[start:end] @ weights[expert].mT
        assert (found[start:end].double() - right).norm() <= 0.003 * right.norm(), expert
    again = products.product(rows, matrices, permutation, 750.0, BF16)
    num_local = int(permutation.offsets_L[-1])
    assert torch.equal(again[:num_local], found[:num_local])


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_kernel_for_hopper_transposes_without_spilling(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It loads 16 bytes at a time, transposes without shared memory, and leaves registers for a second program."""
    from experts.fp8 import turned

    hopper = importlib.import_module("experts.fp8.hopper.turned")
    monkeypatch.setattr(turned, "runs_on_hopper", lambda device, num_rows: True)
    compiled = compile_launches(monkeypatch, tmp_path, hopper, turned)
    maps = [torch.zeros(512, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(32, dtype=torch.int32), 8)
    blocks = turned.row_blocks(permutation)
    for gather, by_column in ((True, True), (False, False)):
        x = torch.zeros(64 if gather else 512, 2880, dtype=dtype)
        turned.turn(x, blocks, permutation, gather, by_column, halves=1 if gather else 2)
        code = compiled["turn_rows"]
        assert re.search(r"ld\.global\.v4\.b32", code)
        assert not by_column or "st.shared" not in code
        said = assemble(code, tmp_path)
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None
        assert int(registers[1]) <= 128


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
