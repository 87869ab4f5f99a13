"""The figures of `gmm` with traces: what the GPU does in a call, and how long it is idle."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from moebench.workload.models import SHAPE_AXES, shape_name
from tests.figures import data
from tests.figures.data import GMM, SHAPES_OF_STEPS_AGAIN, results, select, the
from tests.figures.markdown import markdown

#: The groups of the study `kernels` that are no products.
_REST = ("rows", "sort", "copies")


def _calls() -> Iterator[tuple[str, str, pd.Series, dict[str, Any]]]:
    """Shape, mode, the row of results, and of the three calls in the trace the one with the shortest span."""
    profiled = data.document(f"{GMM}/kernels.json")["rows"]
    for shape in SHAPES_OF_STEPS_AGAIN:
        for mode in ("forward", "train"):
            row = the(select(data.of_shape(results(GMM), shape), mode=mode), backend="gmm")
            calls = [call for call in profiled if call["trace"].startswith(row["case_id"])]
            assert len(calls) == 3
            shortest = min(calls, key=lambda call: call["span_ms"])
            assert shortest["waits"] == shortest["copies_to_host"] == 1
            assert shortest["other_ms"] == shortest["waiting_ms"] == shortest["communication_ms"] == 0
            yield shape_name(dict(zip(SHAPE_AXES, shape, strict=True))), mode, row, shortest


def traces() -> str:
    header = ["shape", "mode", "kernels", "copies", "products", "the rest", "timed call", "of it, the GPU works"]
    header += ["span under the profiler", "idle in the span", "idle before the first product"]

    def rows() -> Iterator[list[Any]]:
        for shape, mode, row, call in _calls():
            rest_ms = sum(call[f"{group}_ms"] for group in _REST)
            times = [call["products_ms"], rest_ms, row["time_ms"], row["busy_ms"]]
            times += [call["span_ms"], call["idle_ms"], call["idle_before_products_ms"]]
            yield [shape, mode, call["kernels"], call["copies"], *(f"{ms:.2f}" for ms in times)]

    return markdown(header, rows())


def waits() -> dict[str, str]:
    """In which share of a timed call the GPU works, and the share of the products in the time of all kernels."""
    found: dict[str, str] = {}
    calls = list(_calls())
    for mode in ("forward", "train"):
        shares = [row["busy_ms"] / row["time_ms"] for _, own_mode, row, _ in calls if own_mode == mode]
        found |= {f"{mode}_low": f"{min(shares):.2f}", f"{mode}_high": f"{max(shares):.2f}"}
    products = [call["products_ms"] / (call["span_ms"] - call["idle_ms"]) for *_, call in calls]
    early = [call["idle_before_products_ms"] / call["idle_ms"] for *_, call in calls]
    return {
        **found,
        "products_low": f"{min(products):.2f}",
        "products_high": f"{max(products):.2f}",
        "early_low": f"{min(early):.0%}"[:-1],
        "early_high": f"{max(early):.0%}",
    }
