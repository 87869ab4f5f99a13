"""Make the tables of a report's top.

The first table has for each case the fastest backend, its lead over the next one, and its memory. The second has each
context of training beside `plain`.

The frames `rows` in this module are sorted by `labels.in_case_order`. They have the columns `label` (the backend with
its dispatcher) and `close` (whether the row is too close to the fastest to call; see `report.ranking`).
"""

import math
from collections.abc import Hashable, Sequence
from operator import itemgetter

import pandas as pd

from moebench.machine.units import size
from moebench.report.pagetable import MISSING, Cell, Line, Table, case_columns, number
from moebench.report.tables.cells import Row, graph_times, milliseconds
from moebench.results.compare import BESIDE_PLAIN, beside_plain
from moebench.results.folder import rows_of
from moebench.results.record import Status
from moebench.workload.context import PLAIN

_CASE = ("run_id", "case_id", "device", "gpu")
_MEASURED = ("fastest", "ms", "next", "× fastest", "peak memory")
_BESIDE = ("ms", "× plain", "peak memory", "peak × plain", "saved", "saved × plain")
_GRAPH = ("fastest as CUDA graph", "graph ms")


def best_table(rows: pd.DataFrame) -> Table:
    """Return a table with one line for each case that two or more backends computed.

    Backends are named together if their times are too close to call. Steps of decoding and cases of several ranks
    also have the backend that is the fastest as a CUDA graph.
    """
    timed = rows[rows["status"].eq(Status.ok) & rows["time_ms"].notna()]
    titles, cells_of = case_columns(rows)
    has_graphs = bool(graph_times(timed).notna().any())
    lines = []
    timed = timed.assign(graph_ms=graph_times(timed), cells=cells_of[timed.index])
    cases: dict[Hashable, list[Row]] = {}
    for row in rows_of(timed):
        cases.setdefault(tuple(None if pd.isna(row[name]) else row[name] for name in _CASE), []).append(row)
    for case in cases.values():
        if len(case) > 1:
            ranked = sorted(case, key=itemgetter("time_ms"))
            cells = (*case[0]["cells"], *_cells(ranked), *(_graph_cells(case) if has_graphs else ()))
            lines.append(Line.of(ranked[0], cells))
    return Table((*titles, *_MEASURED, *(_GRAPH if has_graphs else ())), tuple(lines))


def context_table(rows: pd.DataFrame) -> Table:
    """Return a table with a line for each backend in each context, beside `plain`. It may have no lines."""
    frame = beside_plain(rows)
    if frame.empty:
        return Table((), ())
    titles, cells_of = case_columns(frame.assign(context=PLAIN, dp_size=1))
    measures = [number("time_ms", milliseconds), number("peak_memory_bytes", size), number("saved_memory_bytes", size)]
    ratios = [number(ratio, "{:.2f}×".format) for ratio in BESIDE_PLAIN.values()]
    columns = [column for pair in zip(measures, ratios, strict=True) for column in pair]
    lines = []
    for index, row in zip(frame.index, frame.to_dict("records"), strict=True):
        context = row["context"] + (f" DP {row['dp_size']}" if row["dp_size"] > 1 else "")
        named = Cell(row["label"], row["label"]), Cell(context, context)
        lines.append(Line.of(row, (*cells_of[index], *named, *(column(row) for column in columns))))
    return Table((*titles, "backend", "context", *_BESIDE), tuple(lines))


def _cells(ranked: Sequence[Row]) -> tuple[Cell, ...]:
    best = ranked[0]
    ties = [row for row in ranked if row["close"]] or [best]
    after = ranked[len(ties) :]
    names = " or ".join(row["label"] for row in ties)
    lead = (Cell(after[0]["label"], after[0]["label"]), _ratio(after[0], best)) if after else (Cell("", ""), MISSING)
    memory = number("peak_memory_bytes", size)(best)
    return Cell(names, names), Cell(milliseconds(best["time_ms"]), best["time_ms"], True), *lead, memory


def _ratio(row: Row, best: Row) -> Cell:
    ratio = row["time_ms"] / best["time_ms"]
    return Cell(f"{ratio:.2f}×", ratio, True)


def _graph_cells(case: Sequence[Row]) -> tuple[Cell, Cell]:
    graphs = [row for row in case if not math.isnan(row["graph_ms"])]
    if not graphs:
        return Cell("", ""), MISSING
    best = min(graphs, key=itemgetter("graph_ms"))
    return Cell(best["label"], best["label"]), Cell(milliseconds(best["graph_ms"]), best["graph_ms"], True)
