"""Where jobs run: several slots at once, each with its own worker, as many GPUs as the ranks need, and one journal."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.machine.gpus import Slot
from moebench.results.journal import Journal
from moebench.run import supervisor
from moebench.run.runner import Plan, Refused, RunnerError, execute
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.moebench import stand_in
from tests.moebench.executed import share_workers

ROOT = Path(__file__).parents[3]
SHAPE = {"n_routed_experts": 8, "n_activated_experts": 2, "moe_inter_dim": 8, "dtype": "float32"}
TWO_CORES = (Slot(num_threads=1), Slot(num_threads=1))
GPUS = tuple(Slot(f"GPU-{name}") for name in "abcd")

#: A worker that puts its GPUs and its number of threads into the detail of every row.
SAYS_WHERE = """
ready(device=os.environ.get("SEEN_BY_TORCH", "cuda:0"))
where = os.environ.get("CUDA_VISIBLE_DEVICES", "") + " " + os.environ.get("OMP_NUM_THREADS", "")
for number in itertools.count(): done(number, detail=where)
"""


def jobs(tokens=(1, 2, 3, 4), dims=(16,), backends="ab", **fields):
    cases = [Case(num_tokens=t, dim=dim, **SHAPE, **fields) for dim in dims for t in tokens]
    return tuple(Job(case=case, backend=name) for case in cases for name in backends)


def plan_of(folder, jobs, slots, **fields):
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=60.0)
    return Plan(jobs, policy, folder / "run", "a-run", slots=slots, **fields)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A function that takes a worker's script and makes `execute` start it in place of the worker.

    All backends count as built in.
    """
    share_workers(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(script):
        program = stand_in.write(tmp_path / "stand-in", script)
        monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(program)))

    return write


def given_to(folder):
    """Return the jobs of each worker, in the order in which the workers began."""
    files = sorted((folder / "run" / "logs").glob("*.jobs.jsonl"))
    return [[Job.model_validate_json(line) for line in file.read_text().splitlines()[1:]] for file in files]


@pytest.mark.certify
def test_two_slots_measure_at_once_with_real_workers(tmp_path, monkeypatch, certify):
    if not certify:
        pytest.skip("the tests below have stand-ins for workers: make certify")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    some = jobs(dims=(16, 32), backends=("loop", "torch_mm"))
    outcome = execute(plan_of(tmp_path, some, TWO_CORES, device="cpu"))
    assert {row.status.value for row in outcome.records} == {"ok"}
    assert sorted(row.key for row in outcome.records) == sorted(job.key for job in some)
    assert list(Journal(tmp_path / "run" / "journal.jsonl")) == list(outcome.records)
    first, second = given_to(tmp_path)
    assert {len(first), len(second)} <= set(range(2, 15, 2)), "both worked, and whole cases"
    assert {job.case for job in first}.isdisjoint(job.case for job in second)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["num_threads"] == 1


def test_each_gpu_has_a_worker_that_sees_it_alone(tmp_path, worker):
    """No worker ends a job until both have begun, so that both work at once."""
    worker(
        SAYS_WHERE.replace("ready(", "open(f'begun-{number_of_worker}', 'w')\nready(").replace(
            "for number",
            "if number_of_worker: open('second', 'w')\nelse:\n    start(0)\n"
            "    while not os.path.exists('second'): time.sleep(0.001)\nfor number",
        )
    )
    os.chdir(tmp_path)
    outcome = execute(plan_of(tmp_path, jobs(), GPUS[:2]))
    where = {row.detail.split()[0] for row in outcome.records}
    assert where == {"GPU-a", "GPU-b"}
    for tokens in (1, 2, 3, 4):
        of_case = {row.detail.split()[0] for row in outcome.records if row.num_tokens == tokens}
        assert len(of_case) == 1, "the backends of a case are compared on one GPU"
    assert outcome.num_left == 0


def test_ranks_get_as_many_gpus(tmp_path, worker):
    worker(SAYS_WHERE)
    some = (*jobs((1,)), *jobs((1, 2), ep_size=2, backends="a"), *jobs((1,), ep_size=8))
    rows = execute(plan_of(tmp_path, some, GPUS)).records
    by_size = {size: {row.detail.split()[0] for row in rows if row.ep_size == size} for size in (1, 2, 8)}
    assert by_size[1] <= {"GPU-a", "GPU-b", "GPU-c", "GPU-d"}
    assert by_size[2] <= {"GPU-a,GPU-b", "GPU-c,GPU-d"}
    assert by_size[8] == {"GPU-a,GPU-b,GPU-c,GPU-d"}, "all there are: the worker says that they are too few"
    assert [row.ep_size for row in rows] == [1, 1, 2, 2, 8, 8]


def test_where_torch_sees_no_gpu_one_worker_does_all(tmp_path, worker, monkeypatch):
    monkeypatch.setenv("SEEN_BY_TORCH", "cpu")
    worker(SAYS_WHERE)
    rows = execute(plan_of(tmp_path, jobs(), GPUS)).records
    assert len(given_to(tmp_path)) == 1
    assert len(rows) == 8


def test_what_the_first_worker_refuses_no_other_is_asked(tmp_path, worker):
    worker("say(line('refused', mistakes=['no backend a']))\n")
    with pytest.raises(Refused, match="no backend a"):
        execute(plan_of(tmp_path, jobs(), GPUS))
    assert len(given_to(tmp_path)) == 1


LOST = """
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
if gpu == "GPU-b":
    print("CUDA error: unknown", flush=True)
    os._exit(1)
ready(device="cuda:0")
start(0)
while not len(os.listdir("run/logs")) > 3: time.sleep(0.001)
for number in itertools.count(): done(number, detail=gpu)
"""


def test_a_gpu_on_which_no_worker_starts_is_given_up_and_said(tmp_path, worker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker(LOST)
    outcome = execute(plan_of(tmp_path, jobs(), GPUS[:2]))
    assert [row.detail for row in outcome.records] == ["GPU-a"] * 8
    (note,) = outcome.notes
    assert note.startswith(
        "GPU-b: no longer used, because a worker ended before it measured anything: its process exited with 1"
    )
    assert "CUDA error: unknown" in note


def test_without_any_gpu_left_the_run_ends(tmp_path, worker):
    worker(LOST)
    with pytest.raises(RunnerError, match="CUDA error: unknown"):
        execute(plan_of(tmp_path, jobs(), GPUS[1:2]))


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "hang()"])
def test_what_one_worker_breaks_disturbs_no_other(tmp_path, worker, monkeypatch, how):
    """The case with two tokens ends its worker. Another worker or the next one measures the case's other backend."""
    monkeypatch.chdir(tmp_path)
    worker(
        "ready(device='cuda:0')\n"
        "for number in itertools.count():\n"
        "    start(number)\n"
        "    job = jobs[number]\n"
        "    if job.case.num_tokens == 2 and job.backend == 'a':\n"
        f"        {how}\n"
        "    say(told(number))\n"
    )
    plan = plan_of(tmp_path, jobs(), GPUS[:2])
    plan = Plan(**{**vars(plan), "policy": Policy(timeout_s=2.0)})
    outcome = execute(plan)
    statuses = {(row.num_tokens, row.backend): row.status.value for row in outcome.records}
    wrong = statuses.pop((2, "a"))
    assert wrong == ("timeout" if how == "hang()" else "crash")
    assert len(statuses) == 7
    assert set(statuses.values()) == {"unsupported"}
