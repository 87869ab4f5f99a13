"""Turn figures into the bytes of image files."""

import io
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from moebench.report.plots.look import settle
from moebench.report.plots.settings import settings


def images(make: Callable[[], Figure], formats: Sequence[str]) -> dict[str, bytes]:
    """Draw a figure with moebench's settings, and return it in each of the formats "png" and "svg"."""
    found = {}
    with settings():
        figure = make()
        settle(figure)
        for kind in formats:
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
            found[kind] = content.getvalue()
    return found


def failure(name: str, error: Exception) -> str:
    """Return the line that says which picture failed and why."""
    why = next(iter(str(error).splitlines()), "")
    return f"plot {name}: cannot be drawn: {type(error).__name__}: {why}; everything else is written"
