"""A sweep over the nodes of a real Ray cluster: nodes and its head are killed, and every job is measured once.

The nodes are processes of this machine. The workers are stand-ins, which start in no time.
"""

import importlib.util
import re
import threading
import time
from dataclasses import replace

import pytest

from moebench.report import folder as report
from moebench.report.folder import Written
from moebench.results.journal import Journal
from moebench.run.runner import execute
from moebench.run.workers.link import free_port
from moebench.run.workers.ray import ray_cluster
from moebench.workload.case import Job
from tests.moebench import stand_in
from tests.moebench.executed import CASE, plan_of
from tests.moebench.resumed import is_whole
from tests.moebench.run.workers.rayed import RayCluster

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'moebench[ray]'"),
    pytest.mark.timeout(600),  # nodes start slowly where processes share few cores
]

#: A worker that takes a little time for each job.
SLOW = """ready()
for number in itertools.count():
    start(number)
    time.sleep(0.02)
    say(told(number))
"""
#: Moments of a run -> what a file of the run's logs then has, and the end of the file's name.
MOMENTS = {
    "start": ("run_id", ".jobs.jsonl"),
    "ready": ('"ready"', ".events.jsonl"),
    "job begun": ('"start"', ".events.jsonl"),
    "job ended": ('"record"', ".events.jsonl"),
    "third job": ('"number": 2', ".events.jsonl"),
}


def jobs(count):
    cases = [CASE.model_copy(update={"num_tokens": 8 + number}) for number in range(count)]
    return tuple(Job(case=case, backend=name) for case in cases for name in ("a", "b"))


@pytest.fixture(scope="module")
def cluster():
    found = RayCluster()
    found.add(gpus=2)
    found.add()
    yield found
    found.end()


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    found = ray_cluster(cluster.address, "cpu", tmp_path_factory.mktemp("site"))
    until(lambda: len(found.places(1)) == 3, "three nodes")
    yield found
    found.end()


def until(is_so, what):
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_sweep_over_three_nodes_has_the_jobs_of_one_machine(site, tmp_path, worker):
    """No worker ends its first job before all three have begun."""
    waits = f"while len(os.listdir({str(tmp_path / 'begun')!r})) < 3: time.sleep(0.001)\n"
    worker(f"ready()\nstart(0)\nopen({str(tmp_path / 'begun')!r} + f'/{{os.getpid()}}', 'w')\n{waits}" + SLOW[8:])
    (tmp_path / "begun").mkdir()
    over = execute(plan_of(tmp_path / "over", jobs(8)), site=site)
    worker(stand_in.ALL)
    here = execute(plan_of(tmp_path / "here", jobs(8)))
    assert sorted(row.key for row in over.records) == sorted(row.key for row in here.records)
    assert list(Journal(tmp_path / "over" / "journal.jsonl")) == list(over.records)
    assert {row.node for row in over.records} == {"node-0", "node-1", "node-2"}
    assert {row.node for row in here.records} == {None}
    for tokens in {row.num_tokens for row in over.records}:
        assert len({row.node for row in over.records if row.num_tokens == tokens}) == 1, "one node has the whole case"


@pytest.mark.certify(share=0)  # hosts start slowly where processes share few cores
def test_a_worker_has_the_gpus_that_ray_gives_it(site, cluster, tmp_path, worker):
    """Only node-1 has GPUs. Without a device, jobs run on GPUs if any node has some."""
    begun = tmp_path / "begun"
    begun.mkdir()
    worker(
        "gpus = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "ready(device='cuda:0')\nstart(0)\n"
        f"open({str(begun)!r} + '/' + gpus, 'w')\n"
        f"while not len(os.listdir({str(begun)!r})) > 1: time.sleep(0.001)\n"
        "for number in itertools.count(): done(number, detail=gpus + ' ' + option['--device'])\n"
    )
    both = [*jobs(2)]
    both += [Job(case=CASE.model_copy(update={"ep_size": 2}), backend="a", dispatcher="allgather")]
    on_gpus = ray_cluster(cluster.address, None, tmp_path / "logs")
    try:
        plan = replace(plan_of(tmp_path / "run", tuple(both)), device=None)
        rows = execute(plan, site=on_gpus).records
    finally:
        on_gpus.end()
    assert {row.node for row in rows} == {"node-1"}
    by_case = {(row.ep_size, row.num_tokens): row.detail for row in rows}
    assert sorted(by_case.values()) == ["0 cuda", "0,1 cuda", "1 cuda"]
    assert by_case[2, 8] == "0,1 cuda"


