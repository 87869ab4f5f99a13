"""Gradients of weights that backward adds to main gradients: the kernels, the layer, and what autograd sees of them.

As in test_gemm.py, the tests on a CPU need Triton's interpreter.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsLoRA, GroupedExpertsTE
from experts.steps import Permutation, eager
from tests.experts.compiled import assemble, compile_launches
from tests.experts.grouped import GROUPS, WIDTHS, Grouped, assert_sums
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    INTERPRETED,
    Batch,
    Named,
    expected,
    misaligned,
    moe_config,
    random_batch,
    random_parameters,
    run,
)

pytest.importorskip("triton")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_gemm.py's test_in_tritons_interpreter")
WEIGHTS = ("gate_and_up_projs", "down_projs")
#: Experts 1 and 4 get no row.
INDICES = [[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2], [0, 3]]
CONFIG = moe_config(n_routed_experts=5, dim=24, moe_inter_dim=16, dtype=F16, expert_bias=True)
Gathered = str | None


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from experts.gemm import accumulation

    for name, size in {"LEFT": 16, "RIGHT": 32, "STEP": 16}.items():
        monkeypatch.setattr(accumulation, name, size)


def check_kernel(given: Grouped, gathered: Gathered, place: Callable[[Tensor], Tensor]) -> None:
    """Compare `add_outer` with float64 sums. `place` puts the gradient into other memory."""
    from experts import gemm

    tokens = eager.gather_rows(given.x_TP, given.permutation)
    left, right = (given.b_NQ, given.x_TP) if gathered == "right" else (given.a_NP, given.b_NQ)
    left = given.x_TP if gathered == "left" else left
    of_left, of_right = (given.b_NQ, tokens) if gathered == "right" else (tokens if gathered else left, given.b_NQ)
    exact = given.right(of_left, of_right)
    start = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3)).to(left.device)
    start[~exact.any((1, 2))] = torch.nan  # an addition of zeros would give the same
    out = place(start.clone())
    gemm.add_outer(left, right, out, given.permutation, gathered)
    empty = torch.tensor(given.rows) == 0
    assert torch.equal(out[empty].isnan(), torch.ones_like(out[empty], dtype=torch.bool))
    out[empty] = start[empty] = 0
    assert_sums(out, start.double() + exact, F32)
    again = place(start.clone())
    gemm.add_outer(left, right, again, given.permutation, gathered)
    assert torch.equal(again, out)
    gemm.add_outer(left, right, again, given.permutation, gathered)
    assert_sums(again, start.double() + 2 * exact, F32)


@in_interpreter
@pytest.mark.parametrize("gathered", [None, "left", "right"])
@pytest.mark.parametrize(("rows", "dtype"), [((17, 0, 40), F32), ((16, 5), F16), ((0, 0), F16)], ids=str)
def test_the_kernel_adds_the_sums_of_each_group_on_cpu(
    rows: tuple[int, ...], dtype: torch.dtype, gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    check_kernel(Grouped(rows, (40, 24), dtype, "cpu"), gathered, torch.clone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("place", [torch.clone, misaligned])
@pytest.mark.parametrize("gathered", [None, "left", "right"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [*GROUPS, tuple(150 if expert % 3 else 0 for expert in range(60))], ids=str)
def test_the_kernel_adds_the_sums_of_each_group_on_a_gpu(
    rows: tuple[int, ...],
    widths: tuple[int, int],
    gathered: Gathered,
    place: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """Where memory is not aligned, the TMA cannot add to it: Triton's kernel for all GPUs does."""
    check_kernel(Grouped(rows, widths, dtype), gathered, place)


@pytest.mark.gpu
def test_an_expert_is_not_touched_by_anothers_nan() -> None:
    from experts import gemm

    given = Grouped((70, 70), (128, 256), BF16)
    given.a_NP[70:140], given.b_NQ[70:140] = torch.nan, torch.inf
    for place in (torch.clone, misaligned):
        out = place(torch.zeros(2, 128, 256, device="cuda"))
        gemm.add_outer(given.a_NP, given.b_NQ, out, given.permutation)
        assert_sums(out[:1], given.right(given.a_NP, given.b_NQ)[:1], F32)
        assert out[1].isnan().all()


def layer(fields: dict[str, Any] | None = None, device: str = "cpu", config: Any = CONFIG) -> GroupedExperts:
    with torch.device(device):
        made = GroupedExperts(config, BackendConfig(experts="triton", **(fields or {})))
    made.load_state_dict(random_parameters(config))
    return made


def fused(save: str = "memory", device: str = "cpu", config: Any = CONFIG) -> tuple[GroupedExperts, Named]:
    """Return a layer whose weights have main gradients, and copies of them."""
    made = layer({"gradient_accumulation_fusion": True, "save": save}, device, config)
    start = {}
    for name in WEIGHTS:
        weight = getattr(made, name)
        generator = torch.Generator().manual_seed(len(name))
        weight.main_grad = torch.randn(weight.shape, generator=generator).to(device)
        start[name] = weight.main_grad.clone()
    return made, start


