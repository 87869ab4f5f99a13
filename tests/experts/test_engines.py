"""The engines: windows of local experts, refusals, unwritten memory, and determinism from run to run."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from experts import InputError, MoEConfig, RegistryError, Unsupported
from experts.compute import ExpertParameters
from experts.engines import engine_names, get_engine
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    Setup,
    assert_near,
    assert_same,
    expected,
    layer,
    moe_config,
    on_cpu_and_gpu,
    on_every_engine,
    on_every_setup,
    random_batch,
    random_parameters,
    run,
)
from tests.experts.oracle import PARAMETERS

CPU = torch.device("cpu")


def test_names_of_the_engines() -> None:
    assert engine_names() == ("loop", "torch_mm", "torch_mm_mxfp8", "triton", "triton_fp8", "deep_gemm_fp8", "gmm")


def test_the_error_for_an_unknown_engine_lists_the_engines() -> None:
    with pytest.raises(RegistryError) as caught:
        get_engine("cutlass")
    assert str(caught.value) == f"there is no engine 'cutlass' here; the engines are {', '.join(engine_names())}"


@on_every_setup
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [(0, 2), (2, 3), (3, 1), (5, 1), (1, 4)], ids=lambda w: f"{w[0]}+{w[1]}")
def test_a_window_of_local_experts_gives_the_part_of_the_oracle(
    setup: Setup, window: tuple[int, int], bias: bool
) -> None:
    """The engine gets only the window's parameters. Choices of experts outside of the window count as −1."""
    first, count = window
    config = setup.config(n_routed_experts=6, n_activated_experts=3, expert_bias=bias)
    batch = random_batch(config, indices=[[5, 0, 3], [1, -1, 2], [4, 3, 5], [0, 0, 1], [3, 3, 2], [2, 5, 4]])
    whole = random_parameters(config)
    local = {name: p[first : first + count].to(setup.device, copy=True).requires_grad_() for name, p in whole.items()}
    x, weights, indices, grad = (
        tensor.to(setup.device, copy=True) for tensor in (batch.x, batch.weights, batch.indices, batch.grad)
    )
    x.requires_grad_()
    weights.requires_grad_()
    stacked = ExpertParameters(*(local.get(name) for name in PARAMETERS))
    output = get_engine(setup.engine).compute(x, weights, indices, stacked, config, first)
    output.backward(grad)

    outside = (batch.indices < first) | (batch.indices >= first + count)
    right = expected(config, whole, batch.with_(indices=batch.indices.masked_fill(outside, -1)))
    right |= {name: right[name][first : first + count] for name in whole}
    found = {"output": output, "x": x.grad, "weights": weights.grad, **{name: p.grad for name, p in local.items()}}
    assert_near(found, right, config.dtype)


