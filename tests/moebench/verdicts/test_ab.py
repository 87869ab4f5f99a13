"""`moebench ab` measures two revisions in the right order, ends in time, keeps its results and finds regressions.

Most tests replace the processes with a stand-in and set its times and failures. The last test starts real processes.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moebench.cli import app
from moebench.errors import UsageError
from moebench.machine.gpus import Slot
from moebench.results.frame import load
from moebench.results.journal import Journal
from moebench.results.record import Status
from moebench.run import request
from moebench.run.lock import locked
from moebench.run.runfile import Asked
from moebench.run.runner import Outcome, Refused
from moebench.verdicts import ab, times
from moebench.verdicts.looks import block_of
from moebench.verdicts.verdict import Verdict
from tests.moebench.gated import bad, frame, gated, job_of, ok, steady, waits

ROOT = Path(__file__).parents[3]
SWEEP = """
name = "small"
[policy]
time_cap_s = 0.02
[[grid]]
backend = ["loop", "torch_mm"]
num_tokens = [32, 64]
n_routed_experts = 4
n_activated_experts = 2
dim = 64
moe_inter_dim = 64
dtype = "float32"
"""
FIRST, SECOND, LAST = 5, 10, 20  # the number of rounds at each look, for four jobs


class Processes:
    """Replace `execute`: write the row that `row_of(side, job, time_ms)` returns, and end as `stops` says.

    `in_turns` replaces `execute_in_turns`.
    """

    def __init__(self):
        self.plans, self.budgets_s = [], []
        self.stops = {}  # number of the call -> the Outcome or exception that replaces its last process
        self.row_of = lambda side, job, time_ms: ok(job, [time_ms])
        self._noise = np.random.default_rng(3)

    def in_turns(self, *rounds, **options):
        return self(*itertools.chain(*rounds), **options)

    def __call__(self, *plans, on_record, time_budget_s):
        stop = self.stops.get(len(self.budgets_s))
        self.budgets_s.append(time_budget_s)
        for plan in plans[:-1] if stop else plans:
            self.plans.append(plan)
            plan.folder.mkdir(parents=True, exist_ok=True)
            for job in plan.jobs:
                row = self.row_of(plan.folder.name, job, float(np.exp(self._noise.normal(0, 0.001))))
                rounds = {"round": plan.round, **({"sample_rounds": (plan.round,) * 3} if row.samples_ms else {})}
                Journal(plan.folder / "journal.jsonl").append(row.model_copy(update=rounds))
                on_record(row)
        if isinstance(stop, Exception):
            raise stop
        return stop or Outcome((), 0)

    def rounds(self, side, backend):
        """Return the rounds in which a process of that side had a job of that backend."""
        here = [plan for plan in self.plans if plan.folder.name == side]
        return sorted({plan.round for plan in here if any(job.backend == backend for job in plan.jobs)})


@pytest.fixture
def processes(monkeypatch):
    stand_in = Processes()
    monkeypatch.setattr(ab, "execute", stand_in)
    monkeypatch.setattr(ab, "execute_in_turns", stand_in.in_turns)
    monkeypatch.setattr(ab, "unknown_backends", lambda revision, names: {})
    return stand_in


@pytest.fixture
def moebench(capsys, monkeypatch, tmp_path):
    """Return a function that runs `moebench ab a-folder b-folder small.toml --out out` in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SWEEP)
    for side in ("a-folder", "b-folder"):
        shutil.copytree(ROOT / "experts", tmp_path / side / "experts", ignore=shutil.ignore_patterns("__pycache__"))

    def call(*arguments, a="a-folder", b="b-folder"):
        command = ["moebench", "ab", a, b, "small.toml", "--device", "cpu", "--out", "out"]
        monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=printed.out, err=printed.err)

    return call


