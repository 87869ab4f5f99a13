"""Tables in Markdown."""

from collections.abc import Iterable
from typing import Any


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
