"""The kernels of the steps, compiled for an H200. This needs no GPU.

They compile in bfloat16, which the interpreter cannot show, and they read and write 16 bytes at a time.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation
from tests.experts.compiled import compile_launches
from tests.experts.layers import BF16, F32, moe_config

pytest.importorskip("triton")

TOKENS, K, EXPERTS, DIM, INTER = 64, 8, 128, 2048, 768
ROWS = TOKENS * K


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Return a dict that gets the PTX of each kernel that is launched from now on. No kernel runs."""
    from experts.steps import fused  # noqa: F401

    modules = [sys.modules[f"experts.steps.fused.{name}"] for name in ("sort", "rows", "activation", "reduce")]
    return compile_launches(monkeypatch, tmp_path, *modules)


def test_steps_compile_for_sm90_and_move_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    from experts.steps import fused
    from experts.steps.fused import sort as fused_sort

    def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    maps = [zeros(ROWS, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, zeros(EXPERTS, dtype=torch.int32), K)
    x_TD, y_ND, bias_LD = zeros(TOKENS, DIM), zeros(ROWS, DIM), zeros(EXPERTS, DIM)
    weights_TK = zeros(TOKENS, K, dtype=F32)
    fused.sort_by_expert(maps[0].view(TOKENS, K), 0, EXPERTS)
    many = 1 + fused_sort.FEW_CHOICES // K
    fused.sort_by_expert(zeros(many, K, dtype=torch.int64), 0, EXPERTS)
    fused.gather_rows(x_TD, permutation, weights_TK)
    fused.sum_rows(y_ND, permutation, weights_TK, bias_LD)
    fused.sum_by_expert(y_ND, permutation, weights_TK)
    fused.dot_rows(x_TD, permutation, None, bias_LD)
    assert {*ptx} == {"_sort_few", "_count", "_place", "_gather", "_sum", "_sum_parts", "_dot"}
    check_activation(fused, permutation, weights_TK, ptx)
    for name, code in ptx.items():
        assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu]16\b", code), f"{name} moves single elements"
        if name not in ("_sort_few", "_count", "_place"):
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
