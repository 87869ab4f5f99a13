"""The figures of sentences.py and tables.py about contexts of training and adapters."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from experts.catalog import LORA
from moebench.workload.spec import available_sweeps, load_sweep
from tests.figures import data
from tests.figures.data import ADAPTERS, TRAINING, results, select, the
from tests.figures.markdown import markdown
from tests.figures.quoted import WORDS

BACKENDS, CONTEXTS = ("triton", "torch_mm", "te"), ("plain", "checkpoint", "checkpoint_experts", "checkpoint_reentrant")
ENGINES = {"triton_lora": "triton", "torch_mm_lora": "torch_mm"}
MIB = 2**20


def _row(backend: str, context: str) -> pd.Series:
    return the(results(TRAINING), backend=backend, context=context)


def contexts() -> str:
    header = ["backend", "context", "time, ms", "95% interval, ms", "× `plain`", "GPU busy, ms"]
    header += ["peak, MiB", "kept for backward, MiB"]

    def rows() -> Iterator[list[Any]]:
        for backend in BACKENDS:
            plain_ms = _row(backend, "plain")["time_ms"]
            for context in CONTEXTS:
                row = _row(backend, context)
                interval = " to ".join(f"{row[f'time_ms_{end}']:.2f}" for end in ("low", "high"))
                busy = f"{row['busy_ms']:.2f}" if row["waits"] else "–"
                sizes = (f"{row[f'{what}_memory_bytes'] / MIB:.0f}" for what in ("peak", "saved"))
                times = (f"{row['time_ms']:.2f}", interval, f"{row['time_ms'] / plain_ms:.2f}", busy)
                yield [f"`{backend}`", f"`{context}`", *times, *sizes]

    return markdown(header, rows())


def run() -> dict[str, Any]:
    frame = results(TRAINING)
    assert len(frame) == len(BACKENDS) * len(CONTEXTS)
    assert set(frame["model"]) == {"qwen3-30b-a3b"}
    missing = sorted({job.case.context for job in load_sweep(available_sweeps()["training"]).jobs()} - set(CONTEXTS))
    jobs = data.document(f"{TRAINING}/run.json")["num_jobs"]
    names = ", ".join(f"`{name}`" for name in missing[:-1]) + f" and `{missing[-1]}`"
    (tokens,) = frame["num_tokens"].unique()
    contexts = WORDS[len(CONTEXTS) + len(missing)]
    return {"measured": len(frame), "jobs": jobs, "tokens": tokens, "contexts": contexts, "missing": names}


def _over_plain(column: str, backends: tuple[str, ...]) -> list[float]:
    return [
        _row(backend, context)[column] / _row(backend, "plain")[column]
        for backend in backends
        for context in CONTEXTS[1:]
    ]


def costs() -> dict[str, str]:
    """What checkpoints cost in time and save in memory."""
    saved = {(one, context): _row(one, context)["saved_memory_bytes"] / MIB for one in BACKENDS for context in CONTEXTS}
    times = _over_plain("time_ms", ("triton", "torch_mm"))
    peaks = _over_plain("peak_memory_bytes", ("triton", "torch_mm"))
    reentrant = [_row(one, "checkpoint_reentrant") for one in ("triton", "torch_mm")]
    other = [_row(one, "checkpoint") for one in ("triton", "torch_mm")]
    assert all(a["time_ms_high"] < b["time_ms_low"] for a, b in zip(reentrant, other, strict=True))
    more = [(a["peak_memory_bytes"] - b["peak_memory_bytes"]) / MIB for a, b in zip(reentrant, other, strict=True)]
    assert min(peaks) >= 1, "a checkpoint does not lower the peak within one layer"
    (few,) = {round(saved[one, "checkpoint"]) for one in BACKENDS}
    (kept,) = {round(saved[one, "plain"]) for one in ("triton", "torch_mm")}
    plain, tokens = _row("triton", "plain"), _row("triton", "plain")["num_tokens"]
    return {
        "low": f"{min(times):.2f}",
        "high": f"{max(times):.2f}",
        "kept": f"{kept}",
        "few": f"{few}",
        "peak": f"{plain['peak_memory_bytes'] / MIB:.0f}",
        "more": f"{max(more):.0f}",
        "x": f"{tokens * plain['dim'] * 2 / MIB:.0f}",
        "te_kept": f"{saved['te', 'plain']:.0f}",
    }


def of_te() -> dict[str, str]:
    """The host's part of the time of `te`."""
    assert all(_row("te", context)["waits"] and not _row("te", context)["converged"] for context in CONTEXTS)
    assert not any(_row(one, context)["waits"] for one in BACKENDS[:2] for context in CONTEXTS)
    plain, busy = _row("te", "plain"), _over_plain("busy_ms", ("te",))
    return {
        "time": f"{plain['time_ms']:.1f}",
        "busy": f"{plain['busy_ms']:.1f}",
        "low": f"{min(busy):.2f}",
        "high": f"{max(busy):.2f}",
        "experts": str(plain["n_routed_experts"]),
    }


def adapters() -> str:
    header = ["tokens", "backend", "forward, ms", "× its engine", "peak, MiB"]

    def rows() -> Iterator[list[Any]]:
        for num_tokens in (2048, 16384):
            case = select(results(ADAPTERS), num_tokens=num_tokens)
            times = case.set_index("backend")["time_ms"]
            for backend in ("triton", "triton_lora", "torch_mm", "torch_mm_lora", "loop_lora"):
                if backend in times:
                    over = f"{times[backend] / times[ENGINES[backend]]:.2f}" if backend in ENGINES else "–"
                    peak = f"{the(case, backend=backend)['peak_memory_bytes'] / MIB:.0f}"
                    yield [num_tokens, f"`{backend}`", f"{times[backend]:.2f}", over, peak]

    return markdown(header, rows())


def of_adapters() -> dict[str, Any]:
    frame = results(ADAPTERS)
    assert set(frame["mode"]) == {"forward"}
    by_count = [
        the(frame, backend=own, num_tokens=count)["time_ms"] / the(frame, backend=engine, num_tokens=count)["time_ms"]
        for own, engine in ENGINES.items()
        for count in (2048, 16384)
    ]
    jobs = data.document(f"{ADAPTERS}/run.json")["num_jobs"]
    return {
        "measured": len(frame),
        "jobs": jobs,
        "low": f"{min(by_count):.2f}",
        "high": f"{max(by_count):.2f}",
        "missing": jobs - len(frame),
        "rank": LORA.rank,
    }
