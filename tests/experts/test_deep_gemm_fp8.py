"""The engine deep_gemm_fp8: with a stand-in for DeepGEMM in Triton's interpreter, and with DeepGEMM on a GPU.

test_fp8.py runs this file in Triton's interpreter.
"""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import BackendConfig, ConfigError, GroupedExperts
from experts.compute import deep_gemm_fp8
from experts.compute.deep_gemm_fp8 import Product, fillers
from experts.config import Save
from experts.engines import get_engine
from experts.fp8.blocks import E4M3, Matrices, Rows, up_halves
from experts.permutation import sort_by_expert
from moebench.parity.quantization import fp8_product
from tests.experts import fake_deep_gemm
from tests.experts.layers import BF16, F16, F32, INTERPRETED, expected, moe_config, run
from tests.experts.test_fp8 import poisoned_blocks
from tests.experts.test_triton_fp8 import errors, some

pytest.importorskip("triton")

RECIPE = "block_float32"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, id="cpu-float16", marks=in_interpreter),
        pytest.param("cuda", BF16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture
def fake_library(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch)


def install_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_deep_gemm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def made(
    device: str,
    config: Any,
    parameters: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    save: Save | None = None,
) -> GroupedExperts:
    """Return a layer with the real library on a GPU, or with its stand-in on a CPU."""
    if device == "cuda":
        pytest.importorskip("deep_gemm")
    else:
        install_fake(monkeypatch)
        monkeypatch.setattr(deep_gemm_fp8, "ENGINE", replace(deep_gemm_fp8.ENGINE, unsupported=lambda *_: None))
    with torch.device(device):
        layer = GroupedExperts(config, BackendConfig(experts="deep_gemm_fp8", save=save))
    layer.load_state_dict(parameters)
    return layer


@pytest.mark.parametrize(
    ("activation", "inter"),
    [("swiglu", 256), ("swiglu", 176), ("swigluoai", 144), ("quick_geglu", 144), ("relu2", 144)],
    ids=["swiglu", "swiglu-partial", "swigluoai-partial", "geglu", "relu2"],
)
@on_every_setup
def test_a_layer_comes_near_the_emulation(
    device: str, dtype: torch.dtype, activation: str, inter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation of the recipe comes far closer to the layer than the exact result does, in every tensor in FP8."""
    config, parameters, batch = some(dtype, activation, moe_inter_dim=inter, n_routed_experts=3)
    layer = made(device, config, parameters, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", poisoned_blocks)
        found = run(layer, batch)
    halved = (config.dim, 2 * inter) if up_halves(config) == 2 else None
    emulated = errors(found, expected(config, parameters, batch, fp8_product(RECIPE, halved)))
    exact = errors(found, expected(config, parameters, batch))
    # a number between two FP8 numbers may go to the other one, as what comes before is rounded to 16 bits
    share = 0.5 if dtype is BF16 else 0.4
    in_fp8 = [name for name in exact if name != "down_proj_bias"]  # the sum of the output's gradients is exact
    assert {name: (emulated[name], exact[name]) for name in in_fp8 if emulated[name] > share * exact[name]} == {}
    assert {name: exact[name] for name in in_fp8 if exact[name] < 0.02} == {}


@on_every_setup
def test_all_ways_to_quantise_halves_with_a_partial_block_give_the_same_numbers(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward transposes the weights, reads what the forward pass wrote, or what a later call wrote, or quantises."""
    config, parameters, batch = some(dtype, "swiglu", dim=80, moe_inter_dim=144, n_routed_experts=3)
    plain = made(device, config, parameters, monkeypatch)
    kept = made(device, config, parameters, monkeypatch, save="time")
    later = made(device, config, parameters, monkeypatch, save="time")
    on_device = batch.map(lambda tensor: tensor.to(device))
    with torch.no_grad():
        later(on_device.x, on_device.token_mask, on_device.weights, on_device.indices)
    uncached = made(device, config, parameters, monkeypatch)
    uncached.weight_cache = None
    right = run(plain, batch)
    for layer in (kept, later, uncached):
        assert {name for name, tensor in run(layer, batch).items() if not torch.equal(tensor, right[name])} == set()
    blocks = 3 * 3 * 2  # gate, up and down of three experts have two each
    forward, back = 3 * 3 * 80 * 144, 3 * (2 * 80 * 256 + 80 * 144)
    assert plain.cached_weight_bytes == back + 4 * blocks
    assert kept.cached_weight_bytes == later.cached_weight_bytes == forward + back + 2 * 4 * blocks


@on_every_setup
def test_without_gradients_the_output_is_the_same(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of this package that multiplies and activates at once is not taken."""
    config, parameters, batch = some(dtype, "swiglu", moe_inter_dim=128, n_routed_experts=3)
    layer = made(device, config, parameters, monkeypatch)
    output = run(layer, batch)["output"]
    on_device = batch.map(lambda tensor: tensor.to(device))
    with torch.no_grad():
        assert torch.equal(layer(on_device.x, on_device.token_mask, on_device.weights, on_device.indices), output)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.gpu
def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    config, parameters, batch = some(BF16)
    layer = made("cuda", config, parameters, monkeypatch)
    run(layer, batch)
    given = batch.map(lambda tensor: tensor.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(given.x, given.token_mask, given.weights, given.indices).backward(given.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(("first", "count"), [(0, 8), (3, 4), (7, 1)])
def test_fillers_make_every_group_a_multiple_of_128_rows(k: int, first: int, count: int) -> None:
    draw = torch.Generator().manual_seed(k)
    indices_TK = torch.randint(-1, 8, (301, k), generator=draw)
    indices_TK[indices_TK == 5] = -1  # an expert without rows
    added_AK = fillers(indices_TK.int(), first, count)
    whole = torch.cat([indices_TK, added_AK])
    before = sort_by_expert(indices_TK, first, count).tokens_per_expert_L
    after = sort_by_expert(whole, first, count).tokens_per_expert_L
    assert after.tolist() == [-(-rows // 128) * 128 for rows in before.tolist()]
    assert whole.numel() % 128 == 0
    assert len(added_AK) == len(fillers(torch.full_like(indices_TK, -1), first, count)), "the shapes alone decide"


def test_fillers_of_no_tokens_choose_nobody() -> None:
    assert set(fillers(torch.empty(0, 2, dtype=torch.int64), 0, 4).flatten().tolist()) == {-1}


@pytest.mark.usefixtures("fake_library")
def test_halves_with_a_partial_block_are_matrices_of_their_own() -> None:
    draw = torch.Generator().manual_seed(1)
    permutation = sort_by_expert(torch.tensor([[0], [1], [2]]).repeat(128, 1), 1, 2)
    rows = Rows(torch.randn(384, 16, generator=draw).to(E4M3), torch.rand(1, 384, generator=draw))
    values, scales = torch.randn(2, 2 * 144, 16, generator=draw).to(E4M3), torch.rand(2, 4, 1, generator=draw)
    out_NQ = Product(permutation)(rows, Matrices(values, scales, q_halves=2), F16)
    by_column = scales.repeat_interleave(torch.tensor([128, 16, 128, 16]), dim=1)
    right = (values.float() * by_column) @ (rows.values.float() * rows.scales.t()).t()
    for expert, of_expert in enumerate((slice(0, 128), slice(128, 256))):
        torch.testing.assert_close(out_NQ[of_expert], right[expert, :, of_expert].t().to(F16))
    assert bool(out_NQ[256:].isnan().all())


@pytest.mark.usefixtures("fake_library")
def test_the_library_skips_rows_past_the_last_group() -> None:
    """The stand-in leaves NaN where the library writes nothing."""
    indices_TK = torch.tensor([[0], [1]]).repeat(128, 1)
    permutation = sort_by_expert(indices_TK, 1, 1)
    rows = Rows(torch.ones(256, 16).to(E4M3), torch.full((1, 256), 3.0))
    matrices = Matrices(torch.ones(1, 32, 16).to(E4M3), torch.full((1, 1, 1), 0.5))
    out_NQ = Product(permutation)(rows, matrices, BF16)
    assert out_NQ.dtype is BF16
    assert out_NQ[:128].unique().tolist() == [16 * 3.0 * 0.5]
    assert bool(out_NQ[128:].isnan().all())


def test_formats_of_fp8_cannot_be_chosen() -> None:
    for option in ({"fp8_gradients": "e5m2"}, {"fp8_weight_gradients": True}):
        with pytest.raises(ConfigError, match="deep_gemm_fp8 cannot choose what is in FP8; use triton_fp8, or leave"):
            GroupedExperts(moe_config(), BackendConfig(experts="deep_gemm_fp8", **option))  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_library")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"dtype": F16}, "DeepGEMM returns bfloat16, not float16"),
        ({"dtype": F32}, "DeepGEMM returns bfloat16, not float32"),
        ({"dim": 40}, "takes multiples of 16, but dim = 40"),
        ({"moe_inter_dim": 2880}, None),
        ({"moe_inter_dim": 2888}, "takes multiples of 16, but moe_inter_dim = 2888"),
    ],
    ids=str,
)
def test_a_layer_that_does_not_fit_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    given = deep_gemm_fp8.unsupported(CUDA, moe_config(**{"dtype": BF16, "dim": 32, "moe_inter_dim": 128, **fields}))
    assert given is None if reason is None else reason in str(given)


@pytest.mark.usefixtures("fake_library")
def test_the_engine_needs_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    unsupported = get_engine("deep_gemm_fp8").unsupported
    assert "needs a CUDA GPU of SM90, the device is cpu" in str(unsupported(CPU, None))
    for capability in ((8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert f"needs SM90, this is SM{capability[0]}{capability[1]}" in str(unsupported(CUDA, None))


@pytest.mark.parametrize("error", [OSError("undefined symbol: x"), RuntimeError("load failed"), AssertionError("nvcc")])
def test_a_library_that_does_not_load_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "deep_gemm":
                raise error

    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Loader(), *sys.meta_path])
    given = str(deep_gemm_fp8.unsupported(CUDA, None))
    assert given.startswith(f"deep_gemm does not import ({error}); pip install 'moebench[deepgemm]'")
