"""Options of `pytest suites/`, and the jobs that they choose. docs/pytest-benchmark.md is the user's reference."""

import os
from typing import Any

import pytest
import torch

from experts.errors import RegistryError
from experts.registry import check_name
from moebench.errors import SweepError, UsageError
from moebench.machine import environment
from moebench.measure.cache import Workload
from moebench.measure.timing import TimingPolicy
from moebench.measure.worker import pick_device, timing_policy
from moebench.run import request
from moebench.workload.case import Job
from moebench.workload.selection import select
from moebench.workload.spec import find_sweep, load_sweep

JOBS = pytest.StashKey[tuple[Job, ...]]()
POLICY = pytest.StashKey[TimingPolicy]()
WORKLOAD = pytest.StashKey[Workload]()
ENVIRONMENT = pytest.StashKey[environment.Environment]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moebench")
    group.addoption("--sweep", help="a sweep file, or the name of one; default gpu where torch sees a GPU, else quick")
    group.addoption("--backend", action="append", default=[], help="instead of the sweep's backends; repeatable")
    group.addoption("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark asks for the machine's description when it is configured
def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(environment.cpu_cores_usable())
    try:
        _choose(config)
    except (SweepError, RegistryError, UsageError, ValueError) as mistake:
        raise pytest.UsageError(str(mistake)) from None


def _choose(config: pytest.Config) -> None:
    request.check_device(config.option.device)
    device = pick_device(config.option.device)
    sweep = config.option.sweep or ("gpu" if device.type == "cuda" else "quick")
    jobs = select(sweep, config.option.backend, [], [])
    request.check_named(jobs, config.option.backend)
    for name in dict.fromkeys(job.backend for job in jobs):
        check_name(name)
    config.stash[JOBS] = jobs
    config.stash[POLICY] = timing_policy(load_sweep(find_sweep(sweep)).policy, device)
    config.stash[WORKLOAD] = Workload(device)
    config.stash[ENVIRONMENT] = environment.collect(str(device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    jobs = metafunc.config.stash[JOBS]
    metafunc.parametrize("job", jobs, ids=[f"{job.case.case_id}-{job.backend}" for job in jobs])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What must be the same for times to be compared: --benchmark-compare warns where it is not."""
    machine_info["moebench"] = config.stash[ENVIRONMENT].comparable()


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> TimingPolicy:
    """How long a job is sampled."""
    return request.config.stash[POLICY]


@pytest.fixture
def workload(request: pytest.FixtureRequest) -> Workload:
    """The session's: parameters and inputs live on from backend to backend of a case."""
    return request.config.stash[WORKLOAD]