def forward(made: GroupedExperts, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return x, which requires a gradient, and the output."""
    x = batch.x.detach().requires_grad_()
    return x, made(x, batch.token_mask, batch.weights, batch.indices)


ON = [pytest.param("cpu", F16, marks=in_interpreter), pytest.param("cuda", BF16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("save", ["memory", "time"])
def test_backward_adds_to_the_main_gradients(save: str, device: str, dtype: torch.dtype) -> None:
    """The main gradients have the sum of two batches. All else has the bits of a layer without them."""
    config = moe_config(**{**vars(CONFIG), "dtype": dtype})
    made, start = fused(save, device, config)
    plain, parameters = layer({"save": save}, device, config), random_parameters(config)
    sums = {name: tensor.double() for name, tensor in start.items()}
    for seed in (2, 3):
        batch = random_batch(config, seed=seed, indices=INDICES)
        made.zero_grad()
        plain_grads = run(plain, batch)
        on_device = batch.map(lambda tensor: tensor.to(device))
        x, output = forward(made, on_device)
        output.backward(on_device.grad)
        assert torch.equal(output, plain_grads["output"])
        assert torch.equal(x.grad, plain_grads["x"])
        assert torch.equal(made.down_proj_bias.grad, plain_grads["down_proj_bias"])
        assert [getattr(made, name).grad for name in WEIGHTS] == [None, None]
        exact = expected(config, parameters, batch)
        for name in WEIGHTS:
            sums[name] += exact[name].to(device)
            error = (getattr(made, name).main_grad.double() - sums[name]).norm()
            assert error <= (2e-2 if dtype is BF16 else 3e-3) * sums[name].norm()
    stacked = made.stacked_grads()
    for name in WEIGHTS:
        assert stacked[name] is getattr(made, name).main_grad
        assert stacked[name].dtype is F32
        assert torch.equal(stacked[name][1], start[name][1]), "expert 1 has no rows"


@in_interpreter
@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@pytest.mark.parametrize("wrap", ["checkpoint", "compile", "retain_graph"])
def test_each_backward_adds_once(wrap: str) -> None:
    made, start = fused()
    batch = random_batch(CONFIG, indices=INDICES)
    x, output = forward(made, batch)
    output.backward(batch.grad)
    once = {name: getattr(made, name).main_grad.clone() for name in WEIGHTS}
    for name in WEIGHTS:
        getattr(made, name).main_grad.copy_(start[name])
    if wrap == "retain_graph":
        x, output = forward(made, batch)
        output.backward(batch.grad, retain_graph=True)
    else:
        call = torch.compile(made, backend="eager") if wrap == "compile" else made
        inputs = x.detach().requires_grad_(), batch.token_mask, batch.weights, batch.indices
        output = checkpoint(call, *inputs, use_reentrant=False) if wrap == "checkpoint" else call(*inputs)
        output.backward(batch.grad)
    for name in WEIGHTS:
        assert torch.equal(getattr(made, name).main_grad, once[name])
    if wrap == "retain_graph":
        output.backward(batch.grad)
        assert not any(torch.equal(getattr(made, name).main_grad, once[name]) for name in WEIGHTS)


@in_interpreter
def test_a_gradient_of_x_alone_leaves_the_main_gradients() -> None:
    made, start = fused()
    batch = random_batch(CONFIG, indices=INDICES)
    x, output = forward(made, batch)
    (grad_x,) = torch.autograd.grad(output, x, batch.grad, retain_graph=True)
    assert all(torch.equal(getattr(made, name).main_grad, start[name]) for name in WEIGHTS)
    output.backward(batch.grad)
    assert torch.equal(x.grad, grad_x)
    assert not any(torch.equal(getattr(made, name).main_grad, start[name]) for name in WEIGHTS)


@in_interpreter
def test_a_frozen_weight_needs_no_main_gradient() -> None:
    made, start = fused()
    made.down_projs.requires_grad_(False)
    del made.down_projs.main_grad
    batch = random_batch(CONFIG, indices=INDICES)
    _, output = forward(made, batch)
    output.backward(batch.grad)
    assert made.down_projs.grad is None
    assert not torch.equal(made.gate_and_up_projs.main_grad, start["gate_and_up_projs"])


@in_interpreter
def test_megatrons_hooks_get_a_gradient_that_they_drop() -> None:
    """Megatron's data parallelism gives its parameters the attribute `grad_added_to_main_grad`."""
    made, _ = fused()
    seen = []
    for name in WEIGHTS:
        weight = getattr(made, name)
        weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    made.down_projs.grad_added_to_main_grad = False
    made.down_projs.zero_out_wgrad = True
    batch = random_batch(CONFIG, indices=INDICES)
    forward(made, batch)[1].backward(batch.grad)
    assert made.down_projs.grad_added_to_main_grad
    assert made.gate_and_up_projs.grad is None
    assert (made.down_projs.grad.shape, made.down_projs.grad.dtype) == (made.down_projs.shape, F16)
    assert not made.down_projs.grad.any()
    assert any(grad is made.down_projs.grad for grad in seen)
    assert not hasattr(made.gate_and_up_projs, "grad_added_to_main_grad")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@in_interpreter
@pytest.mark.usefixtures("one_rank")
def test_the_main_gradient_of_a_sharded_weight_is_this_ranks_part() -> None:
    made, start = fused()
    right = {name: getattr(made, name).main_grad for name in WEIGHTS}
    batch = random_batch(CONFIG, indices=INDICES)
    forward(made, batch)[1].backward(batch.grad)
    made.init_token_dispatcher(init_device_mesh("cpu", (1,)))
    for name in WEIGHTS:
        weight = getattr(made, name)
        weight.main_grad = start[name].clone()
        weight.grad_added_to_main_grad = False
    forward(made, batch)[1].backward(batch.grad)
    for name in WEIGHTS:
        assert torch.equal(made.stacked_grads()[name], right[name])
        assert getattr(made, name).grad.placements == getattr(made, name).placements


@in_interpreter
@pytest.mark.usefixtures("one_rank")
def test_weights_that_fsdp_shards_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    made, _ = fused()
    fully_shard(made, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match=r"gate_and_up_projs has no main_grad.* FSDP2 shards cannot have one$"):
        forward(made, random_batch(CONFIG, indices=INDICES))


@in_interpreter
@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda grad: None, r"down_projs has no main_grad, .* torch.float32 tensor \[5, 16, 24\] on cpu"),
        (lambda grad: grad.to(BF16), r"main_grad is torch.bfloat16 \[5, 16, 24\] on cpu; it must be a contiguous"),
        (lambda grad: grad.to("meta"), r"main_grad is torch.float32 \[5, 16, 24\] on meta; it must be"),
        (lambda grad: grad[:4], r"main_grad is torch.float32 \[4, 16, 24\] on cpu; it must be"),
        (lambda grad: grad.mT.contiguous().mT, r"main_grad is torch.float32 \[5, 16, 24\] on cpu, not contiguous; it"),
    ],
)
def test_a_main_gradient_that_does_not_fit_is_refused(change: Callable[[Tensor], Tensor], how: str) -> None:
    made, _ = fused()
    batch = random_batch(CONFIG, indices=INDICES)
    _, output = forward(made, batch)
    made.down_projs.main_grad = change(made.down_projs.main_grad)
    with pytest.raises(ConfigError, match=how):
        output.backward(batch.grad)
    with pytest.raises(ConfigError, match=how):
        forward(made, batch)
    with torch.no_grad():
        forward(made, batch)


