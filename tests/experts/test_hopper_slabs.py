"""Three groups of warps for gradients of the weights: the bits of two groups, and their code for an H200."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation
from tests.experts.compiled import assemble, compile_launches
from tests.experts.grouped import Grouped
from tests.experts.layers import BF16, F16, INTERPRETED, poisoned

pytest.importorskip("triton")

#: Rows of each expert. A slab has 64 columns, and a tile 192.
ROWS = [(0, 1, 63, 64, 65, 191, 192, 193, 0), (0, 3000, 0), (150, 0, 150) * 20]
each_kind = pytest.mark.parametrize(
    ("which", "add", "dtype"),
    list(itertools.product(["outer", "gathered_outer", "outer_gathered"], [False, True], [BF16, F16])),
    ids=str,
)


def sums(which: str, add: bool, a_NP: Tensor, x_TP: Tensor, b_NQ: Tensor, permutation: Permutation) -> Tensor:
    """Return the gradient, or one plus the gradient in float32."""
    from experts import gemm

    left, right = (b_NQ, x_TP) if which == "outer_gathered" else (a_NP if which == "outer" else x_TP, b_NQ)
    if not add:
        return getattr(gemm, which)(left, right, permutation)
    out = torch.ones(permutation.offsets_L.shape[0], left.shape[1], right.shape[1], device=left.device)
    gathered: Any = {"outer": None, "gathered_outer": "left", "outer_gathered": "right"}[which]
    gemm.add_outer(left, right, out, permutation, gathered)
    return out


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("widths", [(2880, 336), (336, 2880), (128, 2048)], ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_three_groups_return_the_bits_of_two(
    rows: tuple[int, ...],
    widths: tuple[int, int],
    which: str,
    add: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (SM90)")
    from experts.gemm.hopper import launching

    given = Grouped(rows, widths, dtype)
    monkeypatch.setattr(torch, "empty", poisoned)
    found = []
    for three in (False, True, True, True):
        monkeypatch.setattr(launching, "three_groups", lambda columns, three=three: three)
        found.append(sums(which, add, given.a_NP, given.x_TP, given.b_NQ, given.permutation))
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], three) for three in found[1:])


@pytest.mark.parametrize(("columns", "three"), [(2880, 1), (768, 1), (7168, 1), (2048, 0), (4096, 0), (128, 0)])
def test_three_groups_compute_what_their_tiles_fit(columns: int, three: bool) -> None:
    from experts.gemm.tiling import three_groups

    assert three_groups(columns) == three


@pytest.mark.certify(share=0.15)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@each_kind
def test_kernels_compile_for_sm90_without_spilling(
    which: str, add: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tiles of 192 fit 7168 columns, which are those of the result's rows or, for `outer_gathered`, of its columns."""
    from experts.gemm import accumulation
    from experts.gemm.hopper import launching

    monkeypatch.setattr(accumulation, "runs_on_hopper", lambda device, num_rows: True)
    ptx = compile_launches(monkeypatch, tmp_path, accumulation, launching)
    maps = [torch.zeros(512, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(2, dtype=torch.int32), 8)
    a_NP, x_TP, b_NQ = (torch.zeros(*shape, dtype=dtype) for shape in ((512, 7168), (64, 7168), (512, 2048)))
    sums(which, add, a_NP, x_TP, b_NQ, permutation)
    assert list(ptx) == ["sum_outer_slabs"]
    code = ptx["sum_outer_slabs"]
    said = assemble(code, tmp_path)
    assert "wgmma.mma_async.sync.aligned.m64n128k16" in code
    assert "wgmma" not in said, "the assembler says that products wait for each other"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"(st|ld)\.local", code)
    parts = re.findall(r"cp\.(reduce\.)?async\.bulk\.tensor\.3d\.global\.shared::cta", code)
    # three groups hand over eight or four parts each, and a loop stores zeros for tiles without rows
    assert parts == (["reduce."] * 24 if add else [""] * 13)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code)
    assert sorted(set(waits)) == ["0", "1"], "a step waits for its own products, and nothing runs meanwhile"
