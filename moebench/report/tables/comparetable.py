"""Show comparisons and histories as tables in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.machine.comparability import differences
from moebench.report.tables.boxes import ruled
from moebench.report.tables.cells import Row, memory, milliseconds
from moebench.results.compare import num_common
from moebench.results.folder import Result
from moebench.results.history import when
from moebench.results.labels import backend_labels, describe
from moebench.verdicts.findings import is_null

_LEGEND = """\
ms: median time; B/A: B's median time divided by A's, below 1 is faster
  (`moebench gate` takes the median over all pairs of rounds instead)
"""
_BUSY = "busy B/A: the same of the GPU's own time, for calls that wait for the GPU\n"
_LEGEND_END = """\
mem: peak memory; mem B/A: B's peak memory divided by A's, below 1 is smaller
A ratio may be noise. `moebench gate` tests for noise and gives a verdict."""


@dataclass(frozen=True)
class ComparisonTable:
    """A table with one line per job.

    A line has the time in each result. For each result except the first, it also has the ratios of time and of memory
    to the first result and, if any job has it, the ratio of the GPU's own time.
    """

    frame: pd.DataFrame  # as moebench.results.compare.compare returns it
    names: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        described = describe(self.frame.assign(run_id="", device="", gpu=""))
        yield Text(described.title(), style="bold")
        for number, name in enumerate(self.names):
            yield Text(f"{_letter(number)}: {name}")
        yield self._table(described.labels)
        yield Text(_LEGEND + _BUSY * self._has_busy + _LEGEND_END, "dim")

    def _has_size(self, number: int) -> bool:
        """Whether a result has its memory in bytes. The memory of a third result follows from its ratio."""
        return number == 0 or len(self.names) == 2

    @property
    def _has_busy(self) -> bool:
        return any(self.frame[f"busy_ms_ratio:{name}"].notna().any() for name in self.names[1:])

    def _table(self, labels: Sequence[str]) -> Table:
        table = ruled()
        for name in ("backend", "case"):
            table.add_column(name, overflow="fold")
        for number in range(len(self.names)):
            letter = _letter(number)
            ratios = [f"{letter}/A", *[f"busy {letter}/A"] * self._has_busy, f"mem {letter}/A"]
            sizes = [f"{letter} mem"] * self._has_size(number)
            for title in (f"{letter} ms", *sizes, *(ratios if number else ())):
                table.add_column(title, justify="right", no_wrap=title in sizes)
        backends = backend_labels(self.frame)
        for backend, label, row in zip(backends, labels, self.frame.to_dict("records"), strict=True):
            table.add_row(Text(backend), Text(label or "all"), *map(Text, self._cells(row)))
        return table

    def _cells(self, row: Row) -> Iterator[str]:
        for number, name in enumerate(self.names):
            time_ms, status = row[f"time_ms:{name}"], row[f"status:{name}"]
            yield milliseconds(time_ms) if not is_null(time_ms) else "-" if is_null(status) else str(status)
            if self._has_size(number):
                yield memory(row[f"peak_memory_bytes:{name}"])
            if number:
                yield _ratio(row[f"time_ms_ratio:{name}"])
                if self._has_busy:
                    yield _ratio(row[f"busy_ms_ratio:{name}"])
                yield _ratio(row[f"peak_memory_bytes_ratio:{name}"])


def _letter(number: int) -> str:
    """Return the letter of a result: A, B, … Z, A1, B1, …"""
    turn, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(turn) if turn else "")


def _ratio(value: Any) -> str:
    return "-" if is_null(value) else f"{value:.3f}"


def environment_lines(results: Mapping[str, Result]) -> list[str]:
    """Return one line for each difference between the environments of the first result and of a later result.

    If the results have different schemas, a line says that they have no ratios.
    """
    (first, one), *others = results.items()
    found: dict[str, None] = {}
    for name, two in others:
        if not num_common({first: one.frame, name: two.frame})[name]:
            found[f"{name} against {first}: no job in common"] = None
        schemas = [", ".join(map(str, sorted(set(result.frame["schema"])))) for result in (one, two)]
        if schemas[0] != schemas[1]:
            found[
                f"{name} against {first}: INCOMPARABLE: schema {' -> '.join(schemas)}: moebench measures differently "
                "since, so rows of different schemas have no ratio"
            ] = None
        for before in one.environments.values():
            for after in two.environments.values():
                found |= dict.fromkeys(f"{name} against {first}: {some}" for some in differences(before, after))
        if not (one.environments and two.environments) and set(one.frame["env_id"]) != set(two.frame["env_id"]):
            found[f"{name} against {first}: the environments differ, and no environment.json says how"] = None
    return list(found)


def history_table(rows: pd.DataFrame) -> Table:
    """Return a table of a history. `rows` are as `moebench.results.history.history` returns them, one line per row."""
    table = ruled()
    for name in ("start (UTC)", "result", "backend"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "change", "since first", "memory"):
        table.add_column(name, justify="right")
    table.add_column("environment")
    for row in rows.to_dict("records"):
        time_ms = str(row["status"]) if is_null(row["time_ms"]) else milliseconds(row["time_ms"])
        changes = ["-" if is_null(row[name]) else f"{row[name]:+.1%}" for name in ("change", "since_first")]
        facts = when(row["run_id"]), row["result"], row["line"], time_ms, *changes
        table.add_row(*map(Text, (*facts, memory(row["peak_memory_bytes"]), row["env_id"])))
    return table
