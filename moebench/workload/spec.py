"""Sweep files: TOML -> `SweepSpec` -> jobs. No torch here.

A wrong file gets every mistake in it in one `SweepError`. docs/sweeps.md is the user's reference.
"""

import re
import tomllib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

import moebench
from moebench.errors import SweepError
from moebench.workload.axes import combinations, did_you_mean, is_match, listed
from moebench.workload.case import Case, Job
from moebench.workload.reader import SweepReader

#: The folder of sweeps: in a checkout, in the working folder, and inside the package where a wheel was installed.
SUITES = "suites"

Value = bool | int | float | str
Axes = dict[str, tuple[Value, ...]]


class Policy(BaseModel):
    """How jobs are measured. `interval_target` is the half width of the median's 95% interval over the median.

    None leaves it to moebench.measure.timing, by device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    interval_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    time_cap_s: Annotated[float, Field(gt=0)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    l2: Literal["cold", "warm"] = "cold"


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: Annotated[str, Field(pattern=r"^[^\n]*$")] = ""


class SweepSpec(_Head):
    """A validated sweep: the union of its `grids` (cartesian products, defaults merged in) less its `excludes`."""

    policy: Policy = Policy()
    grids: tuple[Axes, ...]
    excludes: tuple[Axes, ...] = ()

    def jobs(self) -> list[Job]:
        """The jobs, each once: those with the same weights together, then by case, then by backend, in file order."""
        found = {
            _job(combination): None
            for axes in self.grids
            for combination in combinations(axes)
            if not any(is_match(exclude, combination) for exclude in self.excludes)
        }
        return _in_order(found)


def _job(combination: Mapping[str, object]) -> Job:
    case = Case.model_validate({name: combination[name] for name in Case.model_fields})
    return Job(case=case, backend=str(combination["backend"]), dispatcher=str(combination["dispatcher"]))


def _in_order(jobs: Iterable[Job]) -> list[Job]:
    """Same weights but for their EP size together, then by that, case and backend; among equals the first is first."""
    ranks: dict[Hashable, int] = {}

    def rank(key: Hashable) -> int:
        return ranks.setdefault(key, len(ranks))

    def weights(case: Case) -> Hashable:
        return case.model_copy(update={"ep_size": 1}).weights

    return sorted(jobs, key=lambda job: (rank(weights(job.case)), job.case.ep_size, rank(job.case), rank(job.backend)))


# Reading a file


def available_sweeps() -> dict[str, Path]:
    """Names and files of the sweeps that a wheel holds, of those in the checkout, and of those in ./suites.

    Where two have a name, the later of these wins.
    """
    folders = [Path(moebench.__file__).parent / SUITES, Path(SUITES)]
    if (root := checkout()) is not None:
        folders.insert(1, root / SUITES)
    found = {path.stem: path for folder in folders for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


def checkout() -> Path | None:
    """The folder of the checkout that this moebench is imported from; None where a wheel was installed."""
    root = Path(moebench.__file__).parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / SUITES).is_dir() else None


def find_sweep(name_or_path: str | Path) -> Path:
    """The sweep file at that path or, of that name, in `available_sweeps`; SweepError lists those there are."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    sweeps = available_sweeps()
    name = str(name_or_path)
    if name not in sweeps:
        hint = did_you_mean(name, sweeps) or "give a path or a name"
        raise SweepError([f"{name}: no such file, and no sweep has that name; {hint}; there are {listed(sweeps)}"])
    return sweeps[name]


def load_sweep(path: Path) -> SweepSpec:
    """The sweep in that file; SweepError names every mistake in it."""
    return parse_sweep(read_sweep(path), str(path))


def read_sweep(path: Path) -> str:
    """The text of a sweep file, to the byte. Raises SweepError."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError([f"{path}: cannot be read: {error}; give a TOML file in UTF-8"]) from error


def parse_sweep(text: str, origin: str) -> SweepSpec:
    """The sweep in `text`. `origin`, the file's path, is named in mistakes; traces are relative to its folder."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SweepError([_syntax_mistake(text, origin, str(error))]) from error
    reader = SweepReader(origin)
    found = reader.read(document, _Head, Policy)
    if reader.mistakes:
        raise SweepError(list(reader.mistakes))
    return SweepSpec.model_validate(found)


def _syntax_mistake(text: str, origin: str, message: str) -> str:
    rule, _, place = message.removesuffix(")").partition(" (at ")
    line = re.match(r"line (\d+)", place)
    quoted = f" {text.split(chr(10))[int(line[1]) - 1].strip()!r}" if line else ""
    return f"{origin}: {place}:{quoted} is not TOML: {rule}; strings need quotes, lists need commas and brackets"
