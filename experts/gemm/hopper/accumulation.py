"""Add the gradients of the weights to float32 gradients, with the loading warps of `experts.gemm.hopper.gradients`.

The TMA adds a tile to the gradient: it copies the sums out of shared memory, and the L2 cache adds them. So no program
reads the gradient. A tile in float32 does not fit into shared memory beside the operands, and its registers are needed
for the next tile. So the multiplying warps hand a tile over in four parts, through two buffers, before they go on.
A tile without rows is left out. Each number of the gradient gets one addition from a call, so calls add up in the same
way each time. NVIDIA's documentation of PTX says that these additions take a subnormal number as zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from experts.gemm.hopper.gradients import (
    LEFT,
    LOADING_REGISTERS,
    LOADING_WARPS,
    RIGHT,
    STAGES,
    STEP,
    find_tile,
    load,
    make_buffers,
    multiply_step,
)
from experts.gemm.hopper.storing import make_blocks, write_in_parts

_LEFT, _RIGHT, _STEP, _STAGES = gl.constexpr(LEFT), gl.constexpr(RIGHT), gl.constexpr(STEP), gl.constexpr(STAGES)
_WARPS, _REGISTERS = gl.constexpr(LOADING_WARPS), gl.constexpr(LOADING_REGISTERS)


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
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _RIGHT, 16])
    free = memory[3]
    step = 0
    for tile in range(gl.program_id(0), NUM_TILES, gl.num_programs(0)):
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q)
        if start < end:
            sums = gl.zeros([_LEFT, _RIGHT], gl.float32, layout)
            sums = multiply_step(sums, step, memory, True)
            step += 1
            for _ in range(start + _STEP, end, _STEP):
                sums = multiply_step(sums, step, memory)
                mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
                step += 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            write_in_parts(out, buffers, 0, sums, expert, column, right_column, TRANSPOSED, WARPS)
    tma.store_wait(0)


@gluon.jit
def add_outer_products(
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
    """`parts` is None, because nothing is stored."""
    memory = make_buffers(right.dtype)
    buffers = make_blocks(out, 2)
    gl.warp_specialize(
        [
            (_multiply, (out, offsets, buffers, memory, NUM_TILES, P, Q, TRANSPOSED, num_warps)),
            (load, (left, right, row_to_slot, offsets, memory, parts, None, NUM_TILES, P, Q, K, GATHER)),
        ],
        [_WARPS],
        [_REGISTERS],
    )
