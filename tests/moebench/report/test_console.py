"""What rich can print becomes text and HTML in which no text of others is anything but text."""

import pytest
from rich.text import Text

from moebench.report.console import as_html, as_text


def test_text_has_the_width_of_the_terminal_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    found = as_text(Text("one two three four five six \x1b[31mseven", style="red"))
    assert max(map(len, found.splitlines())) <= 30
    assert "\x1b" not in found
    assert r"\x1b" in found


def test_html_has_colours_and_no_tags_of_others() -> None:
    found = as_html(Text("<script>[bold]", style="red"))
    assert "&lt;script&gt;[bold]" in found
    assert found.count("<span") == 1
    assert found.startswith("<pre")
