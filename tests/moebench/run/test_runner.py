"""The supervisor writes one record per job, in order, however the job's process ends, and measures the other jobs.

The first half runs real workers over backends that break them. The second half runs a stand-in for a worker.
"""

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moebench.results.journal import Journal
from moebench.results.record import GOOD, ONLY_IF_OK, Status
from moebench.run import runner, stop
from moebench.run.runner import Refused, RunnerError, execute
from moebench.run.workers import crew
from moebench.workload.case import Job
from tests.moebench.executed import CASE, THREE, has_ended, jobs_of, pid_of, plan_of, python_path, share_workers
from tests.moebench.stand_in import ALL

ROOT = Path(__file__).parents[3]


# real workers

BROKEN = {
    "RaisesInForward": (Status.error, "cuBLAS is in a bad mood"),
    "SaysUnsupported": (Status.unsupported, "runs on paper, not on cpu"),
    "RaisesMemoryError": (Status.oom, "MemoryError"),
    "OutOfMemory": (Status.oom, "can't allocate memory"),
    "Segfaults": (Status.crash, "its process was killed by SIGSEGV"),
    "KillsItself": (Status.crash, "its process was killed by SIGKILL"),
    "LeavesAChild": (Status.crash, "its process exited with 4"),
    "Hangs": (Status.timeout, "no result after 10 s (policy timeout_s); the worker was killed"),
    "DiesAfterItsRecord": (Status.ok, None),
}


pytestmark = pytest.mark.timeout(400)  # six workers, one of which hangs for ten seconds, on a machine that may be busy


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    """A run with right backends before, between and after backends that break their process.

    The supervisor looks only every 0.3 s. All backends share workers, as if they were built in.
    """
    folder = tmp_path_factory.mktemp("run")
    names = list(BROKEN)
    order = ["loop", *(f"broken:{name}" for name in names[:5]), "torch_mm", *(f"broken:{name}" for name in names[5:])]
    jobs = (*jobs_of(*order), Job(case=CASE.model_copy(update={"seed": 1}), backend="loop"))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(crew, "POLL_S", 0.3)
        share_workers(patch)
        outcome = execute(plan_of(folder, jobs, timeout_s=10.0), on_record=seen.append)
    return SimpleNamespace(jobs=jobs, folder=folder, outcome=outcome, seen=seen)


@pytest.mark.parametrize("name", BROKEN)
def test_each_way_to_break_ends_in_its_status(broken_run, name):
    status, detail = BROKEN[name]
    (row,) = [row for row in broken_run.outcome.records if row.backend == f"broken:{name}"]
    assert row.status is status
    assert (row.detail is None) if detail is None else (detail in row.detail)
    assert status in GOOD or all(getattr(row, field) is None for field in ONLY_IF_OK)
    assert row.device == "cpu"


def test_every_other_job_is_measured_as_if_nothing_had_happened(broken_run):
    right = [row for row in broken_run.outcome.records if ":" not in row.backend]
    assert [(row.backend, row.seed, row.status.value) for row in right] == [
        ("loop", 0, "ok"),
        ("torch_mm", 0, "ok"),
        ("loop", 1, "ok"),
    ]


def test_the_journal_has_every_record_once_and_in_order(broken_run):
    rows, torn = Journal(broken_run.folder / "journal.jsonl").read()
    assert [row.key for row in rows] == [job.key for job in broken_run.jobs]
    assert torn == 0
    assert rows == list(broken_run.outcome.records) == broken_run.seen
    assert (broken_run.outcome.num_left, broken_run.outcome.interrupted) == (0, False)


def test_a_worker_is_used_as_long_as_it_lives(broken_run):
    """The run starts one worker, and another after each of the five backends that ended a worker."""
    assert len(list((broken_run.folder / "logs").glob("worker-*.log"))) == 6
    environments = {row.env_id for row in broken_run.outcome.records}
    written = json.loads((broken_run.folder / "environment.json").read_text())
    assert environments == {written["env_id"]}
    assert written["num_threads"] == 1, "OMP_NUM_THREADS"


