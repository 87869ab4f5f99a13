"""One rank of two on GPUs, for test_symm_mem.py. It checks facts, and writes the traceback of each into a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/experts/gpu_ranks.py FOLDER [NAME ...]
"""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from experts import BackendConfig, GroupedExperts, InputError, MoEConfig, destroy_buffers
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    Batch,
    Named,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
)

SIZES = {"n_routed_experts": 16, "n_activated_experts": 4, "dim": 136, "moe_inter_dim": 64, "expert_bias": True}
INPUTS = ("x", "token_mask", "weights", "indices")


def layer(engine: str, config: MoEConfig, dispatcher: str = "symm_mem", **options: Any) -> GroupedExperts:
    made = GroupedExperts(config, BackendConfig(experts=engine, dispatcher=dispatcher, **options))
    made.load_state_dict(random_parameters(config))
    made.cuda().init_token_dispatcher(init_device_mesh("cuda", (2,), mesh_dim_names=("ep",)))
    return made


def batches(config: MoEConfig, counts: tuple[int, int] = (70, 33), seed: int = 2) -> list[Batch]:
    """Return the tokens of both ranks, some masked, with indices of −1 and an expert that nobody chose."""
    made = [random_batch(config, count, seed=seed + rank) for rank, count in enumerate(counts)]
    for batch in made:
        batch.indices[batch.indices == 1] = 2
        batch.indices[::5, 0] = -1
        batch.token_mask[::7] = False
    return made


def own(both: list[Batch]) -> Batch:
    return both[dist.get_rank()].map(lambda tensor: tensor.cuda())


def run(made: GroupedExperts, batch: Batch) -> Named:
    """Return copies of the output and of all gradients."""
    made.zero_grad()
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    found = {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}
    return {name: tensor.clone() for name, tensor in found.items()}


def matches_the_oracle() -> None:
    """Every dtype, even and uneven ranks, and a rank without tokens."""
    for dtype in (F64, F32, BF16, F16):
        config = moe_config(dtype=dtype, **SIZES)
        for counts in ((40, 40), (70, 33), (0, 50)):
            both, rank = batches(config, counts), dist.get_rank()
            whole = Batch(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in both), strict=True)))
            right = expected(config, random_parameters(config), whole)
            tokens, experts = slice(sum(counts[:rank]), sum(counts[: rank + 1])), slice(8 * rank, 8 * rank + 8)
            mine = {n: t[tokens if n in ("output", "x", "weights") else experts] for n, t in right.items()}
            for engine in ("loop", *(("torch_mm",) if dtype is BF16 else ())):
                for dispatcher in ("symm_mem", "alltoall", "allgather"):
                    assert_near(run(layer(engine, config, dispatcher), own(both)), mine, dtype)


def has_the_bits_of_alltoall() -> None:
    """In every run: both dispatchers sum a token's parts in float32, in the order of the ranks.

    The engine must have the same bits in every run. The loop does not: on a GPU it adds with atomics, and here some
    tokens choose an expert twice. The gradients of biases are sums of parts, and the number of parts depends on the
    number of rows, which differs between the dispatchers. So the layer has no biases.
    """
    for dtype in (F32, BF16):
        config = moe_config(dtype=dtype, **{**SIZES, "expert_bias": False})
        batch = own(batches(config))
        right = run(layer("torch_mm", config, "alltoall"), batch)
        made = layer("torch_mm", config)
        for _ in range(5):
            assert_same(run(made, batch), right)


def equal_tokens() -> None:
    """allgather with declared counts has the bits of allgather without, and a rank that breaks its word is refused."""
    config = moe_config(dtype=BF16, **SIZES)
    made, batch = layer("torch_mm", config, "allgather", equal_tokens=True), own(batches(config, (50, 50)))
    right = run(layer("torch_mm", config, "allgather"), batch)
    for _ in range(2):
        assert_same(run(made, batch), right)
    more = random_batch(config, 51).map(lambda tensor: tensor.cuda())
    if dist.get_rank() == 1:
        with pytest.raises(InputError, match=r"^x has 51 tokens, and had 50 in the first call"):
            run(made, more)
    assert_same(run(made, batch), right)
    uneven = layer("torch_mm", config, "allgather", equal_tokens=True)
    with pytest.raises(InputError, match="from 33 to 70 on all ranks"):
        run(uneven, own(batches(config)))


def two_forwards_before_two_backwards() -> None:
    config = moe_config(dtype=BF16, **SIZES)
    made, given = layer("torch_mm", config), [own(batches(config, seed=seed)) for seed in (3, 5)]
    right = [run(made, batch)["x"] for batch in given]
    xs = [batch.x.clone().requires_grad_() for batch in given]
    outputs = [made(x, batch.token_mask, batch.weights, batch.indices) for x, batch in zip(xs, given, strict=True)]
    for output, batch in zip(outputs, given, strict=True):
        output.backward(batch.grad)
    for x, gradient in zip(xs, right, strict=True):
        assert torch.equal(x.grad, gradient)


