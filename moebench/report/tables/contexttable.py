"""Show what contexts of training cost and save, by backend, as a table in a terminal: context vs plain."""

from dataclasses import dataclass

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.report.tables.boxes import ruled
from moebench.report.tables.casecolumn import case_column
from moebench.report.tables.cells import DIM, Row, memory, milliseconds, times_text
from moebench.results.labels import backend_labels, describe, machine

_NUMBERS_WIDTH = 40
_LEGEND = """\
x plain: time, peak memory or saved memory, divided by that of the same backend in the context plain
memory: peak memory of the call; saved: memory that forward keeps for backward; -: not measured"""


@dataclass(frozen=True)
class ContextTable:
    """A line for each backend in each context, `plain` first. A rich renderable."""

    frame: pd.DataFrame  # as moebench.results.compare.beside_plain returns it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        described = describe(self.frame.assign(context="plain", dp_size=1))
        title = ", ".join(filter(None, ("context vs plain", described.title())))
        yield Text("\n".join(filter(None, (title, machine(self.frame)))), style="bold")
        yield self._table(options.max_width)
        yield Text(_LEGEND, style=DIM)

    def _table(self, width: int) -> Table:
        frame = self.frame
        described = describe(frame.assign(context="plain", dp_size=1))
        labels = backend_labels(frame)
        contexts = frame["context"] + frame["dp_size"].map(lambda size: f" DP {size}" if size > 1 else "")
        room = width - int(labels.str.len().max()) - int(contexts.str.len().max()) - _NUMBERS_WIDTH
        header, cases = case_column(described, room)
        has_cases = bool(described.varying)
        table = ruled()
        if has_cases:
            table.add_column(Text(header), overflow="fold")
        for title in ("backend", "context"):
            table.add_column(title, overflow="fold")
        for title in ("ms", "x plain", "memory", "x plain", "saved", "x plain"):
            table.add_column(title, justify="right", no_wrap=True)
        for case, label, context, row in zip(cases, labels, contexts, frame.to_dict("records"), strict=True):
            table.add_row(*[Text(case)] * has_cases, Text(label), Text(context), *_numbers(row))
        return table


def _numbers(row: Row) -> list[str]:
    return [
        milliseconds(row["time_ms"]),
        times_text(row["time_of_plain"]),
        memory(row["peak_memory_bytes"]),
        times_text(row["peak_of_plain"]),
        memory(row["saved_memory_bytes"]),
        times_text(row["saved_of_plain"]),
    ]
