"""Build results to gate: jobs with the rounds that a test names."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moebench.machine.environment import Environment
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status, record
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.gate import GateResult, gate
from moebench.workload.case import Case, Job

ROOT = Path(__file__).parents[2]
H200 = Environment.from_file(ROOT / "results" / "published" / "h200-2026-11-23" / "environment.json")
SHAPE: dict[str, Any] = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 256, "moe_inter_dim": 512}


def steady(num_rounds: int = 10, time_ms: float = 1.0, spread: float = 0.005, seed: int = 0) -> list[float]:
    """Return medians of rounds, evenly spread over `spread` of the time, in random order."""
    order = np.random.default_rng(seed).permutation(np.linspace(-spread / 2, spread / 2, num_rounds))
    return [time_ms * (1 + float(step)) for step in order]


def job_of(num_tokens: int = 64, backend: str = "loop", dispatcher: str = "local", **fields: Any) -> Job:
    return Job(case=Case(num_tokens=num_tokens, **{**SHAPE, **fields}), backend=backend, dispatcher=dispatcher)


def ok(job: Job, rounds: Sequence[float], **measured: Any) -> Record:
    """Return a row with three samples in each round, around its median."""
    fields = {
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "l2": "cold",
        "time_ms": float(np.median(rounds)),
        "samples_ms": tuple(time * factor for time in rounds for factor in (0.9, 1.0, 1.3)),
        "sample_rounds": tuple(number for number in range(len(rounds)) for _ in range(3)),
        "peak_memory_bytes": 100_000_000,
        "saved_memory_bytes": 1000 if job.case.mode == "train" else None,
        "parity_worst": 0.25,
        "env_id": "e",
        "run_id": "20261123-000000-a",
        **measured,
    }
    return record(job, Status.ok, **fields)


def waits(job: Job, rounds: Sequence[float], busy: Sequence[float], **measured: Any) -> Record:
    """Return a row of a call that waits for the GPU. `busy` has the GPU's own time of the first rounds."""
    fields = {"flags": ("synchronises",), **measured}
    if busy:
        fields["busy_ms"] = float(np.median(busy))
        fields["busy_samples_ms"] = tuple(time * factor for time in busy for factor in (0.99, 1.0, 1.02))
        fields["busy_sample_rounds"] = tuple(number for number in range(len(busy)) for _ in range(3))
    return ok(job, rounds, **fields)


def bad(job: Job, status: Status, detail: str = "why\nmore", **measured: Any) -> Record:
    fields = {"detail": detail, "device": "cuda", "gpu": "NVIDIA H200", "env_id": "e", "run_id": "20261123-000000-a"}
    if status is Status.mismatch:
        fields["parity_worst"] = 3.5
    return record(job, status, **{**fields, **measured})


def frame(*rows: Record) -> pd.DataFrame:
    return to_frame(rows)


def gated(baseline: Sequence[Record], candidate: Sequence[Record], **options: Any) -> GateResult:
    comparability = options.pop("comparability", Comparability({}, {}))
    return gate(to_frame(baseline), to_frame(candidate), comparability, **options)


#: Jobs by what happens to them in `one_of_each`.
JOBS = {
    name: job_of(tokens) for name, tokens in {"same": 1, "slow": 2, "gone": 3, "one": 4, "crash": 5, "new": 6}.items()
}
NASTY = "died \x1b[31m100%\x00 <b>|`x`, a:b\x07\nand more"


@cache
def one_of_each() -> GateResult:
    """Gate one job per outcome.

    They are PASS, REGRESSED by time, MISSING, INCONCLUSIVE, REGRESSED by a crash with a nasty reason, and NEW.
    """
    slow = steady(time_ms=1.0512)
    before = [ok(JOBS[name], steady()) for name in ("same", "slow", "gone", "crash")]
    after = [
        ok(JOBS["same"], steady(seed=1)),
        ok(JOBS["slow"], slow, peak_memory_bytes=125_000_000),
        ok(JOBS["new"], slow),
    ]
    return gated(
        [*before, ok(JOBS["one"], [1.0])],
        [*after, ok(JOBS["one"], [1.01]), bad(JOBS["crash"], Status.crash, NASTY)],
    )


def changed(
    of: Environment = H200, gpu: dict[str, Any] | None = None, versions: dict[str, Any] | None = None, **fields: Any
) -> Environment:
    """Return the environment with some facts changed, also those of its GPUs and libraries."""
    gpus = tuple(some.model_copy(update=gpu or {}) for some in of.gpus)
    return of.model_copy(update={"gpus": gpus, "versions": {**of.versions, **(versions or {})}, **fields})
