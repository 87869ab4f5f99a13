"""Run moebench.measure.studies.bandwidth in two real ranks, and check how many bytes its raw calls move."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.measure.studies import bandwidth
from tests import forked

ROOT = Path(__file__).parents[4]
SHORT = Path(__file__).with_name("short_bandwidth.py")
TOKENS = (24, 40)


def run(folder: Path, counts: tuple[int, ...], *options: str, **variables: str) -> list[dict]:
    out = folder / "rows.json"
    command = forked.command(2, SHORT, "--model", "olmoe", "--device", "cpu", "--out", out)
    command += [*options, *(word for count in counts for word in ("--num-tokens", str(count)))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["environment"]["device"] == "cpu"
    return told["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(tmp_path_factory.mktemp("bandwidth"), TOKENS)


@pytest.mark.certify(share=0)
def test_rows_in_fp8_have_half_the_bytes_on_their_way_out_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    told = run(tmp_path, (2,), "--fp8-rows", TRITON_INTERPRET="1")
    found = {(row["way"], row["fp8_rows"]): row["num_bytes"] for row in told if row["dispatcher"] == "symm_mem"}
    assert found["dispatch", True] / found["dispatch", False] == 2112 / 4096
    assert found["combine", True] == found["combine", False] == found["dispatch", False]


def test_every_dispatcher_of_a_cpu_both_ways_at_every_count(rows: list[dict]) -> None:
    found = [(row["num_tokens"], row["dispatcher"], row["way"]) for row in rows]
    names, ways = ("allgather", "alltoall", "symm_mem"), ("dispatch", "combine")
    assert found == [(count, name, way) for count in TOKENS for name in names for way in ways]


def test_both_speeds_are_of_the_same_bytes(rows: list[dict]) -> None:
    for row in rows:
        assert row["gb_per_s"] * row["ms"] == pytest.approx(row["raw_gb_per_s"] * row["raw_ms"])
        assert row["fraction"] == pytest.approx(row["raw_ms"] / row["ms"])


def test_all_gather_moves_every_ranks_rows(rows: list[dict]) -> None:
    for row in rows:
        if row["dispatcher"] == "allgather":
            num_bytes = 2 * row["num_tokens"] * 2048 * 2  # two ranks, olmoe's dim, bfloat16
            assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(num_bytes)


def test_rows_that_nobody_filled_are_not_moved(rows: list[dict]) -> None:
    """The dispatcher symm_mem brings more rows than alltoall, but fills as many."""
    moved: dict[str, list[float]] = {}
    for row in rows:
        moved.setdefault(row["dispatcher"], []).append(row["gb_per_s"] * row["ms"])
    assert moved["symm_mem"] == pytest.approx(moved["alltoall"])


def test_all_to_all_moves_no_more_than_every_token_to_every_rank(rows: list[dict]) -> None:
    for row in rows:
        if row["dispatcher"] == "alltoall":
            assert 0 < row["gb_per_s"] * row["ms"] * 1e6 <= 2 * row["num_tokens"] * 2048 * 2 + 1


def test_bad_usage_is_one_line() -> None:
    command = [sys.executable, "-m", "moebench.measure.studies.bandwidth", "--num-tokens", "many"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Invalid value for '--num-tokens': ")


def test_a_model_that_is_not_known_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"^--model gpt-5: it must be one of .*olmoe"):
        bandwidth.main(model="gpt-5")
