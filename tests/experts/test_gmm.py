"""The engine gmm with a fake of grouped_gemm.

The fake has the assertions of the real one. What the real one leaves unwritten is NaN in the fake.
"""

import functools
import sys
from typing import Any

import pytest
import torch

from experts import GroupedExpertsDeepEP, Unsupported
from experts.compute import ExpertParameters, gmm
from experts.engines import get_engine
from experts.steps import eager
from tests.experts import fake_grouped_gemm
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    Batch,
    Named,
    assert_near,
    assert_same,
    expected,
    layer,
    moe_config,
    random_batch,
    random_parameters,
    run,
)
from tests.experts.oracle import PARAMETERS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

fake_libraries = pytest.mark.usefixtures("fake_libraries")


def check(batch: Batch, dtype: torch.dtype = F32, **fields: object) -> Named:
    config = moe_config(**{"dtype": dtype, "expert_bias": True, **fields})
    parameters = random_parameters(config)
    found = run(layer("gmm", config, parameters), batch)
    assert_near(found, expected(config, parameters, batch), dtype)
    return found


@pytest.mark.usefixtures("no_libraries")
def test_without_the_library_a_layer_can_be_made_and_its_forward_says_what_to_install() -> None:
    made = GroupedExpertsDeepEP(moe_config(dtype=BF16))
    assert (made.engine_name, made.dispatcher_name) == ("gmm", "deepep")
    made.load_state_dict(random_parameters(made.config))
    batch = random_batch(made.config)
    with pytest.raises(Unsupported, match=r"^gmm: grouped_gemm does not import .*; with nvcc: .*'moebench\[gmm\]'$"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)


@fake_libraries
@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, BF16, "grouped_gemm needs a CUDA GPU, the device is cpu; use torch_mm or the loop"),
        (CUDA, F32, "grouped_gemm takes bfloat16, not float32; use torch_mm or the loop"),
        (CUDA, F16, "grouped_gemm takes bfloat16, not float16; use torch_mm or the loop"),
        (CUDA, BF16, None),
    ],
    ids=str,
)
def test_unsupported_gives_the_reason(device: torch.device, dtype: torch.dtype, reason: str | None) -> None:
    given = gmm.unsupported(device, moe_config(dtype=dtype))
    assert (given and given.reason) == reason


@fake_libraries
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_output_and_every_gradient(dtype: torch.dtype, activation: str, bias: bool, after: bool) -> None:
    """Expert 1 has no token, one token has no expert, and one token chose an expert twice."""
    indices = [[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2], [3, 2]]
    check(
        random_batch(moe_config(dtype=dtype), indices=indices),
        dtype,
        expert_activation=activation,
        expert_bias=bias,
        apply_router_weight_after_down=after,
        activation_limit=0.83,
    )


@fake_libraries
@pytest.mark.parametrize("busy", [0, 1, 3])
def test_experts_without_tokens_get_zeros(busy: int) -> None:
    found = check(random_batch(moe_config(), indices=[[busy, -1], [-1, busy], [busy, busy]]))
    for name in PARAMETERS:
        assert found[name].flatten(1).any(dim=1).tolist() == [expert == busy for expert in range(4)], name


