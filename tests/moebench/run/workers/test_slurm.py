"""Slurm's job steps carry the hosts: what moebench asks of `srun`, and a whole run under a stand-in for it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.results.journal import Journal
from moebench.run.workers.layout import Node, Seats
from moebench.run.workers.slurm import slurm_nodes, step
from tests.moebench import stand_in
from tests.moebench.executed import python_path
from tests.moebench.resumed import SWEEP, is_whole
from tests.moebench.run.workers import slurmed

ROOT = Path(__file__).parents[4]
SCRIPT = ROOT / "docs" / "ci" / "slurm.sbatch"


def gpu_nodes(*names, num_gpus=8):
    return tuple(Node(name, name, num_gpus, "h200") for name in names)


def test_a_step_has_its_gpus_and_its_share_of_the_cpus():
    one = Seats(gpu_nodes("a"), num_ranks=2, num_slots=2, number=3, at_once=4)
    assert step(one, {"SLURM_CPUS_ON_NODE": "96"}) == [
        *("srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=a", "--exact", "--cpus-per-task=24"),
        *("--gpus-per-node=2", "--mem=0", "--no-kill", "--kill-on-bad-exit=0"),
    ]


def test_a_step_over_nodes_has_one_task_on_each():
    both = Seats(gpu_nodes("a", "b"), num_ranks=8, num_slots=8)
    found = step(both, {"SLURM_CPUS_ON_NODE": "96"})
    assert found[1:5] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=a,b"]
    assert "--gpus-per-node=8" in found


def test_a_step_on_cpus_asks_for_no_gpu():
    found = step(Seats((Node("a", "a", 4),), num_ranks=1, num_slots=4), {"SLURM_CPUS_ON_NODE": "4"})
    assert "--cpus-per-task=4" in found
    assert not any("gpu" in option for option in found)


@pytest.fixture
def variables(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    found = slurmed.job(tmp_path / "bin", cpus=4)
    monkeypatch.setenv("PATH", found["PATH"])
    return found


def test_the_nodes_are_those_of_the_job(variables):
    on_gpus = {**variables, "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:8"}
    assert slurm_nodes(None, on_gpus) == (Node("node1", "node1", 8, "h100"), Node("node2", "node2", 8, "h100"))
    assert slurm_nodes("cpu", on_gpus) == slurm_nodes(None, variables)
    assert slurm_nodes(None, variables) == (Node("node1", "node1", 4), Node("node2", "node2", 4))


def test_without_a_job_or_its_gpus_nothing_begins(variables, moebench, monkeypatch):
    with pytest.raises(UsageError, match="the job has no GPUs"):
        slurm_nodes("cuda", variables)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    found = moebench("run", "tiny.toml", "--out", "out", "--slurm")
    assert (found.code, found.err) == (
        2,
        "--slurm: this is not a job of Slurm; give the command in a script for sbatch, or in salloc",
    )
    assert not Path("out").exists()


#: A worker that waits in its first job until another worker has begun.
BOTH = """ready()
start(0)
open(f"begun-{number_of_worker}", "w")
while not os.path.exists("begun-1"): time.sleep(0.001)
for number in itertools.count(): done(number)
"""


def submitted(folder, *arguments):
    """Run the script as sbatch would, in the folder. A stand-in takes the place of moebench's workers."""
    (folder / "tiny.toml").write_text(SWEEP)
    environment = folder / "env" / "bin"
    environment.mkdir(parents=True, exist_ok=True)
    (environment / "activate").write_text(f'export PATH="{environment}:$PATH"\n')
    program = environment / "moebench"
    program.write_text(stand_in.program(folder / "worker"))
    program.chmod(0o755)
    (folder / "bin").mkdir(exist_ok=True)
    job = {**os.environ, **slurmed.job(folder / "bin"), "MOEBENCH_ENV": str(folder / "env"), "COLUMNS": "100"}
    job["PYTHONPATH"] = python_path(ROOT)
    job["TMPDIR"] = str(folder)
    command = ["bash", SCRIPT, "tiny.toml", "--out", "out", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=folder, env=job, capture_output=True, text=True, check=False, timeout=100)


def test_the_script_for_sbatch_measures_on_all_nodes_of_the_job(tmp_path):
    stand_in.write(tmp_path / "worker", BOTH)
    done = submitted(tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_whole(tmp_path / "out")
    assert {row.node for row in Journal(tmp_path / "out" / "journal.jsonl")} == {"node1", "node2"}


@pytest.mark.certify(share=0)  # hosts start slowly where processes share few cores
def test_a_node_that_is_down_is_left_out_and_said(tmp_path):
    stand_in.write(tmp_path / "worker", stand_in.ALL)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "node2-is-down").touch()
    done = submitted(tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_whole(tmp_path / "out")
    assert {row.node for row in Journal(tmp_path / "out" / "journal.jsonl")} == {"node1"}
    words = "node node2: not used, because no host starts there: srun exited with 1: srun: error: Unable to create step"
    assert words in " ".join(done.stderr.split())


def test_the_scripts_options_are_those_of_sbatch():
    """Their names and forms are in the manual of sbatch 22.05, from which these expressions were written."""
    forms = {
        "job-name": r"\S+",
        "nodes": r"\d+(-\d+)?",
        "gpus-per-node": r"([a-z0-9]+:)?\d+",
        "exclusive": None,
        "no-kill": None,
        "time": r"\d+:\d\d:\d\d",
        "signal": r"([RB]:)?[A-Z0-9]+@\d{1,5}",
    }
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    assert found
    assert SCRIPT.read_text().count("#SBATCH") == len(found)
    for name, value in found:
        form = forms[name]
        assert re.fullmatch(form, value) if form else not value, name