def test_a_crash_says_where(broken_run):
    (row,) = [row for row in broken_run.outcome.records if row.backend == "broken:Segfaults"]
    assert "Segmentation fault" in row.detail
    assert "break_down" in row.detail


def test_what_a_dead_worker_leaves_behind_is_ended_too(broken_run):
    (row,) = [row for row in broken_run.outcome.records if row.backend == "broken:LeavesAChild"]
    child = re.search(r"child (\d+)", row.detail)
    assert child is not None
    assert has_ended(int(child[1]))


def limit_memory(environment):
    """Limit the worker that has just started to 1 GiB more address space than it has mapped."""
    (worker,) = psutil.Process().children()
    most = worker.memory_info().vms + 2**30
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (most, most))


def test_a_worker_goes_on_after_a_failure_if_it_is_healthy(tmp_path, monkeypatch):
    """A worker that runs out of memory at a real limit stays healthy.

    A worker in which a backend changes what all backends call does not stay healthy. All backends share workers, as if
    they were built in.
    """
    share_workers(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = jobs_of("broken:FillsTheHost", "loop", "broken:ChangesItsProcess", "torch_mm")
    rows = execute(plan_of(tmp_path, jobs), on_environment=limit_memory).records
    assert [row.status.value for row in rows] == ["oom", "ok", "error", "ok"]
    assert "can't allocate memory" in rows[0].detail
    assert "nobody knows what I did" in rows[2].detail
    first, second = (path.read_text() for path in sorted((tmp_path / "logs").glob("worker-*.log")))
    assert "Unhealthy: the canary's output is off by 0.0007" in first
    assert "Unhealthy" not in second
    given = [path.read_text().count("\n") - 1 for path in sorted((tmp_path / "logs").glob("*.jobs.jsonl"))]
    assert given == [4, 1]


def test_a_backend_changes_torch_for_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    share_workers(monkeypatch)
    rows = execute(plan_of(tmp_path, jobs_of("loop", "broken:RoundsForAll", "torch_mm"))).records
    assert [(row.status.value, row.flags) for row in rows] == [("ok", ()), ("ok", ("changed_settings",)), ("ok", ())]
    first, second = (path.read_text() for path in sorted((tmp_path / "logs").glob("worker-*.log")))
    assert "Unhealthy: broken:RoundsForAll has left its process changed (changed_settings)" in first
    assert "Unhealthy" not in second


def other_experts(folder):
    """Copy this checkout's experts into `folder`, with a loop that returns twice the right output; return `folder`."""
    shutil.copytree(ROOT / "experts", folder / "experts")
    with (folder / "experts" / "compute" / "loop.py").open("a") as file:
        file.write("\nENGINE = Engine(lambda *given: 2 * compute(*given), ENGINE.unsupported)\n")
    return folder


def test_the_experts_of_another_folder_are_driven(tmp_path, monkeypatch):
    """The working directory has other experts, which Python would import first."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    other = other_experts(tmp_path / "other")
    sides = [
        plan_of(tmp_path / name, jobs_of("loop"), round=7, experts_folder=at)
        for name, at in (("a", None), ("b", other))
    ]
    rows = execute(*sides).records
    assert [row.status.value for row in rows] == ["ok", "mismatch"]
    assert [row.round for row in rows] == [7, 7]
    assert set(rows[0].sample_rounds) == {7}
    assert [len(Journal(tmp_path / name / "journal.jsonl").read()[0]) for name in "ab"] == [1, 1]


def test_a_folder_without_experts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(Refused, match=f"experts was imported from {ROOT}/experts, and not from {tmp_path}"):
        execute(plan_of(tmp_path / "run", jobs_of("loop"), experts_folder=tmp_path))


# a stand-in for the worker


def test_a_record_is_in_the_journal_when_it_is_told_of(tmp_path, stand_in):
    stand_in(ALL)
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    lengths = []
    outcome = execute(plan_of(tmp_path / "run", THREE), on_record=lambda row: lengths.append(len(journal.read()[0])))
    assert lengths == [1, 2, 3]
    assert [row.backend for row in outcome.records] == ["a", "b", "c"]


def test_a_run_ends_with_its_last_record_though_the_worker_does_not(tmp_path, stand_in):
    """A thread of a library may keep a process from ending."""
    stand_in(ALL)
    assert execute(plan_of(tmp_path / "run", THREE, timeout_s=1e6)).num_left == 0
    assert has_ended(pid_of(tmp_path / "run"))


def test_a_journal_on_a_full_disk_ends_the_run_in_one_line(tmp_path, stand_in):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").symlink_to("/dev/full")
    stand_in(ALL)
    with pytest.raises(RunnerError) as failure:
        execute(plan_of(tmp_path / "run", THREE))
    assert str(failure.value) == (
        f"{tmp_path}/run: cannot be written: No space left on device; all finished jobs are in the results folder; "
        f"make room and continue with `moebench run --resume {tmp_path}/run`"
    )
    assert has_ended(pid_of(tmp_path / "run"))


def test_no_job_is_started_after_the_time_budget(tmp_path, stand_in, monkeypatch):
    stand_in("ready()\ndone(0)\nhang()\n")
    told = []
    monkeypatch.setattr(stop, "_past", lambda deadline: bool(told))
    outcome = execute(plan_of(tmp_path / "run", THREE), on_record=told.append)
    assert ([row.backend for row in outcome.records], outcome.num_left, outcome.interrupted) == (["a"], 2, False)
    assert has_ended(pid_of(tmp_path / "run"))


def test_plans_are_executed_in_turn_each_in_processes_of_its_own(tmp_path, stand_in):
    stand_in(ALL)
    plans = [plan_of(tmp_path / name, THREE[:2], round=number) for number, name in enumerate("aba")]
    outcome = execute(*plans)
    assert [row.backend for row in outcome.records] == ["a", "b"] * 3
    assert outcome.num_left == 0
    assert len(Journal(tmp_path / "a" / "journal.jsonl").read()[0]) == 4
    assert {path.name for path in (tmp_path / "a" / "logs").glob("*.log")} == {"worker-0.log", "worker-1.log"}
    assert execute(*plans, time_budget_s=0.0).num_left == 6


def test_a_budget_of_nothing_starts_nothing(tmp_path, stand_in):
    stand_in(ALL)
    outcome = execute(plan_of(tmp_path / "run", THREE), time_budget_s=0.0)
    assert (outcome.records, outcome.num_left) == ((), 3)
    assert list((tmp_path / "run" / "logs").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_measured_and_ends_the_worker(tmp_path, stand_in, number):
    stand_in("ready()\ndone(0)\nstart(1)\nhang()\n")
    before = signal.getsignal(number)
    outcome = execute(plan_of(tmp_path / "run", THREE), on_record=lambda row: os.kill(os.getpid(), number))
    assert ([row.backend for row in outcome.records], outcome.num_left, outcome.interrupted) == (["a"], 2, True)
    assert has_ended(pid_of(tmp_path / "run"))
    assert signal.getsignal(number) is before
    assert len(Journal(tmp_path / "run" / "journal.jsonl").read()[0]) == 1


def test_a_second_run_into_the_folder_keeps_the_logs_of_the_first(tmp_path, stand_in):
    for _ in range(2):
        stand_in(ALL)
        execute(plan_of(tmp_path / "run", THREE))
    assert {path.name for path in (tmp_path / "run" / "logs").glob("*.log")} == {"worker-0.log", "worker-1.log"}
    assert len(Journal(tmp_path / "run" / "journal.jsonl").read()[0]) == 6


def test_a_run_id_says_when_and_of_what():
    assert re.fullmatch(r"20\d{6}-\d{6}-quick", runner.new_run_id("quick"))
