"""The worker turns whatever a backend raises into a status, and reports every job in order."""

import json
from pathlib import Path

import pytest
import torch

from moebench.machine import environment
from moebench.measure import ceilings, worker
from moebench.measure.cache import Workload
from moebench.measure.protocol import Events, WorkList
from moebench.measure.timing import TimingPolicy
from moebench.measure.worker import pick_device, run_job, timing_policy, work
from moebench.results.record import Record, Status
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
CASE = Case(num_tokens=6, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")
QUICK = Policy(time_cap_s=0.001, interval_target=0.9)


@pytest.fixture(autouse=True)
def _few_bytes_are_copied(monkeypatch):
    """The speed of a copy is a fact of the machine, which no test here asserts."""
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 1 << 20)


def job(backend, **fields):
    return Job(case=CASE.model_copy(update=fields), backend=backend)


@pytest.fixture
def _third_party(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "backends"))


def outcome(backend):
    measured = run_job(job(backend, mode="train"), Workload(CPU), timing_policy(QUICK, CPU))
    return measured["status"], measured["detail"]


@pytest.mark.usefixtures("_third_party")
@pytest.mark.parametrize(
    ("backend", "status", "detail"),
    [
        ("RaisesInBuild", Status.error, "ZeroDivisionError: no experts today"),
        ("RaisesInForward", Status.error, "RuntimeError: cuBLAS is in a bad mood"),
        ("RaisesInBackward", Status.error, "RuntimeError: no way back"),
        ("NotAModule", Status.error, "AttributeError"),
        ("OtherParameters", Status.error, "gate_and_up_projs"),
        ("IsNotThere", Status.error, "has no attribute 'IsNotThere'"),
        ("SaysUnsupported", Status.unsupported, "runs on paper, not on cpu"),
        ("RaisesUnsupported", Status.unsupported, "found out too late"),
        ("RaisesMemoryError", Status.oom, "MemoryError"),
        ("OutOfMemory", Status.oom, "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_a_backend_raises_becomes_its_status(backend, status, detail):
    found = outcome(f"broken:{backend}")
    assert found[0] is status
    assert detail in found[1]


@pytest.mark.usefixtures("_third_party")
def test_an_error_keeps_its_traceback_and_other_statuses_one_line():
    _, detail = outcome("broken:RaisesInForward")
    assert "break_down" in detail
    assert "broken.py" in detail
    for backend in ("RaisesMemoryError", "OutOfMemory", "SaysUnsupported"):
        assert "\n" not in outcome(f"broken:{backend}")[1]


class HasNoText(Exception):
    def __str__(self):
        raise ValueError("asked for its text")


@pytest.mark.usefixtures("_third_party")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("in a bad mood\nand no more"), "RuntimeError: in a bad mood"),
        (SyntaxError("no Python", ("kernel.py", 3, 1, "(")), "SyntaxError: no Python"),
        (
            OSError("no file k\udcffernel"),
            r"OSError: no file k\udcffernel",
        ),  # these bytes are not valid text
        (HasNoText(), "tests.moebench.measure.test_worker.HasNoText: <exception str() failed>"),
    ],
)
def test_an_error_gives_its_reason_first_whatever_its_text(monkeypatch, error, reason):
    def break_down(self):
        raise error

    monkeypatch.setattr("broken.RaisesInForward.break_down", break_down)
    status, detail = outcome("broken:RaisesInForward")
    assert (status, detail.splitlines()[0]) == (Status.error, reason)
    assert "Traceback" in detail.splitlines()[2 if "mood" in reason else 1]
    detail.encode()


@pytest.mark.usefixtures("_third_party")
@pytest.mark.parametrize(
    ("backend", "status", "detail"),
    [
        ("RaisesEmptyMemoryError", Status.oom, "MemoryError"),
        ("SaysNothing", Status.unsupported, "the backend gives no reason"),
        ("SaysASurrogate", Status.unsupported, r"no \ud800 here\0"),
    ],
)
def test_a_text_that_says_nothing_keeps_its_status(backend, status, detail):
    assert outcome(f"hostile:{backend}") == (status, detail)


@pytest.mark.usefixtures("_third_party")
def test_a_message_of_many_megabytes_is_cut_in_its_middle():
    status, detail = outcome("hostile:RaisesMuch")
    assert status is Status.error
    assert detail.startswith("RuntimeError: much much")
    assert "characters left out" in detail
    assert "in act\n" in detail, "the end of the traceback"
    assert len(detail) < 5000


@pytest.mark.usefixtures("_third_party")
def test_values_that_no_row_may_have_become_an_error(monkeypatch):
    monkeypatch.setattr(worker, "run_job", lambda *given: {"status": Status.ok, "time_ms": -1.0})
    row = Record.model_validate_json(json.dumps(events_of((job("loop"),))[-1]["record"]))
    assert row.status is Status.error
    assert row.detail.startswith("what was measured is not a row of results")


