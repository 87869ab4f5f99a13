"""Long sums lose no digits: the gradients of the biases and of the routing weights, against sums in float64.

A sum of N float32 numbers, one after the other, can be wrong by N roundings of the sum of their sizes. A sum of sums is
wrong by a few.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import eager
from tests.experts.layers import F32, F64, INTERPRETED, Batch, Setup, on_cpu_and_gpu, random_batch, run

ROUNDING = 2.0**-24
#: A sum may be wrong by so many roundings of the sum of its terms' sizes. One after the other, they are above 25.
MOST_ROUNDINGS = 8


def assert_exact(found: Tensor, terms: Tensor) -> None:
    """Check sums [C] against the sums of float64 terms [N, C]. The sums may be rounded to their own dtype."""
    right, sizes = terms.sum(0), terms.abs().sum(0)
    allowed = MOST_ROUNDINGS * ROUNDING * sizes + right.abs() * torch.finfo(found.dtype).eps
    errors = (found.cpu().to(F64) - right).abs()
    assert (errors <= allowed).all(), f"{errors.tolist()}, but allowed are {allowed.tolist()}"


def one_expert(config: Any, weights: Tensor, grad: Tensor) -> Batch:
    num_tokens = len(weights)
    batch = random_batch(config, indices=torch.zeros(num_tokens, 1, dtype=torch.int64))
    return batch.with_(weights=weights, grad=grad)


@on_cpu_and_gpu
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
def test_a_down_bias_gradient_whose_terms_cancel(setup: Setup, after: bool) -> None:
    """Half of the tokens add 1, the others subtract 0.9999: the sum is 0.20483. One after the other it is 0.23732."""
    config = setup.config(
        n_routed_experts=1, n_activated_experts=1, expert_bias=True, apply_router_weight_after_down=after
    )
    weights, grad = torch.ones(4096, 1), torch.ones(4096, config.dim, dtype=config.dtype)
    weights[2048:], grad[2048:] = 0.9999, -1
    found = run(setup.layer(config), one_expert(config, weights, grad))["down_proj_bias"][0]
    terms = weights.to(F64) * grad.to(F64)
    assert float(terms.sum(0)[0]) == pytest.approx(0.20483, abs=1e-5)
    assert_exact(found, terms)


@on_cpu_and_gpu
def test_bias_gradients_of_many_rows(setup: Setup) -> None:
    """Random terms with a mean far from zero, then the same terms negative: partial sums are large, sums are small.

    With a down projection of 1 and a gate of 40, the up bias's gradient is the gradient of the output times the weight.
    """
    config = setup.config(n_routed_experts=1, n_activated_experts=1, expert_bias=True, dim=8, moe_inter_dim=8)
    generator = torch.Generator().manual_seed(3)
    grad = (torch.rand(3000, 8, generator=generator) + 0.5).to(config.dtype)
    grad = torch.cat([grad, -grad])
    weights = torch.rand(6000, 1, generator=generator) * 1e-4 + 0.25
    parameters = {
        "gate_and_up_projs": torch.zeros(1, 8, 16),
        "down_projs": torch.eye(8).unsqueeze(0),
        "gate_up_proj_bias": torch.tensor([[40.0] * 8 + [1.0] * 8]),
        "down_proj_bias": torch.zeros(1, 8),
    }
    found = run(setup.layer(config, parameters), one_expert(config, weights, grad))
    terms = weights.to(F64) * grad.to(F64)
    assert_exact(found["down_proj_bias"][0], terms)
    if config.dtype is F32:  # other dtypes round each term
        assert_exact(found["gate_up_proj_bias"][0, 8:] / 40, terms)


@on_cpu_and_gpu
def test_the_gradient_of_a_routing_weight_of_wide_rows(setup: Setup) -> None:
    """It is the dot product of the output's gradient with the expert's output, which is here the down bias."""
    config = setup.config(n_routed_experts=1, n_activated_experts=1, expert_bias=True, dim=4096, moe_inter_dim=8)
    grad = torch.ones(3, 4096, dtype=config.dtype)
    grad[:, 2048:] = -1
    bias = torch.ones(1, 4096).to(config.dtype)
    bias[:, 2048:] = 0.9999 if config.dtype is F32 else 0.999
    parameters = {
        "gate_and_up_projs": torch.zeros(1, 4096, 16),
        "down_projs": torch.zeros(1, 8, 4096),
        "gate_up_proj_bias": torch.zeros(1, 16),
        "down_proj_bias": bias,
    }
    found = run(setup.layer(config, parameters), one_expert(config, torch.ones(3, 1), grad))["weights"]
    terms = (bias.to(F64) * grad.to(F64)).t()
    assert_exact(found[:, 0], terms)


on_cpu_and_gpu_fused = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@on_cpu_and_gpu_fused
def test_fused_sum_by_expert_of_many_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum of a program gets 6000 rows on a GPU. In the interpreter, smaller programs give each sum 1000 rows."""
    from experts.steps import fused

    num_rows = 100 + 16 * 32 * 6000
    if device == "cpu":
        num_rows = 100 + 2 * 1000
        for name, value in {"MAX_PARTS": 1, "ROWS": 2, "ROWS_OF_SUM": 64}.items():
            monkeypatch.setattr(f"experts.steps.fused.reduce.{name}", value)
    indices = torch.zeros(num_rows, 1, dtype=torch.int64)
    indices[:100] = 1
    permutation = eager.sort_by_expert(indices.to(device), 0, 2)
    rows_NC, weights = torch.ones(num_rows, 2), torch.full((num_rows, 1), 0.9999)
    rows_NC[:, 1] = 0.3
    rows_NC[num_rows // 2 :] *= -0.9997
    found = fused.sum_by_expert(rows_NC.to(device), permutation, weights.to(device))
    terms = rows_NC.to(F64) * weights.to(F64)[permutation.row_to_slot_N.cpu()]
    for sums_C, part_NC in zip(found, terms.split([num_rows - 100, 100]), strict=True):
        assert_exact(sums_C, part_NC)


@pytest.mark.parametrize("counts", [[1], [16], [17, 0, 16], [0, 0], [300, 1, 0, 4097, 15, 0], [0, 257, 256, 255]])
@pytest.mark.parametrize("num_others", [0, 5])
def test_eager_sum_by_expert_of_any_number_of_rows(counts: list[int], num_others: int) -> None:
    """Groups of whole blocks of rows, of a row more or less, without rows. Rows past the last group are NaN."""
    generator = torch.Generator().manual_seed(sum(counts))
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    indices = torch.cat([indices, torch.full((num_others,), -1)])
    permutation = eager.sort_by_expert(indices.unsqueeze(1), 0, len(counts))
    rows_NC = torch.randn(len(indices), 3, generator=generator)
    rows_NC[sum(counts) :] = torch.nan
    found = eager.sum_by_expert(rows_NC, permutation)
    for sums_C, part_NC in zip(found, rows_NC[: sum(counts)].split(counts), strict=True):
        assert_exact(sums_C, part_NC.to(F64))
    assert found.shape == (len(counts), 3)
    assert not found[[count == 0 for count in counts]].any()
