"""Share the parts of the kernels for Hopper GPUs: descriptors, and what the groups of warps do in each step."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.fp8.blocks import BLOCK

SLAB = 64  # rows of one group of warps
#: Whether the groups take turns. Without turns, both multiply and both add at the same time.
TURNS = True
MULTIPLYING_WARPS, MULTIPLYING_REGISTERS, LOADING_REGISTERS = 4, 240, 24

_BLOCK, _SLAB = gl.constexpr(BLOCK), gl.constexpr(SLAB)
_WARPS, _TURNS = gl.constexpr(MULTIPLYING_WARPS), gl.constexpr(TURNS)


def shared_layout(rank: int, bits: int) -> gl.NVMMASharedLayout:
    """Return the layout of a tile in shared memory, which tensor cores read: swizzled rows of 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of a tensor, in blocks that have the tensor's rank."""
    layout = shared_layout(len(block), 8 * tensor.element_size())
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@gluon.jit
def count_blocks(width):
    """Return how many blocks of 128 columns a width has."""
    return (width + _BLOCK - 1) // _BLOCK


@gluon.jit
def split_column(block, width, HALVES: gl.constexpr):
    """Return the half of a block of columns, and the block's first column in it."""
    if HALVES == 1:
        return 0, block * _BLOCK
    blocks = count_blocks(width)
    half = (block >= blocks).to(gl.int32)
    return half, (block - half * blocks) * _BLOCK


@gluon.jit
def is_kept(index, num_steps, STAGES: gl.constexpr, KEPT: gl.constexpr):
    """Return whether the rows of `a` for a tile's step stay in shared memory for the next tile of the same rows.

    With fewer steps than STAGES, the rows after them would be loaded while these are still multiplied.
    """
    return (index < KEPT) & (num_steps >= STAGES)


@gluon.jit
def _find_slot(index, num_steps, memory, step):
    """Return where the rows of `a` are: kept rows have places of their own, the others take turns."""
    a_tiles, b_tiles, _, _, _, _ = memory
    STAGES: gl.constexpr = b_tiles.shape[0] // 2
    KEPT: gl.constexpr = a_tiles.shape[0] // 2 - STAGES
    slot = KEPT + step % STAGES
    if KEPT > 0:
        slot = gl.where(is_kept(index, num_steps, STAGES, KEPT), index, slot)
    return slot


@gluon.jit
def load_step(a, b, a_first, b_left, b_right, half, p, memory, step, index, num_steps, fresh):
    """Load one step's operands: two slabs of rows of `a`, and two blocks of rows of `b`, at columns p of a half.

    `step` counts all steps of a program, and `index` those of a tile. Only `fresh` rows of `a` are loaded.
    """
    a_tiles, b_tiles, _, loaded, free, _ = memory
    STAGES: gl.constexpr = b_tiles.shape[0] // 2
    stage = step % STAGES
    barrier = loaded.index(stage)
    mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
    if fresh:
        mbarrier.expect(barrier, 2 * a.block_type.nbytes + 2 * b.block_type.nbytes)
        slot = _find_slot(index, num_steps, memory, step)
        for slab in gl.static_range(2):
            target = a_tiles.index(2 * slot + slab)._reinterpret(a.dtype, [_SLAB, 1, _BLOCK], a.layout)
            tma.async_copy_global_to_shared(a, [a_first + slab * _SLAB, half, p], barrier, target)
    else:
        mbarrier.expect(barrier, 2 * b.block_type.nbytes)
    target = b_tiles.index(2 * stage)._reinterpret(b.dtype, [_BLOCK, 1, _BLOCK], b.layout)
    tma.async_copy_global_to_shared(b, [b_left, half, p], barrier, target)
    target = b_tiles.index(2 * stage + 1)._reinterpret(b.dtype, [_BLOCK, 1, _BLOCK], b.layout)
    tma.async_copy_global_to_shared(b, [b_right, half, p], barrier, target)


@gluon.jit
def store_block(out, result, values, first, second, row, half, column):
    """Store a slab of one block. What lies past an end of `out` is not stored."""
    tma.store_wait(0)  # the block before has left the memory of the result
    result.store(values)
    fence_async_shared()
    source = result._reinterpret(out.dtype, [1, 1, _SLAB, 1, _BLOCK], out.layout)
    tma.async_copy_shared_to_global(out, [first, second, row, half, column], source)


