"""The supervisor believes only what it can check, and each backend that is not built in has a worker of its own."""

import json
from pathlib import Path

import pytest

from moebench.results.journal import Journal
from moebench.run.runner import RunnerError, execute
from moebench.workload.case import Job
from tests.moebench.executed import CASE, has_ended, jobs_of, plan_of

#: What a worker does after it has begun its first job, and what the job's detail must say.
UNBELIEVABLE = {
    "os.unlink(option['--events'])": "the file of its events was deleted",
    "os.truncate(option['--events'], 3)": "the file of its events was cut short",
    "os.truncate(option['--events'], 0); say(' ' * 10_000 + told(0))": "a line that the worker did not write",
    "say('no JSON\\n')": "a line that the worker did not write: no JSON",
    "say('[' * 100_000 + '\\n')": "a line that the worker did not write: [[[",
    "say(line('record', number=0, token='forged', record={}))": "a line that the worker did not write",
    "say(told(0).replace(os.environ['MOEBENCH_WORKER'], 'guessed'))": "a line that the worker did not write",
    "next(counts); say(told(0))": "a line that the worker did not write",
    "say(line('start', number=0))": "its worker reported `start` out of turn",
    "ready()": "its worker reported `ready` out of turn",
    'say(told(0).replace(\'"backend": "\', \'"backend": "other\'))': "reported a record of another job",
    "say(told(0).replace('\"seed\": 0', '\"seed\": 1'))": "reported a record of another job",
    "say(line('trial', trial='t')); say(line('start', number=1))": "reported `start` out of turn",
}


def test_what_cannot_be_believed_is_a_crash_of_that_job_alone(tmp_path, custom_stand_in):
    """Each worker does one of these things in its first job. The next worker measures the next job."""
    custom_stand_in(
        f"scripts = {list(UNBELIEVABLE)!r}\nready()\nif number_of_worker < len(scripts):\n    start(0)\n"
        "    exec(scripts[number_of_worker])\n    hang()\ndone(0)\n"
    )
    names = [f"b{number}" for number in range(len(UNBELIEVABLE))]
    *rows, last = execute(plan_of(tmp_path / "run", jobs_of(*names, "last"))).records
    assert [(row.backend, row.status.value) for row in rows] == [(name, "crash") for name in names]
    assert (last.backend, last.status.value) == ("last", "unsupported")
    for row, (script, words) in zip(rows, UNBELIEVABLE.items(), strict=True):
        assert words in row.detail, script


def test_texts_of_a_worker_are_bounded(tmp_path, stand_in):
    stand_in("ready()\nfor number in itertools.count(): done(number, detail='x\\0' * 1_000_000)\n")
    (row,) = execute(plan_of(tmp_path / "run", jobs_of("a"))).records
    assert len(row.detail) < 5000
    assert "\0" not in row.detail
    assert "characters left out" in row.detail


SAYS_ITS_NUMBER = "ready()\nfor number in itertools.count(): done(number, detail=str(number_of_worker))\n"


def test_a_backend_that_is_not_built_in_has_a_worker_of_its_own(tmp_path, custom_stand_in):
    custom_stand_in(SAYS_ITS_NUMBER)
    other = CASE.model_copy(update={"seed": 1})
    jobs = (*jobs_of("loop", "torch_mm", "my:A", "my:B", "gmm"), Job(case=other, backend="loop"))
    jobs += (Job(case=other, backend="my:B"),)
    rows = execute(plan_of(tmp_path / "run", jobs)).records
    assert [(row.backend, row.detail) for row in rows] == [
        ("loop", "0"),
        ("torch_mm", "0"),
        ("my:A", "1"),
        ("my:B", "2"),
        ("gmm", "3"),
        ("loop", "3"),
        ("my:B", "4"),
    ]


def test_jobs_of_one_such_backend_on_one_case_share_its_worker(tmp_path, custom_stand_in):
    custom_stand_in(SAYS_ITS_NUMBER)
    jobs = tuple(Job(case=CASE, backend="my:A", dispatcher=name) for name in ("local", "allgather"))
    assert [row.detail for row in execute(plan_of(tmp_path / "run", jobs)).records] == ["0", "0"]


