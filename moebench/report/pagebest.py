"""Make the table of a report's top: for each case the fastest backend, its lead over the next one, and its memory.

The frames `rows` in this module are sorted by `labels.in_case_order`. They have the columns `label` (the backend with
its dispatcher) and `close` (whether the row is too close to the fastest to call; see `report.ranking`).
"""

from collections.abc import Sequence

import pandas as pd

from moebench.machine.units import size
from moebench.report.pagetable import MISSING, Cell, Line, Table, case_columns, number
from moebench.report.tables.cells import Row, graph_times, milliseconds
from moebench.results.record import Status

_CASE = ("run_id", "case_id", "device", "gpu")
_MEASURED = ("fastest", "ms", "next", "× fastest", "peak memory")
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
    for _, case in timed.groupby(list(_CASE), dropna=False, sort=False):
        if len(case) < 2:
            continue
        ranked = case.sort_values("time_ms").to_dict("records")
        cells = (*cells_of[case.index[0]], *_cells(ranked), *(_graph_cells(case) if has_graphs else ()))
        lines.append(Line.of(ranked[0], cells))
    return Table((*titles, *_MEASURED, *(_GRAPH if has_graphs else ())), tuple(lines))


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


def _graph_cells(case: pd.DataFrame) -> tuple[Cell, Cell]:
    graphs = case.assign(graph_ms=graph_times(case)).dropna(subset="graph_ms").sort_values("graph_ms")
    if graphs.empty:
        return Cell("", ""), MISSING
    label, time_ms = graphs[["label", "graph_ms"]].iloc[0]
    return Cell(label, label), Cell(milliseconds(time_ms), float(time_ms), True)
