"""The harness over ranks: real groups of two over gloo, right backends and ones of which one rank is at fault."""

import json
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

from moebench.machine import environment
from moebench.machine.nvml import Clock
from moebench.measure import job as job_module
from moebench.measure import samplers, timing, worker
from moebench.measure.cache import Workload
from moebench.measure.memory import Memory
from moebench.measure.protocol import WorkList
from moebench.measure.samplers import Group
from moebench.measure.timing import TimingPolicy
from moebench.measure.worker import work
from moebench.results.journal import Journal
from moebench.results.record import SPEED_FIELDS, Record
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.inputs import make_inputs, make_parameters
from moebench.workload.spec import Policy

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(300)  # groups start slowly where processes share few cores

TIMEOUT_S = 10.0
#: Tokens of the two ranks together, without the masked quarter.
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


RIGHT = [*(one for load in ACTIVE_TOKENS for one in right(load, "train")), *right("uneven", "forward")]
FP8 = {"dtype": "bfloat16", "dim": 128, "moe_inter_dim": 128, "rank_load": "uneven", "mode": "train"}
WRONG = [
    job("ranks:WrongRow", mode="forward"),
    job("ranks:OwnTokensOnly", mode="train"),
    job("fp8:Block", "alltoall", **FP8),
    job("fp8:CurrentWithWrongScale", "alltoall", **FP8),
]
#: Each ends its group. A right one runs before those that end it without a word, while the group can be looked at.
BROKEN = [
    job("ranks:Raises", mode="train"),
    job("ranks:RunsOutOfMemory"),
    job("loop", seed=1),
    job("ranks:Dies", mode="train"),
    job("loop", seed=2),
    job("ranks:Hangs"),
    job("loop", seed=3),
]
JOBS = [*RIGHT, *WRONG, *BROKEN]


def python_path(*folders):
    """PYTHONPATH with these folders first."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def workers_of(folder):
    """The processes that were told of the folder's job files: launchers and their ranks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder / "logs") in argument for argument in process.cmdline()):
                found.append(process)
    return found


def are_gone(processes):
    """Whether all have ended, or do soon; a zombie is gone that nobody reaps."""
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
def run(tmp_path_factory):
    """All jobs in one run, and the processes that were there as each record came."""
    folder = tmp_path_factory.mktemp("run")
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=TIMEOUT_S)
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        plan = Plan(tuple(JOBS), policy, folder, "run", device="cpu")
        outcome = execute(plan, on_record=lambda row: looks.append(workers_of(folder)))
    return SimpleNamespace(folder=folder, records=outcome.records, outcome=outcome, looks=looks)


@pytest.mark.certify
def test_more_ranks_judge_and_measure_as_two_do(tmp_path, certify):
    """Of four, in full of eight: ranks with little, with nothing, with fewer tokens than there are ranks."""
    ranks = {"ep_size": 8 if certify else 4, "mode": "train"}
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
    assert [row.key for row in run.records] == [one.key for one in JOBS]
    assert (run.outcome.num_left, run.outcome.interrupted) == (0, False)
    assert list(Journal(run.folder / "journal.jsonl")) == list(run.records)


def in_short(one):
    return f"{one.backend}-{one.dispatcher}-{one.case.rank_load}-{one.case.mode}"


@pytest.mark.parametrize("one", RIGHT, ids=in_short)
def test_a_right_backend_is_ok_and_all_is_measured(run, one):
    row = run.records[RIGHT.index(one)]
    assert (row.status.value, row.detail) == ("ok", None)
    assert 0 < row.parity_worst <= 1
    assert min(row.dispatch_ms, row.compute_ms, row.combine_ms) > 0
    assert row.skew_ms >= 0
    assert row.num_samples == len(row.samples_ms)
    assert (row.backward_ms is None) == (row.saved_memory_bytes is None) == (one.case.mode == "forward")
    assert row.peak_memory_bytes > 0
    assert row.executed


@pytest.mark.parametrize("one", RIGHT[::4], ids=in_short)
def test_throughput_is_that_of_the_mean_rank(run, one):
    row = run.records[RIGHT.index(one)]
    tokens = ACTIVE_TOKENS[one.case.rank_load] / 2
    assert row.tokens_per_s == pytest.approx(tokens / row.time_ms * 1e3)
    flops = (3 if one.case.mode == "train" else 1) * 6 * tokens * 2 * 32 * 16
    assert row.tflops == pytest.approx(flops / row.time_ms / 1e9)


def test_a_wrong_row_of_one_rank_is_a_mismatch_that_names_rank_and_token(run):
    row = row_of(run, "ranks:WrongRow", status="mismatch", parity_worst_tensor="output")
    token = int(make_inputs(case(mode="forward"), CPU, rank=1).token_mask_T.nonzero()[2])
    assert row.detail.startswith(f"output (rank 1, token {token}): error ")
    assert all(getattr(row, field) is None for field in SPEED_FIELDS)


