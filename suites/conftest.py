"""Add the options of `pytest suites/`, and choose the jobs. docs/pytest-benchmark.md explains the options."""

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
    group.addoption(
        "--sweep", help="a sweep file, or the name of a sweep; default: gpu if torch sees a GPU, else quick"
    )
    group.addoption(
        "--backend", action="append", default=[], help="also measure this backend, beside the sweep's; repeatable"
    )
    group.addoption(
        "--only", action="append", default=[], help="measure this backend instead of the sweep's; repeatable"
    )
    group.addoption("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark, which asks for the description of the machine
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
    jobs = select(sweep, config.option.backend, [], [], config.option.only)
    request.check_named(jobs, [*config.option.backend, *config.option.only])
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
    """Add the facts that must be equal before times may be compared; --benchmark-compare warns if one differs."""
    machine_info["moebench"] = config.stash[ENVIRONMENT].comparable()


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> TimingPolicy:
    """Return the policy, which says how long each job is sampled."""
    return request.config.stash[POLICY]


@pytest.fixture
def workload(request: pytest.FixtureRequest) -> Workload:
    """Return the workload of the session, which keeps parameters and inputs for all backends of a case."""
    return request.config.stash[WORKLOAD]
