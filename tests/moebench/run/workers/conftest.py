"""The places of a Slurm job, whose job steps a stand-in for `srun` starts on this machine."""

from pathlib import Path

import pytest

from moebench.run.workers.slurm import slurm_cluster
from tests.moebench.executed import python_path, share_workers
from tests.moebench.run.workers import slurmed

ROOT = Path(__file__).parents[4]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A function that returns the places of a Slurm job with that many nodes and CPUs on each."""
    (tmp_path / "bin").mkdir()
    sites = []

    def start(count=2, cpus=1):
        for name, value in slurmed.job(tmp_path / "bin", count, cpus).items():
            monkeypatch.setenv(name, value)
        sites.append(slurm_cluster("cpu", tmp_path / "logs"))
        return sites[-1]

    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a host that is killed leaves its folder
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT, ROOT / "tests" / "backends"))
    yield start
    for some in sites:
        some.end()


@pytest.fixture
def worker(custom_stand_in, monkeypatch):
    """A function that takes a worker's script and makes `execute` start it in place of the worker, on any node.

    All backends count as built in.
    """
    share_workers(monkeypatch)
    return custom_stand_in
