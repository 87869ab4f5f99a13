"""Round sums of tensor cores at once, so that they can be stored while the tensor cores compute the next sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def rounded(sums, dtype: gl.constexpr):
    """Return float32 sums in bfloat16 or float16.

    The assembler joins plain conversions with the packing of pairs, and moves both to the store. There, the store reads
    the sums while tensor cores write the next ones, so the assembler lets each product wait for the one before. It does
    not move inline assembly.
    """
    if dtype == gl.bfloat16:
        values = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [sums], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        values = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [sums], dtype=gl.float16, is_pure=False, pack=2
        )
    return values
