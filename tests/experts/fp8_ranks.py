"""One rank of two whose rows travel in FP8, for test_fp8_rows.py: over gloo in Triton's interpreter, or on GPUs.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/experts/fp8_ranks.py FOLDER [NAME ...]

It checks facts, and writes the traceback of each into a file.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from experts import BackendConfig, GroupedExperts, MoEConfig, destroy_buffers
from experts.dispatch import deepep
from experts.exchange import memory
from moebench.parity.quantization import fp8_product, rows_in_fp8
from tests.experts import fakes
from tests.experts.gpu_ranks import INPUTS, captured, write
from tests.experts.layers import (
    BF16,
    F16,
    Batch,
    Named,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
    run_stacked,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPE = F16 if DEVICE == "cpu" else BF16  # the interpreter's products are right in float16
#: The last block of a token is partial, and so is the one of an expert's width.
SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 208, "moe_inter_dim": 144, "dtype": DTYPE}
BIASED = {"expert_bias": True, "expert_activation": "quick_geglu"}
#: Tokens of the two ranks.
UNEVEN, ONE_EMPTY, EVEN = (14, 5), (0, 11), (9, 9)
OF_TOKENS = ("output", "x", "weights")
#: The start of the outcome of a fact that was not tried.
SKIPPED = "skipped: "


def layer(config: MoEConfig, fp8_rows: bool = True, dispatcher: str = "symm_mem", **options: Any) -> GroupedExperts:
    given = {"fp8_rows": True} if fp8_rows else {}
    made = GroupedExperts(config, BackendConfig(experts="triton_fp8", dispatcher=dispatcher, **given, **options))
    made.load_state_dict(random_parameters(config))
    made.to(DEVICE).init_token_dispatcher(init_device_mesh(DEVICE, (2,), mesh_dim_names=("ep",)))
    return made


def batches(config: MoEConfig, counts: tuple[int, int], seed: int = 2) -> list[Batch]:
    """Return the tokens of both ranks: masked ones, zeros, huge and tiny blocks, and an expert that nobody chose."""
    made = [random_batch(config, count, seed=seed + rank) for rank, count in enumerate(counts)]
    for batch in made:
        batch.indices[batch.indices == 1] = 2
        batch.indices[::5, 0] = -1
        batch.token_mask[::7] = False
        for rows in (batch.x, batch.grad):
            rows[1::4, :128] = 0
            rows[2::4] *= 2.0**-9
            rows[3::4, 5] *= 2.0**4
            rows[4:5] = 0
        batch.x[::7] = torch.nan  # of masked tokens
    return made


def own(both: list[Batch]) -> Batch:
    return both[dist.get_rank()].map(lambda tensor: tensor.to(DEVICE))


def run(made: GroupedExperts, batch: Batch) -> Named:
    return {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}


def rows_in_16_bits_give_the_same_bits() -> None:
    """The experts' side would quantise the same numbers, so output and gradients of tokens have the same bits.

    Gradients of weights read x and the output's gradients after a rounding more, so they are near.
    """
    for counts, fields in ((UNEVEN, {}), (ONE_EMPTY, {}), (EVEN, {"apply_router_weight_after_down": True})):
        config = moe_config(**SIZES, **fields)
        batch, (narrow, wide) = own(batches(config, counts)), (layer(config), layer(config, fp8_rows=False))
        found, right = run(narrow, batch), run(wide, batch)
        assert_same({name: found[name] for name in OF_TOKENS}, {name: right[name] for name in OF_TOKENS})
        for name in found.keys() - {*OF_TOKENS}:
            assert not torch.equal(found[name], right[name]), f"{name} has read rows in 16 bits"
        with torch.no_grad():
            given = batch.x, batch.token_mask, batch.weights, batch.indices
            assert torch.equal(narrow(*given), wide(*given))


@dataclass(frozen=True)
class Errors:
    """The errors of what this rank found, relative to each tensor's norm, beside the oracle with a recipe's rounding.

    Where `fp8_rows` is true, the oracle's tokens and gradients are rounded first, as they travel.
    """

    config: MoEConfig
    counts: tuple[int, int]
    found: Named

    def of(self, recipe: str | None, fp8_rows: bool = False) -> dict[str, float]:
        both, rank = batches(self.config, self.counts), dist.get_rank()
        whole = Batch(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in both), strict=True)))
        if fp8_rows:
            travel = rows_in_fp8("block_float32_rows")
            whole = whole.with_(x=travel(whole.x), grad=travel(whole.grad))
        halved = (self.config.dim, 2 * self.config.moe_inter_dim)
        is_halved = self.config.expert_activation == "swiglu"
        product = torch.matmul if recipe is None else fp8_product(recipe, halved if is_halved else None)
        right = expected(self.config, random_parameters(self.config), whole, product)
        start, error = sum(self.counts[:rank]), {}
        for name, tensor in self.found.items():
            of_rank = slice(start, start + self.counts[rank]) if name in OF_TOKENS else slice(2 * rank, 2 * rank + 2)
            mine = right[name][of_rank]
            error[name] = float((tensor.double().cpu() - mine).norm() / mine.norm()) if mine.numel() else 0.0
        return error


def every_tensor_is_as_its_recipe_rounds_it() -> None:
    """The emulation comes closer than the exact result. For the weights' gradients, the next fact shows more."""
    for counts, fields in ((UNEVEN, {}), (ONE_EMPTY, BIASED)):
        config = moe_config(**SIZES, **fields)
        errors = Errors(config, counts, run(layer(config), own(batches(config, counts))))
        emulated, exact = errors.of("block_float32_rows", fp8_rows=True), errors.of(None)
        share = 0.6 if DTYPE is BF16 else 0.4
        far = {name: (emulated[name], exact[name]) for name in exact if emulated[name] > share * exact[name]}
        assert not far, far


