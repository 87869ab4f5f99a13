"""Read a sweep file (TOML) into a `SweepSpec`, and make the jobs of a sweep.

One `SweepError` lists every mistake of a wrong file. docs/sweeps.md is the user's reference.
"""

import re
import tomllib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import moebench
from moebench.errors import SweepError
from moebench.names import MOST_CHARACTERS, NAME_PATTERN, is_file
from moebench.workload.axes import (
    AXES,
    case_key,
    case_values,
    combinations,
    cut,
    did_you_mean,
    is_match,
    listed,
    rule_for,
)
from moebench.workload.case import Case, Job
from moebench.workload.models import EXPERTS, Model
from moebench.workload.reader import SweepReader
from moebench.workload.traces import Captured

#: The name of the folder of sweeps. A checkout, the working folder and the package from a wheel may each have such a
#: folder.
SUITES = "suites"

Value = bool | int | float | str | Model | Captured
Axes = dict[str, tuple[Value, ...]]


#: The longest time that a job may take: ten weeks. The operating system cannot wait for much longer times.
LONGEST_S = 6_048_000.0


class Policy(BaseModel):
    """How jobs are measured. If a value is None, moebench.measure.timing chooses it by the device.

    `interval_target` is half the width of the median's 95% confidence interval, divided by the median. Sampling stops
    when it reaches this precision, or when it has taken `time_cap_s` seconds. A job without a result after `timeout_s`
    seconds ends with the status timeout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    interval_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    time_cap_s: Annotated[float, Field(gt=0, le=LONGEST_S)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=LONGEST_S)] = 300.0
    l2: Literal["cold", "warm"] = "cold"


#: The name of a run is a time and the sweep's name, and files of a run have further parts.
MOST_IN_SWEEP = MOST_CHARACTERS - 60


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MOST_IN_SWEEP)]
    description: Annotated[str, Field(pattern=r"^[^\n]*$")] = ""


class SweepSpec(_Head):
    """A validated sweep: the jobs of all its `grids`, without those that one of its `excludes` matches.

    A grid is the cartesian product of its axes. The defaults are already merged into each grid.
    """

    policy: Policy = Policy()
    grids: tuple[Axes, ...]
    excludes: tuple[Axes, ...] = ()

    def jobs(self) -> list[Job]:
        """Return the jobs, each once, grouped by weights, then by case, then by backend.

        Groups are in the order of the file.
        """
        case_of: dict[tuple[object, ...], Case] = {}  # the backends of a case share it
        every = (_job(combination, case_of) for combination in self._combinations())
        return _in_order({(job.case, job.backend, job.dispatcher): job for job in every}.values())

    def num_jobs(self) -> int:
        """Return the number of jobs, in a tenth of the time that `jobs` takes."""
        return len({(*case_key(one), one["backend"], one["dispatcher"]) for one in self._combinations()})

    def _combinations(self) -> Iterator[Mapping[str, object]]:
        for axes in self.grids:
            for combination in combinations(axes):
                if not any(is_match(exclude, combination) for exclude in self.excludes):
                    yield combination

    @property
    def models(self) -> tuple[Model, ...]:
        """The models of all grids, each once."""
        named = [value for axes in self.grids for value in axes.get("model", ()) if isinstance(value, Model)]
        return tuple(model for number, model in enumerate(named) if model not in named[:number])

    def with_model(self, model: Model) -> "SweepSpec":
        """Return the sweep with this model in every grid, instead of the grid's own models or shape.

        EP sizes that do not divide the model's experts are left out, because such a case is impossible.
        """
        sizes = {size: None for axes in self.grids for size in axes.get("ep_size", ()) if isinstance(size, int)}
        unfit = tuple(size for size in sizes if model.fields["n_routed_experts"] % size)
        excludes = (*self.excludes, {"ep_size": unfit}) if unfit else self.excludes
        grids = tuple({**axes, "model": (model,)} for axes in self.grids)  # what the model fixes comes from it
        return self.model_copy(update={"grids": grids, "excludes": excludes})

    def with_subject(self, subject: str) -> "SweepSpec":
        """Return the sweep with this subject in every grid, instead of the grid's own.

        A block routes its tokens itself, so routing other than uniform is left out. Raises SweepError for a subject
        that does not exist, and for one that a case cannot have.
        """
        try:
            AXES["subject"].validate_python(subject)
            routings = {routing: None for axes in self.grids for routing in axes.get("routing", ())}
            others = tuple(routing for routing in routings if routing != "uniform" and subject != EXPERTS)
            excludes = (*self.excludes, {"routing": others}) if others else self.excludes
            grids = tuple({**axes, "subject": (subject,)} for axes in self.grids)
            made = self.model_copy(update={"grids": grids, "excludes": excludes})
            made.jobs()
        except ValidationError as error:
            texts = [details["msg"].removeprefix("Value error, ") for details in error.errors()]
            wrong = rule_for("subject", subject, error.errors()[0]) if "pattern" in texts[0] else texts[0]
            raise SweepError([f"--subject {cut(subject)}: {wrong.partition(chr(10))[0]}"]) from error
        return made


def _job(combination: Mapping[str, object], case_of: dict[tuple[object, ...], Case]) -> Job:
    key = case_key(combination)
    case = case_of.get(key) or Case.model_validate(case_values(combination))
    case_of[key] = case
    routing = combination["routing"]
    file = routing.file if isinstance(routing, Captured) else None
    backend, dispatcher = str(combination["backend"]), str(combination["dispatcher"])
    return Job(case=case, backend=backend, dispatcher=dispatcher, routing_file=file)


def _in_order(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs sorted by their weights (without the EP size), then by EP size, case and backend.

    Weights, cases and backends rank by their first appearance.
    """
    ranks: dict[Hashable, int] = {}

    def rank(key: Hashable) -> int:
        return ranks.setdefault(key, len(ranks))

    @cache
    def place(case: Case) -> tuple[Any, ...]:
        return rank(case.model_copy(update={"ep_size": 1}).weights), case.processes, rank(case)

    return sorted(jobs, key=lambda job: (*place(job.case), rank(job.backend)))


