"""Make tables in the two styles that moebench uses in a terminal, and print many lines quickly."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text


def ruled(padding: Any = (0, 1, 0, 0)) -> Table:
    """Return a table for results, with a line below the head."""
    return Table(box=SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)


def plain() -> Table:
    """Return a table for lists, without lines and with a bold head."""
    return Table(box=None, pad_edge=False, header_style="bold")


@dataclass(frozen=True)
class Lines:
    """Texts of one line each, as an object that rich can print. A text that does not fit is wrapped.

    rich itself takes ten times as long: it wraps every text and looks for words in it.
    """

    texts: Iterable[Text]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text in self.texts:
            if _fits(text, options.max_width):
                yield from text.render(console, end="\n")
            else:
                yield text


def _fits(text: Text, width: int) -> bool:
    """Return whether rich would print a text in one line, its characters as they are, and no style but of its parts."""
    return not text.style and text.cell_len <= width and "\n" not in text.plain and "\t" not in text.plain


@dataclass(frozen=True)
class LongRuled:
    """A table like `ruled` for many thousands of rows, as an object that rich can print.

    `head` is a table of `ruled` with columns and no rows. The cells of `rows` are texts of one style each. rich chooses
    the widths of the columns and prints the head. This class prints the rows as rich would, in a tenth of the time.
    """

    head: Table
    rows: Sequence[Sequence[Text]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        probes = [_Probe(*_extent(cells)) for cells in zip(*self.rows, strict=True)]
        if probes:
            self.head.add_row(*probes)
        lines = console.render_lines(self.head, options, pad=False, new_lines=True)
        for line in lines[: len(lines) - bool(probes)]:  # without the row of probes
            yield from line
        columns = [_ColumnOfCells(console, *pair) for pair in zip(self.head.columns, probes, strict=bool(probes))]
        for row in self.rows:
            cells = [column.lines(cell.plain) for column, cell in zip(columns, row, strict=True)]
            for number in range(max(map(len, cells))):
                yield from _joined(cells, number, row, columns)


class _Probe:
    """A cell that takes as much room as all cells of a column, and is told the column's width when rich prints it."""

    def __init__(self, minimum: int, maximum: int) -> None:
        self._extent = Measurement(minimum, maximum)
        self.width = 0

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return self._extent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.width = options.max_width
        yield Text()


def _extent(cells: Sequence[Text]) -> tuple[int, int]:
    """Return the widths of the longest word and of the longest line of cells, as rich measures a text."""
    texts = {cell.plain for cell in cells}
    words = {word for text in texts for word in text.split()}
    lines = {line for text in texts for line in text.splitlines()}
    return max(map(cell_len, words), default=0), max(map(cell_len, lines), default=0)


class _ColumnOfCells:
    """A column of known width. `lines` returns a cell's text as lines that are as wide as the column."""

    def __init__(self, console: Console, column: Column, probe: _Probe) -> None:
        self.blank = " " * probe.width
        self.lines = cache(self._lines)
        self._console, self._column = console, column

    def _lines(self, text: str) -> list[str]:
        width, column = len(self.blank), self._column
        if not width:
            return [""]  # the terminal is so narrow that rich leaves the column empty
        how: Any = {"justify": column.justify, "overflow": column.overflow, "no_wrap": column.no_wrap}
        folded = Text(text).wrap(self._console, width, **how)
        return [line.plain + " " * (width - line.cell_len) for line in folded]


def _joined(
    cells: Sequence[list[str]], number: int, row: Sequence[Text], columns: Sequence[_ColumnOfCells]
) -> Iterator[Segment]:
    """Yield one line of a row: the cells' lines of this number, with two spaces between them."""
    together = ""
    for place, (lines, cell, column) in enumerate(zip(cells, row, columns, strict=True)):
        gap = _GAP * bool(place)
        if cell.style and number < len(lines):
            yield Segment(together + gap)
            yield Segment(lines[number], cell.style if isinstance(cell.style, Style) else Style.parse(cell.style))
            together = ""
        else:
            together += gap + (lines[number] if number < len(lines) else column.blank)
    yield Segment(together)
    yield Segment.line()


#: Between two columns of `ruled`: the padding of a cell, and the line between cells, which is a space.
_GAP = "  "