@fake_libraries
@pytest.mark.parametrize("why", ["no tokens", "masked", "index"])
def test_without_rows_the_library_is_not_called(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asserts that there are rows. Every gradient is zeros, also if masked rows hold NaN."""
    batch = random_batch(moe_config(), num_tokens=0 if why == "no tokens" else 5)
    if why == "masked":
        nan = torch.full_like(batch.x, torch.nan)
        batch = batch.with_(token_mask=torch.zeros_like(batch.token_mask), x=nan, grad=nan)
    if why == "index":
        batch = batch.with_(indices=torch.full_like(batch.indices, -1))
    assert not any(tensor.any() for tensor in check(batch).values())


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return a list that gets the number of rows and the sizes of the groups of each product."""
    seen: list[tuple[int, list[int]]] = []

    def record(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, *transposed: bool) -> torch.Tensor:
        seen.append((a.shape[0], batch_sizes.tolist()))
        return fake_grouped_gemm.gmm(a, b, batch_sizes, *transposed)

    monkeypatch.setattr(sys.modules["grouped_gemm.backend"], "gmm", record)
    return seen


@fake_libraries
def test_the_library_gets_the_sizes_of_the_groups(multiplied: list[tuple[int, list[int]]]) -> None:
    check(random_batch(moe_config(), indices=[[3, 0], [-1, -1], [-1, 3]]))
    assert [sizes for _, sizes in multiplied] == [[1, 0, 0, 2]] * 6


@fake_libraries
def test_only_the_rows_of_local_experts_are_multiplied(multiplied: list[tuple[int, list[int]]]) -> None:
    """Rows of other ranks' experts would take memory."""
    config = moe_config()
    batch = random_batch(config, indices=[[3, 0], [1, -1], [2, 3]])
    whole = random_parameters(config)
    local = ExpertParameters(whole["gate_and_up_projs"][2:], whole["down_projs"][2:], None, None)
    get_engine("gmm").compute(batch.x, batch.weights, batch.indices, local, config, 2)
    assert multiplied == [(3, [1, 2])] * 2


@fake_libraries
def test_rows_are_gathered_before_the_host_waits_for_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    gather, on_host = eager.gather_rows, gmm.Sizes.on_host.func

    def gathered(*arguments: Any) -> torch.Tensor:
        happened.append("gather")
        return gather(*arguments)

    def waited(sizes: gmm.Sizes) -> torch.Tensor:
        happened.append("wait")
        return on_host(sizes)

    monkeypatch.setattr(eager, "gather_rows", gathered)
    once = functools.cached_property(waited)
    once.__set_name__(gmm.Sizes, "on_host")
    monkeypatch.setattr(gmm.Sizes, "on_host", once)
    check(random_batch(moe_config()))
    assert happened[:2] == ["gather", "wait"]
    assert happened.count("wait") == 1, "backward does not wait"


@fake_libraries
def test_values_of_masked_rows_change_nothing() -> None:
    batch = random_batch(moe_config())
    batch.token_mask[[0, 3, 6]] = False
    for tensor in (batch.x, batch.weights, batch.grad):
        tensor[~batch.token_mask] = torch.nan
    check(batch)


@fake_libraries
@pytest.mark.parametrize("window", [(0, 2), (2, 3), (5, 1)], ids=lambda window: f"{window[0]}+{window[1]}")
def test_a_window_of_local_experts_gives_the_part_of_the_oracle(window: tuple[int, int]) -> None:
    first, count = window
    config = moe_config(n_routed_experts=6, n_activated_experts=3, expert_bias=True)
    batch = random_batch(config, indices=[[5, 0, 3], [1, -1, 2], [4, 3, 5], [0, 0, 1], [3, 3, 2], [2, 5, 4]])
    whole = random_parameters(config)
    local = {name: p[first : first + count].clone().requires_grad_() for name, p in whole.items()}
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    stacked = ExpertParameters(*(local[name] for name in PARAMETERS))
    output = get_engine("gmm").compute(x, weights, batch.indices, stacked, config, first)
    output.backward(batch.grad)
    outside = (batch.indices < first) | (batch.indices >= first + count)
    right = expected(config, whole, batch.with_(indices=batch.indices.masked_fill(outside, -1)))
    right |= {name: right[name][first : first + count] for name in whole}
    found = {"output": output, "x": x.grad, "weights": weights.grad, **{name: p.grad for name, p in local.items()}}
    assert_near(found, right, F32)


@fake_libraries
def test_tensors_of_any_strides_are_made_contiguous_for_the_library() -> None:
    """Parameters are transposed views, tokens are not contiguous, and the gradient is the expanded one of a sum."""
    config = moe_config(expert_bias=True)
    parameters = random_parameters(config)
    made = layer("gmm", config)
    views = {name: p.transpose(0, 1).contiguous().transpose(0, 1) for name, p in parameters.items()}
    made.load_state_dict(views, assign=True)
    batch = random_batch(config)
    wide = torch.stack([batch.x, batch.x], dim=-1)[..., 0]
    batch = batch.with_(x=wide, grad=torch.ones(()).expand(batch.grad.shape))
    assert not made.down_projs.is_contiguous()
    assert not batch.x.is_contiguous()
    assert_near(run(made, batch), expected(config, parameters, batch), F32)


@fake_libraries
def test_gradients_accumulate() -> None:
    """Zeros for experts without tokens are written into the new gradient, not into the gradient before."""
    config = moe_config(expert_bias=True)
    made = layer("gmm", config)
    full, part = random_batch(config), random_batch(config, seed=5, indices=[[1, 2], [2, 1], [1, -1]])
    once = {name: g.clone() for name, g in run(made, full).items()}
    more = {name: g.clone() for name, g in run(made, part).items()}
    run(made, full)
    made(part.x, part.token_mask, part.weights, part.indices).backward(part.grad)
    assert_same(
        {name: p.grad for name, p in made.named_parameters()},
        {name: once[name] + more[name] for name, _ in made.named_parameters()},
    )


@fake_libraries
def test_parameters_may_have_another_dtype_than_x() -> None:
    config = moe_config(expert_bias=True)
    batch = random_batch(config, indices=[[0, 1], [1, 3]])
    batch = batch.with_(x=batch.x.to(BF16), grad=batch.grad.to(BF16))
    parameters = random_parameters(config)
    found = run(layer("gmm", config, parameters), batch)
    assert_near(found, expected(config, parameters, batch), BF16)
    assert (found["output"].dtype, found["down_projs"].dtype) == (BF16, F32)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_the_real_library_on_rows_that_are_not_cut(masked: str) -> None:
    """Rows past the last group stay unwritten. Then they hold NaN here."""
    pytest.importorskip("grouped_gemm")
    config = moe_config(dtype=BF16, n_routed_experts=8, dim=128, moe_inter_dim=64, expert_bias=True)
    batch = random_batch(config, num_tokens=300)
    batch.indices[batch.indices == 5] = 6
    batch.token_mask[:: 1 if masked == "all" else 3] = masked == "none"
    right = expected(config, random_parameters(config), batch)
    made = layer("gmm", config, device="cuda")
    for _ in range(2):
        blocks = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 20) for _ in range(20)]
        del blocks
        assert_near(run(made, batch.map(lambda tensor: tensor.cuda())), right, BF16)
