"""Try every faulty backend of tests/backends as `moebench parity` does, and write what was found to docs/faults.md.

`python -m tests.moebench.faultbench` takes about an hour on two cores.
"""

import functools
import importlib
import inspect
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from experts import GroupedExperts, Unsupported
from moebench.measure import trials
from moebench.measure.cache import Workload
from moebench.parity.checks import Search, axes_of, case_job, search_job
from moebench.parity.space import search as space_search
from moebench.parity.space.covering import covering
from moebench.parity.space.trial import Trial
from moebench.results.record import GOOD
from moebench.workload.case import DTYPES, Job

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "faults.md"
BACKENDS = ROOT / "tests" / "backends"
if str(BACKENDS) not in sys.path:  # a user has this folder on PYTHONPATH
    sys.path.append(str(BACKENDS))

CPU = torch.device("cpu")
MODULES = (
    "faulty",
    "faulty_rows",
    "faulty_tokens",
    "faulty_sizes",
    "faulty_weights",
    "faulty_values",
    "faulty_dtypes",
    "faulty_grads",
    "faulty_modes",
    "faulty_state",
    "faulty_lora",
    "faulty_contexts",
)
#: Classes from which faulty layers inherit. They are right.
RIGHT_BASES = ("Act", "Cached", "Hooked", "Loads", "Nth", "OnOutputGrad", "Race")
#: The seconds of the search after the covering cases, as in `moebench parity --seconds`.
SEARCH_S = 60.0
#: What the lines of a counterexample may not import.
WITHOUT_MOEBENCH = "import sys; sys.modules['moebench'] = None\n"


def _faults() -> dict[str, str]:
    """Return the name of each fault and its backend, in the order of MODULES."""
    found = {}
    for module in MODULES:
        for name, kind in vars(importlib.import_module(module)).items():
            is_own = inspect.isclass(kind) and kind.__module__ == module and not name.startswith("_")
            if is_own and issubclass(kind, GroupedExperts) and name not in RIGHT_BASES:
                assert name not in found, f"{name} is in {found[name]} and in {module}"
                found[name] = f"{module}:{name}"
    return found


#: Fault -> the name of its backend.
FAULTS = _faults()


def kind_of(fault: str) -> type[GroupedExperts]:
    """Return the class of a fault."""
    module, _, name = FAULTS[fault].partition(":")
    return getattr(importlib.import_module(module), name)


def described(fault: str) -> str:
    """Return what is wrong, in the words of the class."""
    return " ".join(inspect.getdoc(kind_of(fault)).split())


@dataclass(frozen=True)
class Found:
    """A case on which a backend failed: how many covering cases it took, and what was printed about it.

    `num_cases` is None if the search found the fault. `first` is the case that failed first, and `smallest` the
    smallest case that fails. `lines` are Python.
    """

    num_cases: int | None
    first: Trial | None
    reason: str
    smallest: Trial
    lines: tuple[str, ...]


def tried(job: Job, workload: Workload) -> tuple[bool, str]:
    """Do a job as a worker does. Return whether the backend passed, and the record's detail."""
    try:
        found = trials.examine(job, workload)
    except Unsupported as reason:
        return True, reason.reason
    return found["status"] in GOOD, found["detail"] or ""


@functools.cache
def covering_cases(dtypes: tuple[str, ...] = DTYPES, seed: int = 0) -> list[Trial]:
    """Return the covering cases of `moebench parity`. They are the same for every backend."""
    return covering(axes_of(None, dtypes), seed)


def find(backend: str, seed: int = 0, dtypes: Sequence[str] = DTYPES, search_s: float = SEARCH_S) -> Found | None:
    """Try a backend on the covering cases, and then on random cases, until one fails."""
    workload = Workload(CPU)
    for number, trial in enumerate(covering_cases(tuple(dtypes), seed), 1):
        passed, detail = tried(case_job(backend, trial), workload)
        if not passed:
            return _found(number, trial, detail)
    search = search_job(backend, Search(search_s, seed, None, tuple(dtypes)))
    passed, detail = tried(search, workload)
    return None if passed else _found(None, None, detail)


def _found(number: int | None, first: Trial | None, detail: str) -> Found:
    reason, command, *lines = detail.splitlines()
    case = command.partition("--case '")[2].removesuffix("'")
    return Found(number, first, reason, Trial.parse(case), tuple(lines))


def fails(backend: str, case: Trial) -> bool:
    """Whether the backend fails the case."""
    with not_shrunk():
        return not tried(case_job(backend, case), Workload(CPU))[0]


def not_shrunk() -> "mock._patch[object]":
    """Within this context, a case that fails is not shrunk."""
    return mock.patch.object(space_search, "smallest", lambda failing, *arguments: failing)


def run_lines(lines: Sequence[str], prelude: str = WITHOUT_MOEBENCH) -> "subprocess.CompletedProcess[str]":
    """Run the lines of a counterexample in a process of their own, in which nobody can import moebench."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + "\n".join(lines)],
        env={"PYTHONPATH": f"{ROOT}:{BACKENDS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


# the document


def row_of(fault: str) -> str:
    """Return the fault's row of the table."""
    torch.set_num_threads(1)
    return row_with(fault, find(FAULTS[fault]))


def row_with(fault: str, found: Found | None) -> str:
    """Return the row of a fault that was found like this."""
    what = described(fault).replace("|", "\\|")
    if found is None:
        return f"| {fault} | {what} | nothing | – | – | – |"
    where = "search" if found.num_cases is None else str(found.num_cases)
    dtype = found.smallest.dtype if found.first is None else found.first.dtype
    return f"| {fault} | {what} | {where} | {dtype} | `{found.smallest.text}` | {len(found.lines)} |"


def read() -> dict[str, tuple[str, Trial | None]]:
    """Return the document's faults, with what the column of covering cases says, and the smallest case."""
    rows = re.findall(
        r"^\| (\w+) \| .* \| (\w+) \| [\w–]+ \| (`[^`]*`|–) \| [\d–]+ \|$", DOCUMENT.read_text(), re.MULTILINE
    )
    return {fault: (where, None if case == "–" else Trial.parse(case.strip("`"))) for fault, where, case in rows}


def write(rows: Sequence[str], path: Path = DOCUMENT) -> None:
    """Write the rows into the document's table."""
    head = "| fault | what is wrong | covering cases until it fails | dtype | smallest case that fails | lines |"
    table = "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows])
    marks = r"(<!-- faults, made by [^>]* -->\n\n).*(\n\n<!-- end of faults -->)"
    path.write_text(re.sub(marks, lambda found: found[1] + table + found[2], path.read_text(), flags=re.DOTALL))


def main(show: Callable[[str], None] = print) -> None:
    """Examine every fault, and write the table."""
    rows = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        for row in pool.imap(row_of, FAULTS):
            show(row)
            rows.append(row)
    write(rows)


if __name__ == "__main__":
    main()
