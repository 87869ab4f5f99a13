"""The end of a worker's process decides the status of its job: lost, too slow, out of memory or refused."""

import os
import re

import pytest

from moebench.results.journal import Journal
from moebench.results.record import Status
from moebench.run import processes, supervisor
from moebench.run.runner import Refused, RunnerError, execute
from moebench.run.workers import crew
from tests.moebench.executed import THREE, has_ended, jobs_of, pid_of, plan_of
from tests.moebench.stand_in import ALL


@pytest.mark.parametrize("torn", ["told(1)[:40]", "told(1)[:-1]"])
def test_a_torn_last_word_is_not_a_record(tmp_path, stand_in, torn):
    stand_in(
        "ready()\n"
        "if number_of_worker == 0:\n"
        f"    done(0); start(1); say({torn}); os.kill(os.getpid(), signal.SIGKILL)\n"
        "done(0)\n"
    )
    rows = execute(plan_of(tmp_path / "run", THREE)).records
    assert [(row.backend, row.status.value) for row in rows] == [
        ("a", "unsupported"),
        ("b", "crash"),
        ("c", "unsupported"),
    ]


def test_the_last_words_before_a_death_are_heard(tmp_path, stand_in, monkeypatch):
    """A record and the next start may come while the supervisor does not look. The job that had started is to blame."""
    monkeypatch.setattr(crew, "POLL_S", 1.0)
    stand_in("ready()\nif number_of_worker == 0:\n    done(0); done(1); start(2); os._exit(1)\n")
    rows = execute(plan_of(tmp_path / "run", THREE)).records
    assert [(row.backend, row.status.value) for row in rows] == [
        ("a", "unsupported"),
        ("b", "unsupported"),
        ("c", "crash"),
    ]


@pytest.mark.parametrize(
    ("kills", "status", "detail"),
    [
        (8, "oom", "its process was killed by SIGKILL; the kernel killed a process for lack of memory"),
        (7, "crash", "its process was killed by SIGKILL; another process killed it, not the kernel for lack of memory"),
    ],
)
def test_who_was_killed_by_the_kernel_ran_out_of_memory(tmp_path, stand_in, monkeypatch, kills, status, detail):
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 12\noom_kill 7\n")
    monkeypatch.setattr(processes, "KERNEL_COUNTERS", counters)
    stand_in(
        "ready()\n"
        "if number_of_worker == 0:\n"
        "    start(0)\n"
        f"    open({str(counters)!r}, 'w').write('oom_kill {kills}\\n')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "for number in itertools.count(): done(number)\n"
    )
    rows = execute(plan_of(tmp_path / "run", THREE)).records
    assert [row.status.value for row in rows] == [status, "unsupported", "unsupported"]
    assert rows[0].detail.startswith(detail)


