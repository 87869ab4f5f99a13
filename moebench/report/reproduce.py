"""Find the command that measures one row of results again."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebench.errors import SweepError
from moebench.report.tables.cells import Row
from moebench.run.runfile import SWEEP_NAME, sweeps_of
from moebench.workload.spec import find_sweep, load_sweep


@dataclass(frozen=True)
class Reproducer:
    """The sweeps that may contain the rows of a results folder.

    `case_ids` has the cases of each sweep by the name of the sweep, as a user writes it on a command line.
    """

    case_ids: dict[str, frozenset[str]]

    @classmethod
    def of(cls, folder: Path) -> "Reproducer":
        """Return the Reproducer of a folder. The sweep file in the folder is first. The sweeps of its runs follow."""
        case_ids = {}
        for name in _sweeps(folder):
            try:
                jobs = load_sweep(find_sweep(name)).jobs()
            except SweepError:  # for example, the file with the sweep's recorded routing is missing
                continue
            case_ids[name] = frozenset(job.case.case_id for job in jobs)
        return cls(case_ids)

    def command(self, row: Row) -> str | None:
        """Return `moebench run …` for the job of the row, or None if no sweep has its case."""
        sweep = next((name for name, ids in self.case_ids.items() if row["case_id"] in ids), None)
        if sweep is None:
            return None
        words = ["moebench", "run", sweep, "--case", row["case_id"], "--only", row["backend"]]
        if row["dispatcher"] != "local":
            words += ["--filter", f"dispatcher={row['dispatcher']}"]
        if row["device"] == "cpu":
            words += ["--device", "cpu"]
        return shlex.join(map(str, words))


def _sweeps(folder: Path) -> Iterator[str]:
    """Yield the places where the sweep may be: beside the results, where the run found it, and in suites/."""
    if (folder / SWEEP_NAME).is_file():
        yield str(folder / SWEEP_NAME)
    yield from sweeps_of(folder)
