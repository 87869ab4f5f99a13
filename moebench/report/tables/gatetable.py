"""Show the verdicts of a gate as a table in a terminal, the worst verdict first, with the reasons below the table."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.report.gatewords import (
    busy_change,
    change,
    has_busy,
    in_verdict_order,
    labelled,
    memory_change,
    parity_change,
    reasons,
    smallest_effect,
    total,
)
from moebench.report.tables.boxes import LongRuled, ruled
from moebench.verdicts.gate import GateResult, Judged
from moebench.verdicts.verdict import Severity

_STYLES = {
    Severity.FAILED: "bold red",
    Severity.UNDECIDED: "yellow",
    Severity.BETTER: "green",
}
_WIDE = 100  # if the terminal has this many columns or more, no number is folded
_LEGEND = """\
time: change from baseline to candidate, above 0 is slower; it is the median
  over all pairs of rounds, while `moebench compare` divides two medians;
  each end of the interval is wrong at most 1 time in 100
sees: the smallest slowdown that would have been found 95 times in 100
"""
_BUSY = "busy: change of the GPU's own time in calls that wait for the GPU\n"
_LEGEND_END = """\
memory: change of peak memory, or of saved memory if the peak is equal
err: parity error divided by its budget, at most 1 passes"""


@dataclass(frozen=True)
class GateTable:
    """The verdicts of a gate, as an object that rich can print.

    It has a table with one line per job, the reasons for each verdict except PASS, and the total.
    """

    result: GateResult

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        jobs = in_verdict_order(self.result)
        yield Text(self.result.title, style="bold")
        yield _table(jobs, wide=options.max_width >= _WIDE)
        yield Text()
        yield Text(_LEGEND + _BUSY * has_busy(jobs) + _LEGEND_END, style="dim")
        yield Text()
        for (verdict, why), whom in reasons(jobs, set(Severity) - {Severity.PASSED}).items():
            yield Text(f"{verdict} {why}: {whom}", style=_STYLES.get(verdict.severity, ""))
        for difference in self.result.differences:
            yield Text(f"environments differ: {difference}")
        for comparison in self.result.self_comparisons:
            yield Text(str(comparison), style="dim")
        for note in self.result.notes:
            yield Text(note, style="yellow")
        yield Text(f"gate: {total(self.result)}", style="bold")


def _table(jobs: list[Judged], wide: bool) -> LongRuled:
    table = ruled()
    for name in ("verdict", "backend", "case"):
        table.add_column(name, overflow="fold")
    figures = {"time": change, "sees": smallest_effect, "memory": memory_change, "err": parity_change}
    if has_busy(jobs):
        figures = {"time": change, "sees": smallest_effect, "busy": busy_change, **figures}
    for name in figures:
        table.add_column(name, justify="right", overflow="fold", no_wrap=wide)
    rows = []
    for job in jobs:
        texts = (job.backend, job.case, *(figure(job) for figure in figures.values()))
        verdict = Text(labelled(job), style=_STYLES.get(job.verdict.severity, ""))
        rows.append([verdict, *map(Text, texts)])
    return LongRuled(table, rows)
