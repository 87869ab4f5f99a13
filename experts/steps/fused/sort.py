"""Mask choices, and sort them by expert with a stable, deterministic counting sort.

The sort has three passes, or one for few choices. First, each block of choices counts its choices by expert. Second, a
running sum over all (expert, block) pairs gives the row where each block's choices of each expert end. Third, a
choice's row is that end minus the number of choices of the same expert from this choice to the end of its block. With
few choices, a single kernel does the same: every block counts all choices itself, so no block waits for another block's
counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.steps import Permutation
from experts.steps.fused.launch import launch

BLOCK = 128  # a block compares each pair of its choices, so work and registers grow with BLOCK²
BLOCK_OF_FEW = 32  # smaller: with few choices, more programs than multiprocessors are never needed
FEW_CHOICES = 1024  # with more choices, counting all of them in every block takes longer than two more kernels
MASKED = 512  # choices that one program masks


def sort_by_expert(indices_TK: Tensor, first: int, count: int) -> Permutation:
    """As `Steps.sort_by_expert`. The local experts and "no local expert" are `count` + 1 bins."""
    num_slots = indices_TK.numel()
    num_blocks = triton.cdiv(num_slots, BLOCK)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=indices_TK.device)

    row_to_slot, slot_to_row, row_to_expert = (empty(torch.int64, num_slots) for _ in range(3))
    if num_slots == 0:
        return Permutation(
            row_to_slot, slot_to_row, row_to_expert, empty(torch.int32, count).zero_(), indices_TK.shape[1]
        )
    offsets_L = empty(torch.int32, count)
    indices_TK = indices_TK.contiguous()
    if num_slots <= FEW_CHOICES:
        launch(
            _sort_few,
            (triton.cdiv(num_slots, BLOCK_OF_FEW),),
            *(indices_TK, row_to_slot, slot_to_row, row_to_expert, offsets_L, num_slots, first, count),
            BINS=triton.next_power_of_2(count + 2),
            ALL=max(32, triton.next_power_of_2(num_slots)),
            BLOCK=BLOCK_OF_FEW,
        )
        return Permutation(row_to_slot, slot_to_row, row_to_expert, offsets_L, indices_TK.shape[1])
    counts = empty(torch.int32, count + 1, num_blocks)
    sizes = (num_slots, num_blocks, first, count)
    bins = triton.next_power_of_2(count + 2)  # the last bin is for places past the last choice
    launch(_count, (num_blocks,), indices_TK, counts, *sizes, BINS=bins, BLOCK=BLOCK)
    ends = torch.cumsum(counts.view(-1), 0, dtype=torch.int32)
    launch(
        _place,
        (num_blocks,),
        *(indices_TK, ends, row_to_slot, slot_to_row, row_to_expert, offsets_L),
        *sizes,
        BINS=bins,
        BLOCK=BLOCK,
    )
    return Permutation(row_to_slot, slot_to_row, row_to_expert, offsets_L, indices_TK.shape[1])


def mask_choices(indices_TK: Tensor, token_mask_T: Tensor) -> Tensor:
    """As `Steps.mask_choices`."""
    masked_TK = torch.empty(indices_TK.shape, dtype=torch.int64, device=indices_TK.device)
    num_slots, k = indices_TK.numel(), indices_TK.shape[1]
    grid = (triton.cdiv(num_slots, MASKED),)
    launch(
        _mask,
        grid,
        *(indices_TK.contiguous(), token_mask_T.contiguous(), masked_TK, num_slots, k),
        SLOTS=MASKED,
    )
    return masked_TK


@triton.jit
def _mask(indices, token_mask, masked, num_slots, k, SLOTS: tl.constexpr):
    slots = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    inside = slots < num_slots
    active = tl.load(token_mask + slots // k, mask=inside, other=0) != 0
    index = tl.load(indices + slots, mask=inside & active, other=0).to(tl.int64)
    tl.store(masked + slots, tl.where(active, index, -1), mask=inside)


@triton.jit
def _bin(indices, slots, num_slots, first, count):
    """Return each slot's local expert, or `count` for no local expert, or `count` + 1 past the last choice."""
    local = tl.load(indices + slots, mask=slots < num_slots, other=0).to(tl.int64) - first
    expert = tl.where((local >= 0) & (local < count), local, count)
    return tl.where(slots < num_slots, expert, count + 1).to(tl.int32)


@triton.jit
def _sort_few(
    indices,
    row_to_slot,
    slot_to_row,
    row_to_expert,
    offsets,
    num_slots,
    first,
    count,
    BINS: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    every = tl.arange(0, ALL)
    everyones = _bin(indices, every, num_slots, first, count)
    counts = tl.histogram(everyones, BINS)
    ends = tl.cumsum(counts, 0)
    before = tl.histogram(tl.where(every < block * BLOCK, everyones, BINS - 1), BINS)
    place = tl.arange(0, BLOCK)
    slots = block * BLOCK + place
    expert = _bin(indices, slots, num_slots, first, count)
    precedes = (expert[:, None] == expert[None, :]) & (place[None, :] < place[:, None])
    row = tl.gather(ends - counts + before, expert, 0) + tl.sum(precedes.to(tl.int32), axis=1)
    inside = slots < num_slots
    tl.store(row_to_slot + row, slots.to(tl.int64), mask=inside)
    tl.store(slot_to_row + slots, row.to(tl.int64), mask=inside)
    tl.store(row_to_expert + row, expert.to(tl.int64), mask=inside)
    if block == 0:
        bins = tl.arange(0, BINS)
        tl.store(offsets + bins, ends, mask=bins < count)


@triton.jit
def _count(indices, counts, num_slots, num_blocks, first, count, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slots = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(_bin(indices, slots, num_slots, first, count), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins.to(tl.int64) * num_blocks + block, found, mask=bins <= count)


@triton.jit
def _place(
    indices,
    ends,
    row_to_slot,
    slot_to_row,
    row_to_expert,
    offsets,
    num_slots,
    num_blocks,
    first,
    count,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    slots = block.to(tl.int64) * BLOCK + place
    expert = _bin(indices, slots, num_slots, first, count)
    follows = (expert[:, None] == expert[None, :]) & (place[None, :] >= place[:, None])
    inside = slots < num_slots
    end = tl.load(ends + expert.to(tl.int64) * num_blocks + block, mask=inside, other=0)
    row = (end - tl.sum(follows.to(tl.int32), axis=1)).to(tl.int64)
    tl.store(row_to_slot + row, slots, mask=inside)
    tl.store(slot_to_row + slots, row, mask=inside)
    tl.store(row_to_expert + row, expert.to(tl.int64), mask=inside)
    if block == 0:
        bins = tl.arange(0, BINS)
        last = tl.load(ends + (bins.to(tl.int64) + 1) * num_blocks - 1, mask=bins < count, other=0)
        tl.store(offsets + bins, last, mask=bins < count)
