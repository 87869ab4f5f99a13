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
#: Warps of a group, and the registers of the threads of the loading warp.
WARPS, LOADING_REGISTERS = 4, 24
#: The registers of the threads of each of two groups, with two blocks of columns, and of three, with one.
REGISTERS_OF_TWO, REGISTERS_OF_THREE = 240, 160

_BLOCK, _SLAB, _WARPS = gl.constexpr(BLOCK), gl.constexpr(SLAB), gl.constexpr(WARPS)


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
def count_slabs(rows):
    """Return how many slabs a number of rows has."""
    return (rows + _SLAB - 1) // _SLAB


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
    a_tiles, _, results, loaded, _, _ = memory
    STAGES: gl.constexpr = loaded.shape[0]
    KEPT: gl.constexpr = a_tiles.shape[0] // results.shape[0] - STAGES
    slot = KEPT + step % STAGES
    if KEPT > 0:
        slot = gl.where(is_kept(index, num_steps, STAGES, KEPT), index, slot)
    return slot


@gluon.jit
def load_step(a, b, a_first, slabs, left, right, half, p, memory, step, index, num_steps, fresh, BLOCKS: gl.constexpr):
    """Load one step's operands at columns p of a half: a slab of rows of `a` for each group, and blocks of rows of `b`.

    The first `slabs` groups have rows. For the others, nothing is loaded. The first block begins at row `left`, and the
    second of two at row `right`. `step` counts all steps of a program, and `index` those of a tile. Only `fresh` rows
    of `a` are loaded.
    """
    a_tiles, b_tiles, results, loaded, free, _ = memory
    GROUPS: gl.constexpr = results.shape[0]
    STAGES: gl.constexpr = loaded.shape[0]
    stage = step % STAGES
    barrier = loaded.index(stage)
    mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
    if fresh:
        for count in gl.static_range(1, GROUPS + 1):
            has = (slabs >= count) if count == GROUPS else (slabs == count)
            mbarrier.expect(barrier, count * a.block_type.nbytes + BLOCKS * b.block_type.nbytes, pred=has)
        slot = _find_slot(index, num_steps, memory, step)
        for slab in gl.static_range(GROUPS):
            target = a_tiles.index(GROUPS * slot + slab)._reinterpret(a.dtype, [_SLAB, 1, _BLOCK], a.layout)
            tma.async_copy_global_to_shared(a, [a_first + slab * _SLAB, half, p], barrier, target, pred=slab < slabs)
    else:
        mbarrier.expect(barrier, BLOCKS * b.block_type.nbytes)
    target = b_tiles.index(BLOCKS * stage)._reinterpret(b.dtype, [_BLOCK, 1, _BLOCK], b.layout)
    tma.async_copy_global_to_shared(b, [left, half, p], barrier, target)
    if BLOCKS == 2:
        target = b_tiles.index(2 * stage + 1)._reinterpret(b.dtype, [_BLOCK, 1, _BLOCK], b.layout)
        tma.async_copy_global_to_shared(b, [right, half, p], barrier, target)


@gluon.jit
def store_block(out, result, values, first, second, row, half, column):
    """Store a slab of one block. What lies past an end of `out` is not stored."""
    tma.store_wait(0)  # the block before has left the memory of the result
    result.store(values)
    fence_async_shared()
    source = result._reinterpret(out.dtype, [1, 1, _SLAB, 1, _BLOCK], out.layout)
    tma.async_copy_shared_to_global(out, [first, second, row, half, column], source)


@gluon.jit
def begin_block(a_tile, b_tile):
    """Let the tensor cores multiply a slab by a block of columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    zeros = gl.zeros([_SLAB, _BLOCK], gl.float32, layout)
    return warpgroup_mma(a_tile, b_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _begin_in_turn(a_tile, b_tile, turns, turn, WHICH: gl.constexpr):
    """Begin a block when it is this group's turn, and pass the turn on as soon as the tensor cores have the block."""
    mbarrier.wait(turns.index(WHICH), turn & 1)
    sums = begin_block(a_tile, b_tile)
    mbarrier.arrive(turns.index(1 - WHICH))
    return sums