@pytest.mark.usefixtures("_third_party")
def test_a_gpu_out_of_memory_is_oom(monkeypatch):
    def run_out(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 GiB. GPU 0 has a lot. Try this.")

    monkeypatch.setattr("broken.RaisesInForward.break_down", run_out)
    assert outcome("broken:RaisesInForward") == (
        Status.oom,
        "CUDA out of memory. Tried to allocate 1024.00 GiB",
    )


class Told(list):
    """Collect events as the worker would write them."""

    def emit(self, kind, **fields):
        self.append(json.loads(json.dumps({"kind": kind, **fields})))


def events_of(jobs, device=CPU):
    told = Told()
    work(WorkList(run_id="a-run", policy=QUICK, jobs=jobs), told, device)
    return told


def test_events_are_on_disk_when_they_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_WORKER", "its token")
    events = Events(tmp_path / "events")
    events.emit("start", number=3)
    told = {"kind": "start", "token": "its token", "rank": 0, "count": 0, "number": 3}
    assert json.loads((tmp_path / "events").read_text()) == told
    events.emit("record", number=3, record={"detail": "two\nlines"})
    assert (tmp_path / "events").read_bytes().count(b"\n") == 2
    events._file.close()


@pytest.mark.usefixtures("_third_party")
def test_every_job_is_told_of_before_and_after():
    jobs = (job("loop"), job("broken:RaisesInForward"), job("torch_mm", mode="train"))
    ready, *told = events_of(jobs)
    assert [(event["kind"], event["number"]) for event in told] == [
        (kind, number) for number in range(3) for kind in ("start", "record")
    ]
    rows = [Record.model_validate_json(json.dumps(event["record"])) for event in told[1::2]]
    assert [row.key for row in rows] == [one.key for one in jobs]
    assert [row.status.value for row in rows] == ["ok", "error", "ok"]
    assert {(row.run_id, row.env_id, row.device) for row in rows} == {("a-run", ready["environment"]["env_id"], "cpu")}
    assert all(row.job_s > 0 for row in rows)


def test_what_is_not_there_is_refused_before_anything_runs():
    jobs = (job("loop"), job("lop"), job("no_such_module:Experts"), job("lop", mode="train"))
    (refused,) = events_of(jobs, torch.device("cuda", 99))
    assert refused["kind"] == "refused"
    unknown, module, device = refused["mistakes"]
    assert unknown.startswith("there is no backend 'lop'; did you mean 'loop'?")
    assert "no module 'no_such_module'" in module
    assert "cuda:99" in device


@pytest.mark.usefixtures("_third_party")
def test_what_a_name_leads_to_is_imported_by_its_job_alone(tmp_path, monkeypatch):
    """Importing a backend counts as running it: an error there must not end the whole run."""
    (tmp_path / "explosive.py").write_text("raise SystemError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, *told = events_of((job("explosive:Experts"), job("loop")))
    statuses = [event["record"]["status"] for event in told if event["kind"] == "record"]
    assert statuses == ["error", "ok"]
    assert "SystemError: at import" in told[1]["record"]["detail"]


def test_the_sweeps_policy_goes_before_the_devices_defaults():
    assert timing_policy(Policy(), CPU) == TimingPolicy.default(CPU)
    set_ = timing_policy(Policy(interval_target=0.1, time_cap_s=3.0, l2="warm"), CPU)
    assert set_ == TimingPolicy(interval_target=0.1, time_cap_s=3.0, cold_l2=False)


def test_the_device_by_name_and_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == pick_device("cpu") == CPU
    assert pick_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("rank", [0, 1])
def test_more_ranks_than_gpus_are_unsupported_and_told_once(monkeypatch, rank):
    here = environment.collect("cpu")
    monkeypatch.setattr(worker.environment, "collect", lambda device: here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(worker, "join", lambda *arguments: pytest.fail("ranks that have no GPU join nothing"))
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    case = CASE.model_copy(update={"ep_size": 2})
    pairs = (("loop", "allgather"), ("torch_mm", "alltoall"))
    jobs = tuple(Job(case=case, backend=backend, dispatcher=dispatcher) for backend, dispatcher in pairs)
    told = Told()
    work(WorkList(run_id="a-run", policy=Policy(), jobs=jobs), told, torch.device("cuda", rank))
    if rank == 1:
        assert told == []
        return
    assert [event["kind"] for event in told] == ["ready", "start", "record", "start", "record"]
    rows = [Record.model_validate_json(json.dumps(event["record"])) for event in told[2::2]]
    assert [row.key for row in rows] == [one.key for one in jobs]
    details = {(row.status.value, row.detail, row.device) for row in rows}
    assert details == {("unsupported", "ep_size = 2 needs one GPU per rank, this run has 1", "cuda")}
