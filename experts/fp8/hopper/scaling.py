"""Find the scales of a tile that several warps share, and leave their reciprocals in shared memory.

The tile is that of `experts.fp8.hopper.tiles`, in words of two bfloat16 numbers. The largest magnitudes are found
without taking the two numbers apart. Each warp leaves in shared memory what it found of its rows and columns. When all
warps have done so, each thread finds the scales of one row and of two columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.fp8.blocks import BLOCK
from experts.fp8.hopper.tiles import apart, reciprocal, scale_of

#: The warps of a program, of which PARTS have the same columns, and as many the same rows.
WARPS, PARTS = 16, 4

_BLOCK, _WORDS, _PARTS = gl.constexpr(BLOCK), gl.constexpr(BLOCK // 2), gl.constexpr(PARTS)
#: The layout of a tile of words.
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4, 4], [8, 1, 4], [PARTS, 1, WARPS // PARTS], [2, 1, 0]))
#: The layouts of what the warps found: in shared memory, and in threads that have a row or a word each.
FOUND = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
FOUND_LAYOUT = gl.constexpr(gl.BlockedLayout([PARTS, 1], [1, 32], [1, WARPS], [1, 0]))
#: The same, where each warp has all of it.
_WHOLE_LAYOUT = gl.constexpr(gl.BlockedLayout([PARTS, 4], [1, 32], [1, WARPS], [1, 0]))


@gluon.jit
def _larger(left, right):
    """Return the larger numbers of words of two bfloat16 numbers."""
    return gl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _largest(words, axis: gl.constexpr):
    """Return words of the largest magnitudes of each of the two columns along an axis."""
    return gl.reduce(words & 0x7FFF7FFF, axis, _larger)


@gluon.jit
def of_warps(rows):
    """Turn [32, 4, PARTS], what each warp found of each row, into [PARTS, 128]."""
    return gl.reshape(gl.permute(rows, (2, 0, 1)), [_PARTS, _BLOCK])


@gluon.jit
def leave_rows(found, words):
    """Leave the largest magnitudes of each row, as each warp finds them, in shared memory."""
    found.store(of_warps(_largest(gl.reshape(words, [_BLOCK // 4, 4, _PARTS, _WORDS // _PARTS]), 3)))


@gluon.jit
def leave_columns(found, words):
    """Leave the largest magnitudes of each column, as each warp finds them, in shared memory."""
    most = _largest(gl.reshape(words, [_PARTS, _BLOCK // (4 * _PARTS), 4, _WORDS]), 2)
    found.store(gl.reduce(most, 1, _larger))


@gluon.jit
def each_row(numbers):
    """Return a number for each row of a tile, [32, 4, 1], from shared memory."""
    return numbers._reinterpret(gl.float32, [_BLOCK // 4, 4], FOUND).load(gl.SliceLayout(2, LAYOUT))[:, :, None]


@gluon.jit
def scales_of_columns(found, by_low, by_high, scales, column_block, INTER: gl.constexpr, LARGEST: gl.constexpr):
    """Store the scale of each column, and leave the reciprocals in shared memory."""
    low, high = apart(gl.reduce(found.load(FOUND_LAYOUT), 0, _larger), True)
    low, high = scale_of(low, LARGEST), scale_of(high, LARGEST)
    word = column_block * _WORDS + gl.arange(0, _WORDS, layout=gl.SliceLayout(0, FOUND_LAYOUT))
    gl.store(scales + 2 * word, low, mask=word < INTER // 2)
    gl.store(scales + 2 * word + 1, high, mask=word < INTER // 2)
    by_low.store(reciprocal(low))
    by_high.store(reciprocal(high))


@gluon.jit
def scales_of_rows(found, reciprocals, scales, block_scale, end, LARGEST: gl.constexpr):
    """Store the scale of each row, and leave the reciprocals in shared memory.

    Store the scale of the block, too, and return its reciprocal.
    """
    low, high = apart(gl.reduce(found.load(FOUND_LAYOUT), 0, _larger), True)
    scale = scale_of(gl.maximum(low, high), LARGEST)
    row = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, FOUND_LAYOUT))
    gl.store(scales + row, scale, mask=row < end)
    reciprocals.store(reciprocal(scale))
    low, high = apart(gl.reduce(gl.reduce(found.load(_WHOLE_LAYOUT), 0, _larger), 0, _larger), True)
    scale = scale_of(gl.maximum(low, high), LARGEST)
    gl.store(block_scale, scale)
    return reciprocal(scale)


@gluon.jit
def store_sums(found, sums, end):
    """Store each row's sum of what the warps found, added in the order in which a reduction over warps adds."""
    total = gl.sum(gl.sum(gl.reshape(found.load(FOUND_LAYOUT), [2, _PARTS // 2, _BLOCK]), axis=0), axis=0)
    row = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, FOUND_LAYOUT))
    total = gl.convert_layout(total, gl.SliceLayout(0, FOUND_LAYOUT), assert_trivial=True)
    gl.store(sums + row, total, mask=row < end)
