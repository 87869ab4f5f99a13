"""Show the results of `moebench parity`: a table of backends, and below it the smallest case that fails of each."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.report.tables.boxes import plain
from moebench.report.tables.cells import DIM, STATUS_STYLES, status_text
from moebench.results.record import Record, Status
from moebench.run.audit import Audit, Audited


@dataclass(frozen=True)
class AuditTable:
    """The output of `moebench parity`, as an object that rich can print."""

    audit: Audit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = plain()
        for column in ("backend", "result", "covering cases", "search", "worst error"):
            table.add_column(column, overflow="fold")
        for one in self.audit.backends:
            worst = "–" if one.parity_worst is None else f"{one.parity_worst:.2f}"
            table.add_row(one.backend, _result(one), covering_words(one), search_words(one), worst)
        yield table
        yield Text("worst error: of the cases that passed, divided by its budget", style=DIM)
        for one in self.audit.backends:
            yield from _details(one)


def _result(one: Audited) -> Text:
    failure = one.failure
    if failure is not None:
        style = STATUS_STYLES.get(failure.status, "bold red")
        return Text("MISMATCH" if failure.status is Status.mismatch else status_text(failure.status), style=style)
    if not one.could_run:
        return Text("not examined")
    return Text("ok" if one.deterministic is not False else "ok, bits differ")


def covering_words(one: Audited) -> str:
    """Return how many covering cases ran, and how they ended."""
    counts = {status: sum(row.status is status for row in one.covering) for status in Status}
    words = [f"{count} {_WORDS.get(status, status.value)}" for status, count in counts.items() if count]
    left = one.num_planned - len(one.covering)
    return ", ".join([*words, *([f"{left} not run"] if left else [])]) or "none"


def search_words(one: Audited) -> str:
    """Return how many cases the searches tried."""
    if not one.searches:
        return "–"
    return (
        "; ".join(
            dict.fromkeys((row.detail or "").partition("\n")[0] for row in one.searches if row.status is Status.ok)
        )
        or "failed"
    )


def _details(one: Audited) -> Iterator[Text]:
    failure = one.failure
    if failure is not None:
        first, *lines = (failure.detail or "").splitlines()
        yield Text(f"{one.backend}: {first}", style="bold red")
        yield from (Text(f"  {line}") for line in lines)
    reasons = Counter((row.status, _reason(row)) for row in one.records if row.status in _LEFT_OUT)
    for (status, reason), count in reasons.items():
        no_fault = "left out, which is no fault: " * one.could_run
        yield Text(
            f"{no_fault}{one.backend}: {count} of {len(one.records)} cases {_LEFT_OUT[status]}: {reason}", style=DIM
        )


#: What the statuses of cases that are no fault mean, in words.
_WORDS = {Status.unsupported: "not applicable"}
_LEFT_OUT = {Status.unsupported: "do not apply", Status.oom: "do not fit into memory"}


def _reason(row: Record) -> str:
    return (row.detail or "").strip().partition("\n")[0]
