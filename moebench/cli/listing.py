"""List the sweeps, the backends and the parity checks. For a backend that cannot run, the list has the reason."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.errors import UsageError
from moebench.machine.backends import BackendLine
from moebench.machine.backends import backends as by_what_is_installed
from moebench.report.tables.boxes import plain
from moebench.workload.spec import available_sweeps, load_sweep

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SweepLine:
    """A sweep in suites/."""

    name: str
    num_jobs: int
    description: str


@dataclass(frozen=True)
class Listing:
    """All sweeps and backends. `as_dict` returns them as plain data, and rich can print them."""

    sweeps: tuple[SweepLine, ...]
    backends: tuple[BackendLine, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = plain()
        for name in ("sweep", "jobs", "description"):
            table.add_column(name, justify="right" if name == "jobs" else "left")
        for line in self.sweeps:
            table.add_row(line.name, str(line.num_jobs), line.description)
        yield table
        yield Text()
        yield _backend_table(self.backends)


def _backend_table(lines: tuple[BackendLine, ...]) -> Table:
    table = plain()
    table.add_column("backend")
    table.add_column("here")
    for line in lines:
        table.add_row(line.name, line.here)
    return table


def everything(device: str | None) -> Listing:
    """Return all sweeps of suites/ and all backends, and whether each backend can run on `device`.

    If `device` is None, the device is a GPU if there is one, else the CPU. Raises UsageError if the device does not
    exist. Nothing is imported to find out: see moebench.machine.backends.
    """
    sweeps = []
    for path in available_sweeps().values():
        sweep = load_sweep(path)
        sweeps.append(SweepLine(path.stem, sweep.num_jobs(), sweep.description))
    return Listing(tuple(sweeps), by_what_is_installed(device))


def backends(is_thorough: bool = False) -> Table:
    """Return a table of the backends, with the reason for each that cannot run on this machine's default device.

    If `is_thorough` is true, every backend is imported and asked, which takes some seconds.
    """
    return _backend_table(_backends(None) if is_thorough else by_what_is_installed(None))


def available_backends(device: str | None) -> list[str]:
    """Return the names of the backends that can run on `device`, without the layers of other libraries (peers)."""
    from experts.registry import PEERS

    return [line.name for line in _backends(device) if line.unavailable is None and line.name not in PEERS]


def checks() -> Table:
    """Return a table of the checks of `moebench parity`, with the fault that each check looks for."""
    from moebench.parity.checks import CHECKS

    table = plain()
    table.add_column("check", no_wrap=True)
    table.add_column("looks for")
    for check in CHECKS.values():
        table.add_row(check.name, check.looks_for)
    return table


def _backends(device: str | None) -> tuple[BackendLine, ...]:
    from experts.registry import backend_names  # imports torch, which commands that only open results must not import
    from moebench.machine.environment import gpu_numbers
    from moebench.measure.worker import pick_device

    asked = pick_device(device)
    try:
        gpu_numbers(str(asked))
    except ValueError as absent:
        raise UsageError(str(absent)) from absent
    return tuple(BackendLine(name, _why_not(name, asked)) for name in backend_names())


def _why_not(name: str, device: "torch.device") -> str | None:
    from experts.registry import get_backend

    try:
        reason = get_backend(name).unsupported(device)
    except Exception as error:  # this may import another package: an error there must not hide the other backends
        return f"{type(error).__name__}: {error}"
    return None if reason is None else reason.reason
