"""Compute the gradients of the weights: aᵀ·b of each expert's rows, where the rows of one operand can be gathered.

Every expert has the same number of tiles, so a program finds its tiles without a list. The terms of a tile's sums are
the rows of the expert's group. Four warps load: they gather the rows of one operand, 16 bytes a thread, and let the TMA
copy the rows of the other. Eight warps multiply. A tile is stored while tensor cores multiply the first step of the
next tile. A tile without rows has no step: the warps that load store its zeros, all from the same memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.gemm.hopper.descriptors import MOST_ROWS
from experts.gemm.hopper.rounding import rounded
from experts.gemm.hopper.storing import make_blocks, make_zeros, write, write_zeros

#: Columns of the gathered operand, columns of the other operand, and rows of a step: the sizes of a tile.
LEFT, RIGHT, STEP = 128, 256, 64
STAGES = 3  # steps whose operands are in shared memory at the same time; a fourth does not fit beside the result
LOADING_WARPS, MULTIPLYING_WARPS = 4, 8
LOADING_REGISTERS = 64
#: Tiles with the same columns of the right operand that follow each other; so both operands' columns stay in L2.
BAND = 8

_LEFT, _RIGHT, _STEP, _STAGES = gl.constexpr(LEFT), gl.constexpr(RIGHT), gl.constexpr(STEP), gl.constexpr(STAGES)
_BAND, _WARPS = gl.constexpr(BAND), gl.constexpr(LOADING_WARPS)
_REGISTERS = gl.constexpr(LOADING_REGISTERS)


@gluon.jit
def find_tile(tile, offsets, P: gl.constexpr, Q: gl.constexpr, LEFT: gl.constexpr = _LEFT, BAND: gl.constexpr = _BAND):
    """Return a tile's expert and first columns of the two operands, and the start and end of the expert's group."""
    LEFT_TILES: gl.constexpr = (P + LEFT - 1) // LEFT
    RIGHT_TILES: gl.constexpr = (Q + _RIGHT - 1) // _RIGHT
    expert = tile // (LEFT_TILES * RIGHT_TILES)
    tile = tile % (LEFT_TILES * RIGHT_TILES)
    band = tile // (BAND * RIGHT_TILES)
    tile -= band * (BAND * RIGHT_TILES)
    height = gl.minimum(LEFT_TILES - band * BAND, BAND)
    start = gl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return expert, (band * BAND + tile % height) * LEFT, tile // height * _RIGHT, start, gl.load(offsets + expert)


@gluon.jit
def find_sources(row_to_slot, row, end, K: gl.constexpr, GATHER: gl.constexpr):
    """Return which row of the left operand belongs to each row."""
    if GATHER:
        return gl.load(row_to_slot + row, mask=row < end, other=0).to(gl.int32) // K
    return row


@gluon.jit
def load_right(right, memory, step, first, end, column):
    """Load a step's rows of the right operand once the memory of the stage is free."""
    _, right_tiles, loaded, free = memory
    stage = step % _STAGES
    mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
    mbarrier.expect(loaded.index(stage), right.block_type.nbytes)
    block = right_tiles.index(stage)._reinterpret(right.dtype, [1, 1, _STEP, _RIGHT], right.layout)
    place = [MOST_ROWS, end, MOST_ROWS - end + first, column]
    tma.async_copy_global_to_shared(right, place, loaded.index(stage), block)


