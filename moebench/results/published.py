"""Find the results that come with the project, and open several results as one frame."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

import moebench
from moebench.errors import ResultsError
from moebench.results.files import PARQUET_NAME
from moebench.results.frame import load
from moebench.results.journal import JOURNAL_NAME
from moebench.workload.spec import checkout

#: The folder of published results in a checkout, and in the package from a wheel.
PUBLISHED = Path("results") / "published"
PACKAGED = Path(moebench.__file__).parent / "published"


def default_folders() -> list[Path]:
    """Return the folders with results in results/published of the current folder, else of the checkout or the wheel.

    Raises ResultsError if none of them has a folder with results.
    """
    for place in _places():
        folders = sorted(place.glob("*/"))
        found = [path for path in folders if any((path / name).is_file() for name in (JOURNAL_NAME, PARQUET_NAME))]
        if found:
            return found
    raise ResultsError(f"{PUBLISHED}: holds no results; name folders with --results")


def find(path: Path) -> Path:
    """Return the path itself if it exists, else the published results of that name, else the path itself."""
    named = (place / path for place in _places()) if path.name == str(path) and not path.exists() else ()
    return next((place for place in named if (place / PARQUET_NAME).is_file()), path)


def is_packaged(path: Path) -> bool:
    """Whether results lie in the installed package, where nothing should be written."""
    return PACKAGED in path.parents


def _places() -> list[Path]:
    root = checkout()
    return [PUBLISHED, *([] if root is None else [root / PUBLISHED]), PACKAGED]


def load_all(folders: Iterable[Path]) -> pd.DataFrame:
    """Return the rows of several results in one frame. Raises ResultsError for a folder without results."""
    return pd.concat([load(folder) for folder in folders], ignore_index=True)
