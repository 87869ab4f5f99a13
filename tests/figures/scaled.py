"""The figures of docs/scaling.md: what commands and the supervisor take for many jobs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tests.figures import data

COMMANDS, SUPERVISOR = "scaling/commands-2026-11-30.json", "scaling/supervisor-2026-11-30.json"


def rows(name: str) -> pd.DataFrame:
    return pd.DataFrame(data.document(name)["rows"])


def growth() -> Mapping[str, Any]:
    """By how much the CPU time of each command grows from the smaller to the larger size."""
    after = data.select(rows(COMMANDS), revision="after")
    *_, small, large = sorted(set(after["size"]))
    found = {}
    for command in after["command"].unique():
        times_s = [data.the(after, command=command, size=size)["cpu_s"] for size in (small, large)]
        found[command.replace(" ", "_")] = f"{times_s[1] / times_s[0]:.1f}"
    return {"small": f"{small:,}", "large": f"{large:,}", **found}


def saturated() -> Mapping[str, Any]:
    """What the supervisor does if workers answer at once."""
    row = data.the(rows(SUPERVISOR), revision="after", num_jobs=100_000, job_s=0.0)
    cost_ms = row["cpu_ms_per_job"]
    return {
        "jobs": f"{row['num_jobs']:,}",
        "workers": row["num_workers"],
        "cost": f"{cost_ms:.2f}",
        "most": f"{round(1000 / cost_ms, -2):,.0f}",
        "gib": f"{row['peak_bytes'] / 2**30:.1f}",
    }


def thousand_gpus() -> Mapping[str, Any]:
    """What the jobs of 1,000 GPUs need, if they take as long as those of the published run on one H200."""
    of_a_run = data.results(data.GPU)
    mean_s = float((of_a_run["job_s"] / of_a_run["num_rounds"]).mean())
    row = data.the(rows(SUPERVISOR), num_workers=1000)
    rate = 1000 / mean_s
    return {
        "mean": f"{mean_s:.1f}",
        "rate": f"{rate:.0f}",
        "measured": f"{row['jobs_per_s']:.0f}",
        "cost": f"{row['cpu_ms_per_job']:.1f}",
        "share": f"{rate * row['cpu_ms_per_job'] / 1000:.0%}",
        "seconds": f"{row['job_s']:g}",
    }
