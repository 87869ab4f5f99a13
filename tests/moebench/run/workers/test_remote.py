"""Workers on the nodes of a cluster, whose job steps a stand-in for `srun` starts on this machine.

A group of ranks over two nodes is measured and judged as on one node. What fails on one node is told of that node.
"""

import re
import time
from contextlib import suppress

import psutil
import pytest

from moebench.results.journal import Journal
from moebench.results.record import ONLY_IF_OK
from moebench.run.runner import Plan, execute
from moebench.run.workers import remote
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.moebench.executed import CASE, jobs_of, plan_of, share_workers

pytestmark = pytest.mark.timeout(400)


def test_a_worker_on_a_node_breaks_and_is_told_as_here(tmp_path, site, worker):
    """Its records, its last words, its exit code, and events that cannot be believed come over the connection."""
    worker(
        "ready()\n"
        "if number_of_worker == 0:\n"
        "    done(0); start(1); print('last words', flush=True); os._exit(7)\n"
        "if number_of_worker == 1:\n"
        "    start(0); say('no JSON\\n'); hang()\n"
        "if number_of_worker == 2:\n"
        "    start(0); os.unlink(option['--events']); hang()\n"
        "if number_of_worker == 3:\n"
        "    start(0); hang()\n"
        "done(0)\n"
    )
    jobs = jobs_of("a", "exits", "lies", "deletes", "hangs", "b")
    rows = execute(plan_of(tmp_path / "run", jobs, timeout_s=2.0), site=site(count=1)).records
    assert [(row.backend, row.status.value, row.node) for row in rows] == [
        ("a", "unsupported", "node1"),
        ("exits", "crash", "node1"),
        ("lies", "crash", "node1"),
        ("deletes", "crash", "node1"),
        ("hangs", "timeout", "node1"),
        ("b", "unsupported", "node1"),
    ]
    words = (
        "exited with 7\nthe pid is",
        "a line that the worker did not write: no JSON",
        "was deleted",
        "no result after 2 s",
    )
    for row, some in zip(rows[1:5], words, strict=True):
        assert some in row.detail
    assert rows[1].detail.endswith("\nlast words")
    logs = tmp_path / "run" / "logs"
    assert "last words" in (logs / "worker-0.log").read_text(), "the supervisor keeps what a worker printed"
    pids = [int(path.read_text().split("the pid is ")[1].split()[0]) for path in logs.glob("worker-*.log")]
    assert not any(map(psutil.pid_exists, pids)), "nothing is left on the node"


