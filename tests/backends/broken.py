"""Provide backends that fail or break their process, each in one way, and two backends that only refuse to run."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import ClassVar

import torch
from torch import Tensor, nn

from experts import GroupedExperts, MoEConfig, Unsupported


class RaisesInBuild(GroupedExperts):
    def __init__(self, config: MoEConfig) -> None:
        raise ZeroDivisionError("no experts today")


class _BreaksInForward(GroupedExperts):
    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        self.break_down()
        return super().forward(x, token_mask, weights, indices)

    def break_down(self) -> None:
        raise NotImplementedError


class RaisesInForward(_BreaksInForward):
    def break_down(self) -> None:
        raise RuntimeError("cuBLAS is in a bad mood")


class RaisesInBackward(GroupedExperts):
    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        output = super().forward(x, token_mask, weights, indices)
        if output.requires_grad:
            output.register_hook(self._raise)
        return output

    @staticmethod
    def _raise(grad: Tensor) -> None:
        raise RuntimeError("no way back")


class SaysUnsupported(GroupedExperts):
    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> str:
        return f"runs on paper, not on {device.type}"


class RaisesUnsupported(_BreaksInForward):
    def break_down(self) -> None:
        raise Unsupported("found out too late")


class RaisesMemoryError(_BreaksInForward):
    def break_down(self) -> None:
        raise MemoryError


class OutOfMemory(_BreaksInForward):
    """Asks torch's allocator for a pebibyte, which is more than an address space has."""

    def break_down(self) -> None:
        torch.empty(2**50, dtype=torch.uint8)


class OutOfGpuMemory(_BreaksInForward):
    def break_down(self) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


class BreaksTheGpu(_BreaksInForward):
    """Fails an assertion on the device. After the failure, the process cannot use that GPU."""

    def break_down(self) -> None:
        torch.zeros(3, device="cuda")[torch.full((3,), 99, device="cuda")]
        torch.cuda.synchronize()


class Hangs(_BreaksInForward):
    def break_down(self) -> None:
        threading.Event().wait()


class Segfaults(_BreaksInForward):
    def break_down(self) -> None:
        ctypes.string_at(0)


class KillsItself(_BreaksInForward):
    def break_down(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(_BreaksInForward):
    def break_down(self) -> None:
        os._exit(3)


class LeavesAChild(_BreaksInForward):
    """Exits and leaves a child process in the process group. The child's standard output is the worker's log."""

    def break_down(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        print(f"child {child.pid}", flush=True)
        os._exit(4)


class DiesAfterItsRecord(_BreaksInForward):
    """Computes the right result, but its process dies between this job and the next, as after an asynchronous fault."""

    def break_down(self) -> None:
        events = sys.modules["__main__"].Events
        emit = events.emit

        def emit_and_die(self: object, kind: str, **fields: object) -> None:
            emit(self, kind, **fields)
            if kind == "record":
                os._exit(5)

        events.emit = emit_and_die


class NotAModule:
    """Not an nn.Module."""

    def __init__(self, config: MoEConfig) -> None:
        pass


class OtherParameters(nn.Module):
    """Its parameters are not in the stacked layout."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.dim))


class FillsTheHost(_BreaksInForward):
    """Allocates memory up to the limit of its process. After the error, the memory is free again."""

    def break_down(self) -> None:
        taken = []
        while True:
            taken.append(torch.empty(2**30, dtype=torch.uint8))


class ChangesItsProcess(_BreaksInForward):
    """Raises, and makes every later silu in its process slightly wrong."""

    def break_down(self) -> None:
        silu = torch.nn.functional.silu
        torch.nn.functional.silu = lambda *given: silu(*given) * 1.001  # type: ignore[method-assign]
        raise RuntimeError("and nobody knows what I did")


class RoundsForAll(GroupedExperts):
    """Sets torch so that every later float32 matrix product of the process may be rounded more coarsely."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        torch.set_float32_matmul_precision("medium")


class ReadsOutOfBounds(_BreaksInForward):
    """Makes an illegal memory access on the GPU, in a Triton kernel."""

    def break_down(self) -> None:
        from illegal import read_out_of_bounds

        read_out_of_bounds()


class HangsTheGpu(_BreaksInForward):
    """Starts kernels that take hours. The host waits in the driver, and only SIGKILL ends the wait."""

    def break_down(self) -> None:
        for _ in range(1000):
            torch.cuda._sleep(2**40)
        torch.cuda.synchronize()


class FillsTheGpu(_BreaksInForward):
    """Allocates all memory of the GPU piece by piece, and keeps it. For a later job in this process, none is left."""

    taken: ClassVar[list[Tensor]] = []

    def break_down(self) -> None:
        while True:
            self.taken.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
