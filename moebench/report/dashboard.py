"""Show every job of a series of results on one HTML page, by revision and date, and mark where times changed.

The page is self-contained, as the report is. Its curves are drawn here as SVG, so that hundreds of jobs stay small.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import UsageError
from moebench.report.page import template
from moebench.report.pagetable import MISSING, Cell, Line
from moebench.report.tables.cells import Row, milliseconds
from moebench.results.files import writable, write_atomically
from moebench.results.folder import Result
from moebench.results.history import series, when
from moebench.results.labels import CASE_ORDER, describe, in_case_order, machine, shape_names
from moebench.results.record import Status

#: The size of a curve in pixels, and the least factor between its lower and its upper edge.
WIDTH, HEIGHT, LEAST_SPAN = 420.0, 46.0, 1.1
_EDGE = 5.0
_TITLES = ("case", "backend", "time", "first ms", "latest ms", "latest / first", "changes")


@dataclass(frozen=True)
class Dot:
    """One result on a curve: its place in pixels, its text, and what it is: `ok`, `slower`, `faster` or `failed`."""

    x: float
    y: float
    text: str
    kind: str


@dataclass(frozen=True)
class JobLine:
    """A job's line of the table, with its curve."""

    line: Line
    curve: tuple[str, ...]  # the points of each part of the polyline
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Choices:
    """The titles of the table of jobs, and the values that the page offers for each filter."""

    titles: tuple[str, ...]
    choices: dict[str, list[str]]


@dataclass(frozen=True)
class Change:
    """A change of a job's time. `is_alone` is true if only the newest result has it."""

    line: Line
    date: str
    revisions: str
    case: str
    backend: str
    ratio: float
    is_alone: bool
    has_new_environment: bool


def write_dashboard(results: Mapping[str, Result], out: Path) -> None:
    """Write the page about all jobs of the results. Raises UsageError if the folder of `out` does not exist."""
    if not out.parent.is_dir():
        raise UsageError(
            f"--page {out}: there is no folder {out.parent}; make the folder, or name a file in another one"
        )
    with writable(out):
        write_atomically(out, dashboard(results).encode())


def dashboard(results: Mapping[str, Result]) -> str:
    """Return the HTML page."""
    rows = series(results)
    rows = rows.assign(shape=shape_names(rows), label=rows["line"], fastest=False)
    cases = in_case_order(rows.drop_duplicates("case_id"))
    headings = dict(zip(cases["case_id"], describe(cases.assign(run_id="", device="", gpu="")).headings, strict=True))
    runs = rows.drop_duplicates("place").sort_values("place", ignore_index=True)
    new_environment = [*(runs["env_id"] != runs["env_id"].shift(fill_value=runs["env_id"].iloc[0]))]
    jobs = [
        _job(job, headings, len(runs))
        for _, job in rows.sort_values([*CASE_ORDER, "line", "place"], kind="stable").groupby(
            ["case_id", "line", "device", "gpu"], dropna=False, sort=False
        )
    ]
    changes = [
        _change(row, rows, headings, new_environment[row["place"]])
        for row in rows[rows["is_change"]].sort_values("place", ascending=False, kind="stable").to_dict("records")
    ]
    return template("dashboard.html").render(
        title=f"{len(runs)} results",
        where=machine(rows),
        shared=describe(cases).title(),
        runs=[
            {
                **run,
                "date": when(run["run_id"]),
                "short": _short(run["revision"]),
                "is_new": is_new,
                **_counts(rows, run),
            }
            for run, is_new in zip(runs.to_dict("records"), new_environment, strict=True)
        ],
        changes=changes,
        jobs=jobs,
        table=Choices(_TITLES, _choices([job.line for job in jobs])),
        borders=[round(_x(at - 0.5, len(runs)), 1) for at, is_new in enumerate(new_environment) if is_new],
        width=WIDTH,
        height=HEIGHT,
        good=[Status.ok.value],
    )


def _choices(lines: Sequence[Line]) -> dict[str, list[str]]:
    found = {
        name: list(dict.fromkeys(getattr(line, name) for line in lines))
        for name in ("backend", "model", "tokens", "mode", "routing", "status")
    }
    return {**found, "tokens": sorted(found["tokens"], key=int)}


