"""Make sweeps and results of any size, to measure how moebench's commands scale.

A sweep has ten backends on five published models, both modes and two routings: 200 jobs for each number of tokens.
The results of a sweep have one row for each job. A row has the values of a row that was measured on an H200, of the
same backend and mode if there is one. Its times are scaled by the work of the job, with noise from one job to the next.
A few jobs did not run, ran out of memory, or are wrong.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moebench.results.files import ENVIRONMENT_NAME, PARQUET_NAME
from moebench.results.frame import load, to_records, write
from moebench.results.journal import JOURNAL_NAME
from moebench.results.record import ONLY_IF_OK, Record, Status, record
from moebench.workload.case import Case, Job
from moebench.workload.spec import parse_sweep

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "h200-2026-11-23"
BACKENDS = (
    *("loop", "torch_mm", "torch_mm_save_time", "triton", "gmm", "gmm_save_time", "te"),
    *("te_fp8_current", "te_fp8_delayed", "te_fp8_block"),
)
MODELS = ("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "mixtral-8x7b", "nemotron-3-nano")
ROUTINGS = ("uniform", "zipf")
#: Jobs of the sweep for each number of tokens.
JOBS_OF_A_COUNT = len(BACKENDS) * len(MODELS) * len(ROUTINGS) * 2
#: Shares of jobs that end otherwise than with status ok.
_FAILED = {Status.unsupported: 0.03, Status.oom: 0.005, Status.mismatch: 0.002, Status.crash: 0.0005}
_DETAILS = {
    Status.unsupported: "grouped_gemm is not installed; install it with `pip install grouped_gemm`",
    Status.oom: "CUDA out of memory. Tried to allocate 18.00 GiB",
    Status.mismatch: "output: the error is 3.1 times its budget",
    Status.crash: "the process died of SIGSEGV",
}


def sweep_text(num_jobs: int) -> str:
    """Return a sweep file with `num_jobs` jobs, a multiple of 200."""
    if num_jobs < JOBS_OF_A_COUNT or num_jobs % JOBS_OF_A_COUNT:
        raise ValueError(f"{num_jobs} jobs: must be a multiple of {JOBS_OF_A_COUNT}")
    counts = [64 * (number + 1) for number in range(num_jobs // JOBS_OF_A_COUNT)]
    grid = {"model": MODELS, "mode": ("forward", "train"), "routing": ROUTINGS, "num_tokens": counts}
    axes = "\n".join(f"{name} = {json.dumps(values)}" for name, values in {**grid, "backend": BACKENDS}.items())
    return f'name = "scaling"\n\n[[grid]]\n{axes}\n'


def jobs(num_jobs: int) -> list[Job]:
    return parse_sweep(sweep_text(num_jobs), "scaling.toml").jobs()


def records(of: list[Job], num_rounds: int, seed: int) -> Iterator[Record]:
    """Yield the records of a run: of each round, the record of each job. `seed` draws the noise of the run."""
    templates = _templates()
    base = random.Random(0)  # all runs of a sweep have the same speeds and failures
    noise = random.Random(seed)
    speeds = [base.lognormvariate(0, 0.3) for _ in of]
    endings = base.choices([*_FAILED, Status.ok], [*_FAILED.values(), 1 - sum(_FAILED.values())], k=len(of))
    for number in range(num_rounds):
        for job, speed, ending in zip(of, speeds, endings, strict=True):
            template = templates.get((job.backend, job.case.mode)) or templates["torch_mm", job.case.mode]
            cells = _cells(template, job, number, speed * noise.lognormvariate(0, 0.01), noise)
            if ending is not Status.ok:
                cells = {name: cell for name, cell in cells.items() if name not in ONLY_IF_OK}
                cells |= {"detail": _DETAILS[ending], "flags": ()}
                cells["parity_worst"] = 3.1 if ending is Status.mismatch else None
            cells |= {"run_id": f"20261129-{seed:06}-scaling", "env_id": template.env_id, "round": number}
            yield record(job, ending, **cells)


_LENGTHS = ("time_ms", "time_ms_low", "time_ms_high", "host_time_ms", "graph_time_ms", "backward_ms", "roofline_ms")
_KEPT = (
    *("flags", "executed", "device", "gpu", "gpu_uuid", "l2", "parity_worst", "parity_worst_tensor", "parity_errors"),
    *("deterministic", "converged", "num_samples", "sample_marked", "sm_clock_mhz", "copy_gb_per_s"),
    *("peak_memory_bytes", "saved_memory_bytes", "reserved_memory_bytes", "outside_torch_bytes"),
    *("untracked_memory_bytes", "job_s", "setup_s", "parity_s", "timing_s", "ceilings_s"),
)


def _templates() -> dict[tuple[str, str], Record]:
    found = to_records(load(PUBLISHED))
    return {(row.backend, row.mode): row for row in found if row.status is Status.ok}


def _cells(template: Record, job: Job, number: int, speed: float, noise: random.Random) -> dict[str, Any]:
    """Return the measured columns of a job that takes as long as the template, scaled by its work and by `speed`."""
    measured = Case.model_validate({name: getattr(template, name) for name in Case.model_fields})
    factor = speed * max(1e-3, job.case.flops() / measured.flops())
    cells = {name: getattr(template, name) for name in _KEPT}
    cells |= {name: None if (ms := getattr(template, name)) is None else ms * factor for name in _LENGTHS}
    assert template.samples_ms is not None, "a template is ok"
    cells["samples_ms"] = tuple(ms * factor * (1 + 0.001 * noise.random()) for ms in template.samples_ms)
    cells["sample_rounds"] = (number,) * len(template.samples_ms)
    seconds = cells["time_ms"] / 1e3
    cells["tokens_per_s"] = job.case.num_active_tokens / seconds
    cells["tflops"] = job.case.flops() / seconds / 1e12
    if cells["roofline_ms"] is not None:
        cells["roofline_fraction"] = cells["roofline_ms"] / cells["time_ms"]
    return cells


def write_run(folder: Path, of: list[Job], *, num_rounds: int = 1, seed: int = 1) -> None:
    """Write the folder of a run: a journal, and the environment of the results that were measured on an H200."""
    folder.mkdir(parents=True)
    shutil.copy(PUBLISHED / ENVIRONMENT_NAME, folder)
    with (folder / JOURNAL_NAME).open("w", encoding="utf-8") as file:
        file.writelines(f"{row.to_json()}\n" for row in records(of, num_rounds, seed))


def write_parquet(folder: Path, run: Path) -> None:
    """Write the results of a run as `moebench` publishes them: one row for each job in a Parquet file."""
    folder.mkdir(parents=True)
    shutil.copy(run / ENVIRONMENT_NAME, folder)
    write(load(run), folder)
    assert (folder / PARQUET_NAME).is_file()
