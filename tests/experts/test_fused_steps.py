"""The steps in Triton against the steps in plain torch: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be turned on before triton is imported. The tests in it run in their own process, which
`test_in_tritons_interpreter` starts. The interpreter truncates to bfloat16 while a GPU rounds, so only the tests on a
GPU use bfloat16.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation, Steps, eager
from tests import interpreter
from tests.experts.layers import BF16, F16, F32, F64, INTERPRETED, moe_config

pytest.importorskip("triton")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")


def setups(*dtypes: torch.dtype, device: str) -> list[Any]:
    mark = pytest.mark.gpu if device == "cuda" else in_interpreter
    return [pytest.param(device, dtype, id=f"{device}-{dtype}", marks=mark) for dtype in dtypes]


on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"), setups(F32, F16, device="cpu") + setups(F32, F16, BF16, device="cuda")
)
on_every_device = pytest.mark.parametrize(("device", "dtype"), setups(F32, device="cpu") + setups(F32, device="cuda"))
weights_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
bias_or_not = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


#: Tests that run in the interpreter: files, which of their tests `make certify` runs, and which `make test` runs.
PARTS = (
    (
        ("test_fused_steps.py", "test_exact_sums.py"),
        "cpu and fused",
        # an activation and its backward are one kernel for all dtypes, limits and biases
        "cpu and fused and not (test_activate and (float16 or no-bias))",
    ),
    (  # whole layers, in memory that is filled with NaN
        ("test_corners.py", "test_engines.py"),
        "torch_mm and float32 and (every_gradient or zero_tokens or one_expert or unwritten and swiglu)",
        "torch_mm and float32 and (quick_geglu-bias or zero_tokens or unwritten and bias-swiglu)",
    ),
)


@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
@pytest.mark.certify
@pytest.mark.timeout(600)
def test_in_tritons_interpreter(certify: bool) -> None:
    runs = [
        [*(f"tests/experts/{name}" for name in files), "-k", whole if certify else part] for files, whole, part in PARTS
    ]
    interpreter.assert_passes(*runs, EXPERTS_STEPS="fused")


class Given:
    """Tensors of one size on a device. Rows past the last group and weights of choices that are not local are NaN."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        small = device == "cpu"
        num_tokens, self.k, num_experts, first, self.count = (13, 3, 5, 1, 3) if small else (700, 8, 40, 3, 30)
        self.dim, self.inter = (20, 12) if small else (1544, 360)
        self.generator = torch.Generator().manual_seed(4)
        indices_TK = torch.randint(-1, num_experts, (num_tokens, self.k), generator=self.generator)
        indices_TK[indices_TK == first + 1] = first  # an expert without rows
        self.device, self.dtype = device, dtype
        self.permutation = eager.sort_by_expert(indices_TK.to(device), first, self.count)
        self.num_local = int(self.permutation.offsets_L[-1])
        assert 0 < self.num_local < indices_TK.numel()
        self.x_TD = self.random(num_tokens, self.dim)
        self.y_ND = self.of_rows(self.dim)
        self.bias_LD = self.random(self.count, self.dim)
        self.weights_TK = self.random(num_tokens, self.k).float()
        self.weights_TK[~self.permutation.is_local_TK] = torch.nan

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def of_rows(self, width: int) -> Tensor:
        rows_NC = self.random(self.permutation.num_rows, width)
        rows_NC[self.num_local :] = torch.nan
        return rows_NC


def fused() -> Steps:
    from experts.steps import fused

    return fused


def assert_agree(name: str, given: Given, *arguments: Any, rows: bool, **options: Any) -> None:
    """Check a fused step against the eager step in float64, within one rounding. A second run gives the same bits."""
    results = [_results(getattr(fused(), name)(*_copies(arguments), **options)) for _ in range(2)]
    right = _results(getattr(eager, name)(*_copies(arguments, F64), **options))
    for found, again, exact in zip(*results, right, strict=True):
        if found is None or exact is None:
            assert found is exact
            continue
        end = given.num_local if rows and found.shape[0] == given.permutation.num_rows else None
        found, again, exact = found[:end], again[:end], exact[:end].double()
        assert torch.equal(found, again)
        size = exact.square().mean().sqrt()
        allowed = torch.finfo(found.dtype).eps * exact.abs() + 4e-6 * (size + exact.abs())
        worst = ((found.double() - exact).abs() / allowed).max()
        assert worst <= 1, f"{name}: {worst:.2f} times what rounding explains"


