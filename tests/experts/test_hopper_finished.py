"""The kernels for Hopper GPUs that compute SwiGLU, or its gradients, from a product's tiles."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.config import MoEConfig
from experts.steps import Permutation, eager
from tests.experts.compiled import assemble, compile_launches
from tests.experts.grouped import GROUPS, Grouped, assert_sums
from tests.experts.layers import BF16, F16, INTERPRETED, moe_config, poisoned
from tests.experts.test_hopper import dtypes, hopper

pytest.importorskip("triton")

__all__ = ["hopper"]  # a fixture

MANY = 1000.0  # rows per expert, so that the kernels for Hopper are chosen
#: Sizes of a token and of an expert's hidden layer. A tile has 128 or 256 columns, and a panel has 64.
WIDTHS = [(128, 256), (8, 16), (136, 96), (512, 2880)]
widths_and_rows = [
    pytest.mark.parametrize("widths", WIDTHS, ids=str),
    pytest.mark.parametrize("rows", [*GROUPS, tuple(150 if expert % 3 else 0 for expert in range(60))], ids=str),
]


def swiglu(rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype) -> MoEConfig:
    sizes = {"n_routed_experts": len(rows), "n_activated_experts": 1, "dim": widths[0], "moe_inter_dim": widths[1]}
    return moe_config(**sizes, dtype=dtype, expert_bias=False)


def in_every_case(test: Any) -> Any:
    for mark in (*widths_and_rows, dtypes, pytest.mark.gpu):
        test = mark(test)
    return test


@in_every_case
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_product_and_its_activation_are_those_of_two_kernels(
    rows: tuple[int, ...],
    widths: tuple[int, int],
    weighted: bool,
    copied: bool,
    dtype: torch.dtype,
    hopper: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from experts.gemm import products

    monkeypatch.setattr(products, "COPIED_FROM", 0 if copied else 2**31)
    config, given = swiglu(rows, widths, dtype), Grouped(rows, widths, dtype)
    num_rows, generator = sum(rows), torch.Generator().manual_seed(1)
    b_LDH = (torch.randn(len(rows), widths[0], 2 * widths[1], generator=generator) * widths[0] ** -0.5).to(
        "cuda", dtype
    )
    weights_TK = torch.rand(given.x_TP.shape[0], 1, generator=generator).cuda() if weighted else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        h_NH, a_NI = hopper.kept_and_activated(given.x_TP, b_LDH, given.permutation, MANY, weights_TK, None, config)
    assert h_NH[num_rows:].isnan().all()
    assert a_NI[num_rows:].isnan().all()
    tokens = eager.gather_rows(given.x_TP, given.permutation)[:num_rows].double().split(rows)
    right = torch.cat([x @ b for x, b in zip(tokens, b_LDH.double(), strict=True)])
    assert_sums(h_NH[None, :num_rows], right[None], dtype)
    activated = eager.activate(h_NH[:num_rows].double(), given.permutation.cut(num_rows), weights_TK, None, config)
    assert_sums(a_NI[None, :num_rows], activated[None], dtype)
    for _ in range(3):
        again = hopper.kept_and_activated(given.x_TP, b_LDH, given.permutation, MANY, weights_TK, None, config)
        assert torch.equal(again[0][:num_rows], h_NH[:num_rows])
        assert torch.equal(again[1][:num_rows], a_NI[:num_rows])


@in_every_case
def test_the_gradients_of_the_activation_are_those_of_two_kernels(
    rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, hopper: Any
) -> None:
    config, given = swiglu(rows, widths, dtype), Grouped(rows, widths, dtype)
    (dim, inter), num_rows, generator = widths, sum(rows), torch.Generator().manual_seed(1)
    b_LID = (torch.randn(len(rows), inter, dim, generator=generator) * dim**-0.5).to("cuda", dtype)
    weights_TK = torch.rand(given.x_TP.shape[0], 1, generator=generator).cuda()
    h_NH = torch.randn(num_rows + 70, 2 * inter, generator=generator).to("cuda", dtype)
    h_NH[num_rows:] = torch.nan
    grad_h = h_NH.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        found = hopper.activated_back(given.x_TP, b_LID, grad_h, given.permutation, MANY, weights_TK, None, config)
    a_NI, grad_weights = found
    assert a_NI[num_rows:].isnan().all()
    assert grad_h[num_rows:].isnan().all()
    grad_NI = hopper.gathered_product_back(given.x_TP, b_LID, given.permutation, MANY)
    right = eager.activate_backward(
        h_NH[:num_rows].double(), grad_NI[:num_rows].double(), given.permutation.cut(num_rows), weights_TK.double(),
        None, config, again=True,
    )  # fmt: skip
    assert_sums(grad_h[None, :num_rows], right[0][None], dtype)
    assert_sums(a_NI[None, :num_rows], right[1][None], dtype)
    allowed = 1e-4 * right[2].square().mean().sqrt() + 1e-5 * right[2].abs()
    assert ((grad_weights.double() - right[2]).abs() <= allowed).all()
    for _ in range(3):
        grad_again = h_NH.clone()
        again = hopper.activated_back(given.x_TP, b_LID, grad_again, given.permutation, MANY, weights_TK, None, config)
        assert torch.equal(grad_again[:num_rows], grad_h[:num_rows])
        assert torch.equal(again[0][:num_rows], a_NI[:num_rows])
        assert torch.equal(again[1], grad_weights)


@pytest.mark.gpu
def test_other_activations_and_biases_are_left_to_other_kernels(hopper: Any) -> None:
    given = Grouped((64, 128), (128, 256), BF16)
    b_LDH, weights_TK = torch.ones(2, 128, 512, device="cuda", dtype=BF16), torch.ones(262, 1, device="cuda")
    config = swiglu((64, 128), (128, 256), BF16)
    limited = moe_config(**{**vars(config), "swiglu_limit": 7.0})
    bias_LH, arguments = b_LDH[:, 0], (given.x_TP, b_LDH, given.permutation, MANY, weights_TK)
    assert hopper.kept_and_activated(*arguments, bias_LH, config) is None
    assert hopper.kept_and_activated(*arguments, None, limited) is None
    few = (given.x_TP, b_LDH, given.permutation, 8.0, weights_TK)
    assert hopper.kept_and_activated(*few, None, config) is None


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("inter", [768, 2880])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("back", [False, True])
def test_kernels_compile_for_sm90_without_spilling(
    back: bool, dtype: torch.dtype, inter: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows are stored, and in backward also loaded, 16 bytes at a time."""
    from experts import gemm
    from experts.gemm import lists, products
    from experts.gemm.hopper import finished
    from experts.steps.fused import rows as fused_rows

    monkeypatch.setattr(products, "runs_on_hopper", lambda device, num_rows: True)
    ptx = compile_launches(monkeypatch, tmp_path, lists, products, finished, fused_rows)
    num_rows, k, experts, dim = 512, 8, 128, 2048
    maps = [torch.zeros(num_rows, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    x_TD, weights_TK = torch.zeros(num_rows // k, dim, dtype=dtype), torch.zeros(num_rows // k, k)
    config = moe_config(dtype=dtype, dim=dim, moe_inter_dim=inter)
    if back:
        b_LID, h_NH = (torch.zeros(*shape, dtype=dtype) for shape in ((experts, inter, dim), (num_rows, 2 * inter)))
        assert gemm.activated_back(x_TD, b_LID, h_NH, permutation, MANY, weights_TK, None, config)
    else:
        b_LDH = torch.zeros(experts, dim, 2 * inter, dtype=dtype)
        assert gemm.kept_and_activated(x_TD, b_LDH, permutation, MANY, weights_TK, None, config)
    code = ptx["multiply_and_finish"]
    said = assemble(code, tmp_path)
    assert "wgmma" not in said, "the assembler says that products wait for each other"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    stores, loads = (len(re.findall(rf"{name}\.global\.v4", code)) for name in ("st", "ld"))
    assert (stores, loads) == ((12, 16) if back else (3, 0))  # back: of each of four panels, two parts ahead and now
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code)
    assert max(map(int, waits)) > 0, "a step waits for its own products, and nothing runs meanwhile"
