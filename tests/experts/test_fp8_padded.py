"""Halves that zeros fill up to whole blocks, for libraries that count blocks over both halves.

test_fp8.py runs this file in Triton's interpreter.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.fp8.blocks import E4M3
from tests.experts.compiled import assemble, compile_launches
from tests.experts.layers import BF16, INTERPRETED, moe_config
from tests.experts.test_fp8 import hard_rows, on_every_setup, permutation_of, poisoned_blocks, same

pytest.importorskip("triton")


def filled_up(values: Tensor, halves: int, zeros: int) -> Tensor:
    """Return numbers [..., C] with zeros after each half."""
    parts = values.float().unflatten(-1, (halves, -1))
    return torch.nn.functional.pad(parts, (0, zeros if halves == 2 else 0)).flatten(-2)


@pytest.mark.parametrize("halves", [1, 2])
@on_every_setup
def test_padded_weights_have_zeros_after_each_half(device: str, dtype: torch.dtype, halves: int) -> None:
    """Each of two halves has 208 columns and gets 48 columns of zeros. A single part of 416 columns gets none."""
    from experts.fp8 import quantise

    b_LPQ = torch.stack([hard_rows(144, 416, dtype), hard_rows(144, 416, dtype) * 3]).to(device)
    right = quantise.quantise_weights_back(b_LPQ, halves)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned_blocks)
        forward, back = quantise.quantise_weights_both(b_LPQ, halves, padded=True)
        others = [quantise.transposed(forward, padded=True), quantise.quantise_weights_back(b_LPQ, halves, padded=True)]
    assert same(forward.values, right.values.float().mT)
    for found in (back, *others):
        assert same(found.values, filled_up(right.values, halves, 48))
        assert same(found.scales, right.scales)
        assert (found.q_halves, found.p_halves) == (1, halves)
    turned = quantise.transposed(back, rows=416)
    assert same(turned.values, forward.values)
    assert same(turned.scales, forward.scales)
    assert (turned.q_halves, turned.p_halves) == (halves, 1)
    again = quantise.transposed(quantise.quantise_weights(b_LPQ * 2, halves), back, padded=True)
    assert again is back
    assert same(back.values, filled_up(right.values, halves, 48))
    assert same(back.scales, 2 * right.scales)


@pytest.mark.parametrize("activation", ["swigluoai", "geglu", "relu2", "quick_geglu"])
@on_every_setup
def test_padded_gradients_have_zeros_after_each_half(device: str, dtype: torch.dtype, activation: str) -> None:
    """Only the gradient in FP8 has other places in memory."""
    from experts.fp8.activation import activate_backward

    permutation, inter = permutation_of(9, device), 144
    num_local = int(permutation.offsets_L[-1])
    config = moe_config(n_routed_experts=5, n_activated_experts=3, expert_activation=activation)
    width = inter if activation == "relu2" else 2 * inter
    generator = torch.Generator().manual_seed(5)
    sizes = (27, width), (27, inter), (3, width)
    h_NH, grad_NI, bias_LH = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    given = permutation, torch.rand(9, 3, generator=generator).to(device), bias_LH, config, E4M3
    right, *right_others = activate_backward(h_NH.clone(), grad_NI.clone(), *given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned_blocks)
        found, *others = activate_backward(h_NH.clone(), grad_NI.clone(), *given, padded=True)
    halves = 2 if activation in ("swigluoai", "geglu") else 1
    assert found.halves == halves
    assert same(found.values[:num_local], filled_up(right.values[:num_local], halves, 112))
    assert same(found.scales[:, :num_local], right.scales[:, :num_local])
    for other, right_other in zip(others, right_others, strict=True):
        assert same(other[:num_local], right_other[:num_local])


@pytest.mark.certify
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_kernels_with_padding_compile_for_sm90_without_spilling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from experts.fp8 import activation, quantise

    compiled = compile_launches(monkeypatch, tmp_path, activation, quantise)
    num_rows, experts, dim, inter = 512, 32, 2880, 2880
    permutation = permutation_of(num_rows // 3, "cpu")
    weights = torch.zeros(experts, dim, 2 * inter, dtype=BF16)
    quantise.transposed(quantise.quantise_weights_both(weights, 2, padded=True)[0], padded=True)
    h_NH, grad_NI = torch.zeros(num_rows, 2 * inter, dtype=BF16), torch.zeros(num_rows, inter, dtype=BF16)
    config = moe_config(n_routed_experts=experts, dim=dim, moe_inter_dim=inter, dtype=BF16)
    activation.activate_backward(
        h_NH, grad_NI, permutation, torch.zeros(num_rows // 3, 3), None, config, E4M3, padded=True
    )
    assert compiled.keys() == {"quantise_matrices", "transpose_matrices", "activate_rows_backward"}
    for code in compiled.values():
        assert "0 bytes spill stores, 0 bytes spill loads" in assemble(code, tmp_path)
