"""Draw the curves of docs/scaling.md from the measurements in results/published/scaling: `make results` calls it.

PYTHONPATH=. python suites/scaling/curves.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.report.plots.kinds import round_ticks, set_ticks
from moebench.report.plots.look import BACKEND_STYLES, CEILING_LOOKS
from moebench.report.plots.rendering import images
from moebench.results.files import write_atomically

FOLDER = Path(__file__).parents[2] / "results" / "published" / "scaling"
COMMANDS, SUPERVISOR = FOLDER / "commands-2026-11-30.json", FOLDER / "supervisor-2026-11-30.json"
PICTURE = FOLDER / "curves.svg"
_LOOKS = list(BACKEND_STYLES.values())[1:]
_LINEAR = next(iter(CEILING_LOOKS.values()))

Rows = Sequence[Mapping[str, Any]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def figure(commands: Rows, supervisor: Rows) -> Figure:
    """Return a figure of two panels: CPU time against the size of results, and of the supervisor against its load."""
    drawn = Figure(figsize=(6.4, 5.6), layout="constrained")
    above, below = drawn.subplots(2)
    _draw_commands(above, [row for row in commands if row["revision"] == "after"])
    _draw_supervisor(below, supervisor)
    return drawn


def _draw_commands(ax: Axes, rows: Rows) -> None:
    names = list(dict.fromkeys(row["command"] for row in rows))
    for name, (color, marker) in zip(names, _LOOKS, strict=False):
        at = sorted((row["size"], row["cpu_s"]) for row in rows if row["command"] == name)
        ax.plot(*zip(*at, strict=True), color=color, marker=marker, label=name)
        linear = [(size, at[0][1] * size / at[0][0]) for size, _ in at]
        ax.plot(*zip(*linear, strict=True), **_LINEAR, label="" if name != names[-1] else "linear")
    ax.set(title="Commands", xlabel="records, or jobs of list and dry run", ylabel="CPU time, s")
    _finish(ax, sorted({row["size"] for row in rows}))


def _draw_supervisor(ax: Axes, rows: Rows) -> None:
    """Draw the supervisor's CPU time for each job. A supervisor that uses a whole core is saturated."""
    measured = [row for row in rows if (row["revision"], row["num_workers"]) == ("after", 500)]
    after = sorted((row["jobs_per_s"], row["cpu_ms_per_job"]) for row in measured)
    color, marker = _LOOKS[0]
    ax.plot(*zip(*after, strict=True), color=color, marker=marker, label="500 workers")
    ends = [min(rate for rate, _ in after), max(1000 / cost for _, cost in after)]
    ax.plot(ends, [1000 / rate for rate in ends], **_LINEAR, label="a whole core")
    ax.set(title="Supervisor", xlabel="jobs per second", ylabel="its CPU time for a job, ms")
    _finish(ax, [100, 200, 500, 1000, 2000])


def _finish(ax: Axes, places: Sequence[float]) -> None:
    """Make the axes logarithmic, with labels at the places and at round values, and put a legend beside them."""
    ax.loglog()
    set_ticks(ax.xaxis, places, "{:,.0f}".format)
    set_ticks(ax.yaxis, round_ticks(*ax.get_ylim()), "{:g}".format)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> None:
    drawn = images(lambda: figure(rows_of(COMMANDS), rows_of(SUPERVISOR)), ("svg",))
    write_atomically(PICTURE, drawn["svg"])
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
