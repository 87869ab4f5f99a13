"""The figures about skewed routing: the study `turns` on the sweep `skewed-wide`."""

import math
import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

import pandas as pd

from experts.config import is_gated_activation
from experts.gemm.tiling import PAIRS
from moebench.workload import selection
from moebench.workload.models import MODELS
from tests.figures import data
from tests.figures.data import select, the
from tests.figures.markdown import markdown
from tests.figures.peers import STEPS_AGAIN, steps_of
from tests.figures.quoted import span

SKEWED = "skewed/h200-2026-11-30.json"
BACKENDS = {"backend": "triton", "other": "torch_mm"}
#: Most ratios above 1 have so many tokens.
NUM_TOKENS = 256
ONE_HOT = {"mode": "forward", "num_tokens": NUM_TOKENS, "routing": "one-hot"}
NEXT, QWEN = "qwen3-next-80b", "qwen3-30b-a3b"


@cache
def _rows() -> pd.DataFrame:
    """One row for each ratio. A case is here only if its results agreed and it has samples."""
    frame = pd.DataFrame(data.document(SKEWED)["rows"])
    assert set(frame["status"]) == {"ok"}
    assert all(set(frame[column]) == {value} for column, value in BACKENDS.items())
    assert (frame["slower"] == (frame["ratio_low"] > 1)).all()
    return frame


def _ratio(row: pd.Series) -> str:
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def skewed() -> str:
    """For each mode, number of tokens and routing: the ratios' number, median and largest, and those wholly above 1."""
    by = ["mode", "num_tokens", "routing"]
    header = ["mode", "tokens", "routing", "ratios", "median", "wholly above 1", "largest", "of"]

    def rows() -> Iterator[list[Any]]:
        for (mode, num_tokens, routing), some in _rows().groupby(by, sort=False):
            worst = some.loc[some["ratio"].idxmax()]
            counts = [len(some), f"{some['ratio'].median():.3f}", int(some["slower"].sum())]
            yield [mode, num_tokens, f"`{routing}`", *counts, _ratio(worst), worst["model"]]

    return markdown(header, rows())


def skewed_slower() -> str:
    """The ratios whose whole interval is above 1, the largest first."""
    slower = _rows()[_rows()["slower"]].sort_values("ratio", ascending=False)
    header = ["model", "mode", "tokens", "routing", "`triton`, ms", "`torch_mm`, ms", "ratio"]

    def rows() -> Iterator[list[Any]]:
        for _, row in slower.iterrows():
            times = (f"{row[name]:.3f}" for name in ("time_ms", "other_time_ms"))
            yield [row["model"], row["mode"], row["num_tokens"], f"`{row['routing']}`", *times, _ratio(row)]

    return markdown(header, rows())


def measured() -> dict[str, Any]:
    """How many cases of the sweep were measured, in its order, before the time budget ended."""
    cases = list(dict.fromkeys(job.case for job in selection.select("skewed-wide", (), (), (), ())))
    frame = _rows()
    assert frame["case_id"].tolist() == [case.case_id for case in cases[: len(frame)]]
    counts = {model: int((frame["model"] == model).sum()) for model in dict.fromkeys(case.model for case in cases)}
    *complete, glm, nemotron, minimax = counts.items()
    assert {count for _, count in complete} == {len(cases) / len(counts)}
    assert (glm, nemotron, minimax) == (("glm-4.5-air", 1), ("nemotron-3-nano", 0), ("minimax-m2", 0))
    few, middle, many = frame["num_tokens"].unique()
    return {"few": few, "middle": middle, "many": many, "ratios": len(frame), "cases": len(cases)}


def slower() -> dict[str, Any]:
    """How many ratios are wholly above 1, and with which tokens and routing."""
    frame = _rows()
    above = select(frame, slower=True)
    assert "zipf" not in set(above["routing"])
    others = above[above["num_tokens"] != NUM_TOKENS]
    assert set(zip(others["mode"], others["routing"], strict=True)) == {("train", "one-hot")}
    return {
        "ratios": len(frame),
        "slower": len(above),
        "tokens": NUM_TOKENS,
        "with_tokens": len(above) - len(others),
        "others": len(others),
        "largest": f"{frame['ratio'].max():.3f}",
        "train_largest": f"{select(frame, mode='train')['ratio'].max():.3f}",
        **{mode: f"{some['ratio'].median():.3f}" for mode, some in frame.groupby("mode")},
    }


def _zeros_bytes(model: str, routing: str) -> int:
    """The bytes of the gradients of the weights of the experts that no token can choose."""
    config = MODELS[model]
    num_experts, top = config["n_routed_experts"], config["n_activated_experts"]
    left_out = {"one-hot": num_experts - top, "empty:0.9": min(round(0.9 * num_experts), num_experts - top)}[routing]
    matrices = 3 if is_gated_activation(config["expert_activation"]) else 2
    return int(left_out * matrices * config["dim"] * config["moe_inter_dim"] * 2)


def zeros() -> dict[str, Any]:
    """The time to write these gradients at the speed of the study `steps`' copy, over the time of the train step."""
    speed = statistics.median(steps_of(STEPS_AGAIN, shape)["copy"]["gb_per_s"] for shape in data.SHAPES_OF_STEPS_AGAIN)
    trained = select(_rows(), mode="train", routing=["one-hot", "empty:0.9"])
    shares = pd.Series(
        [_zeros_bytes(row["model"], row["routing"]) / speed / 1e6 / row["time_ms"] for _, row in trained.iterrows()],
        index=trained.index,
    )
    above = trained[trained["slower"]]
    assert len(above) == select(_rows(), mode="train")["slower"].sum()
    mostly = shares[above.index] > 0.5
    assert set(above[mostly]["model"]) == {"deepseek-v3", "deepseek-v4-flash", "kimi-k2"}
    assert set(above[~mostly]["model"]) == {"gpt-oss-20b", "gpt-oss-120b", "mixtral-8x7b"}
    others = span(shares[above.index][~mostly].tolist(), 2)
    return {
        **span(shares.tolist(), 2),
        "steps": len(above),
        "mostly": int(mostly.sum()),
        "mostly_low": f"{shares[above.index][mostly].min():.2f}",
        **{f"others_{end}": share for end, share in others.items()},
    }


def _tiles_of_up(model: str) -> int:
    """The number of large tiles of the up projection if all NUM_TOKENS tokens choose the same experts."""
    config = MODELS[model]
    tiles = math.ceil(NUM_TOKENS / PAIRS.rows) * math.ceil(config["moe_inter_dim"] / PAIRS.columns)
    return int(config["n_activated_experts"] * tiles)


def tiles() -> dict[str, Any]:
    """The large tiles of one up projection beside the GPU's multiprocessors, for two models."""
    found = {name: the(_rows(), model=name, **ONE_HOT) for name in (NEXT, QWEN)}
    assert found[NEXT]["slower"]
    assert not found[QWEN]["slower"]
    (gpu,) = data.document(SKEWED)["environment"]["gpus"]
    assert _tiles_of_up(NEXT) < _tiles_of_up(QWEN) < gpu["sm_count"]
    return {
        "experts": MODELS[NEXT]["n_activated_experts"],
        "rows": NUM_TOKENS,
        "columns": MODELS[NEXT]["moe_inter_dim"],
        "tiles": _tiles_of_up(NEXT),
        "sms": gpu["sm_count"],
        "qwen_tiles": _tiles_of_up(QWEN),
        "qwen_ratio": f"{found[QWEN]['ratio']:.3f}",
    }
