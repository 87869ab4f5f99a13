"""The figures that sentences.py quotes, each computed from committed results."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experts.gemm.tiling import tiling_for
from moebench.parity.space.covering import covering
from moebench.parity.space.trial import RANK_AXES
from moebench.results.frame import load
from moebench.run.memory.passes import pass_bytes
from moebench.verdicts.noise import noises, noises_together
from moebench.workload.case import Case, Job
from tests.figures import data
from tests.figures.data import (
    BOTH,
    DECODE,
    FOUR_GPUS,
    FP8,
    GMM,
    GPU,
    JOB,
    PEERS,
    PEERS_AGAIN,
    PROFILED,
    SYMM_MEM,
    TRAIN,
    TWO_GPUS,
    WAITING,
    results,
    select,
    the,
)

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
QWEN, MIXTRAL = "qwen3-30b-a3b", "mixtral-8x7b"


def span(values: Sequence[float], digits: int) -> dict[str, str]:
    return {"low": f"{min(values):.{digits}f}", "high": f"{max(values):.{digits}f}"}


def environment(name: str = GPU) -> dict[str, str]:
    found = data.document(f"{name}/environment.json")
    versions, (gpu, *_) = found["versions"], found["gpus"]
    torch = ".".join(versions["torch"].split(".")[:2])
    python = ".".join(found["python"].split(".")[:2])
    return {"torch": torch, "cuda": versions["cuda"], "python": python, "gpu": gpu["name"], "date": name[-10:]}


def environments() -> dict[str, str]:
    """What all runs share, and their dates."""
    names = (GPU, DECODE, TWO_GPUS, PEERS, FOUR_GPUS, WAITING, SYMM_MEM, PEERS_AGAIN, PROFILED, TRAIN, BOTH, GMM)
    found = [environment(name) for name in names]
    (shared,) = {tuple((key, one[key]) for key in one if key != "date") for one in found}
    dates = sorted({one["date"] for one in found})
    return {**dict(shared), "first": dates[0], "last": dates[-1]}


def counts(name: str) -> dict[str, Any]:
    frame = results(name)
    assert len(frame) == len(load(data.PUBLISHED / name)), "all jobs are ok"
    assert frame["parity_worst"].max() <= 1
    models = WORDS[frame["model"].nunique()]
    num_jobs = data.document(f"{name}/run.json")["num_jobs"]
    return {"measured": len(frame), "jobs": num_jobs, "models": models, "worst": f"{frame['parity_worst'].max():.2f}"}


# README: which backend


def by_backend(**values: Any) -> pd.DataFrame:
    """Times of `moebench run gpu` in ms, with one row for each case and one column for each backend."""
    return select(results(GPU), **values).pivot(index="case_id", columns="backend", values="time_ms")


def fastest() -> dict[str, int]:
    times = by_backend().dropna(subset="triton")
    others = times.drop(columns="triton").min(axis=1).dropna()
    assert (times.loc[others.index, "triton"] < others).all()
    mixtral = select(results(GPU), model=MIXTRAL)
    assert the(mixtral, backend="triton")["time_ms_high"] > the(mixtral, backend="torch_mm")["time_ms_low"]
    return {"cases": len(others)}


def torch_mm_takes() -> dict[str, str]:
    """How long `torch_mm` takes over the time of `triton`."""

    def over(mode: str, num_tokens: list[int]) -> list[str]:
        times = by_backend(model=QWEN, routing="uniform", mode=mode, num_tokens=num_tokens).dropna(subset="triton")
        return sorted(f"{ratio:.2f}" for ratio in times["torch_mm"] / times["triton"])

    few = over("forward", [16, 128, 512, 2048])
    (forward,), (train,) = over("forward", [16384]), over("train", [16384])
    return {"low": few[0], "high": few[-1], "forward": forward, "train": train}


def libraries_take() -> dict[str, str]:
    """Times of `gmm` and `te` over the time of `triton`, with about a thousand rows for each expert and with fewer."""
    frame = results(GPU)
    rows = frame["num_tokens"] * frame["n_activated_experts"] / frame["n_routed_experts"]
    ratios = {}
    for name, some in {
        "wide": frame[rows.between(1000, 1100) & frame["model"].isin(["gpt-oss-20b", MIXTRAL])],
        "qwen": frame[rows.between(1000, 1100) & frame["model"].eq(QWEN)],
        "fewer": frame[rows < 1000],
    }.items():
        times = some.pivot(index="case_id", columns="backend", values="time_ms")
        over = times[["gmm", "te"]].div(times["triton"], axis=0).stack()
        ratios |= {f"{name}_low": f"{over.min():.1f}", f"{name}_high": f"{over.max():.1f}", f"{name}_most": over.max()}
    return {**ratios, "fewer_most": f"{ratios['fewer_most']:.0f}"}


def fp8_is_slower() -> dict[str, str]:
    for name in (GPU, TWO_GPUS, FOUR_GPUS):
        times = results(name).pivot(index=["case_id", "dispatcher"], columns="backend", values="time_ms")
        for backend in times.filter(like="fp8"):
            both = times[[backend, "torch_mm"]].dropna()
            assert len(both), backend
            assert (both[backend] > both["torch_mm"]).all(), backend
    return {}


def own_fp8_takes() -> dict[str, str]:
    """How many times as long `triton` takes as the engines in FP8, on three shapes."""
    times = results(FP8).pivot(index=["case_id", "mode"], columns="backend", values="time_ms")
    over = 1 / times[["triton_fp8", "deep_gemm_fp8"]].div(times["triton"], axis=0)
    spans = {mode: span(over.xs(mode, level="mode").stack(), 2) for mode in ("forward", "train")}
    return {f"{mode}_{end}": number for mode, ends in spans.items() for end, number in ends.items()}


def minutes() -> dict[str, str]:
    """The time of one round of the GPU suite in minutes, rounded up."""
    jobs = results(GPU)
    seconds = (jobs["job_s"] / jobs["num_rounds"]).mean() * counts(GPU)["jobs"]
    return {"gpu": WORDS[math.ceil(seconds / 60)]}


def lines_of_the_picture() -> dict[str, str]:
    frame = select(results(GPU), model=QWEN)
    points = frame.groupby(["backend", "mode", "routing"])["num_tokens"].nunique()
    return {"backends": WORDS[points[points > 1].index.get_level_values("backend").nunique()]}


# measured.md


def products_twice() -> dict[str, str]:
    of_case = results(GPU).groupby("case_id")["grouped_ms"]
    assert of_case.nunique().max() == 2
    return {"times": "twice", "apart": f"{(of_case.max() / of_case.min() - 1).max():.1%}"}


def listed_from() -> dict[str, int]:
    return {"rows": next(rows for rows in range(1000) if tiling_for(rows, pairs=False).listed)}


def te_forward() -> dict[str, str]:
    forward = select(results(GPU), model=QWEN, backend="te", mode="forward", routing="uniform")
    return {f"t{count}": f"{the(forward, num_tokens=count)['time_ms']:.1f}" for count in (512, 16384)}


def seconds_of_a_job() -> dict[str, str]:
    means = results(GPU)[["job_s", "timing_s", "parity_s", "ceilings_s"]].mean()
    return {name: f"{value:.1f}" for name, value in means.items()}


def not_converged() -> dict[str, Any]:
    rows = select(results(GPU), waits=False, converged=False)
    assert set(rows["model"]) == {MIXTRAL, "deepseek-v3", "kimi-k2"}
    assert set(rows["mode"]) == {"train"}
    return {"jobs": len(rows)}


def speeds_of_the_host() -> dict[str, str]:
    row = the(results(GPU), model=QWEN, backend="gmm", mode="forward", num_tokens=16384)
    return span([float(at) for at in np.percentile(data.samples_of(row), (25, 75))], 1)


def two_rounds() -> dict[str, int]:
    frame = results("rounds/h200-2026-11-23")
    assert set(frame["num_rounds"]) == {2}
    return {"jobs": len(frame)}


def peaks_apart() -> dict[str, str]:
    both = results(GPU).merge(results(data.EARLIER_GPU), on=JOB, suffixes=("", "_before"))
    both = both[both["backend"] != "triton"]
    one, other = (both[f"peak_memory_bytes{side}"].astype(float) for side in ("", "_before"))
    apart = (one - other).abs()
    return {"apart": f"{(apart / one)[apart > 2**20].max():.2%}"}


# the other documents


def estimates() -> dict[str, Any]:
    ratios = []
    for name in (GPU, TWO_GPUS, DECODE, FOUR_GPUS, PEERS):
        for row in results(name).to_dict("records"):
            if not row["backend"].startswith("peer_"):
                fields = {key: row[key] for key in Case.model_fields if key in row and not pd.isna(row[key])}
                job = Job(case=Case.model_validate(fields), backend=row["backend"], dispatcher=row["dispatcher"])
                ratios.append(pass_bytes(job) / row["peak_memory_bytes"])
    return {**span(ratios, 1), "median": f"{np.median(ratios):.1f}", "jobs": len(ratios)}


def gpus_differ() -> dict[str, str]:
    rows = select(data.between_gpus(), waits=False)
    return {"apart": f"{(rows['other_ms'] / rows['one_ms'] - 1).abs().max():.1%}"}


def parity_cases() -> dict[str, int]:
    return {"alone": len(covering()), "ranks": len(covering(RANK_AXES))}


def spread(log_rounds: Sequence[Any]) -> dict[str, str]:
    """The standard deviation in the median job, and the same estimated from the quartiles."""
    quartiles = [np.subtract(*np.percentile(some, (75, 25))) / 1.349 for some in log_rounds]
    return {
        "deviation": f"{np.median([np.std(some, ddof=1) for some in log_rounds]):.0%}",
        "quartiles": f"{np.median(quartiles):.0%}",
    }


def spread_apart() -> dict[str, Any]:
    frame = results("rounds/cpu-2026-11-23")
    (rounds,) = frame["num_rounds"].unique()
    return {**spread([noise.log_rounds for noise in noises(frame, 0.0)]), "jobs": len(frame), "rounds": rounds}


def recorded_together() -> list[Any]:
    a, b = (results(f"rounds/cpu-ab-2026-11-23/{side}") for side in "ab")
    return [noise.log_rounds for noise in noises_together(a, b)]


def rounds_together() -> dict[str, int]:
    few, many = sorted({len(rounds) for rounds in recorded_together()})
    return {"few": few, "many": many}
