"""LongRuled and Lines print what rich prints of the same table and texts."""

import io
from itertools import product

import pytest
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.report.tables.boxes import Lines, LongRuled, ruled

CASES = ("e16k4d128i192 forward zipf, masked", "a", "", "Übergröße 漢字漢字 wide", "oneverylongwordwithoutanyspaces")
STYLES = ("", "bold red")
WIDTHS = (12, 30, 45, 80)


def printed(renderable: RenderableType, width: int, colour: bool) -> str:
    system = "standard" if colour else None
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system=system, legacy_windows=False)
    console.print(renderable)
    return file.getvalue()


def head(no_wrap: bool) -> Table:
    table = ruled()
    table.add_column(Text("verdict"), overflow="fold")
    table.add_column("case", overflow="fold")
    table.add_column("ms", justify="right", no_wrap=no_wrap)
    return table


def rows() -> list[list[Text]]:
    return [
        [Text(f"{case[:9]}", style=style), Text(case), Text("12.5" * (1 + number % 2), style=STYLES[number % 2])]
        for number, (case, style) in enumerate(product(CASES, STYLES))
    ]


@pytest.mark.parametrize("no_wrap", [False, True])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_table_is_printed_as_rich_prints_it(width: int, colour: bool, no_wrap: bool) -> None:
    table = head(no_wrap)
    for row in rows():
        table.add_row(*row)
    assert printed(LongRuled(head(no_wrap), rows()), width, colour) == printed(table, width, colour)


def test_a_long_table_without_rows_is_its_head() -> None:
    assert printed(LongRuled(head(True), []), 40, True) == printed(head(True), 40, True)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_lines_are_printed_as_rich_prints_them(width: int, colour: bool) -> None:
    texts = [Text(case, style=style).append(" 1.25", style="dim") for case, style in product(CASES, STYLES)]
    texts += [Text("two\nlines"), Text("a\ttab"), Text("plain")]
    expected = "".join(printed(text, width, colour) for text in texts)
    assert printed(Lines(texts), width, colour) == expected
