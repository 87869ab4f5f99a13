"""An audit: what it runs, what it refuses, and when it ends."""

import json
import math

import pytest

from moebench.errors import UsageError
from moebench.parity.checks import Search, case_job
from moebench.parity.space.trial import Trial
from moebench.results.record import Status
from moebench.run import audit as audit_module
from moebench.run.audit import Request, audit, audit_case
from moebench.run.runner import Outcome
from tests.moebench.audited import WRONG, audit_of, audited, row_of
from tests.moebench.executed import python_path
from tests.moebench.run.conftest import ROOT

BACKENDS = ROOT / "tests" / "backends"


def test_json_has_every_backend_and_every_record():
    whole = audit_of(audited("loop", Status.ok, (Status.mismatch, {"parity_worst": math.inf}), num_planned=5))
    told = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
    (one,) = told["backends"]
    assert not told["passed"]
    assert (one["backend"], one["status"], one["num_cases"], one["num_planned"]) == ("loop", "mismatch", 2, 5)
    assert one["parity_worst"] == 0.25
    assert one["failure"] == {"case": "num_tokens=8 seed=1", "detail": "why"}
    assert [row["parity_worst"] for row in told["records"]] == [0.25, "inf"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checks": ("layout",)}, 'check layout: did you mean "layouts"?'),
        ({"dtypes": ("float8",)}, "dtype float8: .*must be one of float64, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device tpu"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_runs(fields, message, monkeypatch):
    monkeypatch.setattr(audit_module, "execute", lambda *plans, **options: pytest.fail("it ran"))
    with pytest.raises(UsageError, match=message):
        audit(["loop"], Request(**fields))


@pytest.mark.parametrize(
    ("trial", "dispatcher", "message"),
    [
        (Trial(n_activated_experts=2), None, "n_activated_experts = 2, n_routed_experts = 1"),
        (Trial(), "alltoall", "--dispatcher alltoall with ep_size = 1"),
        (Trial(ep_size=2, n_routed_experts=2), "alltoal", 'dispatcher alltoal: did you mean "alltoall"?'),
    ],
)
def test_a_case_that_cannot_be_is_refused_before_it_runs(trial, dispatcher, message, monkeypatch):
    monkeypatch.setattr(audit_module, "execute", lambda *plans, **options: pytest.fail("it ran"))
    with pytest.raises(UsageError, match=message):
        audit_case("loop", trial, dispatcher)


@pytest.fixture
def jobs_run(monkeypatch):
    """Replace workers by a function from jobs to what is found, and the covering cases by four. Return the jobs run."""
    ran = []

    def replace(found):
        def execute(plan, on_record, time_budget_s):
            for job in plan.jobs:
                ran.append(job)
                on_record(row_of(job, found(job)))
            return Outcome((), 0)

        monkeypatch.setattr(audit_module, "execute", execute)
        few = audit_module.covering_jobs
        monkeypatch.setattr(audit_module, "covering_jobs", lambda *given: _four(few, *given))
        return ran

    return replace


def _four(covering_jobs, backend, check, dtypes, seed, on_ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebench.parity.checks.covering", lambda axes, seed: FOUR_ON_RANKS if on_ranks else FOUR)
        return covering_jobs(backend, check, dtypes, seed, on_ranks)


FOUR = [Trial(num_tokens=8, seed=seed) for seed in range(4)]
FOUR_ON_RANKS = [Trial(num_tokens=8, n_routed_experts=2, ep_size=2, seed=seed) for seed in range(4)]


def searches_of(jobs):
    return [Search.parse(job.check) for job in jobs if job.check.startswith("search")]


def test_a_backend_that_fails_is_left_at_its_first_failure_and_the_next_is_tried(jobs_run):
    ran = jobs_run(lambda job: WRONG if job.backend == "bad" and job.case.seed == 1 else Status.ok)
    planned = []
    found = audit(["bad", "good"], Request("quick", checks=("repeated",)), on_plan=lambda *given: planned.append(given))
    assert [(job.backend, job.case.seed) for job in ran] == [("bad", 0), ("bad", 1), *(("good", n) for n in range(4))]
    assert planned == [("bad", 4), ("good", 4)]
    assert [(one.backend, one.failure is None) for one in found.backends] == [("bad", False), ("good", True)]


def test_the_level_and_the_seconds_decide_about_the_search(jobs_run):
    ran = jobs_run(lambda job: Status.ok)
    audit(["loop"], Request("quick", checks=("repeated",)))
    audit(["loop"], Request("standard", 0.0, ("repeated",)))
    assert searches_of(ran) == []
    audit(["loop"], Request("quick", 6.0, ("repeated", "modes"), ("float32",), seed=3))
    assert searches_of(ran) == [Search(3.0, 3, check, ("float32",)) for check in ("repeated", "modes")]
    ran.clear()
    audit(["loop"], Request("standard", checks=("repeated",)))
    (search,) = searches_of(ran)
    assert 5 <= search.seconds <= audit_module.STANDARD_S


def test_without_checks_two_ranks_are_tried_with_every_dispatcher_that_runs(jobs_run):
    ran = jobs_run(lambda job: Status.unsupported if job.dispatcher == "deepep" else Status.ok)
    audit(["loop"], Request("standard", 6.0))
    on_ranks = [job for job in ran if job.case.ep_size == 2]
    assert {job.dispatcher for job in on_ranks} == {"allgather", "alltoall", "deepep", "symm_mem"}
    searched = {job.dispatcher: Search.parse(job.check) for job in on_ranks if job.check.startswith("search")}
    assert {name: (one.seconds, one.on_ranks) for name, one in searched.items()} == {
        "allgather": (2.0, True),
        "alltoall": (2.0, True),
        "symm_mem": (2.0, True),
    }


def test_a_backend_that_runs_nowhere_is_not_searched(jobs_run):
    ran = jobs_run(lambda job: Status.unsupported)
    found = audit(["te"], Request(), required=["te"])
    assert len(ran) == 4
    assert found.not_examined == ("te",)
    assert not found.passed


def test_an_interruption_ends_the_whole(monkeypatch):
    monkeypatch.setattr(audit_module, "execute", lambda plan, **options: Outcome((), len(plan.jobs), True))
    monkeypatch.setattr(audit_module, "covering_jobs", lambda backend, *_: [case_job(backend, Trial())])
    found = audit(["loop", "torch_mm"], Request())
    assert found.interrupted
    assert [one.backend for one in found.backends] == ["loop"]
    assert found.backends[0].records == ()


@pytest.mark.certify(share=0.3)
@pytest.mark.parametrize(
    ("backend", "status", "words"),
    [
        ("Segfaults", Status.crash, "was killed by SIGSEGV"),
        ("Hangs", Status.timeout, "no result after 3 s"),
        ("RaisesInForward", Status.error, "RuntimeError: cuBLAS is in a bad mood"),
    ],
)
def test_a_case_that_breaks_its_process_is_told_with_its_command(backend, status, words, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path(BACKENDS, ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(audit_module, "TIMEOUT_S", 3.0 if backend == "Hangs" else 60.0)
    found = audit_case(f"broken:{backend}", Trial(steps=("call:no_grad",), num_tokens=2), device="cpu")
    failure = found.backends[0].failure
    assert failure.status is status
    assert words in failure.detail
    assert f"moebench parity broken:{backend} --case '" in failure.detail
    assert not found.passed


def test_a_fault_of_one_rank_is_shrunk_by_all_ranks_together(monkeypatch):
    """The fault needs three tokens on the last rank. No process may go on with a case that another one does not try."""
    monkeypatch.setenv("PYTHONPATH", python_path(BACKENDS, ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    large = {"num_tokens": 17, "n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 8}
    found = audit_case("ranks:WrongRow", Trial(steps=("call:no_grad", "call"), ep_size=2, **large), device="cpu")
    failure = found.backends[0].failure
    assert failure.status is Status.mismatch
    reason, command = failure.detail.splitlines()
    assert reason.startswith("output (rank 1, ")
    case = command.partition("--case '")[2].rstrip("'")
    assert command == f"moebench parity ranks:WrongRow --dispatcher allgather --case '{case}'"
    smallest = Trial.parse(case)
    assert (smallest.ep_size, smallest.num_tokens, len(smallest.steps)) == (2, 3, 1)
