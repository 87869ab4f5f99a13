"""List the kinds of matrix product whose tiles are chosen, each with its rule and with the tiles that may be better."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experts.gemm import tiling
from experts.gemm.tiling import Tiling


@dataclass(frozen=True)
class Kind:
    """A kind of matrix product. `rule` and `candidates` get the average number of rows per expert.

    Tiles are frozen dataclasses of integers and booleans, of the type `tile`. `moebench tune` measures the candidates
    against the rule's tile. A measured choice that is not among the candidates is ignored.
    """

    name: str
    rule: Callable[[float], Any]
    candidates: Callable[[float], tuple[Any, ...]]
    tile: type[Any] = Tiling


def candidates_for(rows_per_expert: float, pairs: bool) -> tuple[Tiling, ...]:
    """Return the tiles of the grouped GEMM that may be the fastest; see `tiling.tiling_for` for the arguments.

    Some may need more shared memory or registers than a GPU has.
    """
    if rows_per_expert <= tiling.FEW_ROWS:
        heights = [height for height in (16, 32, 64) if rows_per_expert <= 2 * height]
        sizes = [(128, 64, 4), (128, 64, 5), (64, 64, 5), (64, 128, 4), (128, 128, 3), (256, 64, 3)]
        tiles = [Tiling(rows, *size, warps=4) for rows in heights for size in sizes]
        tiles += [Tiling(rows, 256, 64, 3, warps=8) for rows in heights]
    else:
        tiles = [
            Tiling(*size, listed=listed)
            for size in (
                *((128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (256, 128, 64, 3, 8), (256, 128, 64, 4, 8)),
                *((128, 128, 64, 3, 4), (128, 128, 64, 4, 4), (128, 128, 64, 4, 8), (128, 128, 128, 3, 8)),
                *((64, 256, 64, 4, 4), (64, 256, 64, 4, 8), (64, 128, 64, 4, 4)),
            )
            for listed in (True, False)
        ]
    return tuple(Tiling(**{**vars(tile), "columns": tile.columns // 2}) for tile in tiles) if pairs else tuple(tiles)


def _of_rows(name: str, pairs: bool = False) -> Kind:
    def rule(rows_per_expert: float) -> Tiling:
        return tiling.tiling_for(rows_per_expert, pairs)

    return Kind(name, rule, lambda rows_per_expert: candidates_for(rows_per_expert, pairs))


PRODUCT = _of_rows("product")
PRODUCT_BACK = _of_rows("product_back")
GATHERED_PRODUCT = _of_rows("gathered_product")
GATHERED_PRODUCT_BACK = _of_rows("gathered_product_back")
#: The up projection with its activation: ungated, gated with gate and up in halves, and gated with columns of both.
ACTIVATED_PRODUCT = _of_rows("activated_product")
GATED_PRODUCT = _of_rows("gated_product", pairs=True)
INTERLEAVED_PRODUCT = _of_rows("interleaved_product", pairs=True)

KINDS = {
    kind.name: kind
    for kind in (
        *(PRODUCT, PRODUCT_BACK, GATHERED_PRODUCT, GATHERED_PRODUCT_BACK),
        *(ACTIVATED_PRODUCT, GATED_PRODUCT, INTERLEAVED_PRODUCT),
    )
}