@pytest.mark.parametrize("end", ["os.truncate(option['--events'], 0); os._exit(0)", "os._exit(0)"])
def test_such_a_backend_is_to_blame_for_a_worker_that_never_said_it_began(tmp_path, custom_stand_in, end):
    custom_stand_in(f"ready()\nnext_job()\nif jobs[0].backend == 'my:A':\n    {end}\ndone(0)\n")
    rows = execute(plan_of(tmp_path / "run", jobs_of("loop", "my:A", "torch_mm"))).records
    assert [(row.backend, row.status.value) for row in rows] == [
        ("loop", "unsupported"),
        ("my:A", "crash"),
        ("torch_mm", "unsupported"),
    ]


def test_a_process_in_a_session_of_its_own_ends_with_the_worker(tmp_path, stand_in):
    """The child's parent has ended, and the child left its parent's process group."""
    stand_in(
        "import subprocess\nready()\nstart(0)\n"
        "code = 'import os, signal\\nif os.fork(): os._exit(0)\\nos.setsid(); print(os.getpid(), flush=True)'\n"
        "code += '\\nsignal.pause()'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)\n"
        "say(told(0, detail=child.stdout.readline().strip()))\n"
    )
    (row,) = execute(plan_of(tmp_path / "run", jobs_of("a"))).records
    assert has_ended(int(row.detail))


#: What a worker does to the results folder.
TO_THE_JOURNAL = {
    "deletes": "os.unlink(journal)",
    "cuts": "os.truncate(journal, 5)",
    "forges": "open(journal, 'a').write('{}\\n{}\\n')",
    "replaces": "os.unlink(journal); os.mkfifo(journal)",
    "same size": "old = open(journal, 'rb').read(); open(journal, 'wb').write(b'x' * len(old))",
    "removes the folder": "import shutil; shutil.rmtree(os.path.dirname(journal))",
}


def test_no_row_is_lost_if_the_journal_is_changed(tmp_path, stand_in, monkeypatch):
    """In each job after the first, the worker does another thing to the journal. The run has a relative folder."""
    monkeypatch.chdir(tmp_path)
    stand_in(
        f"scripts = {list(TO_THE_JOURNAL.values())!r}\n"
        "journal = os.path.dirname(os.path.dirname(option['--jobs'])) + '/journal.jsonl'\nready()\ndone(0)\n"
        "for number, script in enumerate(scripts, 1):\n    start(number)\n"
        "    while not os.path.isfile(journal) or open(journal).read().count('\\n') != number: time.sleep(0.001)\n"
        "    exec(script)\n    say(told(number))\n"
    )
    names = [f"b{number}" for number in range(len(TO_THE_JOURNAL) + 1)]
    outcome = execute(plan_of(Path("run"), jobs_of(*names)))
    assert [row.backend for row in outcome.records] == names
    assert Journal(tmp_path / "run" / "journal.jsonl").read() == (list(outcome.records), 0)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["env_id"] == "e"
    journal, environment = outcome.notes
    assert f"removed it {len(TO_THE_JOURNAL)} times during the run; moebench wrote it again" in journal
    assert "environment.json: another process changed or removed it" in environment


def test_a_journal_that_cannot_be_written_again_ends_the_run_in_one_line(tmp_path, stand_in):
    stand_in(
        "journal = os.path.dirname(os.path.dirname(option['--jobs'])) + '/journal.jsonl'\nready()\ndone(0)\n"
        "while not os.path.exists(journal): time.sleep(0.001)\n"
        "start(1); os.unlink(journal); os.makedirs(journal + '/x'); say(told(1)); hang()\n"
    )
    with pytest.raises(RunnerError, match=r"journal.jsonl: another process changed or removed it .* cannot be written"):
        execute(plan_of(tmp_path / "run", jobs_of("a", "b")))
