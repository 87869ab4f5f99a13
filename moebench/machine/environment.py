"""Describe the machine and the software of a measurement, and what must be equal for timings to be comparable.

Importing this module does not import torch, but `collect` does. On CUDA, `collect` opens a context, so call it in the
process that measures.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

import moebench
from moebench.errors import ResultsError, first_mistake
from moebench.machine import nvml
from moebench.machine.git import run_git
from moebench.machine.versions import TIMED, library_versions
from moebench.names import Name, as_name

#: The user sets this variable where the checkout has no .git, so that results still name their revision.
REVISION_VARIABLE = "MOEBENCH_REVISION"

#: Libraries that run code inside the timed region.
TIMED_LIBRARIES = ("torch", "cuda", "cudnn", "nccl", *TIMED)

ROOT = Path(moebench.__file__).resolve().parent.parent
#: A checkout on a network file system may take long to answer.
GIT_TIMEOUT_S = 30.0
_SOURCES = ("experts", "moebench", "suites")


class Gpu(nvml.GpuReading):
    """A GPU as torch sees it (`index` is torch's number), with NVML's reading of it."""

    index: nvml.Number
    name: str
    memory_bytes: nvml.Number
    compute_capability: str
    sm_count: nvml.Number
    l2_bytes: nvml.Number


class Environment(BaseModel):
    """Facts about the machine and its software. None means absent or not known.

    The host's name is left out on purpose.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    env_id: Name
    device: str
    os: str
    cpu_model: str
    cpu_cores: nvml.Number
    cpu_cores_usable: nvml.Number
    num_threads: nvml.Number
    memory_bytes: nvml.Number
    python: str
    moebench: str
    versions: dict[str, str | None]
    gpus: tuple[Gpu, ...] = ()
    tiles: str | None = None  # a hash of the choices that `moebench tune` stored for this GPU; None without choices
    git_revision: str | None = None
    git_dirty: bool | None = None
    git_problem: str | None = None  # why git did not tell the revision of a checkout

    def comparable(self) -> dict[str, Any]:
        """Return the facts that two environments must share for their timings to be comparable.

        `env_id` is a hash of these facts. They are the hardware, the limits of the GPUs, the driver, the Python
        version, the libraries that run inside the timed region, and the user's tiles if there are any. The thread count
        is one of the facts only on a CPU. The momentary clocks are left out. The revision is also left out, because a
        comparison is often about the revision.
        """
        on_cpu = self.device == "cpu"
        gpus = {
            (gpu.name, gpu.memory_bytes, gpu.sm_count, gpu.driver_version, gpu.power_limit_w, gpu.max_sm_clock_mhz)
            for gpu in self.gpus
        }
        return {
            "device": self.device.partition(":")[0],
            "cpu_model": self.cpu_model,
            "num_threads": self.num_threads if on_cpu else None,
            "python": ".".join(self.python.split(".")[:2]),
            "gpus": sorted([list(gpu) for gpu in gpus], key=repr),
            "libraries": {name: self.versions.get(name) for name in TIMED_LIBRARIES},
            **({} if self.tiles is None else {"tiles": self.tiles}),
        }

    @property
    def code(self) -> dict[str, Any]:
        """The version and revision of the code that ran, by the name of the field. `env_id` does not depend on them."""
        return {"moebench": self.moebench, "git_revision": self.git_revision, "git_dirty": self.git_dirty}

    @property
    def code_name(self) -> str:
        """The revision of the code that ran, or else its version, as a part of a file's name."""
        return as_name(self.git_revision or self.moebench) or "unknown"

    def gpu_uuids(self, count: int) -> str | None:
        """Return the UUIDs of the first `count` GPUs, one for each rank of a job; None without GPUs."""
        return ", ".join(gpu.uuid or f"index {gpu.index}" for gpu in self.gpus[:count]) or None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "Environment":
        """Read an environment that `to_json` wrote. Raises ResultsError if the file is missing or is not valid."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}; every results folder needs this file") from error
        except ValidationError as error:
            raise ResultsError(f"{path}: {first_mistake(error)}; open it with the moebench that wrote it") from error


def collect(device: str) -> Environment:
    """Return the environment of measurements on `device`: "cpu", "cuda" (every visible GPU) or "cuda:N".

    Raises ValueError for a device that this machine does not have.
    """
    import torch

    git = git_state(ROOT)
    facts = Environment(
        env_id="unknown",
        device=device,
        os=f"{platform.system()} {platform.release().partition('-')[0]}",
        cpu_model=cpu_model(),
        cpu_cores=psutil.cpu_count() or 1,
        cpu_cores_usable=cpu_cores_usable(),
        num_threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        moebench=moebench.__version__,
        versions=library_versions(),
        gpus=tuple(map(_gpu, gpu_numbers(device))),
        tiles=_tiles(gpu_numbers(device)),
        git_revision=git.revision,
        git_dirty=git.is_dirty,
        git_problem=git.problem,
    )
    return facts.model_copy(update={"env_id": _digest(facts.comparable())})


def together(nodes: Sequence[Environment]) -> Environment:
    """Return the environment of ranks on several nodes: the first node's, with the GPUs of all in their order.

    Raises ValueError if the nodes differ in what makes timings comparable.
    """
    first = nodes[0]
    for number, node in enumerate(nodes):
        if node.env_id != first.env_id:
            raise ValueError(
                f"node {number} of the group has environment {node.env_id}, node 0 has {first.env_id}: all nodes of a "
                "group must have the same hardware, driver and libraries"
            )
    return first.model_copy(update={"gpus": tuple(gpu for node in nodes for gpu in node.gpus)})


def _digest(comparable: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()[:12]


def gpu_numbers(device: str) -> range:
    """Return torch's numbers of the GPUs that a device names. Raises ValueError if this machine has no such device."""
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isascii() and index.isdecimal())):
        raise ValueError(f"device = {device!r}: it must be cpu, cuda or cuda:N")
    if kind == "cpu":
        return range(0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ValueError(
            f"device = {device!r}: torch {torch.__version__} sees {count} CUDA GPUs; "
            "choose another device, or run `moebench doctor` to see why"
        )
    return range(int(index), int(index) + 1) if index else range(count)


def _tiles(numbers: range) -> str | None:
    if not numbers:
        return None
    import torch

    try:
        from experts.gemm import choices
    except (ImportError, OSError):  # without Triton, and in older revisions of `experts`, nobody chooses tiles
        return None
    return choices.fingerprint(torch.device("cuda", numbers[0]))


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    reading = nvml.read(nvml.full_uuid(str(properties.uuid)))
    seen_by_torch = {
        "index": index,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }
    return Gpu(**{**reading.model_dump(), **seen_by_torch})


def cpu_model() -> str:
    """Return the processor's name from the kernel, or else from Python's platform module."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_cores_usable() -> int:
    """Return the number of logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1


class GitState(NamedTuple):
    """What git says about a checkout.

    `revision` is None if nobody knows it, and `problem` then has git's reason if there is a checkout. `is_dirty` says
    whether the code (not docs, not results) differs from the revision; it is None if nobody knows.
    """

    revision: str | None
    is_dirty: bool | None
    problem: str | None = None


def git_state(root: Path) -> GitState:
    """Return what git says about the checkout in `root`.

    Without .git in `root`, or if git does not answer, the revision is MOEBENCH_REVISION (None if unset).
    """
    revision, problem = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else (None, None)
    if revision is None:
        named = os.environ.get(REVISION_VARIABLE, "").encode(errors="replace").decode()
        return GitState(named or None, None, None if named else problem)
    changes, problem = _git(root, "status", "--porcelain", "--", *_SOURCES)
    return GitState(revision, None if changes is None else bool(changes), problem)


def _git(root: Path, *arguments: str) -> tuple[str | None, str | None]:
    """Return what git prints about the checkout and None, or None and the reason why git does not answer."""
    try:
        done = run_git("-C", str(root), *arguments, timeout_s=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"git does not run: {error}"
    if done.returncode == 0:
        return done.stdout.decode().strip(), None
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    remedy = "; git config --global --add safe.directory FOLDER" if "dubious ownership" in said[0] else ""
    reason = said[0].partition(" at '")[0]  # without the path of the checkout
    return None, f"git: {reason}{remedy}"
