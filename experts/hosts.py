"""Find out on which hosts the ranks of a process group run."""

import contextlib
import platform
from pathlib import Path
from typing import Any

import torch.distributed as dist


def hosts_of(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """Return the host of each rank, in the order of the ranks. All ranks must call this function.

    Two values differ if the hosts differ, or if the ranks run in two containers of one host, which do not see each
    other's files.
    """
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found: list[tuple[str, str]] = tell(group, (platform.node(), boot))
    return found


def tell(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