def test_expert_gradients_of_own_tokens_alone_are_a_mismatch(run):
    row = row_of(run, "ranks:OwnTokensOnly", status="mismatch")
    assert re.match(r"\w+\.grad \(rank 1, expert \d\): error ", row.detail)
    wrong = {name for name, error in row.parity_errors.items() if error > 1}
    assert wrong == {f"{name}.grad" for name in make_parameters(case(), CPU)}


def test_fp8_is_judged_by_its_recipe_on_all_ranks(run):
    assert row_of(run, "fp8:Block", status="ok").parity_worst <= 0.6
    row = row_of(run, "fp8:CurrentWithWrongScale", status="mismatch")
    assert row.parity_errors["output"] > 1
    assert re.search(r"\(rank [01], expert [0-3]\)", row.detail)


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("Raises", "error", r"^rank 1: ZeroDivisionError: no tokens for this rank\nTraceback[^~]* in forward\n"),
        ("RunsOutOfMemory", "oom", r"^rank 1: this rank has no memory left$"),
        ("Dies", "crash", r"^its process exited with 1\n[^~]*rank +: 1 [^~]*SIGKILL"),
        ("Hangs", "timeout", r"^no result after 10 s \(policy timeout_s\); killed$"),
    ],
)
def test_what_breaks_one_rank_is_told_of_that_rank(run, name, status, detail):
    row = row_of(run, f"ranks:{name}", status=status)
    assert re.search(detail, row.detail.replace("~", "")), row.detail
    assert all(getattr(row, field) is None for field in SPEED_FIELDS)


def test_jobs_after_broken_ones_are_measured_as_any_other(run):
    after = [row for row in run.records if row.backend == "loop" and row.seed]
    assert [row.status.value for row in after] == ["ok", "ok", "ok"]
    assert all(row.skew_ms is not None for row in after)


def test_a_group_is_used_as_long_as_all_its_ranks_live(run):
    assert len(list((run.folder / "logs").glob("worker-*.log"))) == 5, "one, and one after each of four"


def test_no_process_of_any_group_is_left(run):
    looks = dict(zip([one.key for one in JOBS], run.looks, strict=True))
    for one in (RIGHT[0], BROKEN[4]):  # not before Dies, which may be dead by then
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


NAMED = ["--backend", "loop", "--backend", "ranks:Hangs"]


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
    journal, events = tmp_path / "out" / "journal.jsonl", tmp_path / "out" / "logs" / "worker-0.events.jsonl"
    deadline = time.monotonic() + 90
    while not (journal.exists() and events.read_text().count('"start"') == 2):
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


# more ranks than GPUs


class Told(list):
    """Events as they would be written."""

    def emit(self, kind, **fields):
        self.append(json.loads(json.dumps({"kind": kind, **fields})))


