"""Settings of all tests: one thread per test process, GPU tests skipped without a GPU, and a fake of NVML."""

import gc
import math
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the test processes share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: A folder that does not exist: the tiles that the user has stored must not change what tests see.
os.environ["EXPERTS_TILES"] = str(Path(__file__).parent / "no-tiles")

# A shell's background jobs and nohup ignore these signals, and child processes inherit that. Restore the defaults.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import replace_functions_once

    replace_functions_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--certify", action="store_true", help="run tests marked certify at their full size")


@pytest.fixture(scope="session")
def certify(request: pytest.FixtureRequest) -> bool:
    """Whether a test marked `certify` runs at its full size (`make certify`) or at a part of it (`make test`)."""
    return bool(request.config.getoption("certify"))


def _left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases of tests marked `certify(share=…)` that `make test` leaves out. The seed is the test's name."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("certify")
        if mark is not None and "share" in mark.kwargs:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for name, some in cases.items():
        share = some[0].get_closest_marker("certify").kwargs["share"]  # type: ignore[union-attr]
        left_out |= set(some) - set(random.Random(name).sample(some, math.ceil(share * len(some))))
    return left_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("certify"):
        left_out = _left_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    # files whose tests take long go first, so that no process waits for one of them at the end
    slow = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collectstart() -> None:
    """Collect no garbage while tests are collected and their modules imported: nearly all that is made stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let later garbage collections skip the modules and tests that are there now, as the worker does with its modules.

    A measured job collects garbage several times, which would take most of a second each time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


class FakeNvml:
    """A fake of pynvml. A test describes its GPUs.

    It raises NVMLError for a query before nvmlInit, for a GPU that it does not have, and for the queries named in
    `unsupported`. `gpus` maps each uuid to the GPU's facts, in NVML's order. `init_error` makes nvmlInit raise. `open`
    is the number of calls of nvmlInit minus the number of calls of nvmlShutdown.
    """

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.gpus: dict[str, SimpleNamespace] = {}
        self.unsupported: set[str] = set()
        self.init_error: str | None = None
        self.open = 0

    def add_gpu(self, uuid: str, **facts: Any) -> SimpleNamespace:
        h200 = {
            "name": "NVIDIA H200",
            "memory_bytes": 150_754_820_096,
            "power_limit_mw": 700_000,
            "max_clocks_mhz": {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201},
            "clocks_mhz": {self.NVML_CLOCK_SM: 345, self.NVML_CLOCK_MEM: 3200},
            "power_mw": 77_500,
            "temperature_c": 31,
            "reasons": 0x001,
            "pids": [],
            "busy_percent": 0,
            "capability": (9, 0),
        }
        self.gpus[uuid] = SimpleNamespace(**{**h200, **facts})
        return self.gpus[uuid]

    def _ask(self, query: str) -> None:
        if self.open <= 0:
            raise self.NVMLError("Uninitialized")
        if query in self.unsupported:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._ask("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._ask("nvmlSystemGetDriverVersion")
        return "580.159.03"

    def nvmlDeviceGetCount(self) -> int:
        self._ask("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        self._ask("nvmlDeviceGetHandleByIndex")
        return list(self.gpus.values())[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> SimpleNamespace:
        self._ask("nvmlDeviceGetHandleByUUID")
        if uuid not in self.gpus:
            raise self.NVMLError("Not Found")
        return self.gpus[uuid]

    def nvmlDeviceGetUUID(self, handle: SimpleNamespace) -> str:
        self._ask("nvmlDeviceGetUUID")
        return next(uuid for uuid, gpu in self.gpus.items() if gpu is handle)

    def nvmlDeviceGetName(self, handle: SimpleNamespace) -> Any:
        self._ask("nvmlDeviceGetName")
        return handle.name

    def nvmlDeviceGetCudaComputeCapability(self, handle: SimpleNamespace) -> Any:
        self._ask("nvmlDeviceGetCudaComputeCapability")
        return handle.capability

    def nvmlDeviceGetMemoryInfo(self, handle: SimpleNamespace) -> SimpleNamespace:
        self._ask("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=handle.memory_bytes)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: SimpleNamespace) -> Any:
        self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return handle.power_limit_mw

    def nvmlDeviceGetMaxClockInfo(self, handle: SimpleNamespace, clock: int) -> Any:
        self._ask("nvmlDeviceGetMaxClockInfo")
        return handle.max_clocks_mhz[clock]

    def nvmlDeviceGetClockInfo(self, handle: SimpleNamespace, clock: int) -> Any:
        self._ask("nvmlDeviceGetClockInfo")
        return handle.clocks_mhz[clock]

    def nvmlDeviceGetPowerUsage(self, handle: SimpleNamespace) -> Any:
        self._ask("nvmlDeviceGetPowerUsage")
        return handle.power_mw

    def nvmlDeviceGetTemperature(self, handle: SimpleNamespace, sensor: int) -> Any:
        self._ask("nvmlDeviceGetTemperature")
        assert sensor == self.NVML_TEMPERATURE_GPU
        return handle.temperature_c

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: SimpleNamespace) -> Any:
        self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        return handle.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: SimpleNamespace) -> list[SimpleNamespace]:
        self._ask("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid) for pid in handle.pids]

    def nvmlDeviceGetUtilizationRates(self, handle: SimpleNamespace) -> SimpleNamespace:
        self._ask("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=handle.busy_percent)


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Replace pynvml until the test ends. The fake has no GPU at first."""
    library = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def pytest_terminal_summary(terminalreporter: Any) -> None:  # pytest names its class since 9
    """Print what tests recorded under the name `summary`: for example the cells of a matrix that were not run."""
    for report in [one for key in ("passed", "failed") for one in terminalreporter.stats.get(key, [])]:
        for name, text in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(text)
