"""Find the results that come with the project, and open several results as one frame."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.frame import PARQUET_NAME, load
from moebench.results.journal import JOURNAL_NAME
from moebench.workload.spec import checkout

#: Where `moebench advise --measure` keeps what it measured, below the current folder.
KEPT = Path("results") / "advised"


def kept_folders() -> list[Path]:
    """Return the folders with results that `moebench advise --measure` has kept in the current folder."""
    return [path for path in sorted(KEPT.glob("*/")) if _has_results(path)]


def _has_results(path: Path) -> bool:
    return any((path / name).is_file() for name in (JOURNAL_NAME, PARQUET_NAME))


def default_folders() -> list[Path]:
    """Return the folders with results in results/published of the current folder, or else of the checkout.

    Raises ResultsError if neither has a folder with results.
    """
    for root in (Path(), checkout()):
        folders = [] if root is None else sorted((root / "results" / "published").glob("*/"))
        found = [path for path in folders if _has_results(path)]
        if found:
            return found
    raise ResultsError("results/published: holds no results; name folders with --results")


def load_all(folders: Iterable[Path]) -> pd.DataFrame:
    """Return the rows of several results in one frame. Raises ResultsError for a folder without results."""
    return pd.concat([load(folder) for folder in folders], ignore_index=True)