def refusal_of_forward(config: MoEConfig, dtype: torch.dtype) -> str:
    """Return the refusal of torch_mm's forward for activations of the dtype. The layer itself can be made."""
    batch = random_batch(config)
    with pytest.raises(Unsupported) as caught:
        layer("torch_mm", config)(batch.x.to(dtype), batch.token_mask, batch.weights, batch.indices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_mm_refuses_float64(device: str) -> None:
    reason = get_engine("torch_mm").unsupported(torch.device(device), moe_config(dtype=F64))
    assert isinstance(reason, Unsupported)
    assert reason.reason == "grouped_mm takes float32, bfloat16 and float16, not float64; use the loop"
    assert refusal_of_forward(moe_config(dtype=F64), F64) == f"torch_mm: {reason.reason}"


UNALIGNED = [
    ({"dim": 18, "dtype": F32}, "dim = 18 in float32 is 72", "multiple of 4"),
    ({"dim": 12, "dtype": BF16}, "dim = 12 in bfloat16 is 24", "multiple of 8"),
    ({"dim": 20, "dtype": F16}, "dim = 20 in float16 is 40", "multiple of 8"),
    ({"moe_inter_dim": 6, "dtype": F32}, "moe_inter_dim = 6 in float32 is 24", "multiple of 4"),
    ({"moe_inter_dim": 3, "dtype": F32}, "2·moe_inter_dim = 6 in float32 is 24", "multiple of 4"),
    ({"moe_inter_dim": 12, "dtype": BF16}, "moe_inter_dim = 12 in bfloat16 is 24", "multiple of 8"),
    ({"moe_inter_dim": 6, "expert_activation": "relu2"}, "but moe_inter_dim = 6 in float32 is 24", "multiple of 4"),
]


@pytest.mark.parametrize(("fields", "fact", "remedy"), UNALIGNED, ids=[fact for _, fact, _ in UNALIGNED])
def test_torch_mm_refuses_rows_that_are_not_whole_16_bytes(fields: dict, fact: str, remedy: str) -> None:
    reason = get_engine("torch_mm").unsupported(CPU, moe_config(**fields))
    assert isinstance(reason, Unsupported)
    for part in ("grouped_mm takes rows that are a multiple of 16 bytes", fact, remedy, "or the loop"):
        assert part in reason.reason
    assert "\n" not in reason.reason
    assert refusal_of_forward(moe_config(**fields), moe_config(**fields).dtype) == f"torch_mm: {reason.reason}"


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": 4, "moe_inter_dim": 4, "dtype": F32},
        {"dim": 8, "moe_inter_dim": 8, "dtype": BF16},
        {"dim": 24, "moe_inter_dim": 8, "dtype": F16},
        {"dim": 8, "moe_inter_dim": 8, "dtype": BF16, "expert_activation": "relu2"},
    ],
    ids=str,
)
@on_every_engine
def test_the_smallest_supported_sizes_run(engine: str, fields: dict) -> None:
    config = moe_config(**fields, expert_bias=True)
    assert get_engine(engine).unsupported(CPU, config) is None
    batch, parameters = random_batch(config), random_parameters(config)
    assert_near(run(layer(engine, config, parameters), batch), expected(config, parameters, batch), config.dtype)


MXFP8_REFUSALS = [
    ("cpu", (10, 0), {}, "MXFP8 needs a CUDA GPU of SM100, the device is cpu; use torch_mm"),
    ("cuda", (9, 0), {}, "MXFP8 needs SM100, this is SM90; use torch_mm"),
    ("cuda", (10, 0), {"dtype": F16}, "torchao's MXFP8 grouped GEMM takes bfloat16, not float16; use torch_mm"),
    ("cuda", (10, 0), {"dim": 48}, "MXFP8 takes multiples of 32, but dim = 48; use torch_mm"),
    ("cuda", (10, 0), {"moe_inter_dim": 48}, "MXFP8 takes multiples of 32, but moe_inter_dim = 48; use torch_mm"),
    ("cuda", (10, 0), {}, None),
]


