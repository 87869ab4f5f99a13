"""The memory of a train step in FP8, on the shapes that an H200 measured. No kernel runs: torch only allocates.

test_fp8.py runs this file in Triton's interpreter.
"""

import importlib
import pkgutil
import sys

import pytest
import torch

import experts
from experts import MoEConfig
from experts.registry import get_backend
from moebench.measure.memory import measure_memory
from tests.experts.layers import BF16, INTERPRETED

MIB = 2**20
#: Shapes (experts, top-k, dim, inter), tokens, and what an H200 measured for `triton`, the peak of a train step in MiB.
MEASURED = [((32, 4, 2880, 2880), 8192, 1823), ((32, 8, 7168, 2048), 4096, 2929), ((128, 8, 2048, 768), 16384, 1988)]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no kernel run, and let the layers take the kernels for Hopper."""
    for package in ("compute", "fp8", "gemm", "steps"):
        for module in pkgutil.walk_packages(
            importlib.import_module(f"experts.{package}").__path__, f"experts.{package}."
        ):
            importlib.import_module(module.name)
    for name, found in list(sys.modules.items()):
        if name.startswith("experts."):
            for function, instead in (("launch", lambda *_, **__: None), ("runs_on_hopper", lambda *_: True)):
                if hasattr(found, function):
                    monkeypatch.setattr(found, function, instead)
    monkeypatch.setattr(experts.layer, "check_indices", lambda *_: None)  # the kernel that masks them has not run


def peak(
    backend: str, shape: tuple[int, int, int, int], num_tokens: int, keep: bool = True, of_tokens: bool = True
) -> tuple[float, float]:
    """Return the peak of a train step of the sweep `fp8`, and the quantised weights that the layer keeps, in MiB."""
    num_experts, k, dim, inter = shape
    config = MoEConfig(n_routed_experts=num_experts, n_activated_experts=k, dim=dim, moe_inter_dim=inter, dtype=BF16)
    layer = get_backend(backend).build(config)
    if not keep:
        layer.weight_cache = None
    x, grad = (torch.empty(num_tokens, dim, dtype=BF16) for _ in range(2))
    weights, indices = torch.empty(num_tokens, k), torch.zeros(num_tokens, k, dtype=torch.int64)
    leaves = [x.requires_grad_(of_tokens), weights.requires_grad_(), *layer.parameters()]

    def forward() -> torch.Tensor:
        layer.weights_changed()
        output: torch.Tensor = layer(x, torch.ones(num_tokens, dtype=torch.bool), weights, indices)
        return output

    for _ in range(2):  # the first call allocates what the layer keeps
        for leaf in leaves:
            leaf.grad = None
        measured = measure_memory(forward, lambda output: output.backward(grad), torch.device("cpu"))
    assert measured.peak_bytes is not None
    return measured.peak_bytes / MIB, layer.cached_weight_bytes / MIB


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
@pytest.mark.parametrize(("shape", "num_tokens", "measured"), MEASURED)
@pytest.mark.usefixtures("without_kernels")
def test_a_train_step_in_fp8_takes_no_more_than_one_in_16_bits_and_one_copy_of_the_weights(
    shape: tuple[int, int, int, int], num_tokens: int, measured: int
) -> None:
    num_experts, _, dim, inter = shape
    bound, nothing = peak("triton", shape, num_tokens)
    assert (round(bound), nothing) == (measured, 0)
    found, kept = peak("triton_fp8", shape, num_tokens)
    assert found <= bound
    assert kept <= 1.001 * 3 * num_experts * dim * inter / MIB
    found, nothing = peak("triton_fp8", shape, num_tokens, keep=False)
    assert found <= bound
    assert nothing == 0


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
@pytest.mark.usefixtures("without_kernels")
def test_tokens_without_gradients_leave_less_room() -> None:
    """Then the peak in 16 bits is lower, because no gradients of their rows are there before those of the weights."""
    shape, num_tokens = (32, 4, 2880, 2880), 8192
    bound, _ = peak("triton", shape, num_tokens, of_tokens=False)
    assert bound < peak("triton", shape, num_tokens)[0] - 45, "the gradient of the tokens alone has 45 MiB"
    assert peak("triton_fp8", shape, num_tokens, of_tokens=False)[0] <= bound


@pytest.mark.parametrize(
    ("shape", "num_rows", "freed_columns", "part"),
    [
        ((32, 2880, 2880), 32768, 8640, 3072),  # all at once
        ((32, 2880, 2880), 32768, 5760, 1536),
        ((32, 2048, 7168), 32768, 11264, 1280),
        ((128, 768, 2048), 131072, 3584, 2048),
    ],
)
def test_the_outputs_gradient_is_transposed_in_as_few_parts_as_memory_allows(
    shape: tuple[int, int, int], num_rows: int, freed_columns: int, part: int
) -> None:
    pytest.importorskip("triton")
    from experts.fp8 import gradients

    num_row_blocks = num_rows // 128 + shape[0]
    assert gradients._part_of_columns(shape, num_rows, num_row_blocks, freed_columns) == part


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
@pytest.mark.usefixtures("without_kernels")
def test_with_many_rows_per_expert_the_rows_take_no_more_than_in_16_bits() -> None:
    """The rows take more memory than the gradients of the weights."""
    shape, num_tokens = (4, 2, 1024, 3584), 2048
    found, _ = peak("triton_fp8", shape, num_tokens, keep=False)
    bound, _ = peak("triton", shape, num_tokens)
    assert found <= bound
