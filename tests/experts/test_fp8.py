"""The FP8 kernels: the format's values, products and activations, in Triton's interpreter and on a GPU.

What is right follows from the definition of the format. As in test_gemm.py, the interpreter needs its own process and
float16. Its conversion to FP8 is wrong where it must round, so the kernels round before (`to_fp8`).
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.fp8.blocks import E4M3, E5M2, Matrices, Rows
from experts.steps import Permutation, eager
from tests.experts.compiled import compile_launches
from tests.experts.layers import BF16, F16, F32, INTERPRETED, moe_config, poisoned

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")
on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, id="cpu-float16", marks=in_interpreter),
        pytest.param("cuda", BF16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)
on_every_format = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
@pytest.mark.certify
@pytest.mark.timeout(600)
def test_in_tritons_interpreter(certify: bool) -> None:
    part = "cpu and (rows_have or turned or outer or 16-rows-forward-1 or swiglu-e4m3 or told or tokens"
    part += " or padded_weights or (padded_gradients and swigluoai)"
    part += " or (near_the_emulation and swiglu-partial) or (same_bits and memory)"
    part += " or after_a_capture or not_written or train-True or (refuses and memory))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EXPERTS_STEPS": "fused", "PYTHONPATH": str(ROOT)}
    quiet = ["-W", "ignore:invalid value encountered:RuntimeWarning", "-W", "ignore:overflow:RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--timeout", "0", *quiet]
    command += ["tests/experts/test_fp8.py", "tests/experts/test_triton_fp8.py"]
    command += ["tests/experts/test_fp8_rows.py", "tests/experts/test_fp8_turned.py"]
    command += [f"tests/experts/test_fp8_{name}.py" for name in ("padded", "memory", "cache")]
    command += ["tests/experts/test_deep_gemm_fp8.py", "-k", f"{'cpu' if certify else part} or takes_no_more"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# the format


def quantised(block: Tensor, fmt: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a block in FP8 and its scale, by the definition: the largest magnitude becomes the largest number."""
    scale = (block.abs().max() / torch.finfo(fmt).max).clamp(min=2.0**-126)
    return (block * (1 / scale)).clamp(-torch.finfo(fmt).max, torch.finfo(fmt).max).to(fmt), scale


