"""Ranks start every sample together; they capture a call together or not at all, and replay it equally often.

graph_ranks.py is one of the ranks that capture.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebench.machine.nvml import Clock
from moebench.measure import samplers
from moebench.measure.samplers import WARMUP_CALLS
from moebench.measure.timing import CONVERGED_SAMPLES
from tests import forked
from tests.moebench.measure import graph_ranks

ROOT = Path(__file__).parents[3]
NOTHING = {"graph_time_ms": None, "num_captures": 0, "num_replays": 0, "num_warm": 0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two ranks found in each scene."""
    folder = tmp_path_factory.mktemp("graphs")
    done = subprocess.run(
        forked.command(2, ROOT / "tests/moebench/measure/graph_ranks.py", folder),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("waits", [False, True])
def test_ranks_of_gpus_start_together_behind_the_wait(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """No host's work lies between the common start and the end of a call that does not wait for the device."""
    done: list[str] = []

    def does(name: str, result: object = None) -> Any:
        return lambda *given: done.append(name) or result

    ranks: Any = SimpleNamespace(align=does("align"), largest=lambda value: value)
    faked = {"mark": does("mark"), "synchronize": does("synchronize"), "ms_between": lambda a, b: 1.0}
    faked |= {"perf_counter": lambda: 0.0, "is_past": lambda event: waits}
    monkeypatch.setattr(samplers, "clock", SimpleNamespace(**faked))
    monkeypatch.setattr(samplers, "L2Flush", lambda device, cold: does("flush"))
    monkeypatch.setattr(torch.cuda, "_sleep", does("wait"))
    stages = [does("forward"), does("backward")]
    sampler = samplers._GpuSampler(
        stages, torch.device("cuda"), True, does("prepare"), does("keep"), ranks, lambda: Clock()
    )
    assert sampler.flags == (("synchronises",) if waits else ())
    done.clear()
    group = sampler.sample(2)
    before = ["prepare", "flush", *(["wait"] if not waits else []), "align"]
    assert done == 2 * [*before, "mark", "forward", "mark", "backward", "mark", "keep"] + ["synchronize"]
    assert group.totals_ms == [2.0, 2.0]


def both(ranks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return what both ranks found alike in a scene."""
    one, other = (found[name] for found in ranks)
    assert one == other
    return dict(one)


def test_ranks_that_capture_have_the_time_of_the_slowest(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "both capture")
    assert found["graph_time_ms"] == max(graph_ranks.SCENES["both capture"].times_ms)
    assert (found["num_captures"], found["num_warm"]) == (1, WARMUP_CALLS)
    assert found["num_replays"] >= CONVERGED_SAMPLES


def test_ranks_replay_equally_often_although_their_times_and_clocks_differ(ranks: list[dict[str, Any]]) -> None:
    """The quiet rank alone would have stopped as soon as in "both capture"."""
    found = both(ranks, "noisy ranks")
    assert found["graph_time_ms"] > 3.0
    assert found["num_replays"] > both(ranks, "both capture")["num_replays"]


@pytest.mark.parametrize("name", ["the second cannot capture", "the first refuses"])
def test_no_rank_replays_what_one_rank_cannot_capture(ranks: list[dict[str, Any]], name: str) -> None:
    """Each rank has tried, whatever error it met, and a call of all ranks still works afterwards."""
    assert both(ranks, name) == {**NOTHING, "num_captures": 1, "num_warm": WARMUP_CALLS}


@pytest.mark.parametrize("name", ["the second waits", "both wait", "memory is short"])
def test_a_call_that_waits_or_has_no_room_is_not_tried(ranks: list[dict[str, Any]], name: str) -> None:
    assert both(ranks, name) == NOTHING


def test_a_replay_that_is_judged_wrong_has_no_time(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "a replay is wrong")
    assert found["graph_time_ms"] is None
    assert found["num_replays"] >= CONVERGED_SAMPLES
