"""Add the gradients of the weights to float32 gradients, with the loading warps of `experts.gemm.hopper.gradients`.

The TMA adds a tile to the gradient: it copies the sums out of shared memory, and the L2 cache adds them. So no program
reads the gradient. A tile in float32 does not fit into shared memory beside the operands, and its registers are needed
for the next tile. So the multiplying warps hand a tile over in four parts, through two buffers, before they go on.
A tile without rows is left out. Each number of the gradient gets one addition from a call, so calls add up in the same
way each time. NVIDIA's documentation of PTX says that these additions take a subnormal number as zero.
"""

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from experts.gemm.hopper.descriptors import aligned, described
from experts.gemm.hopper.gradients import (
    LEFT,
    LOADING_REGISTERS,
    LOADING_WARPS,
    RIGHT,
    STAGES,
    STEP,
    find_tile,
    launch_outer,
    load,
    make_buffers,
    multiply_step,
)
from experts.steps import Permutation

#: The columns of the right operand in a part of a tile, and the parts in shared memory at the same time.
PART, BUFFERS = 64, 2


def add_outer(
    left: Tensor, right_NQ: Tensor, out: Tensor, permutation: Permutation, gather: bool, transposed: bool = False
) -> None:
    """Add to `out` what `experts.gemm.hopper.outer` returns, before it is rounded.

    out: [L, P, Q] float32, or [L, Q, P] with `transposed`; contiguous, from a multiple of 16 bytes on.
    """
    if permutation.num_rows == 0:
        return
    left, right_NQ = aligned(left), aligned(right_NQ)
    described_out = described(out, [1, PART, LEFT] if transposed else [1, LEFT, PART])
    launch_outer(add_outer_products, left, right_NQ, described_out, permutation, gather, transposed)


_LEFT, _RIGHT, _STEP, _STAGES = gl.constexpr(LEFT), gl.constexpr(RIGHT), gl.constexpr(STEP), gl.constexpr(STAGES)
_WARPS, _REGISTERS = gl.constexpr(LOADING_WARPS), gl.constexpr(LOADING_REGISTERS)
_PART, _BUFFERS = gl.constexpr(PART), gl.constexpr(BUFFERS)


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Let the TMA add a block of shared memory to global memory, as `tma.async_copy_shared_to_global` copies it.

    Triton 3.6 and 3.7 have the operation for their own `descriptor.atomic_add`, but no name for it in Gluon.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def _halves(sums, WARPS: gl.constexpr):
    """Return the left and the right half of the columns."""
    WIDTH: gl.constexpr = sums.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    left, right = gl.split(gl.permute(gl.reshape(sums, [_LEFT, 2, WIDTH]), (0, 2, 1)))
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def _add_part(out, buffers, values, part: gl.constexpr, expert, column, right_column, TRANSPOSED: gl.constexpr):
    """Add a part of a tile. What lies past an end of `out` is left out."""
    tma.store_wait(_BUFFERS - 1)  # the part before the last one has left the memory of this part
    buffer = buffers.index(part % _BUFFERS)
    if TRANSPOSED:
        buffer.permute((1, 0)).store(values)
        fence_async_shared()
        block = buffer._reinterpret(out.dtype, [1, _PART, _LEFT], out.layout)
        async_add_shared_to_global(out, [expert, right_column + part * _PART, column], block)
    else:
        buffer.store(values)
        fence_async_shared()
        block = buffer._reinterpret(out.dtype, [1, _LEFT, _PART], out.layout)
        async_add_shared_to_global(out, [expert, column, right_column + part * _PART], block)


@gluon.jit
def _multiply(
    out,
    offsets,
    left_tiles,
    right_tiles,
    buffers,
    loaded,
    free,
    num_tiles,
    P: gl.constexpr,
    Q: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _RIGHT, 16])
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q)
        if start < end:
            sums = gl.zeros([_LEFT, _RIGHT], gl.float32, layout)
            sums = multiply_step(sums, step, left_tiles, right_tiles, loaded, True)
            step += 1
            for _ in range(start + _STEP, end, _STEP):
                sums = multiply_step(sums, step, left_tiles, right_tiles, loaded, False)
                mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
                step += 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            half, other_half = _halves(sums, WARPS)
            first, second = _halves(half, WARPS)
            third, fourth = _halves(other_half, WARPS)
            _add_part(out, buffers, first, 0, expert, column, right_column, TRANSPOSED)
            _add_part(out, buffers, second, 1, expert, column, right_column, TRANSPOSED)
            _add_part(out, buffers, third, 2, expert, column, right_column, TRANSPOSED)
            _add_part(out, buffers, fourth, 3, expert, column, right_column, TRANSPOSED)
    tma.store_wait(0)


@gluon.jit
def add_outer_products(
    left,
    right,
    out,
    row_to_slot,
    offsets,
    EXPERTS: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    num_warps: gl.constexpr,
):
    left_tiles, right_tiles, loaded, free = make_buffers(right.dtype)
    SHAPE: gl.constexpr = [_PART, _LEFT] if TRANSPOSED else [_LEFT, _PART]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, gl.float32)
    if TRANSPOSED:
        buffers = gl.allocate_shared_memory(gl.float32, [_BUFFERS, _PART, _LEFT], LAYOUT)
    else:
        buffers = gl.allocate_shared_memory(gl.float32, [_BUFFERS, _LEFT, _PART], LAYOUT)
    num_tiles = EXPERTS * ((P + _LEFT - 1) // _LEFT) * ((Q + _RIGHT - 1) // _RIGHT)
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, offsets, left_tiles, right_tiles, buffers, loaded, free, num_tiles, P, Q, TRANSPOSED, num_warps),
            ),
            (
                load,
                (
                    left,
                    right,
                    row_to_slot,
                    offsets,
                    left_tiles,
                    right_tiles,
                    loaded,
                    free,
                    num_tiles,
                    P,
                    Q,
                    K,
                    GATHER,
                    True,
                ),
            ),
        ],
        [_WARPS],
        [_REGISTERS],
    )