def test_an_unchanged_revision_passes_and_its_copies_are_gone(moebench, processes, tmp_path):
    found = moebench()
    assert found.code == 0, found.err
    assert found.out.splitlines()[-1] == "gate: 4 PASS"
    assert "A against itself: 0 false alarms in 4 jobs" in found.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "ab.json", "b", "logs", "sweep.toml"]
    assert (tmp_path / "out" / "a" / "results.parquet").exists()
    asked = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert asked["revisions"] == {"a": "a-folder", "b": "b-folder"}


def test_a_round_is_two_processes_a_side_in_random_order_each_with_its_own_experts(moebench, processes):
    processes.row_of = lambda side, job, time_ms: ok(job, [time_ms * processes._noise.uniform(0.5, 2)])
    moebench()
    rounds = [processes.plans[start : start + 4] for start in range(0, len(processes.plans), 4)]
    assert len(rounds) == LAST
    orders = set()
    for number, together in enumerate(rounds):
        sides = {(plan.folder.name, plan.round) for plan in together}
        assert sides == {(side, run) for side in "ab" for run in (2 * number, 2 * number + 1)}
        assert all(plan.experts_folder.name == plan.folder.name for plan in together)
        assert len({plan.jobs for plan in together}) == 1
        orders.add("".join(plan.folder.name for plan in together))
    assert len(orders) > 3
    assert len({together[0].jobs for together in rounds}) > 1


def test_all_is_measured_on_one_gpu_one_after_the_other_and_those_in_use_are_named(moebench, processes, monkeypatch):
    monkeypatch.delattr(ab, "execute_in_turns")  # one GPU has not enough memory for four processes
    free = tuple(Slot(f"GPU-{letter}") for letter in "xyz")
    monkeypatch.setattr(request, "choose", lambda device, wanted, share: (free, ["GPU 0 is in use"]))
    found = moebench()
    assert "GPU 0 is in use" in found.err
    assert {plan.slots for plan in processes.plans} == {free[:1]}


def test_what_is_slower_is_found_and_only_suspects_go_on(moebench, processes):
    def row_of(side, job, time_ms):
        noise = time_ms**30 if job.backend == "loop" else time_ms  # 3% per round hides a slowdown of 3%
        slower = 1.2 if side == "b" and (job.backend, job.case.num_tokens) == ("torch_mm", 64) else 1.0
        return ok(job, [noise * slower])

    processes.row_of = row_of
    found = moebench("--json")
    assert found.code == 1
    jobs = json.loads(found.out)["jobs"]
    verdict_of = {(job["backend"], "-t64-" in job["case_id"]): job["verdict"] for job in jobs}
    assert verdict_of[("torch_mm", True)] == "REGRESSED"
    assert verdict_of[("torch_mm", False)] == "PASS"
    assert processes.rounds("b", "torch_mm") == list(range(2 * FIRST))
    assert len(processes.rounds("b", "loop")) > 2 * FIRST
    assert processes.rounds("a", "loop") == processes.rounds("b", "loop")
    assert f"after {FIRST} rounds: 1 REGRESSED, 2 INCONCLUSIVE, 1 PASS" in found.err


def test_memory_is_judged_at_once_and_does_not_end_the_rounds_for_time(moebench, processes):
    def row_of(side, job, time_ms):
        return ok(job, [time_ms**30], peak_memory_bytes=1_000_000 + (side == "b"), gpu=None)

    processes.row_of = row_of
    found = moebench("--only", "loop")
    assert found.code == 1
    assert "REGRESSED memory: peak 977 KiB, 1 B more: loop on" in found.out
    assert len(processes.rounds("b", "loop")) > 2 * FIRST


def test_a_wrong_candidate_is_regressed(moebench, processes):
    def row_of(side, job, time_ms):
        return bad(job, Status.mismatch, "output") if (side, job.backend) == ("b", "loop") else ok(job, [time_ms])

    processes.row_of = row_of
    found = moebench()
    assert found.code == 1
    assert "REGRESSED parity: mismatch: output: loop on" in found.out
    assert found.out.splitlines()[-1] == "gate: 2 REGRESSED, 2 PASS"


