"""Show the jobs of a sweep as a table in a terminal: the axes that vary, one row for each case."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.report.tables.boxes import LongRuled, ruled
from moebench.report.tables.casecolumn import case_column
from moebench.results.labels import Columns, Description, describe
from moebench.workload.case import Case, Job

_LEAST_CASE = 24  # characters
_MOST_OTHER = 36  # characters of another column that keep their line, if the cases need the room


@dataclass(frozen=True)
class JobTable:
    """The jobs of a sweep, as an object that rich can print. With `ids`, each case has its `case_id`."""

    jobs: Sequence[Job]
    ids: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        of_case: dict[Case, list[Job]] = {}
        for job in self.jobs:
            of_case.setdefault(job.case, []).append(job)
        described = describe(_columns(list(of_case)))
        yield Text(described.title(), style="bold")
        columns = {
            "backends": [_listed(job.backend for job in jobs) for jobs in of_case.values()],
            "dispatchers": [_listed(job.dispatcher for job in jobs) for jobs in of_case.values()],
            "jobs": [str(len(jobs)) for jobs in of_case.values()],
        }
        if self.ids:
            columns["case_id"] = [case.case_id for case in of_case]
        for title in ("backends", "dispatchers"):
            if len(set(columns[title])) == 1:  # all cases share it
                text, *_ = columns.pop(title)
                if text != "local":
                    yield Text(f"{title}: {text}")
        if len(of_case) > 1 or self.ids:
            yield _table(described, columns, options.max_width)
        yield Text(f"{_count(len(self.jobs), 'job')}, {_count(len(of_case), 'case')}")


def _table(described: Description, columns: Mapping[str, Sequence[str]], width: int) -> LongRuled:
    others = sum(min(_MOST_OTHER, max(map(len, [title, *cells]))) + 1 for title, cells in columns.items())
    header, cases = case_column(described, max(_LEAST_CASE, width - others))
    shown = {(header or "case"): [text or "all" for text in cases], **columns}
    table = ruled()
    for title in shown:
        table.add_column(Text(title), justify="right" if title == "jobs" else "left", overflow="fold")
    return LongRuled(table, [list(map(Text, row)) for row in zip(*shown.values(), strict=True)])


def _columns(cases: Sequence[Case]) -> Columns:
    """Return the columns of rows of these cases. A sweep does not say where and when it is measured."""
    nowhere: Columns = {"gpu": [None] * len(cases), "device": [None] * len(cases), "run_id": [""] * len(cases)}
    return {**{name: [getattr(case, name) for case in cases] for name in Case.model_fields}, **nowhere}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