def _results(result: Any) -> tuple[Tensor | None, ...]:
    return result if isinstance(result, tuple) else (result,)


def _copies(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """Copy the arguments, floats in another dtype if it is given. Some steps overwrite their arguments."""
    return [a.to(dtype or a.dtype, copy=True) if isinstance(a, Tensor) else a for a in arguments]


ROUTINGS = [(7, 2, 6, 0, 6), (300, 4, 6, 2, 3), (0, 2, 4, 0, 4), (5, 3, 9, 8, 1), (40, 2, 4, 4, 2), (129, 1, 1, 0, 1)]


@on_every_device
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_sort_by_expert_gives_the_bits_of_eager(device: str, dtype: torch.dtype, routing: tuple[int, ...]) -> None:
    """The dtypes are also the same. Covers several blocks, experts of other ranks, a single expert and no token."""
    num_tokens, k, num_experts, first, count = routing
    indices_TK = torch.randint(-1, num_experts, (num_tokens, k), generator=torch.Generator().manual_seed(3)).to(device)
    assert_same_permutation(indices_TK, first, count)
    assert_same_permutation(indices_TK.int(), first, count)
    assert_same_permutation(indices_TK.t().contiguous().t(), first, count)


@on_every_device
@pytest.mark.parametrize("of_indices", [torch.int64, torch.int8, torch.uint8], ids=str)
def test_mask_choices_gives_the_bits_of_eager(device: str, dtype: torch.dtype, of_indices: torch.dtype) -> None:
    """Covers several programs, no token, strided tensors, and indices of −1 in an unsigned dtype, which are 255."""
    generator = torch.Generator().manual_seed(3)
    for num_tokens, k in ((300, 4), (7, 1), (0, 2)):
        indices_TK = torch.randint(-1, 100, (num_tokens, k), generator=generator).to(of_indices).to(device)
        mask_T = (torch.rand(num_tokens, generator=generator) < 0.5).to(device)
        for given in ((indices_TK, mask_T), (indices_TK.t().contiguous().t(), mask_T[:1].expand(num_tokens))):
            found, right = fused().mask_choices(*given), eager.mask_choices(*given)
            assert found.dtype is torch.int64
            assert torch.equal(found, right)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 128, 512])
def test_sort_by_expert_of_many_tokens_gives_the_bits_of_eager(count: int) -> None:
    indices_TK = torch.randint(-1, 520, (16_384, 8), generator=torch.Generator().manual_seed(3)).cuda()
    assert_same_permutation(indices_TK, 4, count)


def assert_same_permutation(indices_TK: Tensor, first: int, count: int) -> None:
    found = fused().sort_by_expert(indices_TK, first, count)
    right = eager.sort_by_expert(indices_TK, first, count)
    for field in dataclasses.fields(Permutation):
        one, other = getattr(found, field.name), getattr(right, field.name)
        if isinstance(one, Tensor):
            assert one.dtype is other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@on_every_setup
@weights_or_not
def test_gather_rows_agrees_with_eager(device: str, dtype: torch.dtype, weighted: bool) -> None:
    given = Given(device, dtype)
    weights_TK = given.weights_TK if weighted else None
    assert_agree("gather_rows", given, given.x_TD, given.permutation, weights_TK, rows=True)


@on_every_setup
@pytest.mark.parametrize("weigh_rows", [False, True], ids=["before-down", "after-down"])
@bias_or_not
def test_sum_rows_agrees_with_eager(device: str, dtype: torch.dtype, bias: bool, weigh_rows: bool) -> None:
    given = Given(device, dtype)
    bias_LD = given.bias_LD if bias else None
    assert_agree(*("sum_rows", given, given.y_ND, given.permutation, given.weights_TK, bias_LD, weigh_rows), rows=False)


@on_every_setup
@weights_or_not
def test_sum_by_expert_agrees_with_eager(device: str, dtype: torch.dtype, weighted: bool) -> None:
    given = Given(device, dtype)
    weights_TK = given.weights_TK if weighted else None
    assert_agree("sum_by_expert", given, given.y_ND, given.permutation, weights_TK, rows=False)


