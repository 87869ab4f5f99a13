"""Every public function takes results as a path, a frame or a list, and answers anything else with what to give."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import moebench
from moebench.errors import ResultsError
from moebench.results.frame import to_frame, write
from moebench.results.record import Record
from tests.moebench.gated import job_of, ok, steady

PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def rows(time_ms: float = 1.0, *counts: int, run_id: str = "20261123-000000-a") -> list[Record]:
    measured = {"run_id": run_id, "tokens_per_s": 1000.0}
    return [ok(job_of(count), steady(time_ms=time_ms), **measured) for count in counts or (64,)]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return written(tmp_path / "one", to_frame(rows(1.0, 64, 128)))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return written(tmp_path / "two", to_frame(rows(1.5, 64, run_id="20261124-000000-b")))


def written(folder: Path, frame: pd.DataFrame) -> Path:
    folder.mkdir()
    write(frame, folder)
    return folder


def test_compare_takes_sides_lists_paths_and_names(one: Path, two: Path) -> None:
    frames = moebench.load(one), moebench.load(two)
    for found, name in (
        (moebench.compare(one, two), "two"),
        (moebench.compare([str(one), str(two)]), "two"),
        (moebench.compare(*frames), "B"),
        (moebench.compare(list(frames)), "B"),
        (moebench.compare({"before": frames[0], "after": two}), "after"),
    ):
        ratios = found[f"time_ms_ratio:{name}"].astype(object).where(found[f"time_ms_ratio:{name}"].notna(), None)
        assert [value and round(value, 6) for value in ratios] == [1.5, None]


def test_the_other_functions_take_a_path_a_frame_and_a_list(one: Path, two: Path) -> None:
    frame = moebench.load(one)
    for given in (one, str(one), one / "results.parquet", frame, [one]):
        assert moebench.pivot(given).index.tolist() == [64, 128]
        assert moebench.load(given).equals(frame)
    assert moebench.load([one, two])["run_id"].nunique() == 2
    ax = moebench.plot(one)
    assert [len(line.get_xdata()) for line in ax.lines][:1] == [2]
    assert moebench.open_result(str(one)).frame.equals(frame)
    found = moebench.gate_results(frame, two, allow_env_change="all")
    assert found.frame["verdict"].tolist() == ["REGRESSED", "MISSING"]


def duplicated(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, frame], ignore_index=True)


CASES: dict[str, tuple[Any, str]] = {
    "compare nothing": (lambda a, b: moebench.compare(), "0 results to compare: give two or more"),
    "compare one": (lambda a, b: moebench.compare(a), "1 results to compare: give two or more"),
    "compare numbers": (lambda a, b: moebench.compare(1, 2), "A = int 1: it must be results; give a results folder"),
    "compare duplicates": (lambda a, b: moebench.compare(duplicated(a), b), "A: e8k2.* has loop several times"),
    "compare an empty frame": (lambda a, b: moebench.compare(a, b.iloc[:0]), "B: the frame has no rows"),
    "compare nothing in common": (lambda a, b: moebench.compare(a.iloc[1:], b), "no job in common"),
    "compare frames of others": (lambda a, b: moebench.compare(a, pd.DataFrame({"x": [1]})), "no column case_id"),
    "the same path twice": (lambda a, b: moebench.compare("x", "x"), "the same result is given twice"),
    "load a CSV": (lambda a, b: moebench.load("one/results.csv"), "not a Parquet file"),
    "load a number": (lambda a, b: moebench.load(3), "path = int 3: it must be results"),
    "load nothing": (lambda a, b: moebench.load([]), "it is empty; give a results folder"),
    "load twice": (lambda a, b: moebench.load([a, a]), "the same result is given twice"),
    "open a frame": (lambda a, b: moebench.open_result(a), "path is a DataFrame: it must be a results folder"),
    "pivot backends": (lambda a, b: moebench.pivot(a, "backend"), "'backend': each backend .* is a column"),
    "pivot by backends": (lambda a, b: moebench.pivot(a, index="backend"), "give a column such as num_tokens"),
    "pivot the index": (lambda a, b: moebench.pivot(a, "num_tokens", ["num_tokens"]), "also has values"),
    "pivot by nothing": (lambda a, b: moebench.pivot(a, index=[]), "index = .*: it is empty"),
    "pivot two columns": (lambda a, b: moebench.pivot(a, ["time_ms", "tflops"]), "no column"),
    "pivot duplicates": (lambda a, b: moebench.pivot(duplicated(a)), "rows have the same"),
    "pivot an empty frame": (lambda a, b: moebench.pivot(a.iloc[:0]), "results: the frame has no rows"),
    "pivot None": (lambda a, b: moebench.pivot(None), "results = NoneType None: it must be results"),
    "plot an empty frame": (lambda a, b: moebench.plot(a.iloc[:0]), "results: the frame has no rows"),
    "plot on a figure": (lambda a, b: moebench.plot(a, ax=3), "ax is a int: it must be matplotlib axes"),
    "plot a series": (lambda a, b: moebench.plot(a["time_ms"]), "it must be results"),
    "gate lists": (lambda a, b: moebench.gate_results([a], b), "baseline is a list: a gate judges one result"),
    "gate duplicates": (lambda a, b: moebench.gate_results(a, duplicated(b)), "candidate: .* several times"),
    "gate an empty frame": (lambda a, b: moebench.gate_results(a, b.iloc[:0]), "candidate: the frame has no rows"),
    "gate nothing in common": (lambda a, b: moebench.gate_results(a.iloc[1:], b), "no job in common"),
    "gate a wrong threshold": (lambda a, b: moebench.gate_results(a, b, threshold="3%"), "a share between 0 and 1"),
    "gate a wrong change": (lambda a, b: moebench.gate_results(a, b, allow_env_change="gpus"), "it must be one of"),
    "parity errors of a frame": (lambda a, b: moebench.parity_errors(a), "must be one cell of the column"),
    "parity errors of a text": (lambda a, b: moebench.parity_errors("x"), "it is not a cell of the column"),
    "parity errors of a list": (lambda a, b: moebench.parity_errors("[1]"), "it is not a cell of the column"),
    "advise from nothing": (lambda a, b: moebench.advise("olmoe", 64, results=3), "it must be results"),
    "advise on a frame": (lambda a, b: moebench.advise(a, 64), "model is a DataFrame"),
}


@pytest.mark.parametrize("name", CASES)
def test_anything_else_is_one_line_that_says_what_to_give(
    name: str, one: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(one.parent)
    call, message = CASES[name]
    with pytest.raises(ResultsError, match=message) as refused:
        call(moebench.load(one), moebench.load(two))
    assert len(refused.value.lines) == 1
    assert "\n" not in str(refused.value)
