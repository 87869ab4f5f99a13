"""The kernel that quantises weights in both layouts, and the code of the kernels that transpose while they quantise.

test_fp8.py runs this file in Triton's interpreter.
"""

import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.fp8.blocks import E4M3, E5M2
from experts.steps import Permutation, eager
from tests.experts.compiled import assemble, compile_launches
from tests.experts.layers import BF16, F16, INTERPRETED, moe_config
from tests.experts.test_fp8 import exact_matrices, exact_rows, hard_rows, on_every_setup, permutation_of, same

pytest.importorskip("triton")
importlib.import_module("experts.fp8.hopper")


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
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_one_kernel_gives_what_the_activation_and_then_the_transposition_give(fmt: torch.dtype, padded: bool) -> None:
    """Its sigmoid has other last bits, and it rounds the gradients to 16 bits before it finds the scales of rows."""
    from experts.fp8 import activation, turned

    for num_tokens, inter in ((1, 16), (130, 208), (900, 2880)):
        permutation = permutation_of(num_tokens, "cuda")
        blocks, num_local = turned.row_blocks(permutation), int(permutation.offsets_L[-1])
        num_blocks = int(blocks.listed[0])
        config = moe_config(n_routed_experts=5, dim=4096, moe_inter_dim=inter, dtype=BF16)
        h_NH = (hard_rows(permutation.num_rows + 5, 2 * inter, BF16)[: permutation.num_rows] / 64).cuda()
        grad_NI = torch.randn(permutation.num_rows, inter, device="cuda", dtype=BF16)
        h_NH[num_local:], grad_NI[num_local:] = torch.nan, torch.nan  # are not read
        weights_TK = torch.rand(3, num_tokens, device="cuda").T  # in columns
        given = permutation, weights_TK, None, config, fmt, padded
        made = [activation.activate_backward_turned(h_NH, grad_NI, *given, blocks) for _ in range(2)]
        if made[0] is None:
            pytest.skip("needs a Hopper GPU (SM90)")
        right, right_h_NH, right_a_NI, right_weights = activation.activate_backward(h_NH, grad_NI, *given)
        right_h = turned.turn(right_h_NH, blocks, permutation, gather=False, by_column=False, halves=2, dtype=fmt)
        right_a = turned.turn(right_a_NI, blocks, permutation, gather=False, by_column=True)
        bits = []
        for rows, turned_h, turned_a, grad_weights in filter(None, made):
            values, right_values = (one.values[:num_local].view(num_local, 2, -1).float() for one in (rows, right))
            assert (values[:, :, inter:] == 0).all()
            for half, right_half, scale, right_scale in zip(
                *(values.unbind(1), right_values.unbind(1)),
                *(one.scales[:, :num_local].chunk(2) for one in (rows, right)),
                strict=True,
            ):
                by, right_by = (s.repeat_interleave(128, dim=0)[:inter].T for s in (scale, right_scale))
                expected = right_half[:, :inter] * right_by
                # at most the next number of the format, with a scale that differs in the last bit of 16
                step = 1.05 * torch.finfo(fmt).eps * expected.abs() + torch.finfo(fmt).smallest_normal * right_by
                assert ((half[:, :inter] * by - expected).abs() <= step).all()
            for found, right_turned in ((turned_h, right_h), (turned_a, right_a)):
                found_bytes, right_bytes = (one.values[:num_blocks].view(torch.uint8) for one in (found, right_turned))
                assert (found_bytes == right_bytes).float().mean() > 0.99
                torch.testing.assert_close(
                    found.scales[:num_blocks], right_turned.scales[:num_blocks], rtol=0.01, atol=0
                )
            torch.testing.assert_close(grad_weights, right_weights, rtol=1e-4, atol=1e-4)
            parts = (
                rows.values[:num_local],
                rows.scales[:, :num_local],
                *vars(turned_h).values(),
                *vars(turned_a).values(),
            )
            bits.append(
                [part[: part.shape[0] if i < 2 else num_blocks].view(torch.uint8) for i, part in enumerate(parts)]
            )
        assert all(map(torch.equal, *bits))


