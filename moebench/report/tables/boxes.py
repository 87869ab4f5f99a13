"""Make empty tables in the two styles that moebench uses in a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def ruled(padding: Any = (0, 1, 0, 0)) -> Table:
    """Return a table for results, with a line below the head."""
    return Table(box=SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)


def plain() -> Table:
    """Return a table for lists, without lines and with a bold head."""
    return Table(box=None, pad_edge=False, header_style="bold")
