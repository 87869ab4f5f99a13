"""A run that ends early is resumed as it was asked for, and nothing is lost or measured twice.

Only one process at a time resumes it. Signals, kills and limits are real, and so are the command lines.
Most command lines have a stand-in for their workers.
"""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.report import folder as folder_report
from moebench.results.folder import environments_beside
from moebench.results.frame import load
from moebench.results.journal import Journal
from moebench.run import request, start
from moebench.run.runfile import sweeps_of
from tests.moebench import stand_in
from tests.moebench.resumed import SWEEP, TOLD_AND_INTERRUPTS, are_gone, begun, is_whole, refused, rows, until_records
from tests.moebench.stand_in import ALL

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_in_one_line_and_it_is_gone_on_with(folder, moebench, name):
    process = stand_in.started(folder / "waits", "run", "tiny.toml", "--out", "out", "--device", "cpu", cwd=folder)
    workers = until_records(process, folder / "out")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted: 5 jobs left; go on with `moebench run --resume out`"
    assert out.splitlines()[-1] == "results: out"
    assert len(workers) == 1
    assert are_gone(workers)
    before = (folder / "out" / "journal.jsonl").read_bytes()
    assert len(rows(folder / "out")) == 1
    found = moebench("run", "--resume", "out")
    assert (found.code, found.err) == (0, "")
    assert is_whole(folder / "out")
    assert (folder / "out" / "journal.jsonl").read_bytes().startswith(before), "what is there stays as it is"
    run = json.loads((folder / "out" / "run.json").read_text())
    assert [line.partition(" ")[2] for line in run["resumed"]] == ["moebench run --resume out"]
    assert len(load(folder / "out" / "results.parquet")) == 6


def test_a_signal_while_results_are_written_is_one_line_too(folder, moebench, monkeypatch):
    begun(moebench)

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_report, "finish", interrupted)
        found = moebench("run", "--resume", "out")
    line = "interrupted: everything measured so far is in the journal; go on with `moebench run --resume out`"
    assert (found.code, found.out, found.err) == (130, "", line)
    assert moebench("run", "--resume", "out").code == 0
    assert len(load(folder / "out" / "results.parquet")) == 6


def test_a_signal_that_is_ignored_stays_so(folder):
    """`nohup` makes a run ignore SIGHUP."""
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = stand_in.started(folder / "waits", "run", "tiny.toml", "--out", "out", cwd=folder, **ignore)
    until_records(process, folder / "out")
    process.send_signal(signal.SIGHUP)
    (folder / "go").touch()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (0, "")
    assert is_whole(folder / "out")


@pytest.mark.certify(share=0)  # six processes that import torch; test_signals.py kills runs of stand-ins
def test_a_run_killed_between_rounds_of_real_workers_is_completed_exactly(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(*arguments):
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "moebench", "run", *arguments], stdout=pipe, stderr=pipe, text=True
        )

    chosen = ("--rounds", "2", "--filter", "num_tokens=8,24", "--only", "loop", "--device", "cpu")
    process = command("tiny.toml", "--out", "out", *chosen)
    workers = until_records(process, folder / "out")
    process.kill()
    process.communicate()
    assert are_gone(workers), "they do not outlive their supervisor"
    before = rows(folder / "out")
    assert 1 <= len(before) < 4
    with (folder / "out" / "journal.jsonl").open("a") as file:
        file.write(before[0].to_json()[:200])  # as if it was killed while it wrote
    process = command("--resume", "out")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0
    assert err.strip().startswith("out/journal.jsonl: 1 of 5 lines cannot be read")
    assert len(err.strip().splitlines()) == 1
    found, torn = Journal(folder / "out" / "journal.jsonl").read()
    assert torn == 1
    assert sorted((row.num_tokens, row.round) for row in found) == [(8, 0), (8, 1), (24, 0), (24, 1)]
    assert found[: len(before)] == before
    assert {row.status.value for row in found} == {"ok"}
    assert load(folder / "out")["num_rounds"].tolist() == [2, 2]


