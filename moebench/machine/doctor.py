"""Report what this machine can measure, which parts are missing, and what would spoil a measurement.

Each finding is one line. The line of a missing library says how to install the library. The thorough examination also
imports torch, so that it finds a torch that does not import or sees no GPU. This module does not ask the backends;
`moebench list` says why a backend is unavailable.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import psutil

from experts import catalog
from moebench.machine import nvml
from moebench.machine.backends import gpus_of_torch
from moebench.machine.environment import REVISION_VARIABLE, ROOT, cpu_cores_usable, cpu_model, git_state
from moebench.machine.gpus import GPU_BUSY_PERCENT
from moebench.machine.units import size
from moebench.machine.versions import DISTRIBUTIONS, library_versions, module_version, torch_build

Level = Literal["ok", "missing", "problem"]

_OF_PEERS = {backend.library for backend in catalog.BACKENDS if backend.target is not None}

#: How to install each library that may be missing.
REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        **{
            name: f"a peer to compare with: {install}" if name in _OF_PEERS else install
            for name, install in catalog.LIBRARIES.items()
        },
        "numpy": "pip install numpy",
    }
)

_INSTALL_TORCH = "pip install torch"

_CPU_BUSY_PERCENT = 25.0
_GOVERNORS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Diagnosis:
    """One finding of `doctor`. `remedy` says what to do about it; it is None if the user need not do anything."""

    level: Level
    name: str
    detail: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name}: {self.detail}" + (f" → {self.remedy}" if self.remedy else "")


def doctor(is_thorough: bool = False) -> list[Diagnosis]:
    """Return every finding, hardware before software. Does not open a CUDA context.

    If `is_thorough` is false, torch is not imported, and what only an import shows is not found.
    """
    gpus = _gpu_findings()  # before any call into torch, so that this process is not yet a user of a GPU
    has_gpu = any(finding.level != "missing" for finding in gpus)
    torch = _torch_findings(has_gpu) if is_thorough else _build_findings(has_gpu)
    return [*_cpu_findings(), *gpus, *torch, *_library_findings(has_gpu, is_thorough), *_revision_findings()]


def _cpu_findings() -> list[Diagnosis]:
    memory = size(psutil.virtual_memory().total)
    cores = cpu_cores_usable()
    findings = [Diagnosis("ok", "cpu", f"{cpu_model()}, {cores} of {psutil.cpu_count()} cores usable, {memory}")]
    busy = psutil.cpu_percent(interval=0.5)
    if busy > _CPU_BUSY_PERCENT:
        detail = f"other processes keep the cores {busy:.0f}% busy, which makes times on the CPU longer"
        findings.append(Diagnosis("problem", "cpu load", detail, "stop them, or wait"))
    governors = _governors() - {"performance"}
    if governors:
        detail = (
            f"the clock follows the load (governor {', '.join(sorted(governors))}), so times depend on what ran before"
        )
        findings.append(Diagnosis("problem", "cpu clock", detail, "cpupower frequency-set -g performance (as root)"))
    return findings


def _governors() -> set[str]:
    files = _GOVERNORS.glob("cpu[0-9]*/cpufreq/scaling_governor")
    return {file.read_text().strip() for file in files}


def _gpu_findings() -> list[Diagnosis]:
    try:
        gpus = nvml.read_all()
    except nvml.NvmlUnavailable as reason:
        if gpus_of_torch():
            detail = f"torch sees a GPU, but its clocks, power and users cannot be read ({reason})"
            return [Diagnosis("problem", "gpu", detail, "make the driver's libnvidia-ml visible here")]
        return [Diagnosis("missing", "gpu", f"no NVIDIA GPU was found ({reason}); CPU sweeps run")]
    if not gpus:
        return [Diagnosis("missing", "gpu", "NVML finds no GPU; CPU sweeps run")]
    return [finding for index, (reading, use) in enumerate(gpus) for finding in _one_gpu(f"gpu {index}", reading, use)]


def _one_gpu(name: str, gpu: nvml.GpuReading, use: nvml.GpuUse) -> list[Diagnosis]:
    if gpu.nvml_error:
        return [Diagnosis("problem", name, gpu.nvml_error, "see what nvidia-smi says")]
    memory = "" if gpu.memory_bytes is None else f", {size(gpu.memory_bytes)}"
    findings = [Diagnosis("ok", name, f"{gpu.name}{memory}, driver {gpu.driver_version}")]
    if use.other_pids:
        pids = ", ".join(str(pid) for pid in use.other_pids)
        findings.append(
            Diagnosis("problem", f"{name} use", f"process {pids} uses it", "end that process, or choose another GPU")
        )
    elif use.busy_percent is not None and use.busy_percent > GPU_BUSY_PERCENT:
        detail = f"it is {use.busy_percent}% busy with a process that is not visible from here"
        findings.append(Diagnosis("problem", f"{name} use", detail, "choose another GPU"))
    slowed = sorted(set(gpu.throttle_reasons or ()) & nvml.SLOWED_DOWN)
    if slowed:
        findings.append(
            Diagnosis("problem", f"{name} clock", f"slowed down: {', '.join(slowed)}", "check cooling and power")
        )
    return findings


def _build_findings(has_gpu: bool) -> list[Diagnosis]:
    """Return what the files of torch show."""
    build = torch_build()
    if build is None:
        return [Diagnosis("problem", "torch", "not installed", _INSTALL_TORCH)]
    if has_gpu and build.cuda is None:
        return [_cpu_build(build.version)]
    if has_gpu and not gpus_of_torch():
        return [_sees_no_gpu(build.version, build.cuda)]
    return [Diagnosis("ok", "torch", _built_for(build.version, build.cuda))]


def _torch_findings(has_gpu: bool) -> list[Diagnosis]:
    """Return what an import of torch shows."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Diagnosis("problem", "torch", f"does not import: {error}", _INSTALL_TORCH)]
    version, cuda = str(torch.__version__), torch.version.cuda
    if not has_gpu or torch.cuda.is_available():
        return [Diagnosis("ok", "torch", f"{_built_for(version, cuda)}, {torch.get_num_threads()} threads")]
    return [_cpu_build(version) if cuda is None else _sees_no_gpu(version, cuda)]