def over_two_nodes(**fields):
    return Job(case=CASE.model_copy(update={"ep_size": 2, **fields}), backend="loop", dispatcher="allgather")


def test_ranks_that_no_node_holds_run_on_two(site, tmp_path, worker):
    worker("if '--rdzv-conf=is_host=true' not in sys.argv: hang()\nready()\ndone(0, detail=' '.join(sys.argv))\n")
    (row,) = execute(plan_of(tmp_path / "run", [over_two_nodes()]), site=site).records
    assert len(set(row.node.split(", "))) == 2
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=" in row.detail
    assert "--nproc-per-node=1" in row.detail


@pytest.mark.certify(share=0)  # a group of two ranks and two launchers starts slowly on few cores
def test_real_ranks_on_two_nodes_meet(site, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = over_two_nodes(rank_load="uneven", mode="train", num_tokens=24)
    (row,) = execute(plan_of(tmp_path / "run", [job]), site=site).records
    assert (row.status.value, row.detail) == ("ok", None)
    assert len(set(row.node.split(", "))) == 2
    assert row.skew_ms >= 0


def killed_at(moment, cluster, folder, spare):
    """Wait for the moment in a worker's file, then kill the worker's node. Return a list that gets the node's name."""
    text, end = MOMENTS[moment]
    killed = []

    def watch():
        deadline = time.monotonic() + 100
        while not killed and time.monotonic() < deadline:
            for path in folder.glob(f"logs/*{end}"):
                name = node_of(path, cluster) if text in path.read_text() else None
                if name not in (None, spare):
                    cluster.kill(name)
                    killed.append(name)
                    return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, killed


def node_of(file, cluster):
    """Return the node of the worker that the file belongs to; None as long as nobody knows it."""
    log = file.with_name(file.name.partition(".")[0] + ".log")
    words = log.read_text().partition("the pid is ")[2].split() if log.exists() else []
    return cluster.node_of(int(words[0])) if words else None


@pytest.mark.certify
@pytest.mark.timeout(1800)
def test_a_node_that_is_killed_loses_no_job_and_none_is_measured_twice(certify, cluster, site, tmp_path, worker):
    """The head's node is spared. Each killed node is replaced in `make certify`."""
    worker(SLOW)
    moments = [*MOMENTS] * 4 if certify else ["job begun", "job ended"]
    for number, moment in enumerate(moments):
        folder = tmp_path / f"{number}"
        thread, killed = killed_at(moment, cluster, folder, spare=cluster.head)
        outcome = execute(plan_of(folder, jobs(40)), site=site)
        thread.join()
        assert len(killed) == 1, f"{moment}: no node was killed"
        assert sorted(row.key for row in outcome.records) == sorted(job.key for job in jobs(40)), moment
        assert list(Journal(folder / "journal.jsonl")) == list(outcome.records)
        assert {row.status.value for row in outcome.records} == {"unsupported"}, "a lost node is no crash of a job"
        assert any(note.startswith(f"node {killed[0]}: lost, because") for note in outcome.notes), outcome.notes
        if certify:
            replaced = {cluster.add()}
            until(lambda new=replaced: new <= {place.node for place in site.places(1).values()}, "a node in its place")


def test_without_a_cluster_nothing_begins(folder, moebench):
    found = moebench("run", "tiny.toml", "--out", "out", "--ray", f"127.0.0.1:{free_port()}")
    assert (found.code, found.out) == (2, "")
    assert re.fullmatch(r"--ray 127.0.0.1:\d+: ConnectionRefusedError: .*", found.err)
    assert not (folder / "out").exists()


def test_a_head_that_is_killed_ends_the_run_and_resume_goes_on(cluster, site, folder, moebench, monkeypatch):
    site.end()  # it holds the nodes
    monkeypatch.setattr(report, "finish", lambda folder: Written())  # the pictures are of no interest here
    stand_in.write(folder / "slow", "ready()\ndone(0)\nstart(1)\nhang()\n")  # no node measures a whole case
    run = ["run", "tiny.toml", "--out", "out", "--device", "cpu", "--ray", cluster.address]
    process = stand_in.started(folder / "slow", *run, cwd=folder)
    journal = folder / "out" / "journal.jsonl"
    until(lambda: journal.exists() or process.poll() is not None, "a first record")
    cluster.kill(cluster.head)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert f"the Ray cluster {cluster.address} cannot be reached: its head" in err
    assert "--resume goes on" in err
    before = journal.read_bytes()
    assert 1 <= before.count(b"\n") < 6
    assert moebench("run", "--resume", "out").code == 0
    assert journal.read_bytes().startswith(before)
    assert is_whole(folder / "out")
