"""From a plan to a folder: what is refused, what is written, what a refused run leaves."""

import json
from pathlib import Path

import pytest

from moebench import results
from moebench.case import Case, Job
from moebench.record import Journal, Status, record
from moebench.results import UsageError, check_device, finish, measure, on_gpus, plan
from moebench.rounds import shuffled
from moebench.runner import Outcome, Refused, RunnerError
from moebench.selection import select
from moebench.slots import ANYWHERE, Slot
from moebench.spec import SweepError

SWEEP = """
name = "two"
[policy]
timeout_s = 7.0
[defaults]
n_routed_experts = 4
n_activated_experts = 2
dim = 16
moe_inter_dim = 8
backend = ["loop", "torch_mm"]
[[grid]]
num_tokens = [8, 24]
"""


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("two.toml")
    path.write_text(SWEEP)
    return path


def plan_(**asked):
    nothing = {"out": None, "backends": [], "filters": [], "case_ids": [], "device": None, "time_budget_min": None}
    return plan("two.toml", **{**nothing, **asked})


def test_a_plan_has_the_sweeps_jobs_and_policy():
    planned = plan_(device="cpu", time_budget_min=1.5)
    assert [(job.case.num_tokens, job.backend) for job in planned.jobs] == [
        (8, "loop"),
        (8, "torch_mm"),
        (24, "loop"),
        (24, "torch_mm"),
    ]
    assert planned.rounds[0].policy.timeout_s == 7.0
    assert planned.time_budget_s == 90.0
    assert planned.rounds[0].device == "cpu"
    assert plan_().time_budget_s is None
    assert planned.folder.parent == Path("results/runs")
    assert planned.folder.name == planned.run_id
    assert [path.name for path in Path().iterdir()] == ["two.toml"], "planning writes nothing"


def test_rounds_are_plans_of_the_same_jobs_in_other_orders():
    planned = plan_(rounds=3)
    assert [one.round for one in planned.rounds] == [0, 1, 2]
    assert planned.num_jobs == 12
    assert {frozenset(one.jobs) for one in planned.rounds} == {frozenset(planned.jobs)}
    assert [one.jobs for one in planned.rounds] == [shuffled(planned.jobs, planned.run_id, n) for n in range(3)]


def test_a_plan_is_spread_over_the_gpus_that_are_free(fake_nvml, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, pids in (("GPU-a", []), ("GPU-b", [7]), ("GPU-c", [])):
        fake_nvml.add_gpu(name, pids=pids)
    spread, notes = on_gpus(plan_(rounds=2), None, share=False)
    assert {one.slots for one in spread.rounds} == {(Slot("GPU-a"), Slot("GPU-c"))}
    assert [one.device for one in spread.rounds] == [None, None]
    assert [note.partition(":")[0] for note in notes] == ["GPU 1 is in use by process 7"]
    one, notes = on_gpus(plan_(device="cuda:2"), None, share=False)
    assert (one.rounds[0].slots, one.rounds[0].device, notes) == ((Slot("GPU-c"),), "cuda", [])
    with pytest.raises(UsageError, match="GPU 1 is in use by process 7"):
        on_gpus(plan_(), "1", share=False)
    on_cpu, _ = on_gpus(plan_(device="cpu"), None, share=False)
    assert (on_cpu.rounds[0].slots, on_cpu.rounds[0].device) == (ANYWHERE, "cpu")


def test_selections_are_combined():
    jobs = select("two.toml", ["my:Own", "loop"], ["num_tokens>8"], [])
    assert [(job.case.num_tokens, job.backend) for job in jobs] == [(24, "my:Own"), (24, "loop")]
    chosen = select("two.toml", [], [], [jobs[0].case.case_id])
    assert [job.backend for job in chosen] == ["loop", "torch_mm"]


def test_every_case_that_is_not_there_is_named():
    with pytest.raises(SweepError) as refusal:
        select("two.toml", [], [], ["x", "y"])
    assert len(refusal.value.mistakes) == 2


def test_a_case_that_the_filters_leave_out_is_not_there():
    case_id = select("two.toml", [], ["num_tokens=8"], [])[0].case.case_id
    with pytest.raises(SweepError, match=case_id):
        select("two.toml", [], ["num_tokens=24"], [case_id])


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12", None])
def test_devices_that_may_be(name):
    check_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:a", "cpu:0", "cuda:0:1", "CUDA"])
def test_devices_that_cannot_be(name):
    with pytest.raises(UsageError, match="it must be cpu, cuda or cuda:N"):
        check_device(name)


def test_an_empty_folder_may_be_named(tmp_path):
    (tmp_path / "out").mkdir()
    assert plan_(out=Path("out")).folder == Path("out")
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match="--out out"):
        plan_(out=Path("out"))


def row():
    case = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    return record(Job(case=case, backend="loop"), Status.oom, run_id="r", env_id="e", detail="much")


def executing(monkeypatch, error=None, rows=()):
    """Replaces the supervisor by one that writes these rows and raises this error."""

    def execute(planned, *, on_record, on_environment, time_budget_s):
        (planned.folder / "logs").mkdir(exist_ok=True)
        for one in rows:
            Journal(planned.folder / "journal.jsonl").append(one)
            on_record(one)
        if error is not None:
            raise error
        return Outcome(tuple(rows), 0)

    monkeypatch.setattr(results, "execute", execute)


def test_a_run_keeps_what_it_was_asked_for(monkeypatch, sweep):
    executing(monkeypatch, rows=[row()])
    planned = plan_(out=Path("deep/out"))
    told = []
    assert measure(planned, told.append).records == (row(),)
    assert told == [row()]
    assert (planned.folder / "sweep.toml").read_bytes() == sweep.read_bytes()
    asked = json.loads((planned.folder / "run.json").read_text())
    assert (asked["sweep"], asked["num_jobs"], asked["run_id"]) == ("two", 4, planned.run_id)


def test_a_refused_run_leaves_no_folder(monkeypatch):
    executing(monkeypatch, Refused("no backend x"))
    with pytest.raises(Refused):
        measure(planned := plan_(out=Path("out")), print)
    assert not planned.folder.exists()


@pytest.mark.parametrize(("error", "rows"), [(Refused("gone"), [row()]), (RunnerError("broken"), [])])
def test_what_was_measured_and_what_went_wrong_stay(monkeypatch, error, rows):
    executing(monkeypatch, error, rows)
    with pytest.raises(RunnerError):
        measure(planned := plan_(out=Path("out")), lambda one: None)
    assert (planned.folder / "logs").is_dir()
    assert (planned.folder / "journal.jsonl").exists() == bool(rows)


def test_tables_plots_and_report_come_of_the_journal():
    Path("out").mkdir()
    assert finish(Path("out")) == []
    Journal(Path("out/journal.jsonl")).append(row())
    written = finish(Path("out"))
    assert {Path(f"out/{name}") for name in ("results.parquet", "results.csv", "report.html")} <= set(written)
    assert all(path.is_file() for path in written)
