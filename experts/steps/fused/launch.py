"""Launch a kernel on the device of its tensors."""

import contextlib
from typing import Any

import torch
from torch import Tensor

#: Programs in Triton's interpreter, which runs them one after another.
_INTERPRETED_PROGRAMS = 3


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and a small number for Triton's interpreter."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `grid` programs of a kernel, or do nothing if the grid is empty.

    The tensors among `arguments` must be contiguous and on one device.
    """
    if 0 in grid:
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    with torch.cuda.device(tensor.device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)