def gradients_of_weights_read_the_rows_that_arrived() -> None:
    """If they are not in FP8, no other rounding hides the one of the rows. The sum for a bias is exact otherwise."""
    config = moe_config(**SIZES, **BIASED)
    found = run(layer(config, fp8_weight_gradients=False), own(batches(config, UNEVEN)))
    errors = Errors(config, UNEVEN, found)
    emulated, others = (errors.of("block_float32_16bit_dw", fp8_rows=fp8_rows) for fp8_rows in (True, False))
    for name in ("gate_and_up_projs", "down_projs", "down_proj_bias"):
        assert emulated[name] < 0.6 * others[name], (name, emulated, others)


def a_dispatch_writes_half_the_bytes() -> None:
    """Counted in the memory of the experts' rank, where a dispatch writes. A token has 2048 values and 16 scales."""
    config = moe_config(**{**SIZES, "dim": 2048, "moe_inter_dim": 16})
    batch = random_batch(config, 8, seed=dist.get_rank()).map(lambda tensor: tensor.to(DEVICE))
    num_bytes = {}
    for fp8_rows in (True, False):
        destroy_buffers()
        made = layer(config, fp8_rows)
        with torch.no_grad():
            dispatch = functools.partial(made.dispatcher.dispatch, batch.x, batch.weights, batch.indices)
            sent = dispatch()
            num_rows = int((sent.indices_RK >= 0).any(dim=1).sum())
            num_bytes[fp8_rows] = written(dispatch)
        assert num_bytes[fp8_rows] == num_rows * (sent.row_bytes or 2 * config.dim)
    assert num_bytes[True] / num_bytes[False] == (2048 + 16 * 4) / 4096 <= 0.53


def written(dispatch: Callable[[], object]) -> int:
    """Return how many bytes of the rows of this rank's region a dispatch writes."""
    (slabs,) = memory._shared.values()
    rows = slabs.own.rows_RD.view(-1).view(torch.uint8)
    changed = torch.zeros_like(rows, dtype=torch.bool)
    for filled_with in (0x5A, 0xA5):  # a byte that is written can be the same as at most one of them
        dist.barrier()
        rows.fill_(filled_with)
        dist.barrier()
        dispatch()
        changed |= rows != filled_with
    return int(changed.sum())


