"""Say which backends can run here by what is installed and by the GPU, without an import of torch or of a library.

`experts.registry` imports the libraries and asks the backends. That is exact, and takes some seconds. What this module
calls unavailable is unavailable. Of a backend whose library nobody imported yet it says only that it is installed.
"""

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from experts import catalog
from moebench.errors import UsageError
from moebench.machine.versions import torch_build

#: The files of NVIDIA's driver, on Linux and on Windows' Linux. Without one of them, torch sees no GPU.
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))

Capability = tuple[int, int]


@dataclass(frozen=True)
class BackendLine:
    """A backend, and whether it can run on the given device.

    `unavailable` says why it cannot; it is None if the backend can. `is_tried` is false where a library of the backend
    was not imported, so that its import may still fail.
    """

    name: str
    unavailable: str | None
    is_tried: bool = True

    @property
    def here(self) -> str:
        """What a table says about the backend."""
        if self.unavailable:
            return f"unavailable: {self.unavailable}"
        return "available" if self.is_tried else "installed, not tried"


def backends(device: str | None) -> tuple[BackendLine, ...]:
    """Return all backends, and whether each of them can run on `device`, by what is installed.

    If `device` is None, it is a GPU if torch can see one, else the CPU. Raises UsageError for a GPU that is not there.
    """
    capability = _capability(device)
    built_in = [BackendLine(one.name, _why_not(one, capability), _library(one) is None) for one in catalog.BACKENDS]
    names = {one.name for one in catalog.BACKENDS}
    others = sorted({point.name for point in entry_points(group=catalog.ENTRY_POINT_GROUP)} - names)
    return (*built_in, *(BackendLine(name, None, is_tried=False) for name in others))


def _why_not(backend: catalog.BackendEntry, here: Capability | None) -> str | None:
    """Return why a backend cannot run on a GPU of that compute capability, or on the CPU where `here` is None."""
    library, needed = _library(backend), backend.capability
    is_interpreted = library == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if needed is not None and here is None and not is_interpreted:
        return "needs a CUDA GPU, the device is cpu"
    is_later = backend.last_major is not None and here is not None and here[0] > backend.last_major
    if needed is not None and here is not None and (here < needed or is_later):
        return f"needs SM{needed[0]}{needed[1]}, this is SM{here[0]}{here[1]}"
    if library is not None and importlib.util.find_spec(library) is None:
        return catalog.missing(library)
    return None


def _library(backend: catalog.BackendEntry) -> str | None:
    return backend.library if backend.engine is None else backend.engine.library


def _capability(device: str | None) -> Capability | None:
    """Return the compute capability of the GPU that a device names; None for the CPU.

    A GPU whose capability nobody tells gets a capability that suffices for every backend.
    """
    if device == "cpu":
        return None
    seen = gpus_of_torch()
    index = int((device or "").partition(":")[2] or 0)
    if device is not None and index >= len(seen):
        build = torch_build()
        version = "is not installed" if build is None else build.version
        raise UsageError(
            f"device = {device!r}: torch {version} sees {len(seen)} CUDA GPUs; choose another device, or run "
            "`moebench doctor` to see why"
        )
    return seen[index] if seen else None


def gpus_of_torch() -> list[Capability]:
    """Return the compute capabilities of the GPUs that torch should see.

    Only where a driver is there that NVML does not answer for, this function imports torch and asks it.
    """
    build = torch_build()
    if build is None or build.cuda is None:
        return []
    from moebench.machine.gpus import visible_gpus
    from moebench.machine.nvml import NvmlUnavailable

    try:
        return [gpu.capability or (999, 0) for gpu in visible_gpus()]
    except NvmlUnavailable:
        if not any(driver.exists() for driver in _DRIVERS):
            return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(index) for index in range(count)]
