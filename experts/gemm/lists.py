"""List the tiles of rows that are grouped by expert. The host does not wait for their number."""

import torch
import triton
from torch import Tensor

from experts.gemm.kernels import TILE_FIELDS, list_tiles
from experts.gemm.tiling import NO_LIMITS, Limits
from experts.steps import Permutation
from experts.steps.fused.launch import launch, multiprocessors


def most_tiles(permutation: Permutation, rows: int, column_tiles: int = 1) -> int:
    """Return the largest possible number of tiles of `rows` rows, with `column_tiles` of them for the same rows."""
    experts, num_rows = permutation.offsets_L.shape[0], permutation.num_rows
    return (num_rows // rows + min(experts, num_rows)) * column_tiles


def list_of_tiles(permutation: Permutation, rows: int, column_tiles: int = 1, limits: Limits = NO_LIMITS) -> Tensor:
    """Return the tiles of the experts within the limits, int32, as `experts.gemm.kernels.list_tiles` writes them."""
    offsets_L = permutation.offsets_L
    (experts,) = offsets_L.shape
    numbers = (1 + most_tiles(permutation, rows, column_tiles)) * TILE_FIELDS.value
    tiles = torch.empty(numbers, dtype=torch.int32, device=offsets_L.device)
    launch(
        list_tiles,
        (experts,),
        *(offsets_L, tiles),
        EXPERTS=experts,
        BINS=triton.next_power_of_2(experts),
        ROWS=rows,
        COLUMN_TILES=column_tiles,
        OVER=limits.over,
        SMALL=limits.small,
    )
    return tiles


def tiles_and_programs(
    permutation: Permutation, rows: int, listed: bool, column_tiles: int, limits: Limits = NO_LIMITS
) -> tuple[Tensor | None, int]:
    """Return the list of tiles, or None if they are not `listed`, and the number of programs.

    Without a list, there is a program for each tile. With a list, there is one for each multiprocessor, but no more
    than tiles.
    """
    most = most_tiles(permutation, rows, column_tiles)
    if not listed:
        return None, most
    tiles = list_of_tiles(permutation, rows, column_tiles, limits)
    return tiles, min(multiprocessors(tiles.device), most)