@gluon.jit
def load(
    left,
    right,
    row_to_slot,
    offsets,
    memory,
    parts,
    zeros,
    NUM_TILES: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
):
    """Load the operands of each step, and store zeros for tiles without rows unless `zeros` is None."""
    left_tiles, loaded = memory[0], memory[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _LEFT, _LEFT // 8], [_WARPS, 1], [1, 0])
    rows = gl.arange(0, _STEP, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _LEFT, layout=gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), NUM_TILES, gl.num_programs(0)):
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q)
        if zeros is not None and start == end:
            write_zeros(parts, zeros, expert, tile, P, Q, _LEFT, _RIGHT)
        inside = column + columns < P
        source = find_sources(row_to_slot, start + rows, end, K, GATHER)
        for first in range(start, end, _STEP):
            stage = step % _STAGES
            row = first + rows
            where = left + (source.to(gl.int64) * P)[:, None] + (column + columns)[None, :]
            source = find_sources(row_to_slot, row + _STEP, end, K, GATHER)  # early: the next step waits for it
            load_right(right, memory, step, first, end, right_column)
            mask = (row < end)[:, None] & inside[None, :]  # what is masked becomes zero
            async_copy.async_copy_global_to_shared(left_tiles.index(stage), where, mask=mask)
            async_copy.mbarrier_arrive(loaded.index(stage), increment_count=False)
            step += 1
    if zeros is not None:
        tma.store_wait(0)


@gluon.jit
def multiply_step(sums, step, memory, FIRST: gl.constexpr = False, SLABS: gl.constexpr = 1, SLAB: gl.constexpr = 0):
    """Return the sums with a step that tensor cores may still multiply. The step before is done."""
    left_tiles, right_tiles, loaded, _ = memory
    stage = step % _STAGES
    mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
    fence_async_shared()  # tensor cores read what the loading warps wrote
    left_tile = left_tiles.index(SLABS * stage + SLAB).permute((1, 0))
    sums = warpgroup_mma(left_tile, right_tiles.index(stage), sums, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(sums,))


@gluon.jit
def _multiply(
    out,
    offsets,
    result,
    memory,
    NUM_TILES: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _RIGHT, 16])
    free = memory[3]
    step = 0
    # A tile is stored while the first step of the next tile is multiplied. Before the first tile, nothing is stored.
    done = gl.zeros([_LEFT, _RIGHT], out.dtype, layout)
    expert, column, right_column = 0, P, 0
    for tile in range(gl.program_id(0), NUM_TILES, gl.num_programs(0)):
        following, its_column, its_right_column, start, end = find_tile(tile, offsets, P, Q)
        if start < end:
            sums = gl.zeros([_LEFT, _RIGHT], gl.float32, layout)
            sums = multiply_step(sums, step, memory, True)
            step += 1
            write(out, result, done, expert, column, right_column, TRANSPOSED, 0)
            expert, column, right_column = following, its_column, its_right_column
            for _ in range(start + _STEP, end, _STEP):
                sums = multiply_step(sums, step, memory)
                mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
                step += 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            done = rounded(sums, out.dtype)
    write(out, result, done, expert, column, right_column, TRANSPOSED, 0)
    tma.store_wait(0)


@gluon.jit
def make_buffers(dtype: gl.constexpr, SLABS: gl.constexpr = 1, WIDTH: gl.constexpr = _LEFT):
    """Return memory for the operands of all stages, and the barriers on which the warps wait for each other.

    The left operand is in slabs of WIDTH columns. The warps that multiply a slab free a stage once.
    """
    LEFT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, WIDTH], dtype)
    RIGHT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _RIGHT], dtype)
    left_tiles = gl.allocate_shared_memory(dtype, [SLABS * _STAGES, _STEP, WIDTH], LEFT_LAYOUT)
    right_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _RIGHT], RIGHT_LAYOUT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1 + 32 * _WARPS)  # the TMA, and each thread that gathers
        mbarrier.init(free.index(stage), count=SLABS)
    fence_async_shared()
    return left_tiles, right_tiles, loaded, free


@gluon.jit
def sum_outer_products(
    left,
    right,
    out,
    parts,
    row_to_slot,
    offsets,
    NUM_TILES: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`parts` is `out` in the small blocks in which zeros are stored, which lie in one piece in memory."""
    zeros = make_zeros(parts)
    memory = make_buffers(right.dtype)
    result = make_blocks(out, 1).index(0)
    gl.warp_specialize(
        [
            (_multiply, (out, offsets, result, memory, NUM_TILES, P, Q, TRANSPOSED, num_warps)),
            (load, (left, right, row_to_slot, offsets, memory, parts, zeros, NUM_TILES, P, Q, K, GATHER)),
        ],
        [_WARPS],
        [_REGISTERS],
    )
