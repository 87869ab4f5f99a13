"""Store or add the tiles of the gradients of the weights. The TMA leaves out what lies past an end of the gradient."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from experts.gemm.hopper.rounding import rounded


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Let the TMA add a block of shared memory to global memory, as `tma.async_copy_shared_to_global` copies it.

    Triton 3.6 and 3.7 have the operation for their own `descriptor.atomic_add`, but no name for it in Gluon.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def write(out, buffer, values, expert, column, right_column, TRANSPOSED: gl.constexpr, RUNNING: gl.constexpr):
    """Store values through a buffer, or add them in float32, once at most RUNNING of the writes before still run."""
    tma.store_wait(RUNNING)
    if TRANSPOSED:
        buffer.permute((1, 0)).store(values)
        place = [expert, right_column, column]
    else:
        buffer.store(values)
        place = [expert, column, right_column]
    fence_async_shared()
    block = buffer._reinterpret(out.dtype, out.block_type.shape, out.layout)
    if out.dtype == gl.float32:
        async_add_shared_to_global(out, place, block)
    else:
        tma.async_copy_shared_to_global(out, place, block)


@gluon.jit
def make_blocks(out, COUNT: gl.constexpr):
    """Return buffers of the size of a block of `out`."""
    SHAPE: gl.constexpr = [out.block_type.shape[1], out.block_type.shape[2]]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, out.dtype)
    return gl.allocate_shared_memory(out.dtype, [COUNT, SHAPE[0], SHAPE[1]], LAYOUT)


@gluon.jit
def make_zeros(parts):
    """Return a buffer of zeros of the size of a block of `parts`. `write_zeros` may read it, and nobody writes it."""
    SHAPE: gl.constexpr = [parts.block_type.shape[1], parts.block_type.shape[2]]
    zeros = make_blocks(parts, 1).index(0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    zeros.store(gl.zeros(SHAPE, parts.dtype, layout))
    fence_async_shared()
    return zeros


@gluon.jit
def write_zeros(parts, zeros, expert, tile, P: gl.constexpr, Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Store a tile's share of the zeros of an expert's gradient, block by block of `parts`, without a wait.

    The shares are as large as tiles, but in the order of memory, so that successive blocks lie side by side.
    """
    TILES: gl.constexpr = ((P + LEFT - 1) // LEFT) * ((Q + RIGHT - 1) // RIGHT)
    ROWS: gl.constexpr = parts.block_type.shape[1]
    NUMBERS: gl.constexpr = ROWS * parts.block_type.shape[2]
    BLOCKS: gl.constexpr = (P * Q + NUMBERS - 1) // NUMBERS
    SHARE: gl.constexpr = (BLOCKS + TILES - 1) // TILES
    block = zeros._reinterpret(parts.dtype, parts.block_type.shape, parts.layout)
    first = tile % TILES * SHARE
    for number in range(first, gl.minimum(first + SHARE, BLOCKS)):
        tma.async_copy_shared_to_global(parts, [expert, number * ROWS, 0], block)


@gluon.jit
def _halves(sums, WARPS: gl.constexpr):
    """Return the left and the right half of the columns."""
    ROWS: gl.constexpr = sums.shape[0]
    WIDTH: gl.constexpr = sums.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    left, right = gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, WIDTH]), (0, 2, 1)))
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def write_in_parts(
    out, buffers, FIRST: gl.constexpr, sums, expert, column, right_column, TRANSPOSED: gl.constexpr, WARPS: gl.constexpr
):
    """Store or add sums in parts that fill a buffer. They take turns with the two buffers from FIRST on."""
    left, right = _halves(sums, WARPS)
    first, second = _halves(left, WARPS)
    third, fourth = _halves(right, WARPS)
    quarters = (first, second, third, fourth)
    WIDTH: gl.constexpr = first.shape[1]
    for number in gl.static_range(4):
        quarter, place = quarters[number], right_column + number * WIDTH
        if buffers.shape[1 if TRANSPOSED else 2] < WIDTH:
            half, other = _halves(quarter, WARPS)
            write(out, buffers.index(FIRST), half, expert, column, place, TRANSPOSED, 1)
            write(out, buffers.index(FIRST + 1), other, expert, column, place + WIDTH // 2, TRANSPOSED, 1)
        else:
            if out.dtype != gl.float32:
                quarter = rounded(quarter, out.dtype)
            write(out, buffers.index(FIRST + number % 2), quarter, expert, column, place, TRANSPOSED, 1)
