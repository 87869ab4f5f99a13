"""Build plans of one case for several backends, and follow the processes that executing them leaves."""

import os
import time

import psutil

from moebench.run import backlog, request
from moebench.run.runner import Plan
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy

CASE = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")


def python_path(*folders):
    """Return PYTHONPATH with these folders first."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def share_workers(patch):
    """Let every backend count as built in, so that all of them share a worker."""
    patch.setattr(backlog, "is_built_in", lambda name: True)


def measure_shortly(patch):
    """Let jobs whose sweep has no policy be measured for a hundredth of a second."""
    plan = request.Plan
    shortly = Policy(time_cap_s=0.01, interval_target=0.9)
    patch.setattr(request, "Plan", lambda jobs, policy, *given, **more: plan(jobs, shortly, *given, **more))


def jobs_of(*backends):
    return tuple(Job(case=CASE, backend=name) for name in backends)


def plan_of(folder, jobs, **fields):
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=fields.pop("timeout_s", 60.0))
    return Plan(jobs, policy, folder, "a-run", device="cpu", **fields)


def has_ended(pid):
    """Whether the process ends soon; an orphan that no process reaps counts as ended."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            psutil.wait_procs([process], timeout=0.05)
        except psutil.NoSuchProcess:
            return True
    return False


def pid_of(folder, worker=0):
    return int((folder / "logs" / f"worker-{worker}.log").read_text().split("the pid is ")[1].split()[0])


THREE = jobs_of("a", "b", "c")
