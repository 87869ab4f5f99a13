"""Choose where workers run (on GPUs by name, or on the CPU), and give the ranks of a job their slots."""

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.machine import nvml

#: A GPU that is busier than this, although no process is visible, is in use by another container.
GPU_BUSY_PERCENT = 5


@dataclass(frozen=True)
class Slot:
    """Room for one rank on a GPU, or for all ranks of a job on the CPU.

    `gpu` is the GPU's name in CUDA_VISIBLE_DEVICES; None for the CPU. `num_threads` is the value for OMP_NUM_THREADS;
    None means that `variables` chooses the number.
    """

    gpu: str | None = None
    num_threads: int | None = None


#: The slots that one worker takes: one slot or, for several ranks on GPUs, one slot for each rank.
Place = tuple[Slot, ...]

ANYWHERE: Place = (Slot(),)


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU that CUDA would see: its name in CUDA_VISIBLE_DEVICES, and who uses it (None if nobody does).

    `capability` is its compute capability; None if NVML does not tell it.
    """

    name: str
    in_use: str | None = None
    capability: tuple[int, int] | None = None


def places(slots: Sequence[Slot], ep_size: int) -> list[Place]:
    """Return the places that jobs of that EP size can take, each made of some of the slots.

    If there are fewer GPUs than ranks, all GPUs are one place, and its worker reports that they are too few.
    """
    if any(slot.gpu is None for slot in slots):
        return [(slot,) for slot in slots]
    whole = len(slots) // ep_size * ep_size
    return [tuple(slots[first : first + ep_size]) for first in range(0, whole, ep_size)] or [tuple(slots)]


def variables(
    place: Place, at_once: int, num_ranks: int, cores: int, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the environment variables of a worker at `place`: its GPUs, and its threads.

    The `at_once` workers that run side by side share the cores equally. They keep the threads that `inherited` names.
    """
    found = {}
    gpus = [slot.gpu for slot in place if slot.gpu is not None]
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    threads = place[0].num_threads
    if threads is None and at_once * num_ranks > 1 and "OMP_NUM_THREADS" not in inherited:
        threads = max(1, cores // (at_once * num_ranks))  # torch's launcher would give each rank one thread
    return found if threads is None else found | {"OMP_NUM_THREADS": str(threads)}


def visible_gpus() -> list[VisibleGpu]:
    """Return the GPUs that CUDA sees here, and who uses them.

    If the variable CUDA_VISIBLE_DEVICES is set, only its GPUs are returned. CUDA ignores the list from the first entry
    on that is not a GPU, and ignores the whole list if a GPU is in it twice. Raises nvml.NvmlUnavailable as `nvml.nvml`
    does.
    """
    found = nvml.read_all()
    gpus = [
        VisibleGpu(reading.uuid or str(index), in_use(use), use.capability)
        for index, (reading, use) in enumerate(found)
    ]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return gpus
    visible: list[VisibleGpu] = []
    for name in map(str.strip, listed.split(",")):
        gpu = _listed(name, gpus)
        if gpu is None:
            break
        if gpu in visible:
            return []
        visible.append(gpu)
    return visible


def _listed(name: str, gpus: Sequence[VisibleGpu]) -> VisibleGpu | None:
    """Return the GPU that an entry of CUDA_VISIBLE_DEVICES names, by its number, its uuid or the uuid's beginning.

    The result is None if there is no such GPU. NVML does not list the parts of a GPU ("MIG-…").
    """
    if re.fullmatch(r"\+?[0-9]{1,9}", name):  # torch reads it as NVML's index
        return gpus[int(name)] if int(name) < len(gpus) else None
    if name.startswith("MIG-"):
        return VisibleGpu(name)
    return next((gpu for gpu in gpus if name.startswith("GPU-") and gpu.name.startswith(name)), None)


def in_use(use: nvml.GpuUse) -> str | None:
    """Return a text that says who uses a GPU; None if no user is visible."""
    if use.other_pids:
        return f"in use by process {', '.join(map(str, use.other_pids))}"
    if use.busy_percent is not None and use.busy_percent > GPU_BUSY_PERCENT:
        return f"{use.busy_percent}% busy with a process that is not visible from here"
    return None


def choose(device: str | None, wanted: str | None, share: bool) -> tuple[tuple[Slot, ...], list[str]]:
    """Return one slot for each GPU that is `wanted` and free, and a note on each wanted GPU that is in use.

    `wanted` is "0,2", or "all" or None for all GPUs. The numbers are torch's: places in the list of visible GPUs. The
    device "cuda:N" wants GPU N. A GPU in use is left out unless `share` is true. Without NVML, without GPUs and on
    device "cpu" the result is ANYWHERE. Raises UsageError where a named GPU is not there, where all wanted GPUs are in
    use, and where `wanted` and `device` contradict each other.
    """
    kind, _, index = (device or "").partition(":")
    if wanted is not None and (index or kind == "cpu"):
        raise UsageError(f"--gpus {wanted} and --device {device}: both choose where to run; leave one of the two out")
    if kind == "cpu":
        return ANYWHERE, []
    try:
        gpus = visible_gpus()
    except nvml.NvmlUnavailable as reason:
        if wanted is not None:
            raise UsageError(
                f"--gpus {wanted}: moebench cannot list the GPUs here ({reason}); leave --gpus out"
            ) from reason
        return ANYWHERE, []
    notes, free = [], []
    for number in _numbers(f"--device {device}" if index else f"--gpus {wanted}", index or wanted, len(gpus)):
        gpu = gpus[number]
        if gpu.in_use is None or share:
            free.append(Slot(gpu.name))
        else:
            notes.append(f"GPU {number} is {gpu.in_use}, so the run leaves it out; --share-gpus uses it anyway")
    if notes and not free:
        raise UsageError(*notes)
    return tuple(free) or ANYWHERE, notes


def _numbers(option: str, wanted: str | None, count: int) -> list[int]:
    if wanted is None or (wanted == "all" and count):
        return list(range(count))
    words = [word.strip() for word in wanted.split(",")]
    wrong = [word for word in words if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= count]
    if wrong:
        there = f"there are 0 to {count - 1}" if count else "this machine has none"
        raise UsageError(
            f"{option}: {', '.join(map(reprlib.repr, wrong))}: no such GPU, {there}; give numbers of GPUs, or all"
        )
    return list(dict.fromkeys(map(int, words)))