@gluon.jit
def _begin_block(a_tile, b_tile, turns, turn, WHICH: gl.constexpr):
    """Multiply 128 columns when it is this group's turn, and pass the turn on as soon as the tensor cores have it."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    zeros = gl.zeros([_SLAB, _BLOCK], gl.float32, layout)
    if _TURNS:
        mbarrier.wait(turns.index(WHICH), turn & 1)
    sums = warpgroup_mma(a_tile, b_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if _TURNS:
        mbarrier.arrive(turns.index(1 - WHICH))
    return sums


@gluon.jit
def multiply_tile(
    a_where,
    a_stride,
    left_where,
    right_where,
    b_stride,
    num_steps,
    memory,
    step,
    out,
    done_left,
    done_right,
    first,
    second,
    row,
    left_half,
    left_column,
    right_half,
    right_column,
    TWO: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Return a slab's float32 sums over one or more steps, for the left and the right block of columns.

    `a_where` points to the scales of the slab's rows, and `left_where` and `right_where` to those of the two blocks.
    While the first step is multiplied, store the blocks of the tile before, `done_left` and `done_right`, at their
    places, which the arguments from `first` to `right_column` give. Without TWO, there is no right block to store.
    """
    a_tiles, b_tiles, results, loaded, free, turns = memory
    STAGES: gl.constexpr = b_tiles.shape[0] // 2
    result = results.index(WHICH)
    a_scale = gl.load(a_where)
    left_scale, right_scale = gl.load(left_where), gl.load(right_where)
    by_left, by_right = a_scale * left_scale, a_scale * right_scale
    following = gl.minimum(1, num_steps - 1)
    a_scale = gl.load(a_where + following * a_stride)
    left_scale, right_scale = gl.load(left_where + following * b_stride), gl.load(right_where + following * b_stride)
    stage = step % STAGES
    mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
    a_tile = a_tiles.index(2 * _find_slot(0, num_steps, memory, step) + WHICH)
    sums = _begin_block(a_tile, b_tiles.index(2 * stage), turns, 2 * step, WHICH)
    store_block(out, result, done_left, first, second, row, left_half, left_column)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    left = sums * gl.expand_dims(by_left, 1)
    sums = _begin_block(a_tile, b_tiles.index(2 * stage + 1), turns, 2 * step + 1, WHICH)
    if TWO:
        store_block(out, result, done_right, first, second, row, right_half, right_column)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(free.index(stage))
    right = sums * gl.expand_dims(by_right, 1)
    step += 1
    for index in range(1, num_steps):
        stage = step % STAGES
        by_left, by_right = a_scale * left_scale, a_scale * right_scale
        following = gl.minimum(index + 1, num_steps - 1)  # early: the next step waits for the loads
        a_scale = gl.load(a_where + following * a_stride)
        left_scale, right_scale = (
            gl.load(left_where + following * b_stride),
            gl.load(right_where + following * b_stride),
        )
        mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
        a_tile = a_tiles.index(2 * _find_slot(index, num_steps, memory, step) + WHICH)
        sums = _begin_block(a_tile, b_tiles.index(2 * stage), turns, 2 * step, WHICH)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        left += sums * gl.expand_dims(by_left, 1)
        sums = _begin_block(a_tile, b_tiles.index(2 * stage + 1), turns, 2 * step + 1, WHICH)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index(stage))
        right += sums * gl.expand_dims(by_right, 1)
        step += 1
    return left, right


@gluon.jit
def skip_steps(num_steps, memory, step, WHICH: gl.constexpr):
    """Leave out the steps of a slab without rows, but take part in what the other warps wait for."""
    _, b_tiles, _, loaded, free, turns = memory
    STAGES: gl.constexpr = b_tiles.shape[0] // 2
    for _ in range(num_steps):
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(free.index(stage))
        if _TURNS:
            for block in gl.static_range(2):
                mbarrier.wait(turns.index(WHICH), (2 * step + block) & 1)
                mbarrier.arrive(turns.index(1 - WHICH))
        step += 1


@gluon.jit
def no_block(dtype: gl.constexpr):
    """Return a block of zeros, as a tile without steps has it."""
    return gl.zeros([_SLAB, _BLOCK], dtype, gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32]))


@gluon.jit
def allocate(
    a_type: gl.constexpr, b_type: gl.constexpr, out_type: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr
):
    """Return the shared memory and the barriers: tiles of both operands, results, `loaded`, `free` and `turns`.

    It has the operands of STAGES steps, and the rows of `a` for KEPT more. `loaded` and `free` count steps.
    """
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    BITS: gl.constexpr = out_type.primitive_bitwidth
    RESULT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    a_tiles = gl.allocate_shared_memory(a_type, [2 * (KEPT + STAGES), _SLAB, _BLOCK], OPERAND)
    b_tiles = gl.allocate_shared_memory(b_type, [2 * STAGES, _BLOCK, _BLOCK], OPERAND)
    results = gl.allocate_shared_memory(out_type, [2, _SLAB, _BLOCK], RESULT)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both groups of warps
    for which in gl.static_range(2):
        mbarrier.init(turns.index(which), count=1)
    mbarrier.arrive(turns.index(0))  # the first group begins
    fence_async_shared()
    return a_tiles, b_tiles, results, loaded, free, turns
