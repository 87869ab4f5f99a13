"""Define a console that escapes all text that it prints, and print what rich can print as text and as HTML.

No text moves the cursor, changes a colour or the direction of writing (moebench.escapes). rich's markup in a text is
shown as it is.
"""

import io
import shutil
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from moebench import escapes

#: Columns of a table in a notebook.
HTML_WIDTH = 120
_PRE = '<pre style="white-space: pre; line-height: 1.25; font-family: Menlo, Consolas, monospace">{code}</pre>'


class EscapingConsole(Console):
    """A console that escapes what it prints. Only the styles that moebench gives reach the terminal as controls."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(escapes.visible(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escapes.visible(text), style, control)


def messages() -> Console:
    """Return a console for the progress of a run that Python code started, in a terminal or a notebook."""
    return EscapingConsole(stderr=True, highlight=False, markup=False, emoji=False)


def as_text(renderable: RenderableType) -> str:
    """Return what rich prints of an object, without colours, in the width of the terminal."""
    console = EscapingConsole(
        file=io.StringIO(), width=shutil.get_terminal_size((100, 24)).columns, color_system=None, markup=False
    )
    console.print(renderable, soft_wrap=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def as_html(renderable: RenderableType) -> str:
    """Return what rich prints of an object as HTML for a notebook, with colours."""
    console = EscapingConsole(file=io.StringIO(), width=HTML_WIDTH, record=True, markup=False, force_terminal=True)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_PRE)