def test_backends_of_one_side_are_new_or_missing_and_measured_once(moebench, processes, monkeypatch):
    lacks = {"a": {"torch_mm": "no torch_mm"}, "b": {"loop": "no loop"}}
    monkeypatch.setattr(ab, "unknown_backends", lambda revision, names: lacks[revision.folder.name])
    found = moebench("--only", "loop", "--only", "torch_mm", "--only", "gmm")
    assert found.code == 1
    assert found.out.splitlines()[-1] == "gate: 2 MISSING, 2 NEW, 2 PASS"
    assert processes.rounds("a", "loop") == processes.rounds("b", "torch_mm") == [0]
    assert processes.rounds("a", "torch_mm") == processes.rounds("b", "loop") == []


def test_a_backend_that_neither_has_is_bad_usage_and_leaves_nothing(moebench, processes, monkeypatch, tmp_path):
    monkeypatch.setattr(ab, "unknown_backends", lambda revision, names: {"loup": "there is no backend 'loup'"})
    found = moebench("--only", "loup")
    assert (found.code, found.err) == (2, "there is no backend 'loup'\n")
    assert not (tmp_path / "out").exists()


def test_revisions_without_a_common_backend_are_not_compared(moebench, processes, monkeypatch):
    lacks = {"a": {"torch_mm": "no"}, "b": {"loop": "no"}}
    monkeypatch.setattr(ab, "unknown_backends", lambda revision, names: lacks[revision.folder.name])
    found = moebench()
    assert (found.code, found.err) == (
        2, "a-folder and b-folder have no backend of this sweep in common: loop, torch_mm\n"
    )  # fmt: skip


def test_the_time_budget_ends_the_rounds_with_a_verdict(moebench, processes):
    processes.row_of = lambda side, job, time_ms: ok(job, [time_ms**30])
    processes.stops = {1: Outcome((), 7)}
    found = moebench("--time-budget", "10")
    assert found.code == 3
    assert f"after {SECOND} rounds: 4 INCONCLUSIVE, time budget spent: 7 measurements left" in found.err
    assert [0 < budget_s <= 600 for budget_s in processes.budgets_s] == [True, True]
    assert processes.budgets_s[1] < processes.budgets_s[0]


def test_no_time_at_all_is_said(moebench, processes, monkeypatch):
    monkeypatch.setattr(ab, "execute_in_turns", lambda *plans, **options: Outcome((), 9))
    found = moebench("--time-budget", "0")
    assert found.code == 2
    assert "--time-budget: spent before both sides had measured a job" in found.err


def test_ctrl_c_keeps_what_was_measured(moebench, processes, tmp_path):
    processes.stops = {0: Outcome((), 9, interrupted=True)}
    found = moebench()
    assert found.code == 130
    assert f"interrupted; all finished measurements are in {Path('out/a')} and {Path('out/b')}" in found.err
    assert len(load(tmp_path / "out" / "a")) == 4
    assert not (tmp_path / "out" / "experts").exists()


def test_a_refused_run_leaves_no_folder(moebench, processes, monkeypatch, tmp_path):
    def refuse(*plans, **options):
        raise Refused("no such GPU")

    monkeypatch.setattr(ab, "execute_in_turns", refuse)
    found = moebench()
    assert (found.code, found.err.splitlines()[-1]) == (2, "no such GPU")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_writes_into_is_left_alone(moebench, tmp_path):
    run = request.plan("small.toml", Asked(device="cpu"), out=tmp_path / "out")
    theirs = tmp_path / "out" / "experts" / "a"
    with locked(tmp_path / "out"):
        theirs.mkdir(parents=True)
        with pytest.raises(UsageError, match="is writing into it"), ab.prepared(run, "a-folder", ".", 0.03):
            pass
    assert theirs.exists()


def test_mistakes_are_found_before_anything_is_measured(moebench, processes, tmp_path):
    assert moebench("--json", "--github").code == 2
    found = moebench(b="no-such")
    assert found.code == 2
    assert found.err.startswith("no-such: neither a folder that holds an experts nor a git revision with one; git ")
    assert processes.plans == []
    assert not (tmp_path / "out").exists()


# Real processes

