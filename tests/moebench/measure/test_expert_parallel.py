"""Run the harness over ranks: real groups of two over gloo, with right backends and with backends wrong on one rank."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from moebench.results.journal import Journal
from moebench.results.record import ONLY_IF_OK
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.inputs import make_inputs, make_parameters
from moebench.workload.spec import Policy
from tests.moebench.executed import python_path, share_workers

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(300)  # groups start slowly where processes share few cores

TIMEOUT_S = 10.0
#: The tokens of both ranks, without the quarter that is masked.
ACTIVE_TOKENS = {"even": 18 + 18, "uneven": 9 + 18, "one-empty": 18 + 0}


def case(**fields):
    shape = {"num_tokens": 24, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 16}
    unkind = {"expert_bias": True, "masked_share": 0.25, "routing": "zipf"}
    return Case.model_validate({**shape, **unkind, "dtype": "float32", "ep_size": 2, **fields})


def job(backend, dispatcher="allgather", **fields):
    return Job(case=case(**fields), backend=backend, dispatcher=dispatcher)


def right(rank_load, mode):
    return [
        job(backend, dispatcher, rank_load=rank_load, mode=mode)
        for dispatcher in ("allgather", "alltoall")
        for backend in ("loop", "torch_mm")
    ]


RIGHT = [
    *(one for load in ACTIVE_TOKENS for one in right(load, "train")),
    *right("uneven", "forward"),
    job("torch_mm", "symm_mem", rank_load="one-empty", mode="train"),
]
#: `make test` has another dispatcher or engine of each load and mode in turn, and symm_mem.
PART = [*(one for number, one in enumerate(RIGHT[:-1]) if number % 4 == number // 4), RIGHT[-1]]
FP8 = {"dtype": "bfloat16", "dim": 128, "moe_inter_dim": 128, "rank_load": "uneven", "mode": "train"}
WRONG = [
    job("ranks:WrongRow", mode="forward"),
    job("ranks:OwnTokensOnly", mode="train"),
    job("ranks:WrongRowInLaterCalls", mode="forward"),
    job("fp8:Block", "alltoall", **FP8),
    job("fp8:CurrentWithWrongScale", "alltoall", **FP8),
]
#: Each broken backend ends its group. A right job runs before those that end it silently, so a test can see the group.
BROKEN = [
    job("ranks:Raises", mode="train"),
    job("ranks:RunsOutOfMemory"),
    job("loop", seed=1),
    job("ranks:Dies", "symm_mem", mode="train"),  # the other rank waits in a dispatch, which no library watches
    job("loop", seed=2),
    job("ranks:Hangs"),
    job("loop", seed=3),
    job("ranks:DiesInCompute", "symm_mem"),  # the other rank waits in a combine
    job("ranks:DiesInBackward", "symm_mem", mode="train"),  # the other rank waits in the backward of a combine
    job("ranks:Leaves"),
]
#: `make test` leaves these out, because a group takes long to start.
CERTIFIED = tuple(
    f"ranks:{name}" for name in ("Raises", "RunsOutOfMemory", "Hangs", "DiesInCompute", "DiesInBackward", "Leaves")
)


def workers_of(folder):
    """Return the processes that have the folder's job files as arguments: launchers and their ranks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder / "logs") in argument for argument in process.cmdline()):
                found.append(process)
    return found


def are_gone(processes):
    """Whether all processes end soon; a zombie that no process reaps counts as ended."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        _, alive = psutil.wait_procs(processes, timeout=0.05)
        processes = [process for process in alive if not is_zombie(process)]
        if not processes:
            return True
    return False


def is_zombie(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory, certify):
    """Run all jobs in one run, and keep the processes that existed as each record came.

    All backends share groups of ranks, as if they were built in, because a group takes long to start.
    """
    folder = tmp_path_factory.mktemp("run")
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=TIMEOUT_S)
    right = RIGHT if certify else PART
    jobs = [one for one in (*right, *WRONG, *BROKEN) if certify or one.backend not in CERTIFIED]
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        share_workers(patch)
        plan = Plan(tuple(jobs), policy, folder, "run", device="cpu")
        outcome = execute(plan, on_record=lambda row: looks.append(workers_of(folder)))
    return SimpleNamespace(jobs=jobs, folder=folder, records=outcome.records, outcome=outcome, looks=looks)


@pytest.mark.certify(share=0)
@pytest.mark.timeout(800)
def test_rows_in_fp8_are_judged_and_their_bytes_counted(tmp_path):
    """A row of 2048 values has 16 scales. In Triton's interpreter, which computes in float16."""
    pytest.importorskip("triton")
    fields = {"num_tokens": 6, "dim": 2048, "dtype": "float16", "expert_bias": False, "mode": "forward"}
    jobs = [job(backend, "symm_mem", **fields) for backend in ("triton_fp8", "triton_fp8_rows")]
    jobs.append(job("triton_fp8_rows", "symm_mem", **fields | {"dim": 144, "mode": "train", "rank_load": "uneven"}))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRITON_INTERPRET": "1", "EXPERTS_STEPS": "fused", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=250.0)
        rows = execute(Plan(tuple(jobs), policy, tmp_path, "run", device="cpu")).records
    assert [row.status.value for row in rows] == ["ok"] * 3, [row.detail for row in rows]
    of_job = {(row.backend, row.dim): row.dispatch_bytes for row in rows}
    share = of_job["triton_fp8_rows", 2048] / of_job["triton_fp8", 2048]
    assert share == 2112 / 4096 <= 0.53


