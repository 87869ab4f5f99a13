"""Choose the tiling of the grouped GEMM."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiling:
    """The size of a tile and how a program computes it."""

    rows: int
    columns: int  # columns of the result; a gated activation's tile reads twice as many columns of weights
    depth: int  # the number of terms that one step adds
    stages: int  # the number of steps that load operands at the same time
    warps: int
    #: True if there is one program per multiprocessor, which goes through a list of tiles; else one program per tile.
    listed: bool = False


#: Up to this average of rows per expert, tiles are small.
FEW_ROWS = 56
#: The tile for many rows per expert. It needs the registers of a whole multiprocessor.
LARGE = Tiling(128, 256, depth=64, stages=3, warps=8, listed=True)
#: The tile where LARGE would leave half of the multiprocessors without work; see `spread`.
NARROW = Tiling(128, 128, depth=64, stages=4, warps=8)
#: LARGE for the up projection with a gated activation, which reads a pair of columns for each column of the result.
PAIRS = replace(LARGE, columns=LARGE.columns // 2)

#: Columns of the left operand in a tile of three groups of warps that compute gradients of the weights.
SLABS_COLUMNS = 192


def three_groups(columns: int) -> bool:
    """Return whether three groups of warps compute gradients of the weights on Hopper GPUs, instead of two.

    Three groups cut the left operand's columns into tiles of 192 instead of 128. They compute if these tiles have at
    most 2.5% more columns than the operand. On an H200 (2026-11-30), gradients of up projections took 1.58 instead of
    1.72 ms with 2880 columns and 3.17 instead of 3.22 with 7168, but 1.27 instead of 1.20 with 2048 (3.1% more).
    """
    return -columns % SLABS_COLUMNS <= 0.025 * columns


def tiling_for(rows_per_expert: float, pairs: bool) -> Tiling:
    """Return the tiling for an average of `rows_per_expert`.

    `pairs` is true if each element of the result is computed from a pair of gate and up.

    With few rows per expert, reading the weights takes nearly all the time. Then a tile has as few rows as tensor cores
    allow, so that missing rows take no registers. Several programs share an SM and keep the memory busy. With many
    rows per expert, a tile is as large as the registers allow, and each program has an SM to itself. The bounds were
    chosen on an H200 (2026-11).
    """
    if rows_per_expert <= 24:
        return Tiling(16 if rows_per_expert <= 12 else 32, 64 if pairs else 128, depth=64, stages=4, warps=4)
    if rows_per_expert <= FEW_ROWS:
        return Tiling(64, 64 if pairs else 128, depth=64, stages=4, warps=4)
    return PAIRS if pairs else LARGE


def spread(tile: Tiling, rows_per_expert: float, num_rows: int, width: int, multiprocessors: int) -> Tiling:
    """Return NARROW in place of LARGE if all rows fill tiles of LARGE for at most half of the multiprocessors.

    This is for experts that have less than a tile of rows on average. Routing may give all rows to few of them. On an
    H200 (2026-11-30), the down projection of mixtral-8x7b took 0.098 instead of 0.148 ms for two experts with 256 rows
    each, and 0.238 instead of 0.228 ms for eight with 64 rows each.
    """
    full = -(-num_rows // LARGE.rows) * -(-width // LARGE.columns)
    few = rows_per_expert < LARGE.rows and 2 * full <= multiprocessors
    return NARROW if tile == LARGE and few else tile


@dataclass(frozen=True)
class Limits:
    """Which experts a launch is for: those with more than `over` rows, and at most `most` tiles of rows (0: any).

    Another launch, with tiles of `small` rows (0: none), is for the experts with no more than `over` rows.
    """

    over: int = 0
    most: int = 0
    small: int = 0


NO_LIMITS = Limits()
#: Small tiles are for experts with up to this many tiles of rows: each tile reads the expert's weights again.
MOST_SMALL = 2
#: With so few tokens, no expert has enough rows that large tiles would pay for another launch.
FEW_TOKENS = 64


def limits_for(rows: int, listed: bool, rows_per_expert: float, num_tokens: int) -> tuple[Limits, ...]:
    """Return the limits of one launch with a chosen tile of `rows`, or of it and of another launch with large tiles.

    The tile is chosen for the average number of rows per expert, and routing may give single experts many more rows.
    Only the device knows.
    """
    if listed or rows_per_expert > FEW_ROWS or num_tokens <= FEW_TOKENS:
        return (NO_LIMITS,)
    return Limits(most=MOST_SMALL), Limits(over=MOST_SMALL * rows, small=rows)