@pytest.mark.parametrize(
    ("kind", "engine", "how"),
    [
        (GroupedExperts, "torch_mm", "the engine torch_mm does not add to main gradients; use triton, or leave"),
        (GroupedExperts, "triton_fp8", "the engine triton_fp8 does not add to main gradients; use triton, or leave"),
        (GroupedExpertsTE, "te", "GroupedExpertsTE does not add to main gradients; use the engine triton, or leave"),
        (GroupedExpertsLoRA, "triton", "the weights beside adapters are frozen"),
    ],
)
def test_layers_without_main_gradients_refuse_the_option(kind: Any, engine: str, how: str) -> None:
    with pytest.raises(ConfigError, match=f"^gradient_accumulation_fusion = True: {how}"):
        kind(moe_config(), BackendConfig(experts=engine, gradient_accumulation_fusion=True))


@pytest.mark.certify(share=0.2)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("on_hopper", [True, False])
@pytest.mark.parametrize("gathered", [None, "left", "right"])
def test_kernels_compile_for_sm90_without_spilling(
    gathered: Any, on_hopper: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Hopper GPUs, the TMA adds four parts of a tile, and memory is not read."""
    from experts.gemm import accumulation
    from experts.gemm.hopper import launching

    monkeypatch.setattr(accumulation, "runs_on_hopper", lambda device, num_rows: on_hopper)
    ptx = compile_launches(monkeypatch, tmp_path, accumulation, launching)
    num_rows, k, experts, dim, inter = 512, 8, 128, 2048, 512
    maps = [torch.zeros(num_rows, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    left = torch.zeros(num_rows // k if gathered == "left" else num_rows, dim, dtype=dtype)
    right = torch.zeros(num_rows // k if gathered == "right" else num_rows, inter, dtype=dtype)
    accumulation.add_outer(left, right, torch.zeros(experts, dim, inter), permutation, gathered)
    code = ptx["add_outer_products"]
    said = assemble(code, tmp_path)
    assert "wgmma.mma_async.sync.aligned" in code
    assert "wgmma" not in said, "the assembler says that products wait for each other"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    added = re.findall(r"cp\.reduce\.async\.bulk\.tensor\.3d\.global\.shared::cta\.add", code)
    assert len(added) == (4 if on_hopper else 0)
    assert not re.search(r"(st|ld)\.local", code)
    if on_hopper:
        assert "m64n256k16" in code
        assert not re.search(r"st\.global|ld\.global\S*\.f32", code)
