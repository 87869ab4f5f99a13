"""Facts that the ranks of a group check themselves. Every rank calls every function."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from experts import BackendConfig, ConfigError, GroupedExperts, InputError, Unsupported, catalog
from experts.dispatch.deepep import destroy_buffers
from experts.layer import ExpertLayer
from tests.experts import fakes
from tests.experts.fake_deep_ep import Buffer
from tests.experts.layers import F64, assert_same, misaligned, moe_config, random_batch, random_parameters, run_stacked
from tests.experts.parallel import Case
from tests.experts.parallel_layers import all_ranks, build, gathered, other_weights, sharded

CPU = torch.device("cpu")
SOME = Case("uneven", "loop", "allgather")
DEEPEP = Case("uneven", "loop", "deepep", torch.bfloat16)


def refusals() -> None:
    """Every rank refuses a wrong configuration with the same message, before it sends anything."""
    size = dist.get_world_size()
    if size > 1:
        made = GroupedExperts(moe_config(n_routed_experts=3))
        with pytest.raises(ConfigError) as caught:
            made.init_token_dispatcher(all_ranks())
        assert str(caught.value) == (
            f"n_routed_experts = 3 is not a multiple of the EP size {size}; every rank holds the same number of "
            "experts, so choose an EP size that divides it"
        )
        assert made.ep_mesh is None
    with pytest.raises(ConfigError, match="ep_mesh has 2 dimensions, but must have 1; pass the expert-parallel one"):
        build(SOME).init_token_dispatcher(init_device_mesh("cpu", (1, size)))
    made = sharded(build(SOME, "torch_mm"), random_parameters(SOME.config))
    batch = random_batch(SOME.config.with_dtype(F64))
    with pytest.raises(Unsupported, match=r"^torch_mm: grouped_mm takes float32, bfloat16 and float16, not float64"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)


def without_deep_ep() -> None:
    """Without deep_ep, the layer refuses to be sharded and stays as it was."""
    made = GroupedExperts(DEEPEP.config, BackendConfig(dispatcher="deepep"))
    made.load_state_dict(random_parameters(made.config))
    with pytest.MonkeyPatch.context() as patch:
        fakes.remove(patch)
        with pytest.raises((Unsupported, ImportError)) as caught:
            made.init_token_dispatcher(all_ranks())
    assert made.ep_mesh is None
    assert made.n_local_experts == 12
    run_stacked(made, DEEPEP.batch())
    assert_same(made.state_dict(), random_parameters(made.config))
    assert isinstance(caught.value, Unsupported)
    assert catalog.LIBRARIES["deep_ep"] in str(caught.value)


def fresh_weights() -> None:
    """init_weights gives the same weights as in one process with the same seed.

    TE resets its own weights, with a standard deviation of 0.023.
    """
    whole = build(SOME)
    torch.manual_seed(4)
    whole.init_weights(CPU)
    made = sharded(build(SOME), random_parameters(SOME.config))
    torch.manual_seed(4)
    made.init_weights(CPU)
    assert_same(gathered(made), whole.state_dict())

    made = sharded(build(SOME, "te"), random_parameters(SOME.config))
    made.init_weights(CPU)
    assert made.down_projs.to_local().std().item() == pytest.approx(0.023, rel=0.1)
    assert not made.down_proj_bias.to_local().any()


def state_dict_tools() -> None:
    """get_model_state_dict and set_model_state_dict of torch use the stacked layout."""
    parameters = random_parameters(SOME.config)
    for engine in ("loop", "te"):
        model = nn.ModuleDict({"experts": sharded(build(SOME, engine), parameters)})
        state = get_model_state_dict(model)
        assert list(state) == [f"experts.{name}" for name in parameters]
        other = nn.ModuleDict({"experts": other_weights(Case("uneven", engine, "allgather"))})
        set_model_state_dict(other, state)
        assert_same(gathered(other["experts"]), parameters)


def frozen_parameters() -> None:
    """Frozen parameters stay frozen when they are sharded."""
    for engine in ("loop", "te"):
        made = build(SOME, engine).requires_grad_(False)
        made.init_token_dispatcher(all_ranks())
        assert not any(parameter.requires_grad for parameter in made.parameters()), engine


def two_meshes() -> None:
    """The layer keeps the larger mesh, of which the expert-parallel mesh is a dimension. set_moe_mesh changes it."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for engine in ("loop", "te"):
        made = build(SOME, engine)
        made.init_token_dispatcher(whole["ep"], moe_mesh=whole)
        assert (made.ep_mesh, made.moe_mesh) == (whole["ep"], whole)
        made.set_moe_mesh(None)
        assert made.moe_mesh is None


def deepep_layer(dim: int = DEEPEP.config.dim, **options: int) -> GroupedExperts:
    config = dataclasses.replace(DEEPEP.config, dim=dim)
    backend = BackendConfig(dispatcher="deepep", **options)  # type: ignore[arg-type]
    return sharded(GroupedExperts(config, backend), random_parameters(config))