# Reading a file


def available_sweeps() -> dict[str, Path]:
    """Return the names and files of all sweeps: from the wheel, from the checkout, and from ./suites.

    Where two sweeps have the same name, the sweep from the place that is later in this list wins.
    """
    folders = [Path(moebench.__file__).parent / SUITES, Path(SUITES)]
    if (root := checkout()) is not None:
        folders.insert(1, root / SUITES)
    found = {path.stem: path for folder in folders for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


def checkout() -> Path | None:
    """Return the folder of the checkout that this moebench is imported from; None where it comes from a wheel."""
    root = Path(moebench.__file__).parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / SUITES).is_dir() else None


def find_sweep(name_or_path: str | Path) -> Path:
    """Return the sweep file at that path, or the file of that name in `available_sweeps`.

    Raises SweepError, which lists the available sweeps, if there is no such path and no such name.
    """
    path = Path(name_or_path)
    if is_file(path):
        return path
    sweeps = available_sweeps()
    name = str(name_or_path)
    if name not in sweeps:
        hint = did_you_mean(name, sweeps) or "give a path or a name;"
        raise SweepError(
            [f"{cut(name)}: no such file, and no sweep has that name; {hint} the sweeps are {listed(sweeps)}"]
        )
    return sweeps[name]


def load_sweep(path: Path) -> SweepSpec:
    """Return the sweep in the file. Raises SweepError, which lists every mistake in the file."""
    return parse_sweep(read_sweep(path), str(path))


def read_sweep(path: Path) -> str:
    """Return the text of a sweep file, with its line endings and a byte-order mark unchanged.

    Raises SweepError if the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError([f"{path}: cannot be read: {error}; give a TOML file in UTF-8"]) from error


def parse_sweep(text: str, origin: str) -> SweepSpec:
    """Return the sweep in `text`. Raises SweepError, which lists every mistake in the text.

    `origin` is the file's path. Messages name it, and traces are relative to its folder.
    """
    try:
        document = tomllib.loads(text.removeprefix("\ufeff"))  # editors on Windows write a byte-order mark
    except tomllib.TOMLDecodeError as error:
        raise SweepError([_syntax_mistake(text, origin, str(error))]) from error
    except ValueError as error:  # of Python's int, which reads at most a few thousand digits
        raise SweepError([f"{origin}: a number has too many digits; no key takes so large a number"]) from error
    except RecursionError as error:
        raise SweepError([f"{origin}: lists or tables are nested too deeply; no key takes a list of lists"]) from error
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
