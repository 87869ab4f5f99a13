"""Compile kernels for an H200. This needs no GPU."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts.layers import BF16, F16, F32

POINTERS = {
    BF16: "*bf16",
    F16: "*fp16",
    F32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.uint32: "*u32",
}
POINTERS |= {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
OPTIONS = ("num_stages", "num_warps", "maxnreg")
#: Bytes of shared memory that one program may use on SM90.
SHARED_MEMORY_BYTES = 227 * 1024


def compile_launches(monkeypatch: pytest.MonkeyPatch, folder: Path, *modules: Any) -> dict[str, str]:
    """Make the modules compile their kernels instead of launching them.

    Return a dict that gets the PTX of each kernel's latest launch under the kernel's name.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    compiled: dict[str, str] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {name: constants[name] for name in OPTIONS if name in constants}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature: dict[str, str] = {}
        fixed = dict(constants)
        divisible: dict[tuple[int], Any] = {}
        for position, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if argument is None or (isinstance(argument, int) and argument == 1):
                fixed[name] = argument
            else:
                signature[name] = _type_of(argument)
            multiple = argument.data_ptr() if isinstance(argument, Tensor) else argument
            if isinstance(multiple, int) and multiple % 16 == 0:
                divisible[position,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(fixed, "constexpr")
        ordered = {name: signature[name] for name in kernel.arg_names}
        made = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
        source = made(fn=kernel, signature=ordered, constexprs=fixed, attrs=divisible)
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert result.metadata.shared <= SHARED_MEMORY_BYTES
        compiled[kernel.__name__] = result.asm["ptx"]

    for module in modules:
        monkeypatch.setattr(module, "launch", compile_only)
    return compiled


def assemble(ptx: str, folder: Path) -> str:
    """Return what Triton's assembler says of a kernel: registers, spills, and products that wait for each other."""
    import triton

    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(file), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if isinstance(argument, float | int):
        return "fp32" if isinstance(argument, float) else "i32"
    layout = f",{argument.layout!r}" if hasattr(argument, "layout") else ""  # Gluon's have one
    return f"tensordesc<{POINTERS[argument.base.dtype][1:]}{argument.block_shape}{layout}>"
