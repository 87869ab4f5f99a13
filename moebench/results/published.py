"""Find the results that come with the project."""

from pathlib import Path

import moebench
from moebench.errors import ResultsError
from moebench.results.files import PARQUET_NAME
from moebench.results.journal import JOURNAL_NAME
from moebench.workload.spec import checkout

#: The folder of published results in a checkout, and in the package from a wheel.
PUBLISHED = Path("results") / "published"
PACKAGED = Path(moebench.__file__).parent / "published"
#: Where `moebench advise --measure` keeps what it measured, below the current folder.
KEPT = Path("results") / "advised"


def kept_folders() -> list[Path]:
    """Return the folders with results that `moebench advise --measure` has kept in the current folder."""
    return [path for path in sorted(KEPT.glob("*/")) if _has_results(path)]


def _has_results(path: Path) -> bool:
    return any((path / name).is_file() for name in (JOURNAL_NAME, PARQUET_NAME))


def default_folders() -> list[Path]:
    """Return the folders with results in results/published of the current folder, else of the checkout or the wheel.

    Raises ResultsError if none of them has a folder with results.
    """
    for place in _places():
        found = [path for path in sorted(place.glob("*/")) if _has_results(path)]
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
