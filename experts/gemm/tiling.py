"""How the grouped GEMM is cut into tiles."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """A program's tile, and how it is computed."""

    rows: int
    columns: int  # of the result: a gated activation's tile multiplies by twice as many
    depth: int  # of one step of the sum
    stages: int  # steps whose operands are on their way at once
    warps: int
    #: Programs that stay, one a multiprocessor, go through a list of tiles; else there is a program a tile.
    listed: bool = False


def tiling_for(rows_per_expert: float, pairs: bool) -> Tiling:
    """The tiling for so many rows an expert on average; `pairs`: of gate and up.

    With few rows, reading the weights is all: tiles are as low as tensor cores take them, so that rows that do not
    exist cost no registers, and several programs share an SM, which together keep its memory busy. With many, a tile
    is as large as registers allow, and a program has an SM to itself. The bounds are an H200's, 2026-11.
    """
    if rows_per_expert <= 24:
        return Tiling(16 if rows_per_expert <= 12 else 32, 64 if pairs else 128, depth=64, stages=4, warps=4)
    if rows_per_expert <= 56:
        return Tiling(64, 64 if pairs else 128, depth=64, stages=4, warps=4)
    return Tiling(128, 128 if pairs else 256, depth=64, stages=3, warps=8, listed=True)
