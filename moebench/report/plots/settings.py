"""Keep the user's settings of matplotlib out of moebench's plots, and moebench's settings out of the user's plots.

This module does not import matplotlib at module level: the command line first calls `import_matplotlib`.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any

#: What moebench changes of matplotlib's defaults. All of it is fixed, so that equal results give equal plots.
OURS: Any = {  # Any, because matplotlib's own type lists every key
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "text.parse_math": False,  # a name may contain a $
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # matplotlib would lay out all labels again to see whether they reach the title
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.handlelength": 2.6,  # so that dashes show
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "xtick.major.size": 4,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "savefig.dpi": 200,
    "svg.hashsalt": "moebench",
}


@contextmanager
def settings() -> Iterator[None]:
    """Draw the block's figures with matplotlib's defaults and `OURS`, whatever the user's settings are.

    A figure keeps no setting of its own: draw it and write it in such a block. A character that the font does not have
    is drawn as a box, without a warning.
    """
    import matplotlib

    defaults: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**defaults, **OURS}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        yield


def import_matplotlib() -> None:
    """Import matplotlib as if the user had no settings of it.

    matplotlib reads its settings when it is first imported, and a wrong one ends the import: a backend that does not
    exist in MPLBACKEND, or a matplotlibrc that is not UTF-8. The command line needs none of them. A notebook has to
    import matplotlib with the user's settings, so that only the command line calls this function.
    """
    found = importlib.util.find_spec("matplotlib")
    if "matplotlib" in sys.modules or found is None or found.origin is None:
        return
    data = Path(found.origin).parent / "mpl-data"
    settings = {"MPLBACKEND": "agg", "MATPLOTLIBRC": str(data / "matplotlibrc")}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        # the file in the working folder would come first
        with chdir(data) if Path("matplotlibrc").exists() else nullcontext():
            importlib.import_module("matplotlib")
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