@pytest.mark.parametrize("rank", [0, 1])
def test_more_ranks_than_gpus_are_unsupported_and_told_once(monkeypatch, rank):
    here = environment.collect("cpu")
    monkeypatch.setattr(worker.environment, "collect", lambda device: here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(worker, "join", lambda *arguments: pytest.fail("ranks that have no GPU join nothing"))
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    jobs = (job("loop"), job("torch_mm", "alltoall"))
    told = Told()
    work(WorkList(run_id="a run", policy=Policy(), jobs=jobs), told, torch.device("cuda", rank))
    if rank == 1:
        assert told == []
        return
    assert [event["kind"] for event in told] == ["ready", "start", "record", "start", "record"]
    rows = [Record.model_validate_json(json.dumps(event["record"])) for event in told[2::2]]
    assert [row.key for row in rows] == [one.key for one in jobs]
    details = {(row.status.value, row.detail, row.device) for row in rows}
    assert details == {("unsupported", "ep_size = 2 needs as many GPUs, this run has 1", "cuda")}


# what is told of several ranks


class Two:
    """The ranks of this process and another, which tells what a test says."""

    size, rank = 2, 0

    def __init__(self, *told):
        self._told = list(told)

    def tell(self, value):
        return [value, self._told.pop(0) if self._told else value]

    def largest(self, value):
        return max(self.tell(value))

    def align(self, device):
        pass


def test_a_sample_is_its_slowest_ranks_with_that_ranks_stages(monkeypatch):
    mine = Group([(1.0, 3.0), (5.0, 1.0)], [], Clock(sm_clock_mhz=1980))
    others = Group([(4.0, 4.5), (0.5, 1.0)], [], Clock(sm_clock_mhz=1965))
    sampler = SimpleNamespace(flags=(), sample=lambda count: mine, host_time_ms=lambda: 7.0)
    monkeypatch.setattr(samplers, "_CpuSampler", lambda *arguments: sampler)
    policy = TimingPolicy(interval_target=0.9, time_cap_s=1e-9)
    # told in turn: the samples, the time spent, the host's time
    found = timing.time_stages([], CPU, policy, ranks=Two(others, 0.0, 9.0))
    assert found.samples_ms == (8.5, 6.0)
    assert found.stage_ms == (4.5, 2.75)
    assert found.skew_ms == pytest.approx((4.5 + 4.5) / 2)
    assert (found.time_ms, found.host_time_ms, found.sm_clock_mhz) == (7.25, 9.0, 1965)


def test_ranks_agree_on_when_to_stop(monkeypatch):
    """By one clock, the furthest: else one rank samples on alone, and waits for the others for ever."""
    counts = []

    def sample(count):
        counts.append(count)
        return Group([(1.0,)] * count, [], Clock())

    sampler = SimpleNamespace(flags=(), sample=sample, host_time_ms=float)
    monkeypatch.setattr(samplers, "_CpuSampler", lambda *arguments: sampler)
    policy = TimingPolicy(interval_target=1e-12, time_cap_s=1e6)
    ranks = Two(Group([(1.0,)] * timing.MIN_SAMPLES, [], Clock()), 2e6)
    found = timing.time_stages([], CPU, policy, ranks=ranks)
    assert len(counts) == 1
    assert len(found.samples_ms) == timing.MIN_SAMPLES


def test_memory_is_that_of_the_rank_that_needs_most_figure_by_figure():
    told = job_module._largest(Memory(100, 7, None), Two(Memory(50, 30, None)))
    assert told == {
        "peak_memory_bytes": 100,
        "saved_memory_bytes": 30,
        "reserved_memory_bytes": None,
        "outside_torch_bytes": None,
    }
    assert job_module._largest(Memory(1, None, None, 5), Two(Memory(2, None, None, 4)))["outside_torch_bytes"] == 5


# inputs of the ranks


@pytest.mark.parametrize(
    ("rank_load", "ep_size", "tokens"),
    [
        ("even", 4, [24, 24, 24, 24]),
        ("uneven", 4, [6, 12, 18, 24]),
        ("uneven", 2, [12, 24]),
        ("one-empty", 4, [24, 24, 24, 0]),
    ],
)
def test_how_many_tokens_a_rank_has(rank_load, ep_size, tokens):
    one = case(rank_load=rank_load, ep_size=ep_size)
    assert [one.tokens_of_rank(rank) for rank in range(ep_size)] == tokens
    active = [count * 3 // 4 for count in tokens]
    assert one.num_active_tokens == sum(count - round(count / 4) for count in tokens) / ep_size
    for rank, count in enumerate(tokens):
        inputs = make_inputs(one, CPU, rank)
        shapes = {len(tensor) for tensor in (inputs.x_TD, inputs.token_mask_T, inputs.weights_TK, inputs.indices_TK)}
        assert shapes == {count}
        assert abs(int(inputs.token_mask_T.sum()) - active[rank]) <= 1


def test_no_rank_has_no_tokens_for_being_uneven():
    one = case(rank_load="uneven", ep_size=8, num_tokens=3)
    assert [one.tokens_of_rank(rank) for rank in range(8)] == [1, 1, 2, 2, 2, 3, 3, 3]


def rows_per_expert(one, rank):
    return make_inputs(one, CPU, rank).indices_TK.flatten().bincount(minlength=one.n_routed_experts)


@pytest.mark.parametrize("seed", range(4))
def test_the_popular_experts_are_so_on_all_ranks(seed):
    fields = {"num_tokens": 2000, "ep_size": 4, "seed": seed}
    by_rank = [rows_per_expert(case(routing="zipf:3", n_activated_experts=1, **fields), rank) for rank in range(4)]
    assert len({int(rows.argmax()) for rows in by_rank}) == 1
    for routing in ("empty", "one-hot"):
        empty = {tuple((rows_per_expert(case(routing=routing, **fields), r) == 0).tolist()) for r in range(4)}
        assert len(empty) == 1
        assert any(empty.pop())


def test_no_two_ranks_have_a_tensor_in_common():
    one = case(num_tokens=64, ep_size=4)
    inputs = [make_inputs(one, CPU, rank) for rank in range(4)]
    parameters = [make_parameters(one, CPU, rank) for rank in range(4)]
    for a in range(4):
        for b in range(a):
            for name in ("x_TD", "token_mask_T", "weights_TK", "indices_TK", "grad_TD"):
                assert not torch.equal(getattr(inputs[a], name).nan_to_num(), getattr(inputs[b], name).nan_to_num())
            for name, parameter in parameters[a].items():
                assert not torch.equal(parameter, parameters[b][name])


def test_a_rank_has_its_share_of_the_experts_drawn_as_those_of_one_process():
    one = case(ep_size=4, dim=128, moe_inter_dim=64)
    whole = make_parameters(case(ep_size=1, dim=128, moe_inter_dim=64), CPU)
    for rank in range(4):
        for name, share in make_parameters(one, CPU, rank).items():
            assert share.shape == (2, *whole[name].shape[1:])
            assert float(share.std()) == pytest.approx(float(whole[name].std()), rel=0.25)


def test_parameters_kept_for_one_ep_size_are_not_another_ones():
    workload = Workload(CPU)
    kept = workload.parameters(case())
    assert workload.parameters(case(mode="train", routing="uniform")) is kept
    assert len(workload.parameters(case(ep_size=4))["down_projs"]) == 2
    assert workload.parameters(case())["down_projs"].shape == (4, 16, 32)
