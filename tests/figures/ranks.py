"""The figures of sentences.py about several GPUs."""

from typing import Any

import pandas as pd

from moebench.results.stats import relative_half_width, series_interval
from tests.figures import data
from tests.figures.data import FOUR_GPUS, SYMM_MEM, TWO_GPUS, results, select, the
from tests.figures.quoted import WORDS, span


def forwards(name: str) -> pd.DataFrame:
    """Times of forwards on several ranks in ms, with one row for each case and backend and one column a dispatcher."""
    keys = ["case_id", "num_tokens", "backend"]
    frame = select(results(name), mode="forward").pivot(index=keys, columns="dispatcher", values="time_ms")
    return frame.reset_index().assign(fastest=frame.idxmin(axis=1).to_numpy())


def dispatchers() -> dict[str, Any]:
    """Forwards: `deepep` is the fastest for few tokens, with exceptions on four GPUs, and the slowest for many."""
    two, four = (forwards(name) for name in (TWO_GPUS, FOUR_GPUS))
    is_fastest = two["fastest"] == "deepep"
    most, fewest = two.loc[is_fastest, "num_tokens"].max(), two.loc[~is_fastest, "num_tokens"].min()
    assert is_fastest[two["num_tokens"] <= most].all()
    for times in (two, four):
        many = times[times["num_tokens"] >= fewest]
        assert len(many)
        assert (many["deepep"] > many[["allgather", "alltoall"]].max(axis=1)).all()
    few = four[four["num_tokens"] <= most]
    other = few[few["fastest"] != "deepep"]
    assert set(other["backend"]) == {"torch_mm", "te", "loop"}
    exception = the(other, backend="torch_mm")
    rows = select(results(FOUR_GPUS), case_id=exception["case_id"])
    assert exception["fastest"] == "allgather"
    assert the(rows, dispatcher="allgather")["time_ms_high"] > the(rows, dispatcher="deepep")["time_ms_low"]
    return {
        "few": most,
        "many": fewest,
        "cases": WORDS[len(few)],
        "fastest": WORDS[len(few) - len(other)],
        "except": exception["num_tokens"],
    }


def dispatchers_of_train_steps() -> dict[str, Any]:
    """The fastest dispatcher of the fastest backend depends on the case, on two GPUs and on four."""
    for name in (TWO_GPUS, FOUR_GPUS):
        train = select(results(name), mode="train")
        fastest = train.loc[train.groupby("case_id")["time_ms"].idxmin()]
        assert fastest["dispatcher"].nunique() > 1
    return {}


def engines() -> dict[str, str]:
    """How long `triton` takes over `torch_mm`. No other backend is faster than both by more than 0.1%."""
    for name, ours, most in ((TWO_GPUS, ["torch_mm"], 1.0), (FOUR_GPUS, ["torch_mm", "triton"], 1.001)):
        fastest = select(results(name), backend=ours).groupby("case_id")["time_ms"].min()
        assert (fastest <= most * results(name).groupby("case_id")["time_ms"].min()).all()
    assert "triton" not in set(results(TWO_GPUS)["backend"])
    times = results(FOUR_GPUS).pivot(index=["case_id", "dispatcher"], columns="backend", values="time_ms")
    return span((times["triton"] / times["torch_mm"]).dropna().to_list(), 2)


def waits() -> dict[str, Any]:
    frame = results(FOUR_GPUS)
    assert frame["waits"].all()
    halves = [relative_half_width(*series_interval(data.samples_of(row))) for _, row in frame.iterrows()]
    return {"jobs": len(frame), "reach": sum(half <= 0.005 for half in halves)}


def allgather_waits() -> dict[str, str]:
    found = {}
    for name, rows in (("two", data.bandwidths(SYMM_MEM)), ("four", data.bandwidths(FOUR_GPUS))):
        dispatch = select(rows, dispatcher="allgather", way="dispatch", model="deepseek-v3")
        later = span((dispatch["ms"] - dispatch["raw_ms"]).to_list(), 2)
        found |= {f"{name}_{end}": value for end, value in later.items()}
    return found


def outside_torch() -> dict[str, str]:
    found = {}
    for name, run in (("two", TWO_GPUS), ("four", FOUR_GPUS)):
        of_run = span([float(some) / 2**30 for some in results(run)["outside_torch_bytes"]], 1)
        found |= {f"{name}_{end}": value for end, value in of_run.items()}
    return found