@pytest.mark.parametrize(("device", "capability", "fields", "reason"), MXFP8_REFUSALS)
def test_torch_mm_mxfp8_gives_the_reason_of_a_refusal(
    device: str, capability: tuple[int, int], fields: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below SM100 it refuses and never computes in another format. On SM100, it checks for torchao last."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    torchao = "torchao.prototype.moe_training.mxfp8_grouped_mm"
    for name in ("torchao", "torchao.prototype", "torchao.prototype.moe_training", torchao):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    config = moe_config(**{"dtype": BF16, "dim": 32, "moe_inter_dim": 32, **fields})
    given = get_engine("torch_mm_mxfp8").unsupported(torch.device(device), config)
    assert (given and given.reason) == reason
    monkeypatch.setitem(sys.modules, torchao, None)
    if device == "cuda" and capability == (10, 0):
        given = get_engine("torch_mm_mxfp8").unsupported(torch.device(device), config)
        assert given.reason.startswith("torchao does not import")
        assert given.reason.endswith("pip install torchao")


def test_torch_mm_mxfp8_can_be_made_anywhere_and_its_forward_refuses() -> None:
    made = layer("torch_mm_mxfp8", moe_config())
    batch = random_batch(made.config)
    with pytest.raises(Unsupported, match=r"^torch_mm_mxfp8: MXFP8 needs a CUDA GPU of SM100, the device is cpu"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_the_loop_refuses_nothing(dtype: torch.dtype) -> None:
    config = moe_config(dtype=dtype, dim=7, moe_inter_dim=3, expert_bias=True)
    assert get_engine("loop").unsupported(CPU, config) is None
    batch, parameters = random_batch(config), random_parameters(config)
    assert_near(run(layer("loop", config, parameters), batch), expected(config, parameters, batch), dtype)


@on_every_engine
def test_without_a_config_unsupported_checks_only_the_device(engine: str) -> None:
    assert get_engine(engine).unsupported(CPU, None) is None


@pytest.mark.parametrize(
    ("activations", "fields", "rule"),
    [
        (F64, {}, "not float64"),
        (BF16, {"dim": 12, "moe_inter_dim": 8}, "dim = 12 in bfloat16 is 24"),
        (F16, {"dim": 8, "moe_inter_dim": 4}, "moe_inter_dim = 4 in float16 is 8"),
    ],
    ids=["float64", "dim", "moe_inter_dim"],
)
def test_activations_that_torch_mm_cannot_take_are_refused(activations: torch.dtype, fields: dict, rule: str) -> None:
    """The parameters are supported. Only the activations are not."""
    assert rule in refusal_of_forward(moe_config(dtype=F32, **fields), activations)


def test_torch_mm_refuses_more_rows_than_int32_offsets_count() -> None:
    config = moe_config()
    x, weights = torch.empty(2**30, config.dim, device="meta"), torch.empty(2**30, 2, device="meta")
    indices = torch.empty(2**30, 2, dtype=torch.int64, device="meta")
    made = random_parameters(config)
    parameters = ExpertParameters(*(made[name].to("meta") if name in made else None for name in PARAMETERS))
    with pytest.raises(InputError, match="2147483648 choices of 1073741824 tokens exceed 2147483647"):
        get_engine("torch_mm").compute(x, weights, indices, parameters, config, 0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Make torch.empty fill its memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_shows_rows_that_grouped_mm_leaves_unwritten() -> None:
    """grouped_mm does not write the rows past its last group. The next test needs this."""
    assert torch.empty(8).isnan().all()
    offsets = torch.tensor([2, 3], dtype=torch.int32)
    rows = torch.nn.functional.grouped_mm(torch.ones(5, 4), torch.ones(2, 4, 4), offs=offsets)
    assert rows.isnan().any(dim=1).tolist() == [False, False, False, True, True]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@on_every_engine
def test_unwritten_memory_changes_nothing(
    engine: str, dtype: torch.dtype, bias: bool, activation: str, after: bool
) -> None:
    """This covers rows past the last group and dW of experts without tokens.

    The layer runs twice, as its memory may be clean the first time.
    """
    config = moe_config(
        dtype=dtype, expert_bias=bias, expert_activation=activation, apply_router_weight_after_down=after
    )
    batch = random_batch(config, indices=[[-1, 0], [2, -1], [0, 2], [2, 0], [-1, -1]])
    batch.token_mask[2] = False
    parameters = random_parameters(config)
    made = layer(engine, config, parameters)
    right = expected(config, parameters, batch)
    first = {name: tensor.clone() for name, tensor in run(made, batch).items()}
    assert_near(first, right, dtype)
    assert_same(run(made, batch), first)


@on_cpu_and_gpu
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_run_gives_the_same_bits(setup: Setup, bias: bool) -> None:
    config = setup.config(n_routed_experts=8, n_activated_experts=4, dim=32, moe_inter_dim=24, expert_bias=bias)
    batch = random_batch(config, num_tokens=300)
    made = setup.layer(config)
    first = {name: tensor.clone() for name, tensor in run(made, batch).items()}
    for _ in range(3):
        assert_same(run(made, batch), first)


@on_every_engine
def test_every_run_gives_the_same_bits_with_one_expert_twice(engine: str) -> None:
    config = moe_config(n_activated_experts=3, expert_bias=True)
    indices = torch.randint(0, 4, (200, 3), generator=torch.Generator().manual_seed(9))
    batch = random_batch(config, indices=indices)
    made = layer(engine, config)
    first = {name: tensor.clone() for name, tensor in run(made, batch).items()}
    assert_same(run(made, batch), first)
    assert_near(first, expected(config, random_parameters(config), batch), F32)