def cuts(width: int, halves: int) -> list[slice]:
    """Return the columns of each block of a row."""
    part = width // halves
    starts = (half * part + start for half in range(halves) for start in range(0, part, 128))
    return [slice(start, min(start + 128, (start // part + 1) * part)) for start in starts]


def right_rows(rows_NC: Tensor, fmt: torch.dtype = E4M3, halves: int = 1) -> tuple[Tensor, Tensor]:
    """Return the values [N, C] in FP8, and the scales [blocks, N]."""
    found = [[quantised(row[cut], fmt) for cut in cuts(rows_NC.shape[1], halves)] for row in rows_NC.float()]
    values = torch.stack([torch.cat([value for value, _ in row]) for row in found])
    return values, torch.stack([torch.stack([scale for _, scale in row]) for row in found], dim=1)


def exact_rows(rows: Rows) -> Tensor:
    """Return the values times their scales, [N, C] in float64."""
    exact = rows.values.double()
    for cut, scales_N in zip(cuts(exact.shape[1], rows.halves), rows.scales.double(), strict=True):
        exact[:, cut] *= scales_N[:, None]
    return exact


def exact_matrices(matrices: Matrices) -> Tensor:
    """Return the values times their scales, [L, Q, P] in float64."""
    exact = matrices.values.double()
    for i, rows in enumerate(cuts(exact.shape[1], matrices.q_halves)):
        for j, columns in enumerate(cuts(exact.shape[2], matrices.p_halves)):
            exact[:, rows, columns] *= matrices.scales[:, i, j].double()[:, None, None]
    return exact


def same(found: Tensor, right: Tensor) -> bool:
    return found.shape == right.shape and torch.equal(found.cpu().float(), right.cpu().float())


def hard_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows with blocks of zeros, of tiny and of large values, and with one large value among small ones."""
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(2))
    rows[0, :128] = 0
    rows[1] *= 1e-6
    rows[2] *= 1e3
    rows[3, 5] = 1e4
    rows[4] = 0
    return rows.to(dtype)


def permutation_of(num_tokens: int, device: str, k: int = 3) -> Permutation:
    """Return rows of experts 1 to 3 of 5; expert 2 has none, and some choices are of nobody."""
    indices_TK = torch.randint(-1, 5, (num_tokens, k), generator=torch.Generator().manual_seed(4))
    indices_TK[indices_TK == 2] = 1
    return eager.sort_by_expert(indices_TK.to(device), 1, 3)


@on_every_format
@on_every_setup
def test_rows_have_a_scale_for_128_values(device: str, dtype: torch.dtype, fmt: torch.dtype) -> None:
    from experts.fp8 import quantise

    x_TD = hard_rows(9, 208, dtype)
    values, scales = right_rows(x_TD, fmt)
    found = quantise.quantise_tokens(x_TD.to(device), fmt)
    assert found.values.dtype is fmt
    assert same(found.values, values)
    torch.testing.assert_close(found.scales.cpu(), scales, rtol=1e-6, atol=0)
    permutation = permutation_of(9, device)
    num_local, tokens_N = int(permutation.offsets_L[-1]), permutation.row_to_token_N.cpu()
    x_TD[~permutation.is_local_TK.any(dim=1).cpu()] = torch.nan  # is not read
    gathered = quantise.quantise_and_gather(x_TD.to(device), permutation, fmt)
    assert same(gathered.values[:num_local], values[tokens_N[:num_local]])
    assert same(gathered.scales[:, :num_local], found.scales[:, tokens_N[:num_local].to(device)])


@pytest.mark.gpu  # the interpreter's conversion knows no infinity
def test_infinity_and_nan_stay_in_their_block() -> None:
    from experts.fp8 import quantise

    x_TD = torch.ones(2, 256)
    x_TD[0, 3], x_TD[1, 200] = torch.inf, torch.nan
    found = exact_rows(quantise.quantise_tokens(x_TD.to("cuda", BF16))).cpu()
    assert not found[0, 3].isfinite()
    assert found[1, 200].isnan()
    torch.testing.assert_close(found[0, 128:], torch.ones(128).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1, :128], torch.ones(128).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("halves", [1, 2])
@on_every_setup
def test_weights_have_a_scale_for_128_by_128_values(device: str, dtype: torch.dtype, halves: int) -> None:
    from experts.fp8 import quantise

    b_LPQ = torch.stack([hard_rows(144, 416, dtype), torch.zeros(144, 416, dtype=dtype)])
    forward = quantise.quantise_weights(b_LPQ.to(device), halves)
    back = quantise.quantise_weights_back(b_LPQ.to(device), halves)
    for expert, matrix in enumerate(b_LPQ.float()):
        for i, rows in enumerate(cuts(144, 1)):
            for j, columns in enumerate(cuts(416, halves)):
                values, scale = quantised(matrix[rows, columns], E4M3)
                assert same(back.values[expert, rows, columns], values)
                torch.testing.assert_close(back.scales[expert, i, j].cpu(), scale, rtol=1e-6, atol=0)
    assert same(forward.values, back.values.float().mT)
    assert same(forward.scales, back.scales.mT)
    assert (forward.q_halves, forward.p_halves, back.q_halves, back.p_halves) == (halves, 1, 1, halves)


@on_every_setup
def test_turned_weights_are_those_quantised_for_backward(device: str, dtype: torch.dtype) -> None:
    from experts.fp8 import quantise

    b_LPQ = torch.stack([hard_rows(144, 416, dtype), hard_rows(144, 416, dtype) * 3]).to(device)
    turned = quantise.transposed(quantise.quantise_weights(b_LPQ, 2))
    back = quantise.quantise_weights_back(b_LPQ, 2)
    assert same(turned.values, back.values)
    assert same(turned.scales, back.scales)
    assert (turned.q_halves, turned.p_halves) == (back.q_halves, back.p_halves)


# products


def tilings() -> list[Any]:
    from experts.fp8.products import HOPPER, Tiling

    return [
        pytest.param(Tiling(16, 2, 4, listed=False), id="16-rows"),
        pytest.param(Tiling(64, 2, 4), id="64-rows-listed"),
        pytest.param(HOPPER, id="hopper", marks=pytest.mark.gpu),
    ]


@pytest.mark.parametrize("tiling", tilings())
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("halves", [1, 2])
@on_every_format
@on_every_setup
def test_a_product_is_the_sum_of_the_scaled_values(
    device: str, dtype: torch.dtype, fmt: torch.dtype, halves: int, back: bool, tiling: Any
) -> None:
    from experts.fp8 import quantise
    from experts.fp8.products import product

    if tiling.hopper and (device == "cpu" or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("needs a Hopper GPU (SM90)")
    num_tokens, dim, width = (9, 144, 416) if device == "cpu" else (700, 336, 800)
    permutation = permutation_of(num_tokens, device)
    b_LPQ = torch.stack([hard_rows(dim, width, dtype) for _ in range(3)]).to(device)
    matrices = (quantise.quantise_weights_back if back else quantise.quantise_weights)(b_LPQ, halves)
    x = hard_rows(permutation.num_rows, width if back else dim, dtype).to(device)
    whole = quantise.quantise_tokens(x, fmt)
    if back and halves == 2:
        values, scales = right_rows(x.cpu(), fmt, 2)
        whole = Rows(values.to(device), scales.to(device), 2)
    num_local = int(permutation.offsets_L[-1])
    exact, weights = exact_rows(whole), exact_matrices(matrices)
    pairs = [(exact[row], weights[permutation.row_to_expert_N[row]].mT) for row in range(num_local)]
    right = torch.stack([row @ matrix for row, matrix in pairs])
    unsure = torch.stack([uncertainty(row[:, None] * matrix, 0, device) for row, matrix in pairs])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned_blocks)
        found = product(whole, matrices, permutation, 8, F32 if device == "cpu" else dtype, tiling=tiling)
    assert found[num_local:].isnan().all()
    allowed = unsure + right.abs() * torch.finfo(found.dtype).eps
    assert ((found[:num_local].double() - right).abs() <= allowed).all()


def uncertainty(products: Tensor, dim: int, device: str) -> Tensor:
    """Return by how much a sum over a dimension of the products may be wrong.

    Tensor cores cut each of 32 products off about 13 bits below the largest one. The interpreter sums in float32.
    """
    sizes = products.abs()
    if device == "cpu":
        return 1e-5 * sizes.sum(dim)
    return 2.0**-12 * sizes.sum(dim) + 2.0**-8 * sizes.amax(dim)


@on_every_setup
def test_a_product_can_gather_its_tokens(device: str, dtype: torch.dtype) -> None:
    from experts.fp8 import quantise
    from experts.fp8.products import Tiling, product

    permutation = permutation_of(9, device)
    num_local = int(permutation.offsets_L[-1])
    matrices = quantise.quantise_weights(torch.stack([hard_rows(208, 144, dtype) for _ in range(3)]).to(device), 1)
    x_TD = hard_rows(9, 208, dtype).to(device)
    tiling = Tiling(16, 2, 4, listed=False)
    gathered = product(quantise.quantise_tokens(x_TD), matrices, permutation, 8, F16, gather=True, tiling=tiling)
    rows = quantise.quantise_and_gather(x_TD, permutation)
    assert same(gathered[:num_local], product(rows, matrices, permutation, 8, F16, tiling=tiling)[:num_local])


@pytest.mark.parametrize("halves", [1, 2])
@on_every_setup
def test_outer_products_are_the_sums_of_each_experts_rows(device: str, dtype: torch.dtype, halves: int) -> None:
    """Rows are quantised along the rows: a column of the left operand, and 128 columns of the right one, in blocks."""
    from experts.fp8 import gradients, turned

    num_tokens, left_width, right_width = (70, 144, 288) if device == "cpu" else (900, 208, 544)
    permutation = permutation_of(num_tokens, device)
    offsets = [0, *permutation.offsets_L.tolist()]
    x_TD = (hard_rows(num_tokens, left_width, dtype) / 128).to(device)  # so that no sum overflows
    rows_NH = (hard_rows(permutation.num_rows, right_width, dtype) / 128).to(device)
    rows_NH[offsets[-1] :] = torch.nan  # are not read
    blocks = turned.row_blocks(permutation)
    tokens_ND = eager.gather_rows(x_TD, permutation).float().cpu()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned_blocks)
        turned_rows = turned.turn(rows_NH, blocks, permutation, gather=False, by_column=False, halves=halves)
        up = gradients.grad_of_up(x_TD, turned_rows, permutation, blocks, halves)
        by_column = turned.turn(rows_NH, blocks, permutation, gather=False, by_column=True)
        down = gradients.grad_of_down(by_column, x_TD, permutation, blocks)
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start == end:
            assert not up[expert].any()
            assert not down[expert].any()
            continue
        tokens, rows = tokens_ND[start:end], rows_NH[start:end].float().cpu()
        for found, left, right, parts in ((up, tokens, rows, halves), (down, rows, tokens, 1)):
            exact = along_rows(left, [slice(i, i + 1) for i in range(left.shape[1])]).T @ along_rows(
                right, cuts(right.shape[1], parts)
            )
            columns = [uncertainty(left.double() * one[:, None], 0, device) for one in right.double().T]
            allowed = torch.stack(columns, dim=1) + exact.abs() * torch.finfo(found.dtype).eps + 1e-7
            assert ((found[expert].double().cpu() - exact).abs() <= allowed).all()


def along_rows(rows_NC: Tensor, columns: list[slice]) -> Tensor:
    """Return rows [N, C] after quantising blocks of 128 rows and of some columns, in float64."""
    exact = rows_NC.double()
    for cut in columns:
        for start in range(0, rows_NC.shape[0], 128):
            values, scale = quantised(rows_NC[start : start + 128, cut], E4M3)
            exact[start : start + 128, cut] = values.double() * scale.double()
    return exact


def poisoned_blocks(*shape: Any, **options: Any) -> Tensor:
    """Return what `torch.empty` returns, filled with NaN, or with the largest integer; also for FP8."""
    if options["dtype"] in (E4M3, E5M2):
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=options["device"]).view(options["dtype"])
    return poisoned(*shape, **options)


# activations


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "geglu", "swigluoai", "relu2"])
@on_every_setup
def test_activations_quantise_what_they_compute(
    device: str, dtype: torch.dtype, activation: str, fmt: torch.dtype
) -> None:
    from experts.fp8 import activation as fused

    permutation = permutation_of(9, device)
    num_local, inter = int(permutation.offsets_L[-1]), 144
    config = moe_config(n_routed_experts=5, n_activated_experts=3, expert_activation=activation)
    width = inter if activation == "relu2" else 2 * inter
    generator = torch.Generator().manual_seed(5)
    h_NH = torch.randn(27, width, generator=generator).to(device, dtype)
    grad_NI = torch.randn(27, inter, generator=generator).to(device, dtype)
    bias_LH, weights_TK = torch.randn(3, width, generator=generator), torch.rand(9, 3, generator=generator)
    bias_LH, weights_TK = bias_LH.to(device, dtype), weights_TK.to(device)
    given = permutation, weights_TK, bias_LH.float(), config
    right_a_NI = eager.activate(h_NH.float(), *given)[:num_local].cpu()
    found = exact_rows(fused.activate(h_NH, permutation, weights_TK, bias_LH, config))[:num_local].cpu()
    values, scales = right_rows(right_a_NI)
    assert_close_in_fp8(found, exact_rows(Rows(values, scales)), E4M3)
    right_h_NH, _, right_weights_TK = eager.activate_backward(h_NH.float(), grad_NI.float(), *given, again=True)
    rows, grad_h_NH, a_NI, grad_weights_TK = fused.activate_backward(
        h_NH, grad_NI, permutation, weights_TK, bias_LH, config, fmt
    )
    halves = 1 if activation in ("quick_geglu", "relu2") else 2
    assert rows.halves == halves
    values, scales = right_rows(right_h_NH[:num_local].cpu(), fmt, halves)
    exact = exact_rows(Rows(rows.values[:num_local], rows.scales[:, :num_local], halves)).cpu()
    assert_close_in_fp8(exact, exact_rows(Rows(values, scales, halves)), fmt)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad_h_NH[:num_local].cpu().float(), right_h_NH[:num_local].cpu(), rtol=eps, atol=1e-5)
    torch.testing.assert_close(a_NI[:num_local].cpu().float(), right_a_NI, rtol=eps, atol=1e-5)
    torch.testing.assert_close(grad_weights_TK, right_weights_TK, rtol=1e-5, atol=1e-5)


def assert_close_in_fp8(found: Tensor, right: Tensor, fmt: torch.dtype) -> None:
    """Nearly all values are the same; a value between two numbers may go to the other one."""
    near = (found - right).abs() <= 1e-5 * right.abs() + 1e-9
    assert near.float().mean() > 0.99
    step = torch.finfo(fmt).eps
    assert ((found - right).abs() <= step * right.abs() + step * right.abs().max() / torch.finfo(fmt).max).all()


# code for an H200


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("which", ["product", "outer", "quantise", "activate"])
def test_kernels_compile_for_sm90(which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products use tensor cores in FP8, with tiles from the TMA; the other kernels move 16 bytes at a time."""
    from experts.fp8 import activation, gradients, products, quantise, turned
    from experts.gemm import lists

    for module in (gradients, products):
        monkeypatch.setattr(module, "runs_on_hopper", lambda device, num_rows: True)
    importlib.import_module("experts.fp8.hopper")
    modules = [sys.modules[f"experts.fp8.hopper.{name}"] for name in ("outer", "rows")]
    ptx = compile_launches(monkeypatch, tmp_path, *modules, activation, gradients, lists, products, quantise, turned)
    num_rows, k, experts, dim, inter = 512, 8, 128, 2048, 768
    maps = [torch.zeros(num_rows, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    x_TD, h_NH = torch.zeros(num_rows // k, dim, dtype=BF16), torch.zeros(num_rows, 2 * inter, dtype=BF16)
    a_NI, weights_TK = torch.zeros(num_rows, inter, dtype=BF16), torch.zeros(num_rows // k, k)
    config = moe_config(n_routed_experts=experts, dim=dim, moe_inter_dim=inter, dtype=BF16)
    if which == "product":
        up = quantise.quantise_weights(torch.zeros(experts, dim, 2 * inter, dtype=BF16), 2)
        products.product(quantise.quantise_and_gather(x_TD, permutation), up, permutation, 1000.0, BF16)
    elif which == "outer":
        blocks = turned.row_blocks(permutation)
        right = turned.turn(h_NH, blocks, permutation, gather=False, by_column=False, halves=2)
        gradients.grad_of_up(x_TD, right, permutation, blocks, 2)
    elif which == "quantise":
        quantise.transposed(quantise.quantise_weights(torch.zeros(experts, dim, 2 * inter, dtype=BF16), 2))
        quantise.quantise_and_gather(x_TD, permutation)
    else:
        activation.activate(h_NH, permutation, weights_TK, None, config)
        activation.activate_backward(h_NH, a_NI, permutation, weights_TK, None, config, E4M3)
    for name, code in ptx.items():
        if name in ("multiply_fp8", "outer_fp8"):
            assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in code
            assert "cp.async.bulk.tensor" in code
        elif name not in ("list_tiles", "count_blocks"):
            assert re.search(r"ld\.global\.\S*v4", code), name
        assert not re.search(r"(st|ld)\.local", code), name
