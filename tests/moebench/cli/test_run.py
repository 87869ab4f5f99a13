"""Runs as a user types them: what they print and where, which files they leave, and their exit codes."""

import json
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest

from moebench import __version__
from moebench.results.frame import load, to_json
from moebench.results.journal import Journal
from tests.moebench.executed import python_path
from tests.moebench.typed import SWEEP, finished, is_refused, started

ROOT = Path(__file__).parents[3]


def test_unsupported_and_out_of_memory_are_results(good_run):
    assert good_run.code == 0, good_run.err
    report = json.loads(good_run.out)
    assert report["statuses"] == {"ok": 2, "unsupported": 1, "oom": 1}
    assert [row["backend"] for row in report["records"]] == good_run.backends
    assert (report["interrupted"], report["num_left"]) == (False, 0)


def test_json_is_all_there_is_on_standard_output(good_run):
    report = json.loads(good_run.out)
    assert good_run.out.strip().startswith("{")
    assert {row["num_tokens"] for row in report["records"]} == {8}
    assert json.loads(to_json(load(good_run.cwd / report["results"]))) == report["records"]


def test_a_run_goes_to_a_new_folder_of_results(good_run, sweep):
    folder = Path(json.loads(good_run.out)["results"])
    assert folder.parent == Path("results/runs")
    assert folder.name.endswith("-tiny")
    names = {path.name for path in (good_run.cwd / folder).iterdir()}
    assert names == {
        *("journal.jsonl", "results.parquet", "results.csv", "environment.json", "run.json", "sweep.toml"),
        *("report.html", "logs", "plots", "traces"),
    }
    assert (good_run.cwd / folder / "sweep.toml").read_text() == sweep.read_text()
    asked = json.loads((good_run.cwd / folder / "run.json").read_text())
    assert (asked["sweep"], asked["num_jobs"], asked["moebench"]) == ("tiny", 4, __version__)
    assert asked["command"].startswith(f"moebench run {sweep} --json --filter num_tokens=8 --only loop")


def test_profile_leaves_a_trace_of_each_job_that_ran(good_run):
    folder = good_run.cwd / json.loads(good_run.out)["results"] / "traces"
    names = sorted(path.name.partition("--")[2] for path in folder.iterdir())
    assert names == ["loop--local.json", "torch_mm--local.json"]
    for path in folder.iterdir():
        events = json.loads(path.read_text())["traceEvents"]
        assert "aten::mm" in {event.get("name") for event in events}


@pytest.fixture(scope="module")
def bad_run(sweep, case_ids, tmp_path_factory):
    """A run of a wrong backend, into a folder with a name that is hard to print."""
    cwd = tmp_path_factory.mktemp("bad")
    arguments = ["--only", "loop", "--only", "faulty:DroppedToken", "--case", case_ids[1], "--out", "out [1] :x:"]
    return SimpleNamespace(**vars(finished("run", sweep, *arguments, "--device", "cpu", cwd=cwd)), cwd=cwd)


def test_a_mismatch_is_exit_code_1_and_in_the_table(bad_run):
    assert bad_run.code == 1, bad_run.err
    assert "mismatch" in bad_run.out
    assert "faulty:DroppedToken" in bad_run.out
    assert re.search(r"output \(token \d+\)", bad_run.out)


def test_the_last_line_names_the_folder(bad_run):
    assert bad_run.out.splitlines()[-1] == "results: out [1] :x:"
    assert re.fullmatch(
        r"wrote results.parquet, results.csv, report.html and \d+ files in plots", bad_run.out.splitlines()[-2]
    ), "the files have one line"
    assert (bad_run.cwd / "out [1] :x:" / "results.parquet").is_file()


def test_case_measures_that_case_alone(bad_run, case_ids):
    frame = pd.read_parquet(bad_run.cwd / "out [1] :x:" / "results.parquet")
    assert frame[["case_id", "backend", "status"]].to_numpy().tolist() == [
        [case_ids[1], "loop", "ok"],
        [case_ids[1], "faulty:DroppedToken", "mismatch"],
    ]
    assert frame["time_ms"].notna().tolist() == [True, False]


def test_rounds_measure_every_job_again_in_fresh_processes(sweep, tmp_path):
    found = finished(
        "run", sweep, "--rounds", 2, "--filter", "num_tokens=8", "--out", "out", "--device", "cpu", cwd=tmp_path
    )
    assert found.code == 0, found.err
    rows, _ = Journal(tmp_path / "out" / "journal.jsonl").read()
    assert sorted((row.round, row.backend) for row in rows) == [
        (n, name) for n in (0, 1) for name in ("loop", "torch_mm")
    ]
    assert len(list((tmp_path / "out" / "logs").glob("*.log"))) == 2
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert frame["num_rounds"].tolist() == [2, 2]
    assert {tuple(sorted(set(rounds))) for rounds in frame["sample_rounds"]} == {(0, 1)}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["num_rounds"] == 2


def hanging_run(sweep, cwd):
    """Return a run that has measured its first job and hangs in the second, and the second worker."""
    process = started(
        *("run", sweep, "--out", "out", "--only", "loop", "--only", "broken:Hangs", "--device", "cpu"), cwd=cwd
    )
    journal, events = cwd / "out" / "journal.jsonl", cwd / "out" / "logs" / "worker-1.events.jsonl"
    deadline = time.monotonic() + 90
    while not (journal.exists() and events.exists() and '"start"' in events.read_text()):
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
            pytest.fail(f"it ended by itself: {process.communicate()}")
    (worker,) = psutil.Process(process.pid).children()
    return process, worker


