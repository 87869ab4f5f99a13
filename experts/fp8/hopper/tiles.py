"""Quantise tiles of 128 rows in registers: what the kernels that transpose rows share.

A tile has 32 groups of 4 rows, and words of two columns. A thread has all 4 rows of a group, which are adjacent bytes
of a transposed column. So rows are transposed without shared memory. Only maxima and sums of several warps pass through
it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.fp8.blocks import BLOCK, LEAST_SCALE

_BLOCK, _LEAST_SCALE = gl.constexpr(BLOCK), gl.constexpr(LEAST_SCALE)


@gluon.jit
def rows_of_tile(layout: gl.constexpr):
    """Return the numbers [32, 4] of the rows."""
    group = gl.arange(0, _BLOCK // 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    return 4 * group[:, None] + gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]


@gluon.jit
def words_of_tile(WORDS: gl.constexpr, layout: gl.constexpr):
    """Return the numbers [WORDS] of the words of a row."""
    return gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))


@gluon.jit
def inside_tile(row, end, word, end_word):
    """Return [32, 4, WORDS], which words have a row before `end` and a place before `end_word`."""
    return (row < end)[:, :, None] & (word < end_word)[None, None, :]


@gluon.jit
def apart(words, BF16: gl.constexpr):
    """Return in float32 the two bfloat16 or float16 numbers of each word of 32 bits, the lower half first."""
    if BF16:
        low, high = words << 16, words & -65536
    else:
        low = (words & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        high = ((words >> 16) & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
    return low.to(gl.float32, bitcast=True), high.to(gl.float32, bitcast=True)


@gluon.jit
def largest_of_rows(tile):
    """Return the largest magnitude of each row, [32, 4]."""
    return gl.max(gl.abs(tile), axis=2)


@gluon.jit
def largest_of_columns(tile):
    """Return the largest magnitude of each column, [WORDS]."""
    return gl.max(gl.max(gl.abs(tile), axis=1), axis=0)


@gluon.jit
def scale_of(largest_value, LARGEST: gl.constexpr):
    """Return what `experts.fp8.rounding.scale_of` returns: the quotient, rounded to the nearest. NaN stays NaN.

    The quotient by a constant is corrected once (Markstein, IBM J. Res. Dev. 34, 1990), which takes fewer instructions
    than a division.
    """
    first = largest_value * (1.0 / LARGEST)
    rest = gl.fma(first, -LARGEST, largest_value)
    scale = gl.where(first == float("inf"), first, gl.fma(rest, 1.0 / LARGEST, first))
    return gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)


@gluon.jit
def reciprocal(scale):
    """Return 1 / scale, rounded to the nearest."""
    return gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def store_columns(values, tile, first_column, column, end_column, layout: gl.constexpr):
    """Store a tile in FP8 as columns of 128 bytes. They are the columns `column` [WORDS] after `first_column`."""
    # the same registers in another order, so that four rows become a word
    TURNED: gl.constexpr = gl.BlockedLayout(
        layout.size_per_thread, layout.threads_per_warp, layout.warps_per_cta, [1, 2, 0]
    )
    row = rows_of_tile(TURNED)
    column = gl.convert_layout(column, gl.SliceLayout(0, gl.SliceLayout(1, TURNED)), assert_trivial=True)
    target = values + (first_column + column)[None, None, :] * _BLOCK + row[:, :, None]
    found = gl.convert_layout(tile, TURNED).to(values.dtype.element_ty)
    gl.store(target, found, mask=(column < end_column)[None, None, :])
