"""Build records to draw, and read what a figure then shows."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moebench.report.plots.figures import Picture
from moebench.report.plots.settings import settings
from moebench.results.record import Record, Status, record
from moebench.workload.case import Case, Job

SHAPE: dict[str, Any] = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 256, "moe_inter_dim": 512}
COUNTS = (128, 256, 1024)
LONG = "acme_kernels.experiments.grouped:FancyGroupedExpertsWithEpilogueFusion"


def case(num_tokens: int, **fields: Any) -> Case:
    return Case(num_tokens=num_tokens, **{**SHAPE, **fields})


def ok(of: Case, backend: str = "loop", time_ms: float = 2.0, dispatcher: str = "local", **measured: Any) -> Record:
    rate = of.num_active_tokens / time_ms * 1e3
    measured = {
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "time_ms_low": time_ms * 0.9,
        "time_ms_high": time_ms * 1.2,
        "converged": True,
        "tokens_per_s": rate,
        "tflops": of.flops() / time_ms / 1e9,
        "parity_worst": 0.25,
        "peak_memory_bytes": of.num_tokens * 1000,
        "saved_memory_bytes": of.num_tokens * 500 if of.mode == "train" else None,
        **measured,
    }
    job = Job(case=of, backend=backend, dispatcher=dispatcher)
    return record(job, Status.ok, run_id="20261123-run", env_id="e", time_ms=time_ms, **measured)


def bad(of: Case, status: Status, backend: str = "torch_mm", dispatcher: str = "local", **measured: Any) -> Record:
    found = {"device": "cuda", "gpu": "NVIDIA H200", "detail": "why", **measured}
    job = Job(case=of, backend=backend, dispatcher=dispatcher)
    return record(job, status, run_id="20261123-run", env_id="e", **found)


def family(backend: str, **fields: Any) -> list[Record]:
    return [ok(case(count, **fields), backend, time_ms=1 + count / 100) for count in COUNTS]


def only(pictures: list[Picture]) -> Figure:
    (figure,) = figures_of(pictures).values()
    return figure


def figures_of(pictures: list[Picture]) -> dict[str, Figure]:
    """Draw pictures that are planned, and return their figures by name."""
    with settings():
        return {name: draw() for name, draw in pictures}


def panels(figure: Figure) -> dict[str, Axes]:
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def line(ax: Axes, label: str) -> Line2D:
    (found,) = (line for line in ax.lines if line.get_label() == label)
    return found


def labels(ax: Axes) -> list[str]:
    return [str(line.get_label()) for line in ax.lines]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for sub in figure.subfigs for text in sub.texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for sub in figure.subfigs for box in sub.legends for text in box.get_texts()]