def never_waits_for_the_device() -> None:
    """After the first forward, no operation of forward and backward waits, and nothing of it is a copy to the host.

    alltoall waits for the copy of its sizes, and that is an event: it waits neither for the device nor in a copy.
    """
    config, equal = moe_config(dtype=BF16, **SIZES), (50, 50)
    cases = [layer("torch_mm", config), layer("triton", config), layer("torch_mm", config, "alltoall")]
    for made in (*cases, layer("torch_mm", config, "allgather", equal_tokens=True)):
        batch = own(batches(config, equal))
        run(made, batch)
        x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made(x, batch.token_mask, weights, batch.indices).backward(batch.grad)
            with torch.no_grad():
                made(*(getattr(batch, name) for name in INPUTS))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def replayed_forward() -> None:
    """A captured forward replays with other tokens and routings, also twice in turn, and eager calls go on."""
    config, equal = moe_config(dtype=BF16, **SIZES), (50, 50)
    layers = [(layer(engine, config), (70, 33)) for engine in ("torch_mm", "triton")]
    for made, counts in (*layers, (layer("torch_mm", config, "allgather", equal_tokens=True), equal)):
        static = own(batches(config, counts))
        with torch.no_grad():
            graph, output = captured(lambda made=made, static=static: made(*(getattr(static, n) for n in INPUTS)))
            for batch in others(config, counts):
                right = made(*(getattr(batch, name) for name in INPUTS)).clone()
                write(static, batch)
                for _ in range(2):
                    graph.replay()
                    assert torch.equal(output, right), made


def replayed_train_step() -> None:
    """A captured forward and backward replays with other routings, and gives all gradients."""
    config = moe_config(dtype=BF16, **SIZES)
    for engine in ("torch_mm", "triton"):
        made, static = layer(engine, config), own(batches(config))
        static.x.requires_grad_()
        static.weights.requires_grad_()
        wanted = [static.x, static.weights, *made.parameters()]

        def step(made: GroupedExperts = made, static: Batch = static, wanted: Any = wanted) -> tuple[Tensor, ...]:
            output = made(*(getattr(static, name) for name in INPUTS))
            return output, *torch.autograd.grad(output, wanted, static.grad)

        graph, found = captured(step)
        names = ["output", "x", "weights", *(name for name, _ in made.named_parameters())]
        for batch in others(config):
            right = run(made, batch)
            with torch.no_grad():
                write(static, batch)
            for _ in range(2):
                graph.replay()
                local = [t.to_local() if hasattr(t, "to_local") else t for t in found]
                assert_same(dict(zip(names, (t.detach() for t in local), strict=True)), {n: right[n] for n in names})


def others(config: MoEConfig, counts: tuple[int, int] = (70, 33)) -> list[Batch]:
    """Return batches with other routings: all to the second rank's first expert, all to nobody, and random ones."""
    one, nobody, again = (batches(config, counts, seed) for seed in (21, 22, 23))
    for batch in one:
        batch.indices[:] = 8
    for batch in nobody:
        batch.indices[:] = -1
    return [own(both) for both in (one, nobody, again)]


def write(static: Batch, batch: Batch) -> None:
    for name in (*INPUTS, "grad"):
        getattr(static, name).copy_(getattr(batch, name))


def takes_no_memory_of_the_allocator() -> None:
    """Its memory is outside of torch's allocator, where moebench looks for it. destroy_buffers gives it back."""
    config = moe_config(dtype=BF16, **{**SIZES, "dim": 2048})
    destroy_buffers()
    made, batch = layer("torch_mm", config, max_tokens_per_rank=8192), own(batches(config))
    with torch.no_grad():
        layer("torch_mm", config, "alltoall")(*(getattr(batch, name) for name in INPUTS))
        before = outside()
        made(*(getattr(batch, name) for name in INPUTS))
    room = 2 * 8192 * 2048 * 2
    torch.cuda.synchronize()
    assert room <= outside() - before < 2 * room
    del made
    dist.barrier()
    destroy_buffers()
    dist.barrier()
    assert outside() - before < room / 2


def outside() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def overflow() -> None:
    """The first rank sends more rows to the second than its slab holds. Both ranks must raise."""
    config = moe_config(dtype=BF16, **SIZES)
    made = layer("torch_mm", config, max_tokens_per_rank=64, capacity_factor=0.25)
    batch = random_batch(config, 64).map(lambda tensor: tensor.cuda())
    batch.indices[:] = -1
    if dist.get_rank() == 0:
        batch.indices[:, 0] = 8
    with torch.no_grad():
        made(*(getattr(batch, name) for name in INPUTS))
    torch.cuda.synchronize()


def absent() -> None:
    """The second rank does not take part in a forward. The first one ends when the group's timeout is over."""
    config = moe_config(dtype=BF16, **SIZES)
    made, batch = layer("torch_mm", config), own(batches(config))
    run(made, batch)
    torch.cuda.synchronize()
    if dist.get_rank() == 0:
        run(made, batch)
        torch.cuda.synchronize()


FACTS: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        matches_the_oracle,
        has_the_bits_of_alltoall,
        equal_tokens,
        two_forwards_before_two_backwards,
        never_waits_for_the_device,
        replayed_forward,
        replayed_train_step,
        takes_no_memory_of_the_allocator,
    )
}
#: What must fail, on which ranks, and a part of the error. Each needs processes of its own, because it breaks CUDA in
#: its process. The error comes from the first call that notices, which may be torch's or Triton's.
BREAK: dict[str, tuple[tuple[int, ...], str]] = {
    "overflow": ((0, 1), "device-side assert triggered"),
    "absent": ((0,), "launch failure"),
}


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    timeout = timedelta(seconds=10 if "absent" in names else 60)
    dist.init_process_group("nccl", timeout=timeout, device_id=torch.device("cuda", rank))
    for name in names or FACTS:
        error = ""
        try:
            {**FACTS, "overflow": overflow, "absent": absent}[name]()
        except Exception:  # any exception is the outcome of the fact
            error = traceback.format_exc()
        if error or name in FACTS:
            (folder / f"{name}.rank{rank}.txt").write_text(error)
        if error:
            os._exit(1)  # CUDA may be broken, and the other rank may wait
    if names == ["absent"]:  # the first rank waits for this one
        os._exit(0 if rank else 1)
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
