"""Facts of the dispatcher `symm_mem`, which the ranks of a group check: what its shared memory allows and refuses."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from experts import BackendConfig, GroupedExperts, InputError, destroy_buffers
from experts.exchange import memory
from experts.layer import ExpertLayer
from tests.experts.layers import F64, Batch, Named, assert_same, random_batch, random_parameters, run_stacked
from tests.experts.parallel import Case
from tests.experts.parallel_layers import build, sharded

SYMM_MEM = Case("uneven", "loop", "symm_mem")
#: Experts of 8 tokens, by the number of ranks. They bring 6 rows to each of 2 ranks, or 4 rows to each of 4 ranks.
EVEN_CHOICES = {
    2: [[0, 6]] * 4 + [[1, 2], [3, 4], [7, 8], [9, 10]],
    4: [[0, 3], [6, 9], [1, 4], [7, 10]] * 2,
}


def layer(seed: int = 1, **options: object) -> ExpertLayer:
    backend = BackendConfig(experts="torch_mm", dispatcher="symm_mem", **options)  # type: ignore[arg-type]
    return sharded(GroupedExperts(SYMM_MEM.config, backend), random_parameters(SYMM_MEM.config, seed))


def own_batch(num_tokens: int, seed: int) -> Batch:
    return random_batch(SYMM_MEM.config, num_tokens, seed=seed + 10 * dist.get_rank())


def forward(made: ExpertLayer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x and the routing weights. The last two wait for their gradients."""
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    return made(x, batch.token_mask, weights, batch.indices), x, weights


def refused_by_all(call: Callable[[], object], match: str) -> None:
    """Check that the call raises the same InputError on every rank."""
    with pytest.raises(InputError, match=match) as caught:
        call()
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, str(caught.value))
    assert len(set(told)) == 1, told


def interleaved() -> None:
    """Two forwards run before two backwards, in either order, with other forwards and without gradients in between."""
    made = layer()
    batches = [own_batch(3 + dist.get_rank(), seed=1), own_batch(5 - dist.get_rank(), seed=2)]
    right = [run_stacked(made, batch) for batch in batches]
    right = [{name: tensor.clone() for name, tensor in found.items()} for found in right]
    for order in ((0, 1), (1, 0)):
        passes = [forward(made, batch) for batch in batches]
        with torch.no_grad():
            made(*(getattr(batches[1], name) for name in ("x", "token_mask", "weights", "indices")))
        for number in order:
            made.zero_grad()
            output, x, weights = passes[number]
            output.backward(batches[number].grad)
            gradients = {"x": x.grad, "weights": weights.grad, **made.stacked_grads()}
            assert_same({"output": output.detach(), **gradients}, right[number])


def shared_buffer() -> None:
    """Layers with the same sizes share their memory, and one in the other's forward and backward changes nothing.

    Their numbers of tokens need not be the same. A layer of another dtype has memory of its own.
    """
    destroy_buffers()
    one, other = layer(), layer(seed=9)
    batch, its = own_batch(6, seed=3), own_batch(4 + 4 * dist.get_rank(), seed=4)
    alone = [
        {name: tensor.clone() for name, tensor in run_stacked(made, b).items()}
        for made, b in ((one, batch), (other, its))
    ]
    assert len(memory._shared) == 1
    passes = forward(one, batch), forward(other, its)
    for made in (one, other):
        made.zero_grad()
    for (output, x, weights), made, given, right in zip(passes, (one, other), (batch, its), alone, strict=True):
        output.backward(given.grad)
        found = {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}
        assert_same(found, right)
    exact = Case("uneven", "loop", "symm_mem", F64)
    run_stacked(
        sharded(build(exact), random_parameters(exact.config)), exact.share(dist.get_rank(), dist.get_world_size())
    )
    assert len(memory._shared) == 2


def too_many_tokens() -> None:
    """A rank refuses more tokens than the layer has room for, before it sends anything: the layer still works."""
    for made, room in ((layer(max_tokens_per_rank=5), 5), (layer(), 16)):
        right = run_stacked(made, own_batch(5, seed=5))
        right = {name: tensor.clone() for name, tensor in right.items()}
        refused_by_all(
            lambda made=made, room=room: forward(made, own_batch(room + 1, seed=5)),
            rf"^x has {room + 1} tokens, but symm_mem has room for max_tokens_per_rank = {room}; set ",
        )
        assert_same(run_stacked(made, own_batch(5, seed=5)), right)
        run_stacked(made, own_batch(room, seed=6))


def overflow() -> None:
    """If one rank sends more rows than its slab holds, every rank raises. With enough room, the factor changes nothing.

    Only the last rank sends too many rows, and only to the first rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    made, whole = layer(max_tokens_per_rank=8, capacity_factor=1.0), layer(max_tokens_per_rank=8)
    even = own_batch(8, seed=7)
    even = even.with_(indices=torch.tensor(EVEN_CHOICES[size]))
    assert_same(run_stacked(made, even), {name: t.clone() for name, t in run_stacked(whole, even).items()})
    uneven = even.with_(indices=torch.zeros_like(even.indices)) if rank == size - 1 else even
    room = {2: 6, 4: 4}[size]
    message = (
        f"a rank sends 8 rows to a rank, but there is room for {room}: capacity_factor = 1.0 is too small for this"
    )
    refused_by_all(lambda: forward(made, uneven), message)
    run_stacked(whole, uneven)
    assert_same(run_stacked(made, even), run_stacked(whole, even))


def buffers_made_again() -> None:
    """destroy_buffers frees the memory of all layers. It is made again, and a backward still runs after it."""
    destroy_buffers()
    made, batch = layer(), own_batch(6, seed=8)
    right = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
    output, x, _ = forward(made, batch)
    for _ in range(2):
        destroy_buffers()
        assert not memory._shared
    output.backward(batch.grad)
    assert torch.equal(x.grad, right["x"])
    with torch.inference_mode():  # makes the memory, which a later train step writes to
        forward(made, batch)
    assert_same(run_stacked(made, batch), right)


def other_layouts() -> None:
    """Ranks that disagree about a layout are all refused with the same message."""
    config = SYMM_MEM.config
    dim = config.dim * (1 + dist.get_rank())
    made = sharded(
        GroupedExperts(
            dataclasses.replace(config, dim=dim), BackendConfig(dispatcher="symm_mem", max_tokens_per_rank=8)
        ),
        random_parameters(dataclasses.replace(config, dim=dim)),
    )
    batch = random_batch(made.config, 3)
    refused_by_all(lambda: forward(made, batch), "^symm_mem: rank 0 needs Layout.*, but rank 1 needs Layout")


def subgroups() -> None:
    """Two groups of two ranks each work at the same time, in other orders of their layers, and give the same result."""
    ep_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"]
    case = SYMM_MEM
    made: Named = {}
    for way in ("alltoall", "symm_mem"):
        layers = [build(dataclasses.replace(case, dispatcher=way)) for _ in range(2)]
        for one in layers:
            one.load_state_dict(random_parameters(case.config))
            one.init_token_dispatcher(ep_mesh)
        for number in range(1 + dist.get_rank() // 2):  # the second group goes on alone
            found = run_stacked(layers[number], own_batch(2 + dist.get_rank(), seed=9))
        if way == "alltoall":
            made = {name: tensor.clone() for name, tensor in found.items()}
    assert_same(found, made)


IN_MEMORY: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        interleaved,
        shared_buffer,
        too_many_tokens,
        overflow,
        buffers_made_again,
        other_layouts,
        subgroups,
    )
}
