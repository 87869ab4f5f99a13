"""Show the results of `moebench parity`: a table of checks and backends, and below it the checks that did not pass."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.report.tables.boxes import plain
from moebench.report.tables.cells import DIM, STATUS_STYLES, status_text
from moebench.results.record import Record, Status
from moebench.run.audit import Audit, AuditCell
from moebench.workload.axes import listed


@dataclass(frozen=True)
class AuditTable:
    """The output of `moebench parity`, as an object that rich can print.

    It has a table of results by check and backend. Below the table it lists the faults, the kernels that ran, and the
    checks that could not run.
    """

    audit: Audit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        audit = self.audit
        table = plain()
        table.add_column("check")
        for backend in audit.backends:
            table.add_column(backend, overflow="fold")
        for check in audit.checks:
            table.add_row(check, *(_cell_text(audit.cell(backend, check)) for backend in audit.backends))
        yield table
        yield Text("number: the worst error divided by its budget; differs: two runs gave different bits", style=DIM)
        yield from _details(audit)


def _details(audit: Audit) -> Iterator[Text]:
    for cell in audit.cells:
        if cell.failures:
            first, number = cell.failures[0], f"{len(cell.failures)} of {len(cell.records)} cases failed, the first is"
            where = " ".join(_place(first))
            yield Text(f"{cell.backend}: {cell.check}: {number} {where}: {_reason(first)}", style="bold red")
    for row in audit.records:
        if row.executed:
            yield Text(f"{row.backend}: executed in {row.dtype}: {row.executed}", style=DIM)
    reasons: dict[tuple[str, str], set[str]] = {}
    for row in audit.records:
        if row.status in (Status.unsupported, Status.oom):
            reasons.setdefault((row.backend, _reason(row)), set()).add(str(row.check))
    for (backend, reason), checks in reasons.items():
        which = listed(sorted(checks)) if len(checks) <= 3 else f"{len(checks)} of {len(audit.checks)} checks"
        yield Text(f"{backend}: cannot run {which}: {reason}", style=DIM)
    for backend in () if audit.interrupted else audit.not_examined:
        yield Text(f"{backend}: not examined: none of its cases could run", style="bold")


def cell_words(cell: AuditCell) -> str:
    """Return the result of a check of a backend as text: `ok 0.31`, `MISMATCH 4.2` or another status."""
    match cell.status:
        case None:
            return "not run"
        case Status.ok:
            return f"ok {cell.parity_worst:.2f}{'' if cell.deterministic is not False else ' differs'}"
        case Status.mismatch:
            return f"MISMATCH {cell.parity_worst:.3g}"
        case status:
            return status_text(status)


def _cell_text(cell: AuditCell) -> Text:
    good = cell.status in (None, Status.ok)
    return Text(cell_words(cell), style="" if good else STATUS_STYLES.get(cell.status, "bold red"))  # type: ignore[arg-type]


def _place(row: Record) -> list[str]:
    spread = [f"EP {row.ep_size}", row.dispatcher, row.rank_load] if row.ep_size > 1 else []
    return [row.dtype, row.expert_activation, *(["bias"] if row.expert_bias else []), row.mode, *spread]


def _reason(row: Record) -> str:
    return (row.detail or "").strip().partition("\n")[0]
