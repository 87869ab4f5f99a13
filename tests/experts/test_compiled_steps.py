"""The kernels as compiled for an H200, which needs no GPU: that they compile in bfloat16, which the interpreter cannot
show, and read and write 16 bytes at a time.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation
from tests.experts.layers import BF16, F16, F32, moe_config

triton = pytest.importorskip("triton")

TOKENS, K, EXPERTS, DIM, INTER = 64, 8, 128, 2048, 768
ROWS = TOKENS * K
POINTERS = {BF16: "*bf16", F16: "*fp16", F32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """By kernel, what the launches from now on compile to; none runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from experts.steps import fused  # noqa: F401

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled: dict[str, str] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        signature: dict[str, str] = {}
        fixed = dict(constants)
        divisible: dict[tuple[int], Any] = {}
        for position, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if argument is None or (isinstance(argument, int) and argument == 1):
                fixed[name] = argument
            elif isinstance(argument, Tensor):
                signature[name] = POINTERS[argument.dtype]
            else:
                signature[name] = "fp32" if isinstance(argument, float) else "i32"
            multiple = argument.data_ptr() if isinstance(argument, Tensor) else argument
            if isinstance(multiple, int) and multiple % 16 == 0:
                divisible[position,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(fixed, "constexpr")
        ordered = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=ordered, constexprs=fixed, attrs=divisible)
        compiled[kernel.__name__] = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    for module in ("sort", "rows", "activation", "reduce"):
        monkeypatch.setattr(sys.modules[f"experts.steps.fused.{module}"], "launch", compile_only)
    return compiled


def test_steps_compile_for_sm90_and_move_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    from experts.steps import fused

    def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    maps = [zeros(ROWS, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, zeros(EXPERTS, dtype=torch.int32), K)
    x_TD, y_ND, bias_LD = zeros(TOKENS, DIM), zeros(ROWS, DIM), zeros(EXPERTS, DIM)
    weights_TK = zeros(TOKENS, K, dtype=F32)
    fused.sort_by_expert(maps[0].view(TOKENS, K), 0, EXPERTS)
    fused.gather_rows(x_TD, permutation, weights_TK)
    fused.sum_rows(y_ND, permutation, weights_TK, bias_LD)
    fused.sum_by_expert(y_ND, permutation, weights_TK)
    fused.dot_rows(x_TD, permutation, None, bias_LD)
    assert {*ptx} == {"_count", "_place", "_gather", "_sum", "_sum_parts", "_dot"}
    check_activation(fused, permutation, weights_TK, ptx)
    for name, code in ptx.items():
        assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu]16\b", code), f"{name} moves single elements"
        if name not in ("_count", "_place"):
            assert "ld.global.v4.b32" in code, f"{name} reads less than 16 bytes at a time"


def check_activation(fused: Any, permutation: Permutation, weights_TK: Tensor, ptx: dict[str, str]) -> None:
    for activation in ("swiglu", "quick_geglu", "geglu", "relu2"):
        config = moe_config(dim=DIM, moe_inter_dim=INTER, expert_activation=activation, dtype=BF16)
        width = INTER * (1 if activation == "relu2" else 2)
        h_NH, grad_NI = torch.zeros(ROWS, width, dtype=BF16), torch.zeros(ROWS, INTER, dtype=BF16)
        bias_LH = torch.zeros(EXPERTS, width, dtype=BF16)
        fused.activate(h_NH, permutation, weights_TK, bias_LH, config)
        fused.activate_backward(h_NH, grad_NI, permutation, weights_TK, bias_LH, config, again=True)
        ptx[f"{activation} forward"], ptx[f"{activation} backward"] = ptx["_activate"], ptx["_activate_backward"]