@pytest.mark.certify(share=0)  # groups of many processes start slowly on few cores
def test_more_ranks_judge_and_measure_as_two_do(tmp_path):
    """Run eight ranks. Some ranks have few tokens or none, and one case has fewer tokens than ranks."""
    ranks = {"ep_size": 8, "mode": "train"}
    jobs = [
        job("loop", "allgather", rank_load="one-empty", num_tokens=1, masked_share=0.0, **ranks),
        job("torch_mm", "alltoall", rank_load="uneven", **ranks),
        job("ranks:OwnTokensOnly", rank_load="uneven", **ranks),
    ]
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        rows = execute(Plan(tuple(jobs), policy, tmp_path, "run", device="cpu")).records
    assert [(row.status.value, row.ep_size) for row in rows] == [
        (status, ranks["ep_size"]) for status in ("ok", "ok", "mismatch")
    ], [row.detail for row in rows]
    for one, row in zip(jobs[:2], rows, strict=False):
        assert row.tokens_per_s == pytest.approx(one.case.num_active_tokens / row.time_ms * 1e3)
        assert min(row.dispatch_ms, row.compute_ms, row.combine_ms) > 0
    assert re.match(r"\w+\.grad \(rank \d, expert \d\): error ", rows[2].detail)


def row_of(run, backend, **fields):
    (row,) = (row for row in run.records if row.backend == backend)
    assert all(getattr(row, name) == value for name, value in fields.items())
    return row


def test_every_job_has_one_record_in_order(run):
    assert [row.key for row in run.records] == [one.key for one in run.jobs]
    assert (run.outcome.num_left, run.outcome.interrupted) == (0, False)
    assert list(Journal(run.folder / "journal.jsonl")) == list(run.records)


def row_of_right(run, one):
    if one not in run.jobs:
        pytest.skip("make certify measures every dispatcher and engine")
    return run.records[run.jobs.index(one)]


def in_short(one):
    return f"{one.backend}-{one.dispatcher}-{one.case.rank_load}-{one.case.mode}"


@pytest.mark.certify
@pytest.mark.parametrize("one", RIGHT, ids=in_short)
def test_a_right_backend_is_ok_and_all_is_measured(run, one):
    row = row_of_right(run, one)
    assert (row.status.value, row.detail) == ("ok", None)
    assert 0 < row.parity_worst <= 1
    assert min(row.dispatch_ms, row.compute_ms, row.combine_ms) > 0
    assert row.skew_ms >= 0
    assert row.num_samples == len(row.samples_ms)
    assert (row.backward_ms is None) == (row.saved_memory_bytes is None) == (one.case.mode == "forward")
    assert row.peak_memory_bytes > 0
    assert row.executed


@pytest.mark.parametrize("one", PART[::2], ids=in_short)
def test_throughput_is_that_of_the_mean_rank(run, one):
    row = row_of_right(run, one)
    tokens = ACTIVE_TOKENS[one.case.rank_load] / 2
    assert row.tokens_per_s == pytest.approx(tokens / row.time_ms * 1e3)
    flops = (3 if one.case.mode == "train" else 1) * 6 * tokens * 2 * 32 * 16
    assert row.tflops == pytest.approx(flops / row.time_ms / 1e9)


def test_a_wrong_row_of_one_rank_is_a_mismatch_that_names_rank_and_token(run):
    row = row_of(run, "ranks:WrongRow", status="mismatch", parity_worst_tensor="output")
    token = int(make_inputs(case(mode="forward"), CPU, rank=1).token_mask_T.nonzero()[2])
    assert row.detail.startswith(f"output (rank 1, token {token}): error ")
    assert all(getattr(row, field) is None for field in ONLY_IF_OK)


def test_a_rank_that_is_wrong_only_when_it_is_timed_is_found_by_all_ranks(run):
    row = row_of(run, "ranks:WrongRowInLaterCalls", status="mismatch", parity_worst_tensor="output")
    assert re.fullmatch(r"output \(rank 1, (token \d+|whole tensor)\): .*, in a call that was timed", row.detail)
    assert all(getattr(row, field) is None for field in ONLY_IF_OK)