def test_a_worker_has_the_variables_of_the_supervisor_and_not_the_key(tmp_path, site, worker, monkeypatch):
    monkeypatch.setenv("MOEBENCH_REVISION", "r1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    names = ("MOEBENCH_REVISION", "OMP_NUM_THREADS", "MOEBENCH_KEY")
    worker(f"ready()\ndone(0, detail=json.dumps([os.environ.get(name) for name in {names}]))\n")
    (row,) = execute(plan_of(tmp_path / "run", jobs_of("a")), site=site(count=1)).records
    assert row.detail == '["r1", "3", null]'


#: What a rank on the second of two nodes does, and what its group's row must say.
ON_TWO_NODES = {
    "os.kill(os.getpid(), signal.SIGKILL)": ("crash", "its process was killed by SIGKILL"),
    "print('rank 2: Signal 9 (SIGKILL)', flush=True); os._exit(1)": ("crash", "Signal 9 (SIGKILL)"),
    "say(told(0, 'mine', 'error').replace('\"rank\": 0', '\"rank\": 2')); os._exit(1)": ("error", "mine"),
}


def test_what_dies_on_one_node_is_told_and_not_what_follows_on_another(tmp_path, site, worker, monkeypatch):
    """The first node's rank fails because the other's is gone, and says so in a record of its own."""
    monkeypatch.setattr(remote, "SETTLED_S", 0.8)
    worker(
        "begun = f'begun-{number_of_worker}'\n"
        "if os.environ['SLURM_NODEID'] == '1':\n"
        "    while not os.path.exists(begun): time.sleep(0.001)\n"
        "    next_job()\n"
        "    time.sleep(0.3)\n"  # a rank that fails waits even longer
        f"    exec({list(ON_TWO_NODES)!r}[number_of_worker])\n"
        "ready()\nstart(0)\nopen(begun, 'w')\n"
        "time.sleep(0.7)\n"
        "say(told(0, 'rank 0: the connection was closed', 'error'))\nhang()\n"
    )
    monkeypatch.chdir(tmp_path)
    over_nodes = CASE.model_copy(update={"ep_size": 4})
    jobs = tuple(Job(case=over_nodes, backend=name, dispatcher="allgather") for name in "abc")
    rows = execute(plan_of(tmp_path / "run", jobs), site=site(cpus=2)).records
    assert [row.status.value for row in rows] == [status for status, _ in ON_TWO_NODES.values()]
    for row, (_, words) in zip(rows, ON_TWO_NODES.values(), strict=True):
        assert row.node == "node1, node2"
        assert words in row.detail
        assert "connection was closed" not in row.detail


def case(**fields):
    shape = {"num_tokens": 24, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 16}
    unkind = {"expert_bias": True, "masked_share": 0.25, "routing": "zipf", "rank_load": "uneven", "mode": "train"}
    return Case.model_validate({**shape, **unkind, "dtype": "float32", "ep_size": 4, **fields})


#: Uneven ranks with right backends, and a rank that is wrong, fails, leaves or dies.
OVER_NODES = (
    ("loop", "allgather", "uneven"),
    ("torch_mm", "alltoall", "one-empty"),
    ("ranks:OwnTokensOnly", "allgather", "uneven"),
    ("ranks:Raises", "allgather", "uneven"),
    ("ranks:Leaves", "allgather", "uneven"),
    ("ranks:Dies", "allgather", "uneven"),
)


@pytest.mark.certify(share=0)  # a group of four ranks and two launchers starts slowly on few cores
@pytest.mark.timeout(900)
def test_ranks_over_two_nodes_are_measured_and_judged_as_on_one(tmp_path, site, monkeypatch):
    """Four ranks on two nodes by torch.distributed's rendezvous, with real workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    share_workers(monkeypatch)
    jobs = tuple(Job(case=case(rank_load=load), backend=name, dispatcher=how) for name, how, load in OVER_NODES)
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=60.0)
    over = execute(Plan(jobs, policy, tmp_path / "over", "run", device="cpu"), site=site(cpus=2)).records
    assert [row.key for row in over] == [job.key for job in jobs]
    assert list(Journal(tmp_path / "over" / "journal.jsonl")) == list(over)
    assert {row.node for row in over} == {"node1, node2"}
    right, dead = over[0], over[-1]
    assert (right.status.value, right.detail) == ("ok", None)
    assert 0 < right.parity_worst <= 1
    assert min(right.dispatch_ms, right.compute_ms, right.combine_ms) > 0
    assert right.skew_ms >= 0
    assert right.tokens_per_s == pytest.approx(jobs[0].case.num_active_tokens / right.time_ms * 1e3)
    assert dead.status.value == "crash"
    assert re.search(r"^its process exited with 1\n[^~]*rank +: 3 [^~]*SIGKILL", dead.detail.replace("~", ""))
    assert all(getattr(dead, name) is None for name in ONLY_IF_OK)
    assert not workers_of(tmp_path)
    one = execute(Plan(jobs, policy, tmp_path / "one", "run", device="cpu")).records
    assert [row.status.value for row in one] == ["ok", "ok", "mismatch", "error", "crash", "crash"]
    assert [row.status for row in over] == [row.status for row in one]
    assert [row.parity_errors for row in over] == [row.parity_errors for row in one], "the same errors to the bit"
    assert {row.node for row in one} == {None}
    for row, other in zip(over, one, strict=True):
        assert (row.detail or "").partition("\n")[0] == (other.detail or "").partition("\n")[0]


def workers_of(folder):
    """Return the processes of workers and hosts that still run for the test, after a moment to end."""
    deadline = time.monotonic() + 30
    while (found := list(_running(folder))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(folder):
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.ppid() != 1 and "moebench.measure.worker" in process.cmdline() and process.cwd() == str(folder):
                yield process
