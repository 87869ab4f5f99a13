"""No backend gets a speed by a trick: each is a mismatch, and the right backend measured after it is as without it.

One run measures every trick of tests/backends/cheats.py through the real runner and worker.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.results.record import ONLY_IF_OK, Status
from moebench.run.runner import Plan, execute
from moebench.workload.case import Job
from moebench.workload.spec import Policy
from tests.backends.cheats import CHEATS, CLOCK_CHEATS
from tests.moebench.executed import CASE, python_path, share_workers

ROOT = Path(__file__).parents[3]
#: Each trick with a clock ends its worker, so `make test` tries this one alone.
PART = ("SlowsPerfCounter",)

pytestmark = pytest.mark.timeout(400)  # one worker for each trick with the clock, on a machine that may be busy

CASE_OF = {mode: CASE.model_copy(update={"mode": mode, "masked_share": 0.25}) for mode in ("forward", "train")}
#: A module that slows the clock as soon as it is imported.
AT_IMPORT = """
import time
from experts import GroupedExperts
real = time.perf_counter
time.perf_counter = lambda: real() / 10
class Experts(GroupedExperts):
    pass
"""


def job(backend, mode="forward", seed=0):
    return Job(case=CASE_OF[mode].model_copy(update={"seed": seed}), backend=backend)


@pytest.fixture(scope="module")
def run(tmp_path_factory, certify):
    """Measure all tricks in one run, each followed by a right backend. Return the rows by backend and seed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "at_import.py").write_text(AT_IMPORT)
    tricks = [(name, mode) for name, (mode, _) in CHEATS.items()]
    clocks = tuple(CLOCK_CHEATS) if certify else PART
    tricks += [(name, "train") for name in clocks]
    jobs = [job("loop"), job("loop", "train")]
    for number, (name, mode) in enumerate(tricks, start=1):
        jobs += [job(f"cheats:{name}", mode), job("cheats:Witness", mode, seed=number)]
    jobs += [job("at_import:Experts"), job("cheats:Witness", seed=99)]
    policy = Policy(time_cap_s=0.1, interval_target=0.9, timeout_s=60.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", folder, ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        share_workers(patch)
        outcome = execute(Plan(tuple(jobs), policy, folder / "out", "run", device="cpu"))
    rows = {(row.backend.removeprefix("cheats:"), row.seed): row for row in outcome.records}
    logs = "\n".join(path.read_text() for path in sorted((folder / "out" / "logs").glob("worker-*.log")))
    return SimpleNamespace(clocks=clocks, rows=rows, records=outcome.records, logs=logs, folder=folder / "out")


def is_without_speed(row):
    assert row.status is Status.mismatch, row.detail
    assert {name: getattr(row, name) for name in ONLY_IF_OK if getattr(row, name) is not None} == {}
    return True


@pytest.mark.parametrize("name", CHEATS)
def test_a_trick_gets_no_speed_and_its_detail_says_why(run, name):
    row, (_, detail) = run.rows[name, 0], CHEATS[name]
    assert is_without_speed(row)
    assert row.detail.startswith(detail)
    assert detail.endswith(": ") or row.detail.endswith(", in a call that was timed")


def test_zero_gradients_late_in_a_run_are_found_in_a_gradient(run):
    row = run.rows["ZeroGradsAfterManyCalls", 0]
    wrong = {tensor for tensor, error in row.parity_errors.items() if error > 1}
    assert wrong == row.parity_errors.keys() - {"output"}
    assert wrong >= {"x.grad", "weights.grad", "gate_and_up_projs.grad", "down_projs.grad"}


@pytest.mark.certify
@pytest.mark.parametrize("name", CLOCK_CHEATS)
def test_a_replaced_clock_is_named_and_its_job_has_no_speed(run, name):
    if name not in run.clocks:
        pytest.skip("each trick with a clock ends its worker: make certify tries them all")
    row = run.rows[name, 0]
    assert is_without_speed(row)
    assert row.detail.splitlines()[0] == f"the backend replaced {CLOCK_CHEATS[name]}: no time of it is believed"
    assert row.parity_worst <= 1, "its results are right"
    assert f"Unhealthy: cheats:{name} has " in run.logs, "no other job runs in its process"


def test_a_clock_that_is_replaced_at_import_is_seen_too(run):
    row = run.rows["at_import:Experts", 0]
    assert is_without_speed(row)
    assert row.detail.startswith("the backend replaced time.perf_counter:")


def test_right_backends_between_them_are_ok_on_a_genuine_clock(run):
    """Witness raises if its process has another clock than Python's own."""
    right = [row for row in run.records if row.backend in ("loop", "cheats:Witness")]
    assert len(right) == 2 + len(CHEATS) + len(run.clocks) + 1
    assert [row.detail for row in right if row.status is not Status.ok] == []
    assert all(row.flags == () for row in right)


def test_only_tricks_that_last_end_a_worker(run):
    """Replaced clocks last, the one that is replaced at import among them. So does the mode that LazyByMode leaves."""
    num_ended = len(run.clocks) + 1 + 1
    assert len(list((run.folder / "logs").glob("worker-*.log"))) == 1 + num_ended
    assert run.logs.count("Unhealthy: ") == num_ended