def test_other_cases_are_left_to_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other activations, biases, other dtypes, and rows that need more memory than the gradients of the weights."""
    from experts.fp8 import activation, turned

    monkeypatch.setattr(activation, "runs_on_hopper", lambda device, num_rows: True)
    monkeypatch.setattr(sys.modules["experts.fp8.hopper.turned_activation"], "launch", lambda *_, **__: None)
    permutation = permutation_of(9, "cpu")
    blocks = turned.RowBlocks(permutation.offsets_L, permutation.offsets_L, 3)

    def grad_weights(name: str = "swiglu", dtype: torch.dtype = BF16, bias: bool = False, dim: int = 64) -> Any:
        h_NH, grad_NI = (torch.zeros(permutation.num_rows, width, dtype=dtype) for width in (32, 16))
        config = moe_config(n_routed_experts=5, dim=dim, moe_inter_dim=16, expert_activation=name, dtype=dtype)
        given = permutation, torch.rand(3, 9).T, h_NH[:3] if bias else None, config, E4M3, False, blocks
        made = activation.activate_backward_turned(h_NH, grad_NI, *given)
        return None if made is None else made[3]

    found = grad_weights()
    assert found.shape == (9, 3)
    assert found.is_contiguous(), "the kernel writes to slots of rows, also if the weights are stored in columns"
    assert not found.any()
    for name in ("swigluoai", "quick_geglu", "geglu", "relu2"):
        assert grad_weights(name) is None
    assert grad_weights(dtype=F16) is grad_weights(bias=True) is grad_weights(dim=16) is None


@pytest.mark.gpu
def test_every_tile_of_many_is_computed_once() -> None:
    """There are several rounds of tiles, and the last one is not full. The last tile of an expert has fewer rows."""
    from experts.fp8 import gradients, products, quantise, turned

    indices_TK = torch.rand(3000, 16, generator=torch.Generator().manual_seed(1)).topk(4).indices.cuda()
    indices_TK[indices_TK == 3] = -1
    permutation = eager.sort_by_expert(indices_TK, 0, 16)
    x_TD = torch.randn(3000, 1168, device="cuda", dtype=BF16)
    matrices = quantise.quantise_weights(torch.randn(16, 1168, 1680, device="cuda", dtype=BF16), 2)
    rows = quantise.quantise_and_gather(x_TD, permutation)
    found = products.product(rows, matrices, permutation, 750.0, BF16)
    exact, weights = exact_rows(rows), exact_matrices(matrices)
    for expert, (start, end) in enumerate(itertools.pairwise([0, *permutation.offsets_L.tolist()])):
        right = exact[start:end] @ weights[expert].mT
        assert (found[start:end].double() - right).norm() <= 0.003 * right.norm(), expert
    h_NH, blocks = torch.randn(permutation.num_rows, 544, device="cuda", dtype=BF16), turned.row_blocks(permutation)
    turned_h = turned.turn(h_NH, blocks, permutation, gather=False, by_column=False, halves=2)
    grads = gradients.grad_of_up(x_TD, turned_h, permutation, blocks, 2).float()
    tokens_ND = eager.gather_rows(x_TD, permutation).float()
    for expert, (start, end) in enumerate(itertools.pairwise([0, *permutation.offsets_L.tolist()])):
        right = tokens_ND[start:end].T @ h_NH[start:end].float()
        assert (grads[expert] - right).norm() <= 0.06 * right.norm(), "a tile that is missing is a fifth of the norm"
    again = products.product(rows, matrices, permutation, 750.0, BF16)
    num_local = int(permutation.offsets_L[-1])
    assert torch.equal(again[:num_local], found[:num_local])


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_kernels_for_hopper_transpose_without_spilling(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One loads 16 bytes at a time, and leaves registers for other programs. The other loads with the TMA."""
    from experts.fp8 import activation, turned
    from experts.gemm import lists

    hopper = [sys.modules[f"experts.fp8.hopper.{name}"] for name in ("turned", "turned_activation")]
    for module in (activation, turned):
        monkeypatch.setattr(module, "runs_on_hopper", lambda device, num_rows: True)
    compiled = compile_launches(monkeypatch, tmp_path, *hopper, lists, turned)
    permutation = any_permutation(32)
    blocks = turned.row_blocks(permutation)
    for gather, by_column in ((True, True), (False, False)):
        x = torch.zeros(64 if gather else 512, 2880, dtype=dtype)
        turned.turn(x, blocks, permutation, gather, by_column, halves=1 if gather else 2)
        check_code(compiled["turn_rows"], tmp_path, 128 if by_column else 168)
        assert re.search(r"ld\.global\.v4\.b32", compiled["turn_rows"])
    if dtype == BF16:  # the only one of this kernel
        config = moe_config(n_routed_experts=32, dim=2880, moe_inter_dim=2880, dtype=dtype)
        h_NH, grad_NI = torch.zeros(512, 5760, dtype=dtype), torch.zeros(512, 2880, dtype=dtype)
        given = permutation, torch.rand(64, 8), None, config, E4M3, False, blocks
        activation.activate_backward_turned(h_NH, grad_NI, *given)
        check_code(compiled["turn_gradients"], tmp_path, 128)
        assert "cp.async.bulk.tensor.5d" in compiled["turn_gradients"], "which needs no registers"


def any_permutation(num_experts: int) -> Permutation:
    """Return one of 64 tokens with 8 experts each, for kernels that are only compiled."""
    maps = [torch.zeros(512, dtype=torch.int64) for _ in range(3)]
    return Permutation(*maps, torch.zeros(num_experts, dtype=torch.int32), 8)


def check_code(code: str, folder: Path, most_registers: int) -> None:
    said = assemble(code, folder)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None
    assert int(registers[1]) <= most_registers


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_kernels_compile_for_sm90_without_spilling(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of them load and store 16 bytes at a time, and registers are left for two programs at a time."""
    from experts.fp8 import quantise, turned
    from experts.gemm import lists

    compiled = compile_launches(monkeypatch, tmp_path, lists, quantise, turned)
    num_rows, k, dim, inter = 512, 8, 2048, 2880
    permutation = any_permutation(128)
    blocks = turned.row_blocks(permutation)
    x_TD, h_NH = torch.zeros(num_rows // k, dim, dtype=dtype), torch.zeros(num_rows, 2 * inter, dtype=dtype)

    def check(name: str) -> None:
        for access in ("ld", "st"):
            assert re.search(rf"{access}\.global\.v4\.b32", compiled[name])
        check_code(compiled[name], tmp_path, 128)

    quantise.quantise_weights_both(torch.zeros(2, dim, 2 * inter, dtype=dtype), 2)
    check("quantise_matrices")
    turned.turn(x_TD, blocks, permutation, gather=True, by_column=True)
    check("turn_rows")
    turned.turn(h_NH, blocks, permutation, gather=False, by_column=False, halves=2)
    check("turn_rows")
