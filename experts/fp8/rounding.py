"""Find scales and round to FP8: what the kernels that quantise share."""

import functools

import torch
import triton
import triton.language as tl

from experts.fp8.blocks import LEAST_SCALE

_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


def largest(dtype: torch.dtype) -> float:
    """Return the largest finite number of an FP8 format."""
    return torch.finfo(dtype).max


@functools.cache
def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels. Its conversion to FP8 rounds only exact values right."""
    found: bool = triton.knobs.runtime.interpret
    return found


@triton.jit
def scale_of(largest_value, LARGEST: tl.constexpr):
    """Return the scale of blocks from their largest magnitudes. NaN stays NaN."""
    scale = tl.div_rn(largest_value, tl.full([], LARGEST, tl.float32))  # Triton's own division is not exact
    return tl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)


@triton.jit
def reciprocal(scale):
    """Return 1 / scale, rounded to the nearest."""
    return tl.div_rn(tl.full([], 1.0, tl.float32), scale)


@triton.jit
def to_fp8(value, LARGEST: tl.constexpr, EXACT: tl.constexpr):
    """Return values that the conversion to FP8 makes right.

    The GPU rounds to the nearest, and of two nearest to the even one, and it limits the magnitude to LARGEST. With
    EXACT, do this here in float32: the interpreter's conversion is right only for numbers of the format.
    """
    if EXACT:
        value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
        MANTISSA: tl.constexpr = 3 if LARGEST < 1000 else 2
        LEAST: tl.constexpr = 2.0**-6 if LARGEST < 1000 else 2.0**-14
        normal = tl.maximum(tl.abs(value), LEAST)
        power = (normal.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = power * (1.5 * 2.0 ** (23 - MANTISSA))
        value = (value + shift) - shift
    return value


@triton.jit
def four_bytes(first, second, third, fourth, LARGEST: tl.constexpr, EXACT: tl.constexpr):
    """Return the FP8 numbers of four tiles in words of 32 bits. The first tile's numbers are the lowest bytes.

    A transposition moves words faster than bytes. So it takes tiles of every fourth row.
    """
    if EXACT:
        FORMAT: tl.constexpr = tl.float8e4nv if LARGEST < 1000 else tl.float8e5
        a = to_fp8(first, LARGEST, EXACT).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
        b = to_fp8(second, LARGEST, EXACT).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
        c = to_fp8(third, LARGEST, EXACT).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
        d = to_fp8(fourth, LARGEST, EXACT).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
        words = (a | (b << 8) | (c << 16) | (d << 24)).to(tl.int32, bitcast=True)
    else:  # the assembler of CUDA 12.8 crashes at the code for these shifts, and the instruction makes pairs anyway
        NAME: tl.constexpr = "e4m3x2" if LARGEST < 1000 else "e5m2x2"
        words = tl.inline_asm_elementwise(
            "{.reg .b16 low, high;\n"
            "cvt.rn.satfinite." + NAME + ".f32 low, $2, $1;\n"
            "cvt.rn.satfinite." + NAME + ".f32 high, $4, $3;\n"
            "mov.b32 $0, {low, high};}",
            "=r,f,f,f,f",
            [first, second, third, fourth],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return words


@triton.jit
def largest_of(first, second, third, fourth):
    """Return the largest magnitudes of the columns of four tiles."""
    most = tl.maximum(tl.maximum(tl.abs(first), tl.abs(second)), tl.maximum(tl.abs(third), tl.abs(fourth)))
    return tl.max(most, axis=0)


@triton.jit
def apart(words, BF16: tl.constexpr):
    """Return in float32 the two bfloat16 or float16 numbers of each word of 32 bits, the lower half first."""
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low, high = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
    return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)
