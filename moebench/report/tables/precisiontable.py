"""Show where FP8 pays: as sentences about a workload, and as a map of rows per expert and `moe_inter_dim`.

    python -m moebench.report.tables.precisiontable RESULTS…

prints the maps of results folders as Markdown tables, one for each machine, mode and `dim`.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moebench.results.advise import CLOSE
from moebench.results.frame import load_all
from moebench.results.precision.ratios import Cell, Precision, cells, crossings
from moebench.workload.models import EXPERTS


def sentence(found: Precision, mode: str) -> str:
    """Return what one machine's results say about FP8 for a workload, and which engine is the fastest in FP8."""
    takes = f"{found.machine}: FP8 takes {found.ratio:.2f} times the time of 16 bits in mode {mode}"
    if found.is_measured:
        (one,) = found.cells
        measured = f"{takes} ({one.fp8} {one.fp8_ms:.3f} ms, {one.other} {one.other_ms:.3f} ms), measured"
        return measured + "".join(f"; {engines}" for engines in _engines(one))
    places = ", ".join(
        f"{one.rows_per_expert:g} × {one.moe_inter_dim}: {one.ratio:.2f} ({one.fp8})" for one in found.cells
    )
    return f"{takes}, interpolated between rows per expert × moe_inter_dim {places} (dim {found.cells[0].dim})"


def _engines(cell: Cell) -> Iterator[str]:
    """Yield, for each engine in FP8 but the fastest one, how many times as long as the fastest one it takes."""
    for name, time_ms in cell.fp8_engines[1:]:
        times = time_ms / cell.fp8_ms
        close = ", too close to call" if times < 1 + CLOSE else ""
        yield f"{name} takes {times:.2f} times as long as {cell.fp8} ({time_ms:.3f} ms){close}"


def precision_json(found: Sequence[Precision]) -> list[dict[str, Any]]:
    """Return the answers as JSON data."""
    return [
        {
            "machine": one.machine,
            "ratio": one.ratio,
            "pays": one.pays,
            "is_measured": one.is_measured,
            "cells": [{**vars(cell), "ratio": cell.ratio} for cell in one.cells],
        }
        for one in found
    ]


def markdown(some: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of a Markdown table for each machine, mode and `dim` with two or more widths or row counts."""
    for machine, mode, dim in dict.fromkeys((one.machine, one.mode, one.dim) for one in some):
        own = [one for one in some if (one.machine, one.mode, one.dim) == (machine, mode, dim)]
        counts = sorted({one.rows_per_expert for one in own})
        if len(own) < 2:
            continue
        yield f"{machine}, mode {mode}, dim {dim}: time with FP8 / time without"
        yield ""
        yield f"| moe_inter_dim | {' | '.join(f'{count:g} rows' for count in counts)} | FP8 pays from |"
        yield f"| --- |{' ---: |' * (len(counts) + 1)}"
        for width, start in crossings(own).items():
            ratios = {one.rows_per_expert: one.ratio for one in own if one.moe_inter_dim == width}
            shown = " | ".join(f"{ratios[count]:.2f}" if count in ratios else "–" for count in counts)
            yield f"| {width} | {shown} | {_from(start, min(ratios))} |"
        yield ""


def _from(start: float | None, least: float) -> str:
    if start is None:
        return "nowhere on the map"
    return f"{start:.0f} rows" if start else f"all, {least:g} rows on"


if __name__ == "__main__":
    frame = load_all([Path(argument) for argument in sys.argv[1:]])
    print("\n".join(markdown(cells(frame[frame["subject"].eq(EXPERTS).astype("bool")]))))