#: Engine -> the code appended to its file. It makes the engine copy too much or allocate too large a buffer.
PLANTED = {
    "torch_mm": """

def _with_a_copy_too_many(x_TD, weights_TK, indices_TK, parameters, *rest, **more):
    large = (None if tensor is None else tensor.repeat(200, 1, 1)[: len(tensor)] for tensor in parameters)
    return compute(x_TD, weights_TK, indices_TK, ExpertParameters(*large), *rest, **more)


ENGINE = Engine(_with_a_copy_too_many, unsupported)
""",
    "loop": """

def _with_a_buffer_too_large(x_TD, *rest):
    buffer = x_TD.repeat(9, 1)
    return compute(buffer[: len(x_TD)], *rest)


ENGINE = Engine(_with_a_buffer_too_large, unsupported)
""",
}


@pytest.mark.certify(share=0)  # rounds in real processes take two minutes
@pytest.mark.timeout(400)
def test_a_copy_too_many_and_a_buffer_too_large_are_found(moebench, monkeypatch, tmp_path):
    """Real processes measure two jobs at one look of four rounds, the fewest that can show that one job is slower."""
    for engine, planted in PLANTED.items():
        with (tmp_path / "b-folder" / "experts" / "compute" / f"{engine}.py").open("a") as source:
            source.write(planted)
    monkeypatch.setattr(ab, "schedule", lambda num_jobs: (4,))
    monkeypatch.setattr(ab, "LOOK_FALSE_ALARMS", times.FALSE_ALARMS)
    monkeypatch.setattr(ab, "unknown_backends", lambda revision, names: {})
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    found = moebench("--filter", "num_tokens=32", "--json")
    assert found.code == 1, found.err
    jobs = {job["backend"]: job for job in json.loads(found.out)["jobs"]}
    torch_mm, loop = jobs["torch_mm"], jobs["loop"]
    verdict_on = {
        (job["backend"], finding["measure"]): finding["verdict"] for job in jobs.values() for finding in job["findings"]
    }
    assert verdict_on[("torch_mm", "time")] == "REGRESSED"
    assert torch_mm["time"]["ratio"] > 3
    assert torch_mm["time"]["rounds"] == [8, 8]
    assert verdict_on[("loop", "memory")] == "REGRESSED"
    before, after = (loop["peak_memory_bytes"][side] for side in ("baseline", "candidate"))
    assert after > before
    assert verdict_on[("loop", "time")] != "IMPROVED"
    assert verdict_on[("loop", "parity")] == verdict_on[("torch_mm", "parity")] == "PASS"
    assert json.loads(found.out)["self_comparisons"][0]["num_alarms"] == 0
    assert set(load(tmp_path / "out" / "a")["num_rounds"]) == {8}


@pytest.mark.parametrize(
    ("time", "own", "verdict"),
    [
        (1.0, {}, Verdict.PASS),
        (1.0, {"spread": 0.3}, Verdict.INCONCLUSIVE),
        (1.0, {"time_ms": 1.5}, Verdict.REGRESSED),
        (1.5, {"spread": 0.3}, Verdict.REGRESSED),
    ],
)
def test_a_job_is_decided_when_its_time_and_the_gpus_own_time_are(time, own, verdict):
    before = waits(job_of(), steady(20, 3.0), steady(20, spread=own.get("spread", 0.005)))
    after = waits(job_of(), steady(20, 3.0 * time, seed=1), steady(20, seed=2, **own))
    (judged,) = gated([before], [after], block_of=block_of).jobs
    assert ab._verdict_on_time(judged) is verdict


def test_a_against_itself_has_a_line_for_the_gpus_own_time_where_rows_have_it():
    rows = [frame(waits(job_of(), steady(20), own)).to_dict("records")[0] for own in ([], steady(20))]
    assert [some.name for some in ab._a_against_itself(rows[:1], 0.03)] == ["A against itself"]
    names = {some.name: some.num_compared for some in ab._a_against_itself(rows, 0.03)}
    assert names == {"A against itself": 2, "A against itself, busy_ms": 1}