def _counts(rows: pd.DataFrame, run: Row) -> dict[str, int]:
    statuses = rows.loc[rows["place"] == run["place"], "status"]
    return {"num_ok": int(statuses.eq(Status.ok).sum()), "num_others": int(statuses.ne(Status.ok).sum())}


def _short(revision: object) -> str:
    return revision[:9] if isinstance(revision, str) else "not known"


def _x(place: float, count: int) -> float:
    return _EDGE + (WIDTH - 2 * _EDGE) * (place + 0.5) / count


def _job(job: pd.DataFrame, headings: Mapping[str, str], count: int) -> JobLine:
    """Return the line of a job. Its curve breaks where results have another schema: their times are not compared."""
    last = job.iloc[-1]
    ok = job["status"].eq(Status.ok) & job["time_ms"].notna()
    times = job.loc[ok, "time_ms"].astype("float64")
    low, high = (float(times.min()), float(times.max())) if len(times) else (1.0, 1.0)
    spare = max(1.0, math.sqrt(LEAST_SPAN * low / high))
    low, high = low / spare, high * spare
    dots, parts, schema = [], list[list[str]](), None
    for row in job.to_dict("records"):
        x = _x(row["place"], count)
        said = f"{when(row['run_id'])}, {_short(row['revision'])}: "
        if row["status"] != Status.ok or pd.isna(row["time_ms"]):
            dots.append(Dot(round(x, 1), HEIGHT - _EDGE, said + row["status"], "failed"))
            continue
        y = _EDGE + (HEIGHT - 2 * _EDGE) * (1 - math.log(row["time_ms"] / low) / math.log(high / low))
        if schema != row["schema"]:
            parts.append([])
            schema = row["schema"]
        parts[-1].append(f"{x:.1f},{y:.1f}")
        kind = "ok" if not row["is_change"] else "slower" if row["ratio"] > 1 else "faster"
        dots.append(Dot(round(x, 1), round(y, 1), f"{said}{milliseconds(row['time_ms'])} ms", kind))
    line = Line.of(last.to_dict(), _cells(job, times, headings))
    return JobLine(line, tuple(" ".join(part) for part in parts), tuple(dots))


def _cells(job: pd.DataFrame, times: "pd.Series[float]", headings: Mapping[str, str]) -> tuple[Cell, ...]:
    """Return the cells around the curve. The ratio is of the newest schema's times alone."""
    last = job.iloc[-1]
    alike = times[job.loc[times.index, "schema"] == last["schema"]]
    case = headings[last["case_id"]] or "all"
    ratio = float(alike.iloc[-1] / alike.iloc[0]) if len(alike) else math.nan
    first, latest = (float(alike.iloc[at]) if len(alike) else math.nan for at in (0, -1))
    if last["status"] != Status.ok:
        latest_cell = Cell(str(last["status"]), math.inf, True)
    else:
        latest_cell = _number(latest, milliseconds)
    num_changes = int(job["is_change"].sum())
    return (
        Cell(case, case),
        Cell(last["label"], last["label"]),
        _number(first, milliseconds),
        latest_cell,
        _number(ratio, "{:.3f}".format),
        Cell(str(num_changes) if num_changes else "", num_changes, True),
    )


def _number(value: float, form: Callable[[float], str]) -> Cell:
    return MISSING if math.isnan(value) else Cell(form(value), value, True)


def _change(row: Row, rows: pd.DataFrame, headings: Mapping[str, str], is_new: bool) -> Change:
    same = rows[(rows["case_id"] == row["case_id"]) & (rows["line"] == row["line"]) & (rows["place"] < row["place"])]
    before = same["revision"].iloc[-1] if len(same) else None
    return Change(
        Line.of(row, ()),
        when(str(row["run_id"])),
        f"{_short(before)} → {_short(row['revision'])}",
        headings[str(row["case_id"])] or "all",
        str(row["line"]),
        float(row["ratio"]),
        not row["is_confirmed"],
        is_new,
    )