def test_without_the_kernels_counters_a_kill_is_a_crash(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(processes, "KERNEL_COUNTERS", tmp_path / "absent")
    stand_in("ready()\nstart(0)\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (row,) = execute(plan_of(tmp_path / "run", THREE[:1])).records
    assert row.status is Status.crash


def test_a_death_between_two_jobs_is_nobodys_and_the_next_worker_goes_on(tmp_path, stand_in):
    stand_in("ready()\ndone(0)\nos._exit(1)\n")
    rows = execute(plan_of(tmp_path / "run", THREE)).records
    assert [(row.backend, row.status.value) for row in rows] == [(name, "unsupported") for name in "abc"]
    logs = tmp_path / "run" / "logs"
    left = [path.read_text().count("\n") - 1 for path in sorted(logs.glob("*.jobs.jsonl"))]
    assert left == [3, 2, 1]


def test_a_hang_between_two_jobs_is_nobodys_either(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(supervisor, "START_TIMEOUT_S", 6.0)
    stand_in("ready()\ndone(0)\nif number_of_worker == 0: hang()\ndone(1)\n")
    rows = execute(plan_of(tmp_path / "run", THREE)).records
    assert [row.backend for row in rows] == ["a", "b", "c"]
    assert has_ended(pid_of(tmp_path / "run"))


def test_a_hang_over_a_job_is_a_timeout_and_ends_the_whole_group(tmp_path, stand_in):
    stand_in(
        "ready()\n"
        "if number_of_worker == 0:\n"
        "    done(0); start(1)\n"
        "    child = os.fork()\n"
        "    if child: print('child', child, flush=True)\n"
        "    hang()\n"
        "done(0)\n"
    )
    rows = execute(plan_of(tmp_path / "run", THREE, timeout_s=1.0)).records
    assert [row.status.value for row in rows] == ["unsupported", "timeout", "unsupported"]
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    assert has_ended(pid_of(tmp_path / "run"))
    assert has_ended(int(re.findall(r"^child (\d+)$", log, re.MULTILINE)[0]))


def test_the_stack_of_the_thread_that_died_is_shown_though_others_stand_before_it(tmp_path, stand_in):
    stand_in(
        "ready()\nstart(0)\n"
        "other = ['Thread 0x1 (most recent call first):', *['  File \"other.py\"'] * 20, '']\n"
        "own = ['Current thread 0x2 (most recent call first):', '  File \"kernel.py\" in break_down']\n"
        "print('Fatal Python error: Segmentation fault', '', *other, *own, sep='\\n', flush=True)\n"
        "signal.signal(signal.SIGSEGV, signal.SIG_DFL)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (row, *_) = execute(plan_of(tmp_path / "run", THREE[:1])).records
    assert row.status.value == "crash"
    assert "Segmentation fault\nCurrent thread 0x2" in row.detail
    assert "break_down" in row.detail


def test_a_worker_that_dies_at_once_ends_the_run_and_says_how(tmp_path, stand_in):
    stand_in("print('no module named torch', flush=True)\nos._exit(7)\n")
    with pytest.raises(RunnerError) as failure:
        execute(plan_of(tmp_path / "run", THREE))
    assert not isinstance(failure.value, Refused)
    message = str(failure.value)
    assert message.startswith("a worker ended before it measured anything: its process exited with 7\n")
    assert "no module named torch" in message
    assert str(tmp_path / "run" / "logs" / "worker-0.log") in message
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_of_a_long_log_the_end_is_told(tmp_path, stand_in):
    stand_in("print('too early', 'x' * 100_000, 'last words', sep='\\n', flush=True)\nready(); start(0)\nos._exit(7)\n")
    (row,) = execute(plan_of(tmp_path / "run", THREE[:1])).records
    assert row.detail.endswith("\nlast words")
    assert "too early" not in row.detail
    assert len(row.detail) < 4200


def test_a_worker_that_never_starts_ends_the_run(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(supervisor, "START_TIMEOUT_S", 1.0)
    stand_in("hang()\n")
    with pytest.raises(RunnerError, match=r"did not start within 1 s"):
        execute(plan_of(tmp_path / "run", THREE))
    assert (tmp_path / "run" / "logs" / "worker-0.log").exists()


def test_a_mistake_of_the_users_is_refused_with_all_its_lines(tmp_path, stand_in):
    stand_in("say(line('refused', mistakes=['no backend x', 'no device y']))\n")
    with pytest.raises(Refused, match=r"^no backend x\nno device y$"):
        execute(plan_of(tmp_path / "run", THREE))


def test_a_worker_is_out_of_reach_of_the_terminals_signals(tmp_path, stand_in):
    """Ctrl-C goes to the foreground's process group, which has only the supervisor."""
    stand_in("print('its group is', os.getpgrp(), flush=True)\n" + ALL)
    execute(plan_of(tmp_path / "run", jobs_of("a")))
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    assert int(log.split("its group is ")[1].split()[0]) == pid_of(tmp_path / "run") != os.getpgrp()


def test_a_worker_never_hears_what_another_was_told(tmp_path, stand_in):
    """The log of the first worker was deleted to save space. Its other files keep its number taken."""
    stand_in(ALL)
    execute(plan_of(tmp_path / "run", THREE[:2]))
    (tmp_path / "run" / "logs" / "worker-0.log").unlink()
    outcome = execute(plan_of(tmp_path / "run", THREE[2:]))
    assert ([row.backend for row in outcome.records], outcome.num_left) == (["c"], 0)
    assert [row.backend for row in Journal(tmp_path / "run" / "journal.jsonl")] == ["a", "b", "c"]