@pytest.mark.parametrize("who", ["supervisor", "worker"])
def test_a_full_disk_is_one_line_and_no_jobs_fault(folder, moebench, who):
    """A real limit on the size of files stops the supervisor at the journal, or the worker at its events file."""
    lifted = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n" * (who == "supervisor")
    grows = ALL if who == "supervisor" else ALL.replace("ready()", "ready(versions={'torch': '1' * 1000})")
    stand_in.write(folder / "fills", lifted + grows)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))}
    process = stand_in.started(folder / "fills", "run", "tiny.toml", "--out", "out", cwd=folder, **limit)
    _, err = process.communicate(timeout=60)
    (line,) = err.strip().splitlines()
    assert process.returncode == 1
    assert "cannot be written: File too large" in line
    assert line.endswith("make room and continue with `moebench run --resume out`")
    kept, torn = Journal(folder / "out" / "journal.jsonl").read()
    assert 0 < len(kept) < 6
    assert torn <= 1
    assert {row.status.value for row in kept} == {"unsupported"}, "nobody crashed"
    assert moebench("run", "--resume", "out", "--force").code == 0  # the "worker" case reported another torch
    kept, _ = Journal(folder / "out" / "journal.jsonl").read()
    assert len({(row.key, row.round) for row in kept}) == len(kept) == 6


def test_a_run_is_gone_on_with_as_it_was_asked_for(folder, moebench):
    asked = ("--filter", "num_tokens<=16", "--only", "loop", "--only", "gmm", "--device", "cpu", "--rounds", 3)
    found = moebench("run", "tiny.toml", "--out", "out", *asked, "--time-budget", 0)
    assert found.err == "time budget spent: 12 jobs left; go on with `moebench run --resume out`"
    found = moebench("run", "--resume", "out")
    assert (found.code, found.err) == (0, "10 of 12 jobs: 10 unsupported; last: " + found.err.rpartition(" ")[2])
    assert is_whole(folder / "out", ("loop", "gmm"), (8, 16), rounds=3)
    heads = [json.loads(path.read_text().splitlines()[0]) for path in (folder / "out" / "logs").glob("*.jobs.jsonl")]
    assert sorted(head["round"] for head in heads) == [0, 1, 2], "each round has a process of its own"


def test_a_whole_run_is_not_measured_again_and_keeps_its_exit_code(folder, moebench):
    stand_in.write(folder / "fails", "ready()\nfor number in itertools.count(): done(number, status='error')\n")
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="fails").code == 1
    assert moebench("run", "--resume", "out").code == 1
    assert is_whole(folder / "out")
    assert len(list((folder / "out" / "logs").glob("*.log"))) == 1, "no worker was started again"


def test_a_changed_sweep_is_said_and_refused(folder, moebench):
    begun(moebench)
    (folder / "tiny.toml").write_text(SWEEP.replace("24", "32"))
    assert refused(
        moebench("run", "--resume", "out"), "tiny.toml has changed since 20", "--force resumes with out/sweep"
    )
    (folder / "tiny.toml").unlink()
    (folder / "out" / "sweep.toml").write_text(SWEEP.replace("24", "32"))
    assert refused(moebench("run", "--resume", "out"), "out/sweep.toml has been edited")
    assert not (folder / "out" / "journal.jsonl").exists()
    assert moebench("run", "--resume", "out", "--force").code == 0
    assert is_whole(folder / "out", tokens=(8, 16, 32))


def test_other_jobs_of_the_same_sweep_are_said_and_refused(folder, moebench):
    """Another version of moebench may have other shapes for a model."""
    begun(moebench)
    run = json.loads((folder / "out" / "run.json").read_text())
    (folder / "out" / "run.json").write_text(json.dumps({**run, "jobs_sha256": "0", "moebench": "9.9"}))
    assert refused(moebench("run", "--resume", "out"), "makes other jobs", "9.9")


def test_a_changed_environment_is_said_and_refused(folder, moebench):
    other = "dict(python='4', versions={'torch': '3.0'}, env_id='f', git_revision='abc')"
    stand_in.write(folder / "other", ALL.replace("ready()", f"ready(**{other})"))
    stand_in.write(folder / "first", TOLD_AND_INTERRUPTS)
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="first").code == 130
    found = moebench("run", "--resume", "out", worker="other")
    assert refused(found, "python 3 -> 4", "torch none -> 3.0", "git_revision None -> abc", "--force")
    assert len(rows(folder / "out")) == 1
    assert moebench("run", "--resume", "out", "--force", worker="other").code == 0
    assert is_whole(folder / "out")
    assert json.loads((folder / "out" / "environment.json").read_text())["env_id"] == "e"
    assert json.loads((folder / "out" / "environments" / "f.json").read_text())["python"] == "4"