def has_ended(worker):
    """Whether the process ends within 30 s. An orphan that nobody reaps counts as ended."""
    deadline = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        psutil.wait_procs([worker], timeout=0.05)
    return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_keeps_what_was_measured_and_ends_the_worker(sweep, tmp_path):
    process, worker = hanging_run(sweep, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted: 3 jobs left; go on with `moebench run --resume out`"
    assert out.splitlines()[-1] == "results: out"
    assert has_ended(worker)
    (row,) = Journal(tmp_path / "out" / "journal.jsonl")
    assert (row.backend, row.status.value) == ("loop", "ok")
    assert pd.read_parquet(tmp_path / "out" / "results.parquet")["backend"].tolist() == ["loop"]


def test_a_worker_does_not_outlive_a_supervisor_that_is_killed(sweep, tmp_path):
    process, worker = hanging_run(sweep, tmp_path)
    process.kill()
    process.communicate()
    assert has_ended(worker)
    assert len(Journal(tmp_path / "out" / "journal.jsonl").read()[0]) == 1


def test_what_is_not_there_is_refused_and_leaves_the_folder_free(sweep, moebench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))
    found = moebench("run", sweep, "--out", "out", "--only", "loop", "--only", "no_such:Thing", "--device", "cuda:99")
    assert (found.code, found.out) == (2, "")
    module, device = found.err.strip().splitlines()
    assert "there is no module 'no_such'" in module
    assert "cuda:99" in device
    assert not Path("out").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_unknown_backends_are_refused_before_anything_starts(sweep, moebench, options):
    found = moebench("run", sweep, "--out", "out", "--only", "lopp", "--only", "loop", "--only", "zzz", *options)
    assert (found.code, found.out) == (2, "")
    first, second = found.err.strip().splitlines()
    assert first.startswith("there is no backend 'lopp'; did you mean 'loop'? the backends are loop, torch_mm")
    assert second.startswith("there is no backend 'zzz'; the backends are loop")
    assert not Path("out").exists()


def test_a_time_budget_of_nothing_measures_nothing(sweep, moebench):
    found = moebench("run", sweep, "--out", "out", "--time-budget", "0", "--device", "cpu")
    assert found.code == 0
    assert found.out == "results: out\n"
    assert found.err.strip() == "time budget spent: 4 jobs left; go on with `moebench run --resume out`"
    report = json.loads(moebench("run", sweep, "--out", "out2", "--time-budget", "0", "--json", "--device", "cpu").out)
    assert (report["num_left"], report["records"], report["statuses"]) == (4, [], {})


def test_an_output_folder_that_holds_something(sweep, moebench):
    Path("full").mkdir()
    (Path("full") / "notes.txt").write_text("mine")
    Path("file").write_text("mine")
    for name in ("full", "file"):
        is_refused(moebench("run", sweep, "--out", name), f"--out {name}", "not an empty folder")
    assert (Path("full") / "notes.txt").read_text() == Path("file").read_text() == "mine"


def test_a_sweep_that_is_not_there(moebench):
    is_refused(moebench("run", "quik"), "quik", 'did you mean "quick"?')
    is_refused(moebench("list", "quik"), "quik")


def test_a_sweep_with_mistakes(moebench):
    Path("bad.toml").write_text(SWEEP.replace("dim = 16", 'dim = "16"').replace('"float32"', '"float31"'))
    found = moebench("run", "bad.toml")
    assert found.code == 2
    assert len(found.err.splitlines()) >= 2, "every mistake at once"
    assert "float31" in found.err


def test_a_case_a_filter_and_a_backend_that_cannot_be(sweep, moebench):
    is_refused(moebench("run", sweep, "--case", "e4k2-nothing"), "'e4k2-nothing'", f"see `moebench list {sweep} --ids`")
    is_refused(moebench("run", sweep, "--filter", "tokens=8"), "'tokens=8'", "num_tokens")
    is_refused(moebench("run", sweep, "--filter", "num_tokens=9"), "no job is left")
    is_refused(moebench("run", sweep, "--backend", "my module"), "'my module'", "module:attribute")


def test_dry_run_measures_nothing(sweep, case_ids, moebench):
    found = moebench("run", sweep, "--dry-run", "--filter", "num_tokens=24", "--only", "torch_mm", "--only", "my:Own")
    assert (found.code, found.err) == (0, "")
    assert "backends: torch_mm, my:Own" in found.out.splitlines()
    assert "2 jobs, 1 case" in found.out.splitlines()
    assert case_ids[1] not in found.out, "a hash is for who asks for it"
    assert "Estimates, nothing was measured." in found.out
    assert list(Path().iterdir()) == []


def test_dry_run_as_json_is_what_list_gives(sweep, moebench):
    plan = json.loads(moebench("run", sweep, "--dry-run", "--json").out)
    assert [(job["case"]["num_tokens"], job["backend"]) for job in plan["jobs"]] == [
        (tokens, name) for tokens in (8, 24) for name in ("loop", "torch_mm")
    ]
    assert plan["forecast"]["num_jobs"] == 4
    assert plan["forecast"]["memory_bytes"] == max(job["estimate"]["memory_bytes"] for job in plan["jobs"]) > 0
    assert json.loads(moebench("list", sweep, "--json").out) == plan


def test_a_command_measures_blocks_instead_of_experts(sweep, moebench):
    found = moebench("run", sweep, "--dry-run", "--json", "--subject", "block:olmoe")
    assert (found.code, found.err) == (0, "")
    assert {job["case"]["subject"] for job in json.loads(found.out)["jobs"]} == {"block:olmoe"}
    wrong = moebench("run", sweep, "--dry-run", "--subject", "block:nobody")
    assert wrong.code == 2
    assert "its router is not known; take block:MODEL" in wrong.err
