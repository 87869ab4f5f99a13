"""Facts of a layer in training that the ranks of a group check: checkpointing, FSDP, copies."""

import copy
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, GroupedExperts
from tests.experts.layers import (
    BF16,
    F32,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
    run_stacked,
)
from tests.experts.parallel import Case
from tests.experts.parallel_layers import all_ranks, build, gathered, sharded

CPU = torch.device("cpu")
SOME = Case("uneven", "loop", "allgather")


def checkpointed() -> None:
    """With checkpointing, forward runs again on every rank and gives the same bits.

    This includes a rank without rows, which does not call the library.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    for engine in ("loop", "torch_mm", "gmm", "te"):
        for dispatcher in ("allgather", "alltoall", "symm_mem"):
            case = Case("all-to-one-expert", engine, dispatcher)
            made, batch = sharded(build(case), random_parameters(case.config)), case.share(rank, size)
            right = run_stacked(made, batch)
            made.zero_grad()
            x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
            checkpoint(made, x, batch.token_mask, weights, batch.indices, use_reentrant=False).backward(batch.grad)
            found = {"output": right["output"], "x": x.grad, "weights": weights.grad, **made.stacked_grads()}
            assert_same(found, right)


def copied() -> None:
    """A copy of a layer uses the same group and has its own parameters."""
    for engine, dispatcher in (("loop", "allgather"), ("te", "alltoall"), ("loop", "deepep"), ("loop", "symm_mem")):
        case = Case("uneven", engine, dispatcher, BF16)
        made, batch = sharded(build(case), random_parameters(case.config)), case.share(dist.get_rank(), 2)
        right = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
        other = copy.deepcopy(made)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert_same(run_stacked(other, batch), right)
        assert not run_stacked(made, batch)["output"].any()


def gradients_on_one_rank() -> None:
    """Backward runs on every rank, and is right, whatever requires a gradient there: here never what rank 0 does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ways = [(dispatcher, F32) for dispatcher in ("allgather", "alltoall", "symm_mem")] + [("deepep", BF16)]
    for engine, (dispatcher, dtype) in itertools.product(("loop", "torch_mm", "te"), ways):
        case = Case("uneven", engine, dispatcher, dtype)
        made, batch = sharded(build(case), random_parameters(case.config)), case.share(rank, size)
        right = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
        for frozen, of_x, of_weights in ((True, 0, 1), (True, 1, 1), (True, None, 0), (rank == 0, 0, None)):
            made.zero_grad()
            made.requires_grad_(not frozen)
            x, weights = (
                t.clone().requires_grad_(rank == of_) for t, of_ in ((batch.x, of_x), (batch.weights, of_weights))
            )
            made(x, batch.token_mask, weights, batch.indices).backward(batch.grad)
            wanted = {"x": x.grad} if rank == of_x else {}
            wanted |= {"weights": weights.grad} if rank == of_weights else {}
            assert_same(wanted | made.stacked_grads(), {name: right[name] for name in wanted | made.stacked_grads()})
            assert bool(made.stacked_grads()) is not frozen
            assert (x.grad is None) is (rank != of_x)


def frozen_in_inference() -> None:
    """Without grad mode nothing requires a gradient. Tensors made in inference mode may go through in grad mode."""
    made = sharded(build(SOME), random_parameters(SOME.config)).requires_grad_(False)
    with torch.inference_mode():
        batch = SOME.share(dist.get_rank(), dist.get_world_size())
        tokens = batch.x * 1
        output = made(tokens, batch.token_mask, batch.weights, batch.indices)
    assert not output.requires_grad
    assert torch.equal(made(tokens, batch.token_mask, batch.weights, batch.indices), output)
    with torch.no_grad():
        assert not made(batch.x, batch.token_mask, batch.weights, batch.indices).requires_grad


def fully_sharded() -> None:
    """FSDP works without expert parallelism, for a number of experts that the number of ranks does not divide."""
    config = moe_config(n_routed_experts=3, expert_bias=True)
    made = GroupedExperts(config, BackendConfig(experts="torch_mm"))
    made.load_state_dict(random_parameters(config))
    assert_trains_fully_sharded(fully_shard(made, mesh=all_ranks()))


def fully_sharded_experts() -> None:
    """FSDP works over data-parallel ranks that each hold a share of the experts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    config = moe_config(n_routed_experts=8, expert_bias=True)
    made = GroupedExperts(config, BackendConfig(experts="torch_mm", dispatcher="alltoall"))
    made.load_state_dict(random_parameters(config))
    made.init_token_dispatcher(mesh["ep"], moe_mesh=mesh)
    assert_trains_fully_sharded(fully_shard(made, mesh=mesh["dp"]))


def assert_trains_fully_sharded(made: GroupedExperts) -> None:
    """Check output and gradients, fresh weights and loaded weights against one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parameters, whole = random_parameters(made.config), random_batch(made.config, 3 * size)
    share = whole.map(lambda tensor: tensor[3 * rank : 3 * rank + 3])
    x = share.x.requires_grad_()
    output = made(x, share.token_mask, share.weights, share.indices)
    output.backward(share.grad)
    right = expected(made.config, parameters, whole)
    of_tokens = {name: right[name][3 * rank : 3 * rank + 3] for name in ("output", "x")}
    assert_near({"output": output, "x": x.grad}, of_tokens, F32)
    gradients = {name: 2 * p.grad.full_tensor() for name, p in made.named_parameters()}  # FSDP averages over 2 ranks
    assert_near(gradients, {name: right[name] for name in parameters}, F32)

    alone = GroupedExperts(made.config)
    for module in (alone, made):
        torch.manual_seed(4)
        module.init_weights(CPU)
    assert_same(gathered(made), alone.state_dict())
    made.load_state_dict(parameters)
    assert_same(gathered(made), parameters)


TRAINING: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (checkpointed, copied, gradients_on_one_rank, frozen_in_inference, fully_sharded, fully_sharded_experts)
}