@on_every_setup
@pytest.mark.parametrize("what", ["rows", "bias", "both"])
def test_dot_rows_agrees_with_eager(device: str, dtype: torch.dtype, what: str) -> None:
    given = Given(device, dtype)
    y_ND = None if what == "bias" else given.y_ND
    bias_LD = None if what == "rows" else given.bias_LD
    assert_agree("dot_rows", given, given.x_TD, given.permutation, y_ND, bias_LD, rows=False)


LIMITED = {"activation_alpha": 1.3, "activation_limit": 0.7, "swiglu_limit": 0.7}


@on_every_setup
@pytest.mark.parametrize("fields", [{}, LIMITED], ids=["wide", "limited"])
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
@weights_or_not
@bias_or_not
def test_activate_and_its_backward_agree_with_eager(
    device: str, dtype: torch.dtype, bias: bool, weighted: bool, activation: str, fields: dict[str, float]
) -> None:
    given = Given(device, dtype)
    config = moe_config(moe_inter_dim=given.inter, expert_activation=activation, **fields)
    width = given.inter * (1 if activation == "relu2" else 2)
    h_NH, grad_NI = given.of_rows(width), given.of_rows(given.inter)
    bias_LH = given.random(given.count, width) if bias else None
    weights_TK = given.weights_TK if weighted else None
    if fields:  # no value is near enough to the limit for rounding in another order to move it across
        h_NH = torch.where((h_NH.abs() - 0.7).abs() < 0.05, torch.ones_like(h_NH), h_NH)
        bias_LH = None if bias_LH is None else torch.zeros_like(bias_LH)
    looked_up = (given.permutation, weights_TK, bias_LH, config)
    assert_agree("activate", given, h_NH, *looked_up, rows=True)
    for again in (False, True):
        assert_agree("activate_backward", given, h_NH, grad_NI, *looked_up, again, rows=True)


@on_every_device
def test_nan_stays_in_its_row(device: str, dtype: torch.dtype) -> None:
    """A clamp or a rectifier that removed the NaN would hide an earlier error."""
    given = Given(device, dtype)
    for activation in ("swigluoai", "quick_geglu", "relu2"):
        config = moe_config(moe_inter_dim=given.inter, expert_activation=activation)
        h_NH = given.of_rows(given.inter * (1 if activation == "relu2" else 2))
        h_NH[1, 0] = torch.nan
        a_NI = fused().activate(h_NH, given.permutation, given.weights_TK, None, config)[: given.num_local]
        assert a_NI.isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.gpu
def test_more_elements_than_int32_can_count_are_right() -> None:
    """The permuted side has more than 2^31 elements. 32-bit offsets would have overflowed in the last rows."""
    num_tokens, k, dim = 2**16 + 8, 8, 4096
    indices_TK = torch.arange(num_tokens * k, device="cuda").view(num_tokens, k) % 16
    permutation = fused().sort_by_expert(indices_TK, 0, 16)
    x_TD = torch.arange(num_tokens, device="cuda").remainder(251).to(BF16).unsqueeze(1).expand(-1, dim).contiguous()
    rows_ND = fused().gather_rows(x_TD, permutation)
    assert rows_ND.numel() > 2**31
    for part in (slice(0, 100), slice(-100, None)):
        assert torch.equal(rows_ND[part], x_TD[permutation.row_to_token_N[part]])
    sums_TD = fused().sum_rows(rows_ND, permutation)
    assert torch.equal(sums_TD[-100:], x_TD[-100:] * k)
    config = moe_config(dim=dim, moe_inter_dim=dim // 2)
    weights_TK = torch.ones(num_tokens, k, device="cuda")
    a_NI = fused().activate(rows_ND, permutation, weights_TK, None, config)
    right_NI = eager.activate(
        rows_ND[-100:],
        dataclasses.replace(
            permutation,
            row_to_slot_N=permutation.row_to_slot_N[-100:],
            row_to_expert_N=permutation.row_to_expert_N[-100:],
        ),
        weights_TK,
        None,
        config,
    )
    torch.testing.assert_close(a_NI[-100:], right_NI)