def test_a_run_with_several_environments_goes_on_in_each_of_them(folder, moebench):
    """A run on a cluster of unlike nodes has several environments, and a run that was resumed by force."""
    stand_in.write(folder / "first", TOLD_AND_INTERRUPTS)
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="first").code == 130
    (environment,) = (folder / "out").glob("environment.json")
    other = json.loads(environment.read_text()) | {"python": "4", "env_id": "f"}
    (folder / "out" / "environments").mkdir()
    (folder / "out" / "environments" / "f.json").write_text(json.dumps(other))
    for python, env_id in (("5", "g"), ("4", "f")):
        stand_in.write(folder / "other", ALL.replace("ready()", f"ready(python={python!r}, env_id={env_id!r})"))
        found = moebench("run", "--resume", "out", worker="other")
        assert refused(found, "python 3 -> 5") if python == "5" else found.code == 0
    assert {row.env_id for row in rows(folder / "out")} == {"e", "f"}


def test_which_revision_ran_is_kept_though_times_of_both_may_be_compared(folder, moebench):
    for name in ("first", "other"):
        script = TOLD_AND_INTERRUPTS if name == "first" else ALL
        stand_in.write(folder / name, script.replace("ready()", f"ready(git_revision={name!r})"))
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="first").code == 130
    assert refused(moebench("run", "--resume", "out", worker="other"), "git_revision first -> other")
    assert moebench("run", "--resume", "out", "--force", worker="other").code == 0
    assert is_whole(folder / "out")
    assert {row.env_id for row in rows(folder / "out")} == {"e"}
    assert environments_beside(folder / "out")["e"].git_revision == "first"
    assert json.loads((folder / "out/environments/e-other.json").read_text())["git_revision"] == "other"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sweep.toml", None, ("out/sweep.toml: cannot be read: ", "No such file")),
        ("sweep.toml", lambda text: text.replace(b"tiny", b"t\xefny"), ("out/sweep.toml: cannot be read: ", "UTF-8")),
        ("journal.jsonl", None, ("out: the folder has results.parquet but not journal.jsonl", "put it back")),
        ("journal.jsonl", lambda text: text.replace(b'"schema":2', b'"schema":3'), ("journal.jsonl:1: schema 3",)),
        (
            "journal.jsonl",
            lambda text: text.replace(b'"oom"', b'"fine"'),
            ("journal.jsonl:1: status = 'fine': Input should",),
        ),
        ("environment.json", lambda text: text[:40], ("out/environment.json: Invalid JSON",)),
    ],
)
def test_a_folder_with_a_file_lost_or_broken_is_refused_in_one_line(folder, moebench, name, change, words):
    stand_in.write(folder / "first", TOLD_AND_INTERRUPTS.replace("done(0)", "done(0, status='oom')"))
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="first").code == 130
    content = (folder / "out" / name).read_bytes()
    (folder / "out" / name).unlink()
    if change is not None:
        assert change(content) != content
        (folder / "out" / name).write_bytes(change(content))
    left = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.name.startswith("results")}
    assert refused(moebench("run", "--resume", "out", "--force"), *words)
    assert left == {path: path.read_bytes() for path in left}


def test_who_was_overtaken_measures_nothing_twice(folder, moebench):
    """After this process reads the journal and before it locks the folder, another process resumes and ends the run."""
    begun(moebench)
    plan = request.plan_rest(Path("out"), backends=(), time_budget_min=None)
    assert moebench("run", "--resume", "out").code == 0
    with pytest.raises(UsageError, match="out: another process resumed the run in the meantime"):
        start.start_run(plan, print)
    assert is_whole(folder / "out")