def two_backwards_of_a_graph() -> None:
    """Also where hooks keep the saved tensors, and a sum of two gradients in FP8 is one in 16 bits."""
    config = moe_config(**SIZES)
    made, batch = layer(config), own(batches(config, UNEVEN))
    right = run(made, batch)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert_same(run(made, batch), right)
    made.zero_grad()
    x, weights = batch.x.detach().requires_grad_(), batch.weights.detach().requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    first = torch.autograd.grad(output, (x, weights), batch.grad, retain_graph=True)
    output.backward(batch.grad)
    for name, one, two in zip(("x", "weights"), first, (x.grad, weights.grad), strict=True):
        assert torch.equal(one, right[name])
        assert torch.equal(two, right[name])
    assert_same(made.stacked_grads(), {name: right[name] for name in made.stacked_grads()})


class NotHereError(Exception):
    """A fact that these processes cannot try, and why."""


def deepep_gives_the_bits_of_rows_in_16_bits() -> None:
    config = moe_config(**{**SIZES, "dim": 160, "dtype": BF16})
    reason = deepep.unsupported(torch.device(DEVICE), config)
    if reason is not None:
        raise NotHereError(str(reason))
    for counts in (UNEVEN, ONE_EMPTY):
        batch = own(batches(config, counts))
        narrow, wide = (layer(config, fp8_rows, "deepep") for fp8_rows in (True, False))
        found, right = run(narrow, batch), run(wide, batch)
        assert_same({name: found[name] for name in OF_TOKENS}, {name: right[name] for name in OF_TOKENS})
        sent = narrow.dispatcher.dispatch(batch.x.nan_to_num(), batch.weights, batch.indices)
        assert sent.row_bytes == 160 + 2 * 4
        if DEVICE == "cpu":  # the library may bring rows in another order
            assert_same(run(layer(config), batch), found)


FACTS: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        rows_in_16_bits_give_the_same_bits,
        every_tensor_is_as_its_recipe_rounds_it,
        gradients_of_weights_read_the_rows_that_arrived,
        a_dispatch_writes_half_the_bytes,
        two_backwards_of_a_graph,
        deepep_gives_the_bits_of_rows_in_16_bits,
    )
}


# on GPUs


def never_waits_for_the_device() -> None:
    """After the first forward, no operation of forward and backward waits, and nothing of it is a copy to the host."""
    config = moe_config(**SIZES)
    made, batch = layer(config), own(batches(config, EVEN))
    run(made, batch)
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(x, batch.token_mask, weights, batch.indices).backward(batch.grad)
        with torch.no_grad():
            made(x, batch.token_mask, weights, batch.indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed_train_step() -> None:
    """A captured forward and backward replays with other tokens and routings, and gives all gradients."""
    config = moe_config(**SIZES)
    made, static = layer(config), own(batches(config, UNEVEN))
    static.x.requires_grad_()
    static.weights.requires_grad_()
    wanted = [static.x, static.weights, *made.parameters()]

    def step() -> tuple[torch.Tensor, ...]:
        output = made(*(getattr(static, name) for name in INPUTS))
        return output, *torch.autograd.grad(output, wanted, static.grad)

    graph, found = captured(step)
    names = ["output", "x", "weights", *(name for name, _ in made.named_parameters())]
    for seed in (21, 22):
        batch = own(batches(config, UNEVEN, seed))
        if seed == 22:
            batch.indices[:] = 3
        right = run(made, batch)
        with torch.no_grad():
            write(static, batch)
        for _ in range(2):
            graph.replay()
            local = [(t.to_local() if hasattr(t, "to_local") else t).detach() for t in found]
            assert_same(dict(zip(names, local, strict=True)), {name: right[name] for name in names})


ON_GPUS: dict[str, Callable[[], None]] = {
    fact.__name__: fact for fact in (never_waits_for_the_device, replayed_train_step)
}


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=torch.device("cuda", rank))
    else:
        fakes.install(pytest.MonkeyPatch())
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    facts = FACTS if DEVICE == "cpu" else FACTS | ON_GPUS
    for name in names or facts:
        error = ""
        try:
            facts[name]()
        except NotHereError as reason:
            (folder / f"{name}.rank{rank}.txt").write_text(f"{SKIPPED}{reason}")
            continue
        except Exception:  # any exception is the outcome of the fact
            error = traceback.format_exc()
        (folder / f"{name}.rank{rank}.txt").write_text(error)
        if error:
            os._exit(1)  # the other rank may wait
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
