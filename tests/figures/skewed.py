"""The figures about skewed routing: the study `turns` on the sweep `skewed-wide`."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pandas as pd

from moebench.workload import selection
from tests.figures import data
from tests.figures.markdown import markdown

SKEWED = "skewed/h200-2026-11-30.json"
BACKENDS = {"backend": "triton", "other": "torch_mm"}


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


def counted() -> dict[str, Any]:
    """The tokens of the cases, and that each case of the sweep was measured."""
    cases = list(dict.fromkeys(job.case for job in selection.select("skewed-wide", (), (), (), ())))
    frame = _rows()
    assert frame["case_id"].tolist() == [case.case_id for case in cases]
    few, middle, many = frame["num_tokens"].unique()
    return {"few": few, "middle": middle, "many": many, "cases": len(cases)}


def ratios() -> dict[str, Any]:
    """The median ratio of each mode, and the largest of all; none is wholly above 1."""
    frame = _rows()
    assert not frame["slower"].any()
    worst = frame.loc[frame["ratio"].idxmax()]
    assert (worst["model"], worst["mode"], worst["routing"]) == ("gpt-oss-20b", "train", "one-hot")
    return {
        "ratios": len(frame),
        "largest": _ratio(worst),
        "tokens": worst["num_tokens"],
        **{mode: f"{some['ratio'].median():.3f}" for mode, some in frame.groupby("mode")},
    }
