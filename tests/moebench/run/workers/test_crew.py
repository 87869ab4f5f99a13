"""Jobs go to the nodes of a cluster and back: a case keeps to one environment, and no job is lost or measured twice.

The nodes are those of a Slurm job under a stand-in for `srun`. A worker that kills its host stands for the death of the
node.
"""

import pytest

from moebench.errors import RunnerError
from moebench.results.journal import Journal
from moebench.run.runner import execute
from moebench.workload.case import Job
from tests.moebench.executed import CASE, jobs_of, plan_of

#: A node dies at once. Or it shuts down, and its worker's processes are killed first.
AT_ONCE = "def die(): os.kill(os.getppid(), signal.SIGKILL)\n"
SHUTS_DOWN = """
import subprocess
def die():
    subprocess.Popen(["sh", "-c", f"kill -9 {os.getpid()}; sleep 0.3; kill -9 {os.getppid()}"], start_new_session=True)
"""
#: A worker whose node dies in the job with this backend, once, when the supervisor has the record of `a`.
DIES = """
def die_at(backend, number):
    start(number)
    if jobs[number].backend == backend and not os.path.exists("died"):
        while not (os.path.exists("run/journal.jsonl") and '"backend":"a"' in open("run/journal.jsonl").read()):
            time.sleep(0.001)
        open("died", "w")
        die()
        hang()
"""
#: Each node has an environment of its own.
UNLIKE = (
    DIES
    + """
ready(env_id=os.environ["SLURMD_NODENAME"])
for number in itertools.count():
    die_at("b", number)
    done(number, detail=os.environ["SLURMD_NODENAME"])
"""
)


def two_cases():
    other = CASE.model_copy(update={"seed": 1})
    return (*jobs_of("a", "b", "c"), *(Job(case=other, backend=name) for name in "de"))


@pytest.mark.parametrize("how", [AT_ONCE, SHUTS_DOWN], ids=["at once", "shuts down"])
def test_a_case_that_a_dead_node_began_is_finished_in_its_environment(tmp_path, site, worker, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    worker(how + UNLIKE)
    outcome = execute(plan_of(tmp_path / "run", two_cases()), site=site())
    assert sorted(row.key for row in outcome.records) == sorted(job.key for job in two_cases())
    assert {row.status.value for row in outcome.records} == {"unsupported"}
    of_case = {seed: {row.env_id for row in outcome.records if row.seed == seed} for seed in (0, 1)}
    assert all(len(env_ids) == 1 for env_ids in of_case.values()), "b and c came after their node had died"
    assert all(row.env_id == row.node == row.detail for row in outcome.records)
    assert any(": lost, because" in note for note in outcome.notes)


def test_where_no_node_has_the_environment_any_more_the_case_waits_for_resume(tmp_path, site, worker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    down = f"open({str(tmp_path / 'bin')!r} + '/' + os.environ['SLURMD_NODENAME'] + '-is-down', 'w')"
    worker(AT_ONCE + UNLIKE.replace('open("died", "w")', f'open("died", "w"); {down}'))
    plan = plan_of(tmp_path / "run", two_cases())
    with pytest.raises(RunnerError, match="2 jobs are left, and their cases were begun in an environment that no node"):
        execute(plan, site=site())
    earlier = list(Journal(tmp_path / "run" / "journal.jsonl"))
    assert sorted(row.backend for row in earlier) == ["a", "d", "e"]
    for path in (tmp_path / "bin").glob("*-is-down"):
        path.unlink()
    rest = tuple(job for job in plan.jobs if job.backend in "bc")
    rows = execute(plan_of(tmp_path / "run", rest), site=site(), earlier=earlier).records
    (began,) = (row.env_id for row in earlier if row.backend == "a")
    assert [(row.backend, row.env_id) for row in rows] == [("b", began), ("c", began)]


@pytest.mark.certify(share=0)  # hosts start slowly where processes share few cores
def test_a_job_that_ends_three_nodes_is_a_crash(tmp_path, site, worker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker(
        AT_ONCE
        + DIES.replace(' and not os.path.exists("died")', "")
        + "ready()\nfor number in range(9): die_at('b', number); done(number)\n"
    )
    rows = execute(plan_of(tmp_path / "run", jobs_of("a", "b", "c")), site=site(count=1)).records
    assert [row.backend for row in rows] == ["a", "b", "c"]
    assert [row.status.value for row in rows] == ["unsupported", "crash", "unsupported"]
    assert rows[1].detail.startswith("3 nodes were lost while they ran this job; the last: ")


@pytest.mark.certify(share=0)  # hosts start slowly where processes share few cores
def test_a_node_on_which_no_worker_starts_is_given_up_and_said(tmp_path, site, worker):
    worker("if os.environ['SLURMD_NODENAME'] == 'node1': sys.exit('no torch')\nready()\nfor n in range(9): done(n)\n")
    outcome = execute(plan_of(tmp_path / "run", jobs_of("a", "b")), site=site())
    assert [(row.backend, row.node) for row in outcome.records] == [("a", "node2"), ("b", "node2")]
    (note,) = outcome.notes
    assert note.startswith("node node1: no longer used, because a worker ended before it measured anything")
    assert "no torch" in note


@pytest.mark.certify(share=0)  # hosts start slowly where processes share few cores
def test_what_the_first_worker_of_all_refuses_no_other_node_is_asked(tmp_path, site, worker):
    worker("say(line('refused', mistakes=['no backend a']))\n")
    with pytest.raises(RunnerError, match="no backend a"):
        execute(plan_of(tmp_path / "run", jobs_of("a")), site=site())
    assert len(list((tmp_path / "run" / "logs").glob("worker-*.log"))) == 1
