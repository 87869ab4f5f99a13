"""The grouped GEMM in Triton: its products in Triton's interpreter and on a GPU, and its code for an H200.

As in test_fused_steps.py, the interpreter needs its own process. It truncates to bfloat16, so only the tests on a GPU
use bfloat16.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import MoEConfig
from experts.engines import get_engine
from experts.steps import Permutation, eager
from tests import interpreter
from tests.experts.compiled import compile_launches
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRETED,
    Batch,
    assert_near,
    expected,
    layer,
    misaligned,
    moe_config,
    poisoned,
    random_batch,
    random_parameters,
    run,
)

pytest.importorskip("triton")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")
LAYERS = "triton-cpu-float16"
ACTIVATIONS = ("swiglu", "quick_geglu", "swigluoai", "geglu", "relu2")


def setups(*dtypes: torch.dtype, device: str) -> list[Any]:
    mark = pytest.mark.gpu if device == "cuda" else in_interpreter
    return [pytest.param(device, dtype, id=f"{device}-{dtype}", marks=mark) for dtype in dtypes]


on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"), setups(F32, F16, device="cpu") + setups(F16, BF16, device="cuda")
)
on_every_layer = pytest.mark.parametrize(
    ("device", "dtype"), setups(F16, device="cpu") + setups(F16, BF16, device="cuda")
)
bias_or_not = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


#: Tests that run in the interpreter: files, which of their tests `make certify` runs, and which `make test` runs.
PARTS = (
    (
        ("test_gemm.py", "test_main_grads.py", "test_few.py", "test_skewed.py"),
        "cpu or main_grads",
        # products with small tiles, activated ones of one plan with all their operands, and main gradients
        (
            "cpu and (float16 and (16x16 or bias-swiglu-before or kernel_adds) or adds_to and memory) or megatron "
            "or few-cpu and (takes_them or quick_geglu) or (few_large or small_and_large) and cpu-float16 "
            "and not geglu"
        ),
    ),
    (
        ("test_corners.py", "test_engines.py", "test_compiled.py", "test_lora.py"),
        f"{LAYERS} and (every_gradient and bias and not geglu or zero_tokens or one_expert or window or compiled)",
        f"{LAYERS} and (every_gradient and quick_geglu-bias or zero_tokens or window and 1+4-bias or any_number)",
    ),
    (("test_lora.py",), "triton", "scale_times_a_b and 3-triton"),
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
    """Rows of experts 1 to 3 of 5; expert 2 has none. Tokens and weights without a local expert are NaN."""

    def __init__(self, device: str, dtype: torch.dtype, **fields: Any) -> None:
        small = device == "cpu"
        num_tokens, dim, inter = (23, 40, 24) if small else (700, 328, 200)
        fields = {"n_routed_experts": 5, "n_activated_experts": 3, "dim": dim, "moe_inter_dim": inter, **fields}
        self.config = moe_config(**fields)
        self.generator = torch.Generator().manual_seed(4)
        self.device, self.dtype = device, dtype
        indices_TK = torch.randint(-1, 5, (num_tokens, 3), generator=self.generator)
        indices_TK[indices_TK == 2] = 1
        self.permutation = eager.sort_by_expert(indices_TK.to(device), 1, 3)
        self.num_local = int(self.permutation.offsets_L[-1])
        assert 0 < self.num_local < indices_TK.numel()
        width = inter * (1 if self.config.expert_activation == "relu2" else 2)
        self.x_TD = self.random(num_tokens, dim)
        self.x_TD[~self.permutation.is_local_TK.any(dim=1)] = torch.nan
        self.b_LDH = self.random(3, dim, width) / dim**0.5
        self.bias_LH = self.random(3, width)
        self.weights_TK = self.random(num_tokens, 3).float()
        self.weights_TK[~self.permutation.is_local_TK] = torch.nan

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def right_h(self) -> Tensor:
        """Return the up projection of the local rows in float64."""
        x_ND = eager.gather_rows(self.x_TD.double(), self.permutation)
        groups = torch.tensor_split(x_ND, self.permutation.offsets_L.tolist())
        return torch.cat([rows @ b for rows, b in zip(groups, self.b_LDH.double(), strict=False)])

    def assert_near(self, found: Tensor, exact: Tensor) -> None:
        """Allow sums in float32 and one rounding."""
        size = exact.square().mean().sqrt()
        eps = torch.finfo(self.dtype).eps
        allowed = eps * exact.abs() + (4e-6 if self.dtype is F32 else eps / 64) * size
        assert found[: self.num_local].dtype is self.dtype
        worst = ((found[: self.num_local].double() - exact).abs() / allowed).max()
        assert worst <= 1, f"{worst:.2f} times what rounding explains"


@pytest.fixture(params=[False, True], ids=["one-program-per-tile", "listed"])
def listed(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture(params=[(16, 16, 16), (32, 64, 32)], ids=["16x16", "32x64"])
def tiles(request: pytest.FixtureRequest, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set tile sizes. Some divide a group, its columns and the length of the sum; others do not."""
    from experts.gemm import tiling

    of_these = tiling.Tiling(*request.param, stages=2, warps=4, listed=listed)
    monkeypatch.setattr(tiling, "tiling_for", lambda rows_per_expert, pairs: of_these)


