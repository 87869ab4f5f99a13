"""Workers side by side: which worker measures which job when, how a round ends, and what each side keeps."""

import json
import os
import signal
from types import SimpleNamespace

import psutil
import pytest

from moebench.errors import Refused
from moebench.results.journal import Journal
from moebench.run import supervisor
from moebench.run.plan import Plan
from moebench.run.turns import execute_in_turns
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.moebench.executed import share_workers
from tests.moebench.stand_in import ALL, write

CASE = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")
JOBS = tuple(Job(case=CASE, backend=name) for name in "xyz")
RANKS = Job(case=CASE.model_copy(update={"ep_size": 2}), backend="x", dispatcher="allgather")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that takes the workers' script and makes the supervisor start it in place of the workers.

    All backends count as built in.
    """
    share_workers(monkeypatch)

    def start(script):
        monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(write(tmp_path / "stand-in", script))))

    return start


@pytest.fixture
def sides(tmp_path):
    """A function that makes the plans of both sides of a round.

    Both sides have the same jobs, except if a test gives one side its own jobs.
    """

    def plans(jobs=JOBS, number=0, **of_side):
        policy = Policy(timeout_s=60.0)
        return [
            Plan(of_side.get(side, jobs), policy, tmp_path / side, "a-run", device="cpu", round=number) for side in "ab"
        ]

    return plans


def run(*rounds, **options):
    told = []
    outcome = execute_in_turns(*rounds, on_record=told.append, **options)
    assert list(outcome.records) == told
    return outcome


def journal(folder):
    return [(row.backend, row.status.value) for row in Journal(folder / "journal.jsonl")]


def logs(folder):
    return sorted(path.name for path in (folder / "logs").glob("*.log"))


def pids(folder):
    return [int(path.read_text().split("the pid is ")[1].split()[0]) for path in (folder / "logs").glob("*.log")]


def test_each_job_is_measured_by_both_before_the_next(tmp_path, stand_in, sides):
    stand_in(ALL)
    outcome = run(sides(), sides(number=1))
    assert [row.backend for row in outcome.records] == [name for name in "xyzxyz" for _ in "ab"]
    assert outcome.num_left == 0
    for side in "ab":
        assert journal(tmp_path / side) == [(name, "unsupported") for name in "xyzxyz"]
        assert logs(tmp_path / side) == ["worker-0.log", "worker-1.log"], (
            "a round is a process of its own, and only one"
        )
        assert json.loads((tmp_path / side / "environment.json").read_text())["env_id"] == "e"
    assert not any(map(psutil.pid_exists, pids(tmp_path / "a") + pids(tmp_path / "b")))


def test_who_is_first_is_drawn_anew_for_each_job(tmp_path, stand_in, sides):
    """The workers add lines to one file, and the order of the lines shows who was first."""
    order = tmp_path / "order"
    stand_in(
        "ready()\nfor number in itertools.count():\n"
        f"    start(number); print('b' if '/b/' in option['--jobs'] else 'a', file=open({str(order)!r}, 'a'))\n"
        "    say(told(number))\n"
    )
    many = tuple(Job(case=CASE.model_copy(update={"seed": seed}), backend="x") for seed in range(40))
    run(sides(many))
    firsts = order.read_text().split()[::2]
    assert 5 < firsts.count("a") < 35


def test_a_job_of_one_side_alone_is_measured_there_alone(tmp_path, stand_in, sides):
    stand_in(ALL)
    outcome = run(sides(a=JOBS[:1], b=JOBS[1:]))
    assert (len(outcome.records), outcome.num_left) == (3, 0)
    assert journal(tmp_path / "a") == [("x", "unsupported")]
    assert journal(tmp_path / "b") == [("y", "unsupported"), ("z", "unsupported")]


def test_a_worker_that_dies_is_replaced_and_the_other_goes_on(tmp_path, stand_in, sides):
    stand_in(
        "ready()\ndone(0)\n"
        "if '/a/' in option['--jobs'] and number_of_worker == 0:\n"
        "    start(1); os.kill(os.getpid(), signal.SIGKILL)\n"
        "for number in itertools.count(1): done(number)\n"
    )
    run(sides())
    assert journal(tmp_path / "a") == [("x", "unsupported"), ("y", "crash"), ("z", "unsupported")]
    assert journal(tmp_path / "b") == [(name, "unsupported") for name in "xyz"]
    assert [len(logs(tmp_path / side)) for side in "ab"] == [2, 1]


def test_a_death_between_two_turns_is_nobodys(tmp_path, stand_in, sides):
    stand_in("ready()\ndone(0)\nos._exit(1)\n")
    run(sides())
    assert journal(tmp_path / "a") == journal(tmp_path / "b") == [(name, "unsupported") for name in "xyz"]


def test_jobs_of_another_ep_size_get_workers_of_their_own(tmp_path, stand_in, sides):
    stand_in(ALL)
    outcome = run(sides((RANKS, *JOBS)))
    assert [row.ep_size for row in outcome.records] == [1] * 6 + [2] * 2
    assert [len(logs(tmp_path / side)) for side in "ab"] == [2, 2]


def test_a_signal_ends_all_and_keeps_what_was_measured(tmp_path, stand_in, sides):
    stand_in("ready()\ndone(0)\nstart(1)\nhang()\n")
    told = []

    def interrupt(row):
        told.append(row)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = execute_in_turns(sides(), on_record=interrupt)
    assert (len(outcome.records), outcome.num_left, outcome.interrupted) == (2, 4, True)
    assert journal(tmp_path / "a") == journal(tmp_path / "b") == [("x", "unsupported")]
    assert not any(map(psutil.pid_exists, pids(tmp_path / "a") + pids(tmp_path / "b")))


def test_the_time_budget_ends_it_between_turns(tmp_path, stand_in, sides):
    stand_in(ALL)
    outcome = run(sides(), time_budget_s=0.0)
    assert (outcome.records, outcome.num_left, outcome.interrupted) == ((), 6, False)


def test_a_mistake_of_the_users_is_said(stand_in, sides):
    stand_in("say(line('refused', mistakes=['there is no backend x']))")
    with pytest.raises(Refused, match="there is no backend x"):
        run(sides())