@gluon.jit
def find_operands(index, num_steps, memory, step, WHICH: gl.constexpr):
    """Wait for a step's operands. Return a group's slab, and the number of the stage in shared memory."""
    a_tiles, _, results, loaded, _, _ = memory
    STAGES: gl.constexpr = loaded.shape[0]
    stage = step % STAGES
    mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
    slot = _find_slot(index, num_steps, memory, step)
    return a_tiles.index(results.shape[0] * slot + WHICH), stage


@gluon.jit
def multiply_pair(
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
    _, b_tiles, results, _, free, turns = memory
    result, last = results.index(WHICH), num_steps - 1
    by, left_by, right_by = gl.load(a_where), gl.load(left_where), gl.load(right_where)
    # two steps early: the loads take longer than a step
    next_step, third_step = gl.minimum(1, last), gl.minimum(2, last)
    next_by, later_by = gl.load(a_where + next_step * a_stride), gl.load(a_where + third_step * a_stride)
    next_left, later_left = gl.load(left_where + next_step * b_stride), gl.load(left_where + third_step * b_stride)
    next_right, later_right = gl.load(right_where + next_step * b_stride), gl.load(right_where + third_step * b_stride)
    a_tile, stage = find_operands(0, num_steps, memory, step, WHICH)
    sums = _begin_in_turn(a_tile, b_tiles.index(2 * stage), turns, 2 * step, WHICH)
    store_block(out, result, done_left, first, second, row, left_half, left_column)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    left = sums * gl.expand_dims(by * left_by, 1)
    sums = _begin_in_turn(a_tile, b_tiles.index(2 * stage + 1), turns, 2 * step + 1, WHICH)
    if TWO:
        store_block(out, result, done_right, first, second, row, right_half, right_column)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(free.index(stage))
    right = sums * gl.expand_dims(by * right_by, 1)
    step += 1
    for index in range(1, num_steps):
        by, left_by, right_by = next_by, next_left, next_right
        next_by, next_left, next_right = later_by, later_left, later_right
        following = gl.minimum(index + 2, last)
        later_by = gl.load(a_where + following * a_stride)
        later_left, later_right = (
            gl.load(left_where + following * b_stride),
            gl.load(right_where + following * b_stride),
        )
        a_tile, stage = find_operands(index, num_steps, memory, step, WHICH)
        sums = _begin_in_turn(a_tile, b_tiles.index(2 * stage), turns, 2 * step, WHICH)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        left += sums * gl.expand_dims(by * left_by, 1)
        sums = _begin_in_turn(a_tile, b_tiles.index(2 * stage + 1), turns, 2 * step + 1, WHICH)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index(stage))
        right += sums * gl.expand_dims(by * right_by, 1)
        step += 1
    return left, right


@gluon.jit
def skip_steps(num_steps, memory, step, WHICH: gl.constexpr, TURNS: gl.constexpr):
    """Leave out the steps of a slab without rows, but take part in what the other warps wait for.

    With TURNS, these are also the turns of `multiply_pair`.
    """
    _, _, _, loaded, free, turns = memory
    STAGES: gl.constexpr = loaded.shape[0]
    for _ in range(num_steps):
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(free.index(stage))
        if TURNS:
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
    a_type: gl.constexpr,
    b_type: gl.constexpr,
    out_type: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
):
    """Return the shared memory and the barriers: tiles of both operands, results, `loaded`, `free` and `turns`.

    It has the operands of STAGES steps, and the rows of `a` for KEPT more. A step has a slab of `a` for each of the
    GROUPS, and BLOCKS blocks of `b`. `loaded` and `free` count steps. Only two groups take turns.
    """
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    BITS: gl.constexpr = out_type.primitive_bitwidth
    RESULT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    a_tiles = gl.allocate_shared_memory(a_type, [GROUPS * (KEPT + STAGES), _SLAB, _BLOCK], OPERAND)
    b_tiles = gl.allocate_shared_memory(b_type, [BLOCKS * STAGES, _BLOCK, _BLOCK], OPERAND)
    results = gl.allocate_shared_memory(out_type, [GROUPS, _SLAB, _BLOCK], RESULT)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(2):
        mbarrier.init(turns.index(which), count=1)
    mbarrier.arrive(turns.index(0))  # the first group begins
    fence_async_shared()
    return a_tiles, b_tiles, results, loaded, free, turns