def _built_for(version: str, cuda: str | None) -> str:
    return f"{version}, built for {'CPU only' if cuda is None else f'CUDA {cuda}'}"


def _cpu_build(version: str) -> Diagnosis:
    detail = f"{version} is a CPU build, and this machine has an NVIDIA GPU"
    return Diagnosis("problem", "torch", detail, f"pip install --force-reinstall torch=={version.partition('+')[0]}")


def _sees_no_gpu(version: str, cuda: str | None) -> Diagnosis:
    detail = f"{version} for CUDA {cuda} sees no GPU, though this machine has one"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = (
        "update the driver" if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or update the driver"
    )
    return Diagnosis("problem", "torch", detail, remedy)


def _revision_findings() -> list[Diagnosis]:
    problem = git_state(ROOT).problem
    if problem is None:
        return []
    remedy = f"correct it, or set {REVISION_VARIABLE}"
    return [Diagnosis("problem", "revision", f"results cannot name the revision of this checkout: {problem}", remedy)]


def _library_findings(has_gpu: bool, is_thorough: bool) -> list[Diagnosis]:
    try:
        versions = library_versions() if is_thorough else {name: module_version(name) for name in DISTRIBUTIONS}
    except (ImportError, OSError):  # torch does not import; _torch_findings reports it
        return []
    findings = []
    for name in ("cudnn", "nccl", *DISTRIBUTIONS):
        version = versions.get(name)
        if version is not None and version.startswith("unusable"):
            findings.append(Diagnosis("problem", name, version, "keep the system's libraries off LD_LIBRARY_PATH"))
        elif version is not None:
            findings.append(Diagnosis("ok", name, version))
        elif name in DISTRIBUTIONS:
            why = "not installed" if has_gpu else "not installed; only useful on an NVIDIA GPU"
            findings.append(Diagnosis("missing", name, why, REMEDIES[name]))
    return findings