def buffers() -> None:
    """All layers of a group share one buffer, which fits the largest layer. After destroy_buffers, it is made again."""
    destroy_buffers()
    Buffer.made = Buffer.destroyed = 0
    small, _ = deepep_layer(), deepep_layer()
    assert (Buffer.made, Buffer.destroyed) == (1, 0)
    large = deepep_layer(dim=512)
    assert (Buffer.made, Buffer.destroyed) == (2, 1)
    deepep_layer()
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    run_stacked(large, random_batch(large.config))
    first = {name: tensor.clone() for name, tensor in run_stacked(small, batch).items()}
    assert (Buffer.made, Buffer.destroyed) == (2, 1)
    for _ in range(2):
        destroy_buffers()
        assert (Buffer.made, Buffer.destroyed) == (2, 2)
    assert_same(run_stacked(small, batch), first)
    destroy_buffers()


def replaced_buffer() -> None:
    """A backward runs although a larger layer replaced the buffer after the forward."""
    destroy_buffers()
    small = deepep_layer()
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    right = run_stacked(small, batch)["x"].clone()
    x = batch.x.clone().requires_grad_()
    output = small(x, batch.token_mask, batch.weights, batch.indices)
    deepep_layer(dim=512)
    output.backward(batch.grad)
    assert torch.equal(x.grad, right)


def num_sms() -> None:
    """Each layer uses its own number of SMs in forward and backward, even if another layer set its own in between."""
    few, many = deepep_layer(num_sms=8), deepep_layer()
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    outputs = [made(batch.x, batch.token_mask, batch.weights, batch.indices) for made in (few, many)]
    assert Buffer.num_sms == 20
    outputs[0].backward(batch.grad)
    assert Buffer.num_sms == 8
    outputs[1].backward(batch.grad)
    assert Buffer.num_sms == 20


def parameters_of_others() -> None:
    """A layer refuses parameters that hold other experts than those of this rank."""
    batch = random_batch(SOME.config)
    inputs = batch.x, batch.token_mask, batch.weights, batch.indices
    replicated = build(SOME)
    for name, tensor in random_parameters(SOME.config).items():
        setattr(replicated, name, nn.Parameter(distribute_tensor(tensor, all_ranks(), [Replicate()])))
    with pytest.raises(ConfigError, match="parameters hold 12 experts, but need 6 of the layer's 12; shard them once"):
        replicated(*inputs)
    spread = sharded(build(SOME), random_parameters(SOME.config))
    spread.init_token_dispatcher(DeviceMesh("cpu", [dist.get_rank()]))
    with pytest.raises(ConfigError, match="parameters hold 6 experts, but need 12 of the layer's 12; shard them once"):
        spread(*inputs)


def equal_tokens() -> None:
    """Ranks that declare equal numbers of tokens compare them once. After that, no size is exchanged.

    The results stay the same, bit by bit. A rank that breaks its word is refused before it sends anything.
    """
    rank, reduced = dist.get_rank(), []
    config, all_reduce = SOME.config, dist.all_reduce

    def layer(**options: bool) -> ExpertLayer:
        backend = BackendConfig(experts="torch_mm", dispatcher="allgather", **options)  # type: ignore[arg-type]
        return sharded(GroupedExperts(config, backend), random_parameters(config))

    def forward(num_tokens: int) -> None:
        batch = random_batch(config, num_tokens, seed=rank)
        made(batch.x, batch.token_mask, batch.weights, batch.indices)

    made, asked, given = layer(equal_tokens=True), layer(), random_batch(config, 5, seed=10 + rank)
    right = {name: tensor.clone() for name, tensor in run_stacked(asked, given).items()}
    with pytest.raises(InputError, match=f"^x has {3 + rank} tokens on this rank, and from 3 to 4 on all ranks, but "):
        forward(3 + rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda *args, **named: reduced.append(args) or all_reduce(*args, **named))
        assert_same(run_stacked(made, given), right)
        assert len(reduced) == 2
        assert_same(run_stacked(made, given), right)
        if rank == 1:
            with pytest.raises(InputError, match=r"^x has 4 tokens, and had 5 in the first call, but with "):
                forward(4)
        assert_same(run_stacked(made, given), right)
        assert len(reduced) == 2
        forward(5)
        run_stacked(asked, given)
        assert len(reduced) == 3


def autocast() -> None:
    """The layer and its dispatcher ignore torch.autocast in forward and backward."""
    batch = SOME.share(dist.get_rank(), dist.get_world_size())
    for dispatcher in ("allgather", "alltoall", "symm_mem"):
        for engine in ("loop", "torch_mm"):
            made = sharded(build(Case("uneven", engine, dispatcher)), random_parameters(SOME.config))
            right = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
            with torch.autocast("cpu", torch.bfloat16):
                assert_same(run_stacked(made, batch), right)


def memory_may_start_anywhere() -> None:
    """Every dispatcher carries tensors that do not start at a multiple of 16 bytes, as slices of larger ones may."""
    for dispatcher in ("allgather", "alltoall", "symm_mem", "deepep"):
        case = Case("uneven", "loop", dispatcher, torch.bfloat16)
        made = sharded(build(case), random_parameters(case.config))
        batch = case.share(dist.get_rank(), dist.get_world_size())
        right = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
        assert_same(run_stacked(made, batch.map(misaligned)), right)


FACTS: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        refusals,
        without_deep_ep,
        fresh_weights,
        state_dict_tools,
        frozen_parameters,
        two_meshes,
        buffers,
        replaced_buffer,
        num_sms,
        parameters_of_others,
        equal_tokens,
        autocast,
        memory_may_start_anywhere,
    )
}
