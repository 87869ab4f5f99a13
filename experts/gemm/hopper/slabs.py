"""Compute the gradients of the weights, or add to them, with three groups of warps that multiply.

Each group multiplies a slab of 64 columns of the left operand by 256 columns of the right one. So a tile needs fewer
bytes for each product than one of `experts.gemm.hopper.gradients`. Neither shared memory nor the registers have room
for a whole result beside the operands and the next sums. So a group hands a finished slab over in parts, through two
buffers of its own. Meanwhile, tensor cores can multiply the other groups' slabs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma, warpgroup_mma_wait

from experts.gemm.hopper.gradients import (
    LOADING_WARPS,
    RIGHT,
    STAGES,
    STEP,
    find_sources,
    find_tile,
    load_right,
    make_buffers,
    multiply_step,
)
from experts.gemm.hopper.storing import make_blocks, make_zeros, write_in_parts, write_zeros
from experts.gemm.tiling import SLABS_COLUMNS

#: The groups of warps that multiply, the columns of each one's slab, and its warps.
GROUPS, SLAB, WARPS = 3, SLABS_COLUMNS // 3, 4
#: The columns of one instruction. The assembler gives a kernel of more than twelve warps too few registers for 256.
INSTRUCTION_COLUMNS = 128
#: The registers of a thread that multiplies, and of a thread that loads.
REGISTERS, LOADING_REGISTERS = 160, 32
#: Tiles with the same columns of the right operand that follow each other; so both operands' columns stay in L2.
BAND = 6

_GROUPS, _SLAB, _WARPS, _LEFT = (gl.constexpr(size) for size in (GROUPS, SLAB, WARPS, SLABS_COLUMNS))
_RIGHT, _STEP, _STAGES, _BAND = (gl.constexpr(size) for size in (RIGHT, STEP, STAGES, BAND))
_REGISTERS, _LOADING_REGISTERS = gl.constexpr(REGISTERS), gl.constexpr(LOADING_REGISTERS)
_INSTRUCTION_COLUMNS, _LOADING_WARPS = gl.constexpr(INSTRUCTION_COLUMNS), gl.constexpr(LOADING_WARPS)


@gluon.jit
def _find_sources(row_to_slot, row, end, K: gl.constexpr, GATHER: gl.constexpr):
    """Return which row of the left operand belongs to each row, and −1 for rows past the end."""
    return gl.where(row < end, find_sources(row_to_slot, row, end, K, GATHER), -1)


@gluon.jit
def _load(
    left,
    right,
    row_to_slot,
    offsets,
    memory,
    sources,
    parts,
    zeros,
    NUM_TILES: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
):
    """Load the operands of each step, without slabs past P. Store zeros for tiles without rows unless `zeros` is None.

    The left operand's rows of the next step wait in shared memory, because the warps have few registers.
    """
    left_tiles, loaded = memory[0], memory[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _SLAB, _SLAB // 8], [_LOADING_WARPS, 1], [1, 0])
    rows = gl.arange(0, _STEP, layout=gl.BlockedLayout([1], [32], [_LOADING_WARPS], [0]))
    columns = gl.arange(0, _SLAB, layout=gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), NUM_TILES, gl.num_programs(0)):
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q, _LEFT, _BAND)
        if zeros is not None and start == end:
            write_zeros(parts, zeros, expert, tile, P, Q, _LEFT, _RIGHT)
        sources.store(_find_sources(row_to_slot, start + rows, end, K, GATHER))
        for first in range(start, end, _STEP):
            stage = step % _STAGES
            following = _find_sources(row_to_slot, first + _STEP + rows, end, K, GATHER)
            load_right(right, memory, step, first, end, right_column)
            source = sources.load(gl.SliceLayout(1, layout))
            where = left + (source.to(gl.int64) * P)[:, None] + (column + columns)[None, :]
            inside = source >= 0
            for slab in gl.static_range(_GROUPS):
                if column + slab * _SLAB < P:
                    mask = inside[:, None] & (column + slab * _SLAB + columns < P)[None, :]  # masked: zero
                    block = left_tiles.index(_GROUPS * stage + slab)
                    async_copy.async_copy_global_to_shared(block, where + slab * _SLAB, mask=mask)
            async_copy.mbarrier_arrive(loaded.index(stage), increment_count=False)
            sources.store(following)
            step += 1
    if zeros is not None:
        tma.store_wait(0)


@gluon.jit
def _multiply(
    out,
    offsets,
    buffers,
    memory,
    NUM_TILES: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GROUP: gl.constexpr,
):
    loaded, free = memory[2], memory[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _INSTRUCTION_COLUMNS, 16])
    step = 0
    for tile in range(gl.program_id(0), NUM_TILES, gl.num_programs(0)):
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q, _LEFT, _BAND)
        column += GROUP * _SLAB
        steps = (end - start + _STEP - 1) // _STEP
        last = step + steps - 1
        if (column < P) & (steps > 0):
            sums = gl.zeros([_SLAB, _RIGHT], gl.float32, layout)
            sums = multiply_step(sums, step, memory, False, _GROUPS, GROUP)
            for later in range(step + 1, last + 1):
                sums = multiply_step(sums, later, memory, False, _GROUPS, GROUP)
                mbarrier.arrive(free.index((later - 1) % _STAGES))
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index(last % _STAGES))
            write_in_parts(out, buffers, 2 * GROUP, sums, expert, column, right_column, TRANSPOSED, _WARPS)
        else:  # the left operand has no rows, or no columns in this slab
            for later in range(step, last + 1):
                mbarrier.wait(loaded.index(later % _STAGES), (later // _STAGES) & 1)
                mbarrier.arrive(free.index(later % _STAGES))
        step = last + 1
    tma.store_wait(0)


@gluon.jit
def sum_outer_slabs(
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
    """`parts` is as for `sum_outer_products`, or None to add, which keeps what is there."""
    memory = make_buffers(right.dtype, _GROUPS, _SLAB)
    buffers = make_blocks(out, 2 * _GROUPS)
    rows = gl.allocate_shared_memory(gl.int32, [_STEP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if parts is None:
        zeros: gl.constexpr = None
    else:
        zeros = make_zeros(parts)
    gl.warp_specialize(
        [
            (_multiply, (out, offsets, buffers, memory, NUM_TILES, P, Q, TRANSPOSED, 0)),
            (_multiply, (out, offsets, buffers, memory, NUM_TILES, P, Q, TRANSPOSED, 1)),
            (_multiply, (out, offsets, buffers, memory, NUM_TILES, P, Q, TRANSPOSED, 2)),
            (
                _load,
                (left, right, row_to_slot, offsets, memory, rows, parts, zeros, NUM_TILES, P, Q, K, GATHER),
            ),
        ],
        [_WARPS, _WARPS, _LOADING_WARPS],
        [_REGISTERS, _REGISTERS, _LOADING_REGISTERS],
    )