def test_what_is_left_of_later_rounds_is_shown(folder, moebench):
    asked = ("--rounds", 2, "--device", "cpu", "--only", "loop")
    assert moebench("run", "tiny.toml", "--out", "out", *asked).code == 0
    journal = folder / "out" / "journal.jsonl"
    kept = [
        line
        for line in journal.read_text().splitlines(keepends=True)
        if '"round":0' in line or '"num_tokens":24' in line
    ]
    journal.write_text("".join(kept))
    found = moebench("run", "--resume", "out", "--dry-run")
    assert "2 jobs, 2 cases" in found.out.splitlines()
    assert moebench("run", "--resume", "out").code == 0
    assert is_whole(folder / "out", ["loop"], rounds=2)


@pytest.mark.parametrize("out", ["tiny.toml/out", "/proc/moebench"])
def test_a_folder_that_cannot_be_written_is_refused(folder, moebench, out):
    assert refused(moebench("run", "tiny.toml", "--device", "cpu", "--out", out), f"{out}: cannot be written: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("run",), "give a SWEEP, or --resume DIR"),
        (("run", "tiny.toml", "--resume", "out"), "SWEEP with --resume: a resumed run keeps what it was"),
        (("run", "--resume", "out", "--rounds", "2"), "--rounds with --resume: a resumed run keeps what it was"),
        (("run", "--resume", "out", "--filter", "dim=16"), "--filter with --resume: a resumed run keeps what it was"),
        (("run", "tiny.toml", "--force"), "--force without --resume"),
        (("run", "--resume", "nowhere"), "nowhere: run.json: No such file"),
        (("run", "--resume", "merged"), "merged: run.json: run_id: Field required"),
    ],
)
def test_what_cannot_be_resumed(folder, moebench, arguments, word):
    begun(moebench)
    (folder / "merged").mkdir()
    (folder / "merged" / "run.json").write_text('{"merged": []}')
    assert refused(moebench(*arguments), word)


def test_a_module_that_only_a_file_names_is_not_imported(folder, moebench):
    """moebench can open someone else's sweep or results folder without running their code."""
    (folder / "theirs.toml").write_text(SWEEP.replace('"torch_mm"', '"evil:Experts"'))
    found = moebench("run", "theirs.toml", "--out", "out")
    assert refused(found, "evil:Experts: a module is imported only where", "add --backend evil:Experts")
    assert not (folder / "out").exists()
    named = ("--only", "evil:Experts")
    assert moebench("run", "theirs.toml", "--out", "out", *named, "--time-budget", 0).code == 0
    assert refused(moebench("run", "--resume", "out"), "evil:Experts", "add --backend evil:Experts")
    assert moebench("run", "--resume", "out", *named).code == 0
    assert is_whole(folder / "out", ("evil:Experts",))
    assert moebench("list", "theirs.toml").code == 0, "to look at it imports nothing"


@pytest.mark.parametrize("content", ["5", "[]", '{"sweep": 5}', '{"sweep_file": null}', "{", "[" * 100_000, "9" * 6000])
def test_a_run_file_that_names_no_sweep(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert sweeps_of(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "."])
def test_a_sweep_file_that_no_path_can_be_has_not_changed(folder, moebench, name):
    """run.json may come from somebody else."""
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", "--time-budget", "0").code == 0
    path = folder / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sweep_file": name}))
    assert moebench("run", "--resume", "out", "--dry-run").code == 0


@pytest.mark.parametrize("run_id", ["../x", "/x", "", "a/b"])
def test_a_run_id_that_leads_elsewhere_is_refused(folder, moebench, run_id):
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", "--time-budget", "0").code == 0
    path = folder / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": run_id}))
    assert refused(moebench("run", "--resume", "out"), f"run.json: run_id = {run_id!r}: ")


def test_why_git_does_not_tell_the_revision_is_told(folder, moebench):
    stand_in.write(folder / "first", ALL.replace("ready()", "ready(git_problem='git: dubious ownership')"))
    found = moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", worker="first")
    assert (found.code, found.err) == (
        0,
        "the results do not name the revision of this checkout: git: dubious ownership",
    )


def test_a_run_prints_the_rows_that_show_prints(folder, moebench):
    ran = moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", "--rounds", "2", "--json")
    shown = moebench("show", "out", "--json")
    assert json.loads(ran.out)["records"] == json.loads(shown.out)
    assert json.loads(ran.out)["statuses"] == {"unsupported": 12}
    assert len(json.loads(shown.out)) == 6
