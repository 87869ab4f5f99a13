"""Where workers run: GPUs by name, or the CPU; and how the ranks of a job share them. No torch here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.machine import nvml

#: A GPU busier than this, with no process to be seen, is someone's in another container.
GPU_BUSY_PERCENT = 5


@dataclass(frozen=True)
class Slot:
    """Room for one rank: a GPU, as CUDA_VISIBLE_DEVICES names it, or else the CPU, where all ranks of a job have room.

    `num_threads` is what OMP_NUM_THREADS is set to, None as it is.
    """

    gpu: str | None = None
    num_threads: int | None = None


#: What one worker takes: a slot or, for several ranks on GPUs, as many.
Place = tuple[Slot, ...]

ANYWHERE: Place = (Slot(),)


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU that CUDA would see: its name in CUDA_VISIBLE_DEVICES, and why it should be left alone, if so."""

    name: str
    in_use: str | None = None


def places(slots: Sequence[Slot], ep_size: int) -> list[Place]:
    """The slots as jobs of that EP size take them; fewer GPUs than ranks are one place, whose worker says so."""
    if any(slot.gpu is None for slot in slots):
        return [(slot,) for slot in slots]
    whole = len(slots) // ep_size * ep_size
    return [tuple(slots[first : first + ep_size]) for first in range(0, whole, ep_size)] or [tuple(slots)]


def variables(place: Place, at_once: int, num_ranks: int, cores: int) -> dict[str, str]:
    """What the environment of a worker at `place` says: its GPUs, and its share of the cores among those `at_once`."""
    found = {}
    gpus = [slot.gpu for slot in place if slot.gpu is not None]
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    threads = place[0].num_threads
    if threads is None and at_once * num_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, cores // (at_once * num_ranks))  # torch's launcher would give each rank one
    return found if threads is None else found | {"OMP_NUM_THREADS": str(threads)}


def visible_gpus() -> list[VisibleGpu]:
    """The GPUs that CUDA sees here, by CUDA_VISIBLE_DEVICES where it is set, and who uses them.

    Raises nvml.NvmlUnavailable.
    """
    found = nvml.read_all()
    gpus = [VisibleGpu(reading.uuid or str(index), in_use(use)) for index, (reading, use) in enumerate(found)]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return gpus
    visible = []
    for name in filter(None, map(str.strip, listed.split(","))):
        if name.isdecimal():  # an index of NVML's, as torch takes it; CUDA stops at the first that is none
            if int(name) >= len(gpus):
                break
            visible.append(gpus[int(name)])
        else:
            whole = [gpu for gpu in gpus if gpu.name.startswith(name)]
            visible.append(whole[0] if whole else VisibleGpu(name))
    return visible


def in_use(use: nvml.GpuUse) -> str | None:
    """By whom a GPU is used, None by nobody that can be seen."""
    if use.other_pids:
        return f"in use by process {', '.join(map(str, use.other_pids))}"
    if use.busy_percent is not None and use.busy_percent > GPU_BUSY_PERCENT:
        return f"{use.busy_percent}% busy with work of a process that cannot be seen from here"
    return None


def choose(device: str | None, wanted: str | None, share: bool) -> tuple[tuple[Slot, ...], list[str]]:
    """Slots on the GPUs that are `wanted` ("0,2"; "all" or None, all there are), and what is to be said of others.

    Numbers are torch's: places in the list of visible GPUs; `device`, "cuda:N", wants one. A GPU in use is left out
    unless they are shared. Without NVML, without GPUs and on device "cpu" it is one slot anywhere. Raises UsageError
    where GPUs are named that are not there, and where all are in use.
    """
    kind, _, index = (device or "").partition(":")
    if wanted is not None and (index or kind == "cpu"):
        raise UsageError(f"--gpus {wanted} beside --device {device}: leave one of the two out")
    if kind == "cpu":
        return ANYWHERE, []
    try:
        gpus = visible_gpus()
    except nvml.NvmlUnavailable as reason:
        if wanted is not None:
            raise UsageError(f"--gpus {wanted}: GPUs cannot be told apart here: {reason}; leave it out") from reason
        return ANYWHERE, []
    notes, free = [], []
    for number in _numbers(f"--device {device}" if index else f"--gpus {wanted}", index or wanted, len(gpus)):
        gpu = gpus[number]
        if gpu.in_use is None or share:
            free.append(Slot(gpu.name))
        else:
            notes.append(f"GPU {number} is {gpu.in_use}: not used; --share-gpus uses it all the same")
    if notes and not free:
        raise UsageError("\n".join(notes))
    return tuple(free) or ANYWHERE, notes


def _numbers(option: str, wanted: str | None, count: int) -> list[int]:
    if wanted is None or (wanted == "all" and count):
        return list(range(count))
    words = [word.strip() for word in wanted.split(",")]
    wrong = [word for word in words if not word.isdecimal() or int(word) >= count]
    if wrong:
        there = f"there are 0 to {count - 1}" if count else "there is none"
        raise UsageError(f"{option}: {', '.join(map(repr, wrong))}: no such GPU, {there}; give numbers, or all")
    return list(dict.fromkeys(map(int, words)))