@on_every_setup
@pytest.mark.usefixtures("tiles")
def test_products_are_right_and_write_only_their_rows(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile that writes past its group races with the next group. Past the last group, such a write is visible."""
    from experts import gemm

    given = Given(device, dtype)
    right = given.right_h()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        gathered = gemm.gathered_product(given.x_TD, given.b_LDH, given.permutation, 9.0)
    given.assert_near(gathered, right)
    assert gathered[given.num_local :].isnan().all()
    x_ND = eager.gather_rows(given.x_TD, given.permutation)
    x_ND[given.num_local :] = torch.nan
    given.assert_near(gemm.product(x_ND, given.b_LDH, given.permutation, 9.0), right)
    strided = given.b_LDH.transpose(1, 2).contiguous().transpose(1, 2)
    given.assert_near(gemm.product(x_ND, strided, given.permutation, 9.0), right)
    given.assert_near(gemm.product(misaligned(x_ND), misaligned(given.b_LDH), given.permutation, 9.0), right)
    b_LHD = given.b_LDH.transpose(1, 2).contiguous()
    given.assert_near(gemm.product_back(x_ND, b_LHD, given.permutation, 9.0), right)
    given.assert_near(gemm.gathered_product_back(given.x_TD, b_LHD, given.permutation, 9.0), right)


@on_every_setup
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("looked_up", ["weights", "bias", "both"])
def test_an_activated_product_is_the_activation_of_the_product(
    device: str, dtype: torch.dtype, looked_up: str, activation: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts import gemm
    from experts.gemm import tiling

    of_these = tiling.Tiling(16, 16, 32, stages=2, warps=4, listed=listed)
    monkeypatch.setattr(tiling, "tiling_for", lambda rows_per_expert, pairs: of_these)
    given = Given(device, dtype, expert_activation=activation, swiglu_limit=1.0, activation_limit=1.0)
    bias_LH = None if looked_up == "weights" else given.bias_LH
    weights_TK = None if looked_up == "bias" else given.weights_TK
    exactly = [None if tensor is None else tensor.double() for tensor in (weights_TK, bias_LH)]
    right = eager.activate(given.right_h(), given.permutation.cut(given.num_local), *exactly, given.config)
    given.assert_near(
        gemm.activated_product(given.x_TD, given.b_LDH, given.permutation, 9.0, weights_TK, bias_LH, given.config),
        right,
    )


@on_every_layer
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@bias_or_not
def test_a_layer_without_gradients_is_right(
    device: str, dtype: torch.dtype, bias: bool, activation: str, after: bool
) -> None:
    """Without gradients, the kernel of the up projection also activates.

    Covers masked tokens, −1, one expert twice and an expert without tokens.
    """
    fields = {"expert_bias": bias, "expert_activation": activation, "apply_router_weight_after_down": after}
    config = moe_config(dtype=dtype, **fields)
    batch = random_batch(config, indices=[[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2], [3, 2]])
    batch.token_mask[2] = False
    parameters = random_parameters(config)
    right = {"output": expected(config, parameters, batch)["output"]}
    assert_near({"output": output_of("triton", config, batch, device)}, right, dtype)


def output_of(engine: str, config: MoEConfig, batch: Batch, device: str) -> Tensor:
    made = layer(engine, config, device=device)
    on_device = batch.map(lambda tensor: tensor.to(device))
    with torch.no_grad():
        output: Tensor = made(on_device.x, on_device.token_mask, on_device.weights, on_device.indices)
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 100, 3000])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu"])
@bias_or_not
def test_every_tiling_is_right_on_a_gpu(bias: bool, activation: str, num_tokens: int) -> None:
    """Compare with float64 on the CPU, without and with gradients. Each number of tokens uses another tiling."""
    sizes = {"n_routed_experts": 8, "n_activated_experts": 3, "dim": 264, "moe_inter_dim": 136}
    config = moe_config(dtype=BF16, expert_bias=bias, expert_activation=activation, **sizes)
    batch = random_batch(config, num_tokens)
    in_float64 = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    right = run(layer("loop", config.with_dtype(F64), random_parameters(config)), in_float64)
    made = layer("triton", config, device="cuda")
    for _ in range(2):
        assert_near({"output": output_of("triton", config, batch, "cuda")}, {"output": right["output"]}, BF16)
        assert_near(run(made, batch), right, BF16)


def test_tilings_grow_with_the_rows() -> None:
    from experts.gemm.tiling import tiling_for

    for pairs in (False, True):
        heights = [tiling_for(rows, pairs).rows for rows in (0.1, 8, 16, 64, 1024)]
        assert heights == sorted(heights)
        assert (heights[0], heights[-1]) == (16, 128)


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("rows_per_expert", [4, 20, 50, 1000])
def test_products_compile_for_sm90_with_wide_copies(
    rows_per_expert: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They use tensor cores, and those of Hopper in tiles of at least 64 rows.

    Weights come through the tensor memory accelerator, tokens by copies of 16 bytes.
    """
    from experts import gemm
    from experts.gemm import lists, products, tiling

    ptx = compile_launches(monkeypatch, tmp_path, lists, products)
    listed = tiling.tiling_for(rows_per_expert, pairs=True).listed
    tokens, k, experts, dim, inter = 64, 8, 128, 2048, 768
    maps = [torch.zeros(tokens * k, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    x_TD, a_NI = torch.zeros(tokens, dim, dtype=BF16), torch.zeros(tokens * k, inter, dtype=BF16)
    weights_TK = torch.zeros(tokens, k)

    def check(gathers: bool) -> None:
        code = ptx.pop("grouped_gemm")
        assert (ptx.pop("list_tiles", None) is not None) == listed
        assert ("wgmma.mma_async" in code, "mma.sync" in code) == (rows_per_expert > 24, rows_per_expert <= 24)
        assert "cp.async.bulk.tensor.3d" in code
        assert ("cp.async.cg.shared.global" in code) == gathers
        assert not re.search(r"cp\.async\.ca|st\.global(\.\w+)*\.[bu]16\b", code), "it moves less than 16 bytes"
        # a product must not wait for the one before it, so that the next operands are fetched meanwhile
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code)
        assert waits == [] or max(map(int, waits)) > 0

    for activation in ("swiglu", "quick_geglu"):
        config = moe_config(dim=dim, moe_inter_dim=inter, expert_activation=activation, dtype=BF16)
        up, bias_LH = torch.zeros(experts, dim, 2 * inter, dtype=BF16), torch.zeros(experts, 2 * inter, dtype=BF16)
        gemm.activated_product(x_TD, up, permutation, rows_per_expert, weights_TK, bias_LH, config)
        check(gathers=True)
    down = torch.zeros(experts, inter, dim, dtype=BF16)
    gemm.product(a_NI, down, permutation, rows_per_expert)
    check(gathers=False)
    gemm.product_back(torch.zeros(tokens * k, dim, dtype=BF16), down, permutation, rows_per_expert)
    check(gathers=False)
    gemm.gathered_product_back(x_TD, down, permutation, rows_per_expert)
    check(gathers=True)
    gemm.gathered_product(x_TD, up, permutation, rows_per_expert)
    check(gathers=True)


REFUSALS = [
    ("cpu", {"dtype": BF16}, "the triton engine needs a CUDA GPU, the device is cpu; use torch_mm"),
    ("cuda", {"dtype": F32}, "the triton engine takes bfloat16 and float16, which"),
    ("cuda", {"dtype": F64}, "not float64; use torch_mm or the loop"),
    ("cuda", {"dtype": BF16, "dim": 12}, "the triton engine takes rows that are a multiple of 16 bytes, but dim = 12"),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter supports the CPU")
@pytest.mark.parametrize(("device", "fields", "fact"), REFUSALS, ids=[fact for *_, fact in REFUSALS])
def test_unsupported_gives_the_reason(
    device: str, fields: dict[str, Any], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = get_engine("triton").unsupported(torch.device(device), moe_config(**fields))
    assert reason is not None
    assert fact in reason.reason
    assert "\n" not in reason.reason


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ((7, 5), "the triton engine needs SM80, this is SM75; use torch_mm"),
        ((12, 0), "the triton engine's tiles do not fit the shared memory of SM120; use torch_mm"),
    ],
)
def test_other_gpus_are_refused(capability: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = get_engine("triton").unsupported(torch.device("cuda"), None)
    assert reason is not None
    assert reason.reason == why
