"""The committed results that documents quote, and selections that several figures need."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moebench.results.frame import load
from moebench.verdicts.findings import rounds_of

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"
GPU, TWO_GPUS, FOUR_GPUS = "h200-2026-11-23", "h200-ep2-2026-11-23", "h200-ep4-2026-11-28"
#: Two GPUs on 2026-11-29: the dispatchers that wait, and `symm_mem` in three rounds with the layers of NeMo AutoModel.
WAITING, SYMM_MEM = "h200-ep2-2026-11-29", "h200-peers-ep2-2026-11-29"
CASE = ["model", "mode", "num_tokens"]
#: `moebench run peers`: many tokens with every library, few tokens, and the runs before with many tokens.
PEERS, DECODE = "h200-peers-2026-11-28", "h200-peers-2026-11-23"
#: One round of a part of `moebench run peers`, train steps of two GPUs with traces, contexts of training, adapters,
#: and FP8.
PEERS_AGAIN, PROFILED = "h200-peers-2026-11-30", "h200-ep2-2026-11-30"
#: `moebench run peers` in three rounds, with every library, and few tokens in one round, with newer kernels.
ROUNDS = "h200-peers-rounds-2026-11-30"
#: Train steps with newer kernels: all layers on the three shapes in one run, and three models.
TRAIN = "h200-peers-train-2026-11-30"
#: Forwards and train steps of the three shapes beside SonicMoE in one run, and train steps of GPT-OSS-120B.
BOTH = "h200-peers-2026-12-01"
#: `gmm` on the three shapes, with traces.
GMM = "h200-gmm-2026-12-01"
TRAINING, ADAPTERS, FP8 = "h200-training-2026-11-30", "h200-lora-2026-11-30", "h200-fp8-2026-12-01"
#: FP8 on a map of rows per expert and moe_inter_dim.
FP8_MAP = "h200-fp8-map-2026-11-30"
#: Contexts of training, and rows in FP8, on two GPUs. The later run has other cases of the same sweep.
TRAINING_OF_TWO, FP8_OF_TWO = "h200-training-ep2-2026-11-30", "h200-fp8-ep2-2026-11-30"
FP8_OF_TWO_LATER = "h200-fp8-ep2-later-2026-11-30"
EARLIER_GPU, EARLIER_PEERS = "earlier/h200-2026-11-23-2", (DECODE, "earlier/h200-peers-2026-11-23")
#: Shapes (experts, top-k, dim, inter) and the token count that was measured for each.
SHAPES = {(128, 8, 2048, 768): 16384, (32, 4, 2880, 2880): 8192, (32, 8, 7168, 2048): 4096}
#: The shapes of which PEERS_AGAIN has counters.
SHAPES_AGAIN = {shape: SHAPES[shape] for shape in ((128, 8, 2048, 768), (32, 8, 7168, 2048))}
#: The shapes of the study `steps` of 2026-11-30.
SHAPES_OF_STEPS_AGAIN = ((32, 4, 2880, 2880), (32, 8, 7168, 2048))
JOB = ["case_id", "backend", "dispatcher"]


@cache
def results(name: str) -> pd.DataFrame:
    """The `ok` jobs of a folder of results/published; `waits` says whether the call waits for the GPU."""
    frame = load(PUBLISHED / name)
    frame = frame[frame["status"] == "ok"]
    return frame.assign(waits=["synchronises" in flags for flags in frame["flags"]])


def document(name: str) -> Any:
    return json.loads((PUBLISHED / name).read_text())


def bandwidths(name: str) -> pd.DataFrame:
    """The rows of the study `bandwidth`, from all its files in a folder of results/published."""
    files = sorted((PUBLISHED / name).glob("bandwidth*.json"))
    return pd.DataFrame([row for path in files for row in json.loads(path.read_text())["rows"]])


def select(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows that have these values. A value may be a list of alternatives."""
    return frame.take(_positions(frame, values))


def the(frame: pd.DataFrame, **values: Any) -> pd.Series:
    """The only row that has these values. Raises ValueError if there is not exactly one."""
    (position,) = _positions(frame, values)
    return frame.iloc[position]


def _positions(frame: pd.DataFrame, values: dict[str, Any]) -> np.ndarray:
    has_them = np.ones(len(frame), dtype=bool)
    for name, value in values.items():
        has_them &= frame[name].isin(value if isinstance(value, list) else [value]).to_numpy(bool)
    return np.flatnonzero(has_them)


def of_shape(frame: pd.DataFrame, shape: tuple[int, ...]) -> pd.DataFrame:
    experts, top, dim, inter = shape
    return select(frame, n_routed_experts=experts, n_activated_experts=top, dim=dim, moe_inter_dim=inter)


def peers_of(backend: str, shape: tuple[int, ...], run: str = PEERS) -> pd.DataFrame:
    """The two jobs of a backend on a shape of `moebench run peers`: the forward and the train step."""
    return select(of_shape(results(run), shape), num_tokens=SHAPES[shape], backend=backend)


def samples_of(row: pd.Series) -> Any:
    """The samples of a row in ms, without the marked ones."""
    marked = row["sample_marked"]
    samples = np.asarray(row["samples_ms"], float)
    return samples if marked is None or marked is pd.NA else samples[~np.asarray(marked, bool)]


def between_rounds() -> pd.DataFrame:
    """The jobs that were measured in two rounds of one run, with their medians `one_ms` and `other_ms`."""
    frame = results("rounds/h200-2026-11-23")
    medians = [rounds_of(row) for row in frame.to_dict("records")]
    return _not_short(frame.assign(one_ms=[one[0] for one in medians], other_ms=[one[1] for one in medians]))


def between_gpus() -> pd.DataFrame:
    """The jobs of two runs of `moebench run gpu` on two H200s, without `triton`, whose code changed between them."""
    now, before = results(GPU), results(EARLIER_GPU)
    both = now[now["backend"] != "triton"].merge(before, on=JOB, suffixes=("", "_before"))
    return _not_short(both.assign(one_ms=both["time_ms_before"], other_ms=both["time_ms"]))


def _not_short(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["one_ms"] >= 0.1) & (rows["other_ms"] >= 0.1)]