def test_expert_gradients_of_own_tokens_alone_are_a_mismatch(run):
    row = row_of(run, "ranks:OwnTokensOnly", status="mismatch")
    assert re.match(r"\w+\.grad \(rank 1, (expert \d|whole tensor)\): error ", row.detail)
    wrong = {name for name, error in row.parity_errors.items() if error > 1}
    assert wrong == {f"{name}.grad" for name in make_parameters(case(), CPU)}


def test_fp8_is_judged_by_its_recipe_on_all_ranks(run):
    assert row_of(run, "fp8:Block", status="ok").parity_worst <= 0.6
    row = row_of(run, "fp8:CurrentWithWrongScale", status="mismatch")
    assert row.parity_errors["output"] > 1
    assert re.search(r"\(rank [01], expert [0-3]\)", row.detail)


KILLED = r"^its process exited with 1\n[^~]*rank +: 1 [^~]*SIGKILL"


@pytest.mark.certify
@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("Raises", "error", r"^rank 1: ZeroDivisionError: no tokens for this rank\nTraceback[^~]* in forward\n"),
        ("RunsOutOfMemory", "oom", r"^rank 1: this rank has no memory left$"),
        ("Dies", "crash", KILLED),
        ("DiesInCompute", "crash", KILLED),
        ("DiesInBackward", "crash", KILLED),
        ("Leaves", "crash", r"^a rank ended, as if all were well, before the group's work was done"),
        ("Hangs", "timeout", r"^no result after 10 s \(policy timeout_s\); the worker was killed$"),
    ],
)
def test_what_breaks_one_rank_is_told_of_that_rank(run, name, status, detail):
    if f"ranks:{name}" not in {one.backend for one in run.jobs}:
        pytest.skip("a group takes long to start: make certify breaks more of them")
    row = row_of(run, f"ranks:{name}", status=status)
    assert re.search(detail, row.detail.replace("~", "")), row.detail
    assert all(getattr(row, field) is None for field in ONLY_IF_OK)


def test_jobs_after_broken_ones_are_measured_as_any_other(run):
    after = [row for row in run.records if row.backend == "loop" and row.seed]
    assert [row.seed for row in after] == [one.case.seed for one in run.jobs if one.case.seed]
    assert {row.status.value for row in after} == {"ok"}
    assert all(row.skew_ms is not None for row in after)


def test_a_group_is_used_as_long_as_all_its_ranks_live(run):
    followed = [one for one in run.jobs[:-1] if one in BROKEN and one.backend != "loop"]
    assert len(list((run.folder / "logs").glob("worker-*.log"))) == 1 + len(followed), "one, and one after each of them"


def test_no_process_of_any_group_is_left(run):
    looks = dict(zip([one.key for one in run.jobs], run.looks, strict=True))
    for one in (RIGHT[0], BROKEN[4]):  # not the job before Dies, which may end the group too early
        assert len(looks[one.key]) == 3, "a launcher and two ranks"
    assert are_gone([process for look in run.looks for process in look])
    assert workers_of(run.folder) == []


SWEEP = """
name = "ranks"

[policy]
time_cap_s = 0.01
interval_target = 0.9

[[grid]]
n_routed_experts = 4
n_activated_experts = 2
dim = 16
moe_inter_dim = 8
num_tokens = 8
dtype = "float32"
ep_size = 2
dispatcher = "alltoall"
backend = ["loop", "ranks:Hangs"]
"""


NAMED = ["--only", "loop", "--only", "ranks:Hangs"]


@pytest.mark.certify(share=0)  # two groups of ranks; test_run.py interrupts a run of one process
def test_ctrl_c_ends_all_ranks_of_a_group_and_keeps_what_was_measured(tmp_path):
    (tmp_path / "ranks.toml").write_text(SWEEP)
    path = python_path(ROOT, ROOT / "tests" / "backends")
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", "run", "ranks.toml", "--out", "out", "--device", "cpu", *NAMED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal, events = tmp_path / "out" / "journal.jsonl", tmp_path / "out" / "logs" / "worker-1.events.jsonl"
    deadline = time.monotonic() + 90
    while not (journal.exists() and events.exists() and '"start"' in events.read_text()):
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
            pytest.fail(f"it ended by itself: {process.communicate()}")
    group = psutil.Process(process.pid).children(recursive=True)
    assert len(group) >= 3, "a launcher and two ranks"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip().partition(":")[0]) == (130, "interrupted")
    assert are_gone(group)
    assert [(row.backend, row.status.value) for row in Journal(journal)] == [("loop", "ok")]
