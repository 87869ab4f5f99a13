"""Turn figures into the bytes of image files."""

import io
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moebench.report.plots.look import settle
from moebench.report.plots.settings import settings


def images(make: Callable[[], Figure], formats: Sequence[str]) -> dict[str, bytes]:
    """Draw a figure with moebench's settings, and return it in each of the formats "png" and "svg".

    `Figure.savefig` would draw the figure once more for each format, because it does not know that the layout is fixed.
    """
    found = {}
    with settings():
        figure = make()
        settle(figure)
        for kind in formats:
            figure.dpi = matplotlib.rcParams["savefig.dpi"]
            if kind == "svg":
                text = io.StringIO()  # matplotlib would encode each of many small texts for a file of bytes
                FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
                found[kind] = text.getvalue().encode()
            else:
                content = io.BytesIO()
                FigureCanvasAgg(figure).print_png(content)
                found[kind] = content.getvalue()
    return found


def failure(name: str, error: Exception) -> str:
    """Return the line that says which picture failed and why."""
    why = next(iter(str(error).splitlines()), "")
    return f"plot {name}: cannot be drawn: {type(error).__name__}: {why}; everything else is written"
