"""One rank of two whose rows travel in FP8, for test_fp8_rows.py: over gloo in Triton's interpreter, or on GPUs.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/experts/fp8_ranks.py FOLDER [NAME ...]

It checks facts, and writes the traceback of each into a file.
"""

import dataclasses
import itertools
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
from torch.distributed.device_mesh import init_device_mesh

from experts import BackendConfig, GroupedExperts, MoEConfig, destroy_buffers
from experts.exchange import memory
from moebench.parity.quantization import fp8_product, rows_in_fp8
from tests.experts import fakes
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
RECIPE = "block_float32_rows"


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
    for counts, fields in itertools.product((UNEVEN, ONE_EMPTY, EVEN), ({}, {"apply_router_weight_after_down": True})):
        config = moe_config(**SIZES, **fields)
        batch, (narrow, wide) = own(batches(config, counts)), (layer(config), layer(config, fp8_rows=False))
        found, right = run(narrow, batch), run(wide, batch)
        of_tokens = "output", "x", "weights"
        assert_same({name: found[name] for name in of_tokens}, {name: right[name] for name in of_tokens})
        for name in found.keys() - {*of_tokens}:
            assert not torch.equal(found[name], right[name]), f"{name} has read rows in 16 bits"
        with torch.no_grad():
            given = batch.x, batch.token_mask, batch.weights, batch.indices
            assert torch.equal(narrow(*given), wide(*given))


def errors(found: Named, right: Named) -> dict[str, float]:
    """Return the error of each tensor of this rank, relative to its norm."""
    rank = dist.get_rank()
    error = {}
    for name, tensor in found.items():
        whole = right[name]
        mine = whole if tensor.shape == whole.shape else whole[2 * rank : 2 * rank + 2]
        error[name] = float((tensor.double().cpu() - mine).norm() / mine.norm()) if mine.numel() else 0.0
    return error


def every_tensor_is_as_its_recipe_rounds_it() -> None:
    """The emulation comes far closer than the exact result, and closer than one whose weights' gradients see x."""
    for counts, fields, options in (
        (UNEVEN, {}, {}),
        (ONE_EMPTY, BIASED, {}),
        (UNEVEN, BIASED, {"fp8_weight_gradients": False}),
    ):
        config, recipe = moe_config(**SIZES, **fields), "block_float32_16bit_dw" if options else RECIPE
        both, rank = batches(config, counts), dist.get_rank()
        whole = Batch(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in both), strict=True)))
        start = sum(counts[:rank])
        halved = None if fields else (config.dim, 2 * config.moe_inter_dim)
        rounded = rows_in_fp8(RECIPE)
        travelled = whole.with_(x=rounded(whole.x), grad=rounded(whole.grad))

        def of(batch: Batch, recipe: str | None) -> Named:
            product = torch.matmul if recipe is None else fp8_product(recipe, halved)
            right = expected(config, random_parameters(config), batch, product)
            cut = slice(start, start + counts[rank])
            return {n: t[cut] if n in ("output", "x", "weights") else t for n, t in right.items()}

        found = run(layer(config, **options), own(both))
        emulated, exact = errors(found, of(travelled, recipe)), errors(found, of(whole, None))
        share = 0.5 if DTYPE is BF16 else 0.4
        far = {name: (emulated[name], exact[name]) for name in exact if emulated[name] > share * exact[name]}
        assert not far, far
        others = errors(found, of(whole, "block_float32_16bit_dw" if options else "block_float32"))
        if options:  # without the rounding of FP8 after it, the rounding of the rows shows
            assert emulated["gate_and_up_projs"] < 0.5 * others["gate_and_up_projs"]
            assert emulated["down_projs"] < 0.9 * others["down_projs"]
            assert emulated["down_proj_bias"] < 0.1 * others["down_proj_bias"]


def written(made: GroupedExperts, batch: Batch) -> int:
    """Return how many bytes the rows of the other rank take in this rank's region after a forward's dispatch."""
    (slabs,) = memory._shared.values()
    region, other = slabs.own.rows_RD, slabs.slab(1 - slabs.rank)
    counts = []
    for poison in (0x5A, 0xA5):  # a byte that changes neither has its value by chance in at most one of them
        destroyed = region.view(torch.uint8)
        dist.barrier()
        destroyed.fill_(poison)
        dist.barrier()
        with torch.no_grad():
            made.dispatcher.dispatch(batch.x, batch.weights, batch.indices)
        counts.append(region.view(-1).view(torch.uint8) != poison)
        dist.barrier()
    del other
    return int((counts[0] | counts[1]).sum())


def a_dispatch_writes_half_the_bytes() -> None:
    """Counted in the memory of the experts' rank, where a dispatch writes. A token has 2048 values and 16 scales."""
    config = moe_config(**{**SIZES, "dim": 2048, "moe_inter_dim": 16})
    batch = random_batch(config, 8, seed=dist.get_rank()).map(lambda tensor: tensor.to(DEVICE))
    num_bytes = {}
    for fp8_rows in (True, False):
        destroy_buffers()
        made = layer(config, fp8_rows)
        with torch.no_grad():
            sent = made.dispatcher.dispatch(batch.x, batch.weights, batch.indices)
        num_rows = int((sent.indices_RK >= 0).any(dim=1).sum())
        num_bytes[fp8_rows] = written(made, batch)
        assert num_bytes[fp8_rows] == num_rows * (sent.row_bytes or 2 * config.dim)
    assert num_bytes[True] / num_bytes[False] == (2048 + 16 * 4) / 4096 <= 0.53


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


def deepep_gives_the_bits_of_rows_in_16_bits() -> None:
    config = dataclasses.replace(moe_config(**SIZES), dtype=BF16)
    if DEVICE == "cuda":
        pytest.importorskip("deep_ep")
    for counts in (UNEVEN, ONE_EMPTY):
        batch = own(batches(config, counts))
        narrow, wide = (layer(config, fp8_rows, "deepep") for fp8_rows in (True, False))
        found, right = run(narrow, batch), run(wide, batch)
        of_tokens = "output", "x", "weights"
        assert_same({name: found[name] for name in of_tokens}, {name: right[name] for name in of_tokens})
        sent = narrow.dispatcher.dispatch(batch.x.nan_to_num(), batch.weights, batch.indices)
        assert sent.row_bytes == 208 + 2 * 4
        over_symm_mem = run(layer(config), batch)
        assert_same(over_symm_mem, found)


FACTS: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        rows_in_16_bits_give_the_same_bits,
        every_tensor_is_as_its_recipe_rounds_it,
        a_dispatch_writes_half_the_bytes,
        two_backwards_of_a_graph,
        deepep_gives_the_bits_of_rows_in_16_bits,
    )
}


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=torch.device("cuda", rank))
    else:
        fakes.install(pytest.MonkeyPatch())
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in names or FACTS:
        error = ""
        try:
            FACTS[name]()
        except Exception:  # any exception is the outcome of the fact
            error = traceback.format_exc()
        (folder / f"{name}.rank{rank}.txt").write_text(error)
        if error:
            os._exit(1)  # the other rank may wait
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
