"""Corner cases in which expert layers were wrong before: every engine against the oracle. See also test_tensors.py."""

import pytest
import torch

from tests.experts.layers import (
    BF16,
    F16,
    Setup,
    assert_near,
    assert_same,
    check,
    expected,
    on_cpu_and_gpu,
    on_every_setup,
    random_batch,
    random_parameters,
    run,
    some_masked,
)

GATED = ("swiglu", "swigluoai", "quick_geglu", "geglu")
ACTIVATIONS = (*GATED, "relu2")


def assert_exactly_zero(gradients: dict[str, torch.Tensor], *experts: int) -> None:
    for name in ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"):
        for expert in experts:
            assert not gradients[name][expert].any(), f"{name}[{expert}]"


@on_every_setup
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient(setup: Setup, activation: str, bias: bool) -> None:
    config = setup.config(
        expert_activation=activation,
        expert_bias=bias,
        activation_alpha=1.3,
        activation_limit=0.93,  # no h of this batch is near enough for rounding to move it across the limit
        swiglu_limit=0.71 if bias else 0.0,
    )
    check(setup, config, random_batch(config))


@on_every_setup
def test_zero_tokens(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    found = check(setup, config, random_batch(config, num_tokens=0))
    assert found["output"].shape == (0, config.dim)
    assert_exactly_zero(found, 0, 1, 2, 3)


@on_every_setup
def test_one_token(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    check(setup, config, random_batch(config, num_tokens=1))


@on_every_setup
@pytest.mark.parametrize(
    "empty",
    [[0], [1], [3], [0, 1], [0, 2, 3], [0, 1, 2]],
    ids=lambda empty: "without-" + "-".join(map(str, empty)),
)
def test_experts_without_tokens_get_zero_gradients(setup: Setup, empty: list[int]) -> None:
    config = setup.config(n_activated_experts=1, expert_bias=True)
    busy = [expert for expert in range(4) if expert not in empty]
    found = check(setup, config, random_batch(config, indices=[busy[t % len(busy)] for t in range(7)]))
    assert_exactly_zero(found, *empty)


@on_every_setup
@pytest.mark.parametrize("why", ["masked", "index"])
def test_all_experts_without_tokens(setup: Setup, why: str) -> None:
    config = setup.config(expert_bias=True)
    batch = random_batch(config)
    if why == "masked":
        batch = batch.with_(token_mask=torch.zeros_like(batch.token_mask))
    else:
        batch = batch.with_(indices=torch.full_like(batch.indices, -1))
    for tensor in check(setup, config, batch).values():
        assert not tensor.any()


@on_every_setup
@pytest.mark.parametrize("expert", [0, 2, 3])
def test_all_tokens_to_one_expert(setup: Setup, expert: int) -> None:
    config = setup.config(n_activated_experts=1, expert_bias=True)
    check(setup, config, random_batch(config, indices=[expert] * 20))


@on_every_setup
def test_one_expert_twice_in_a_tokens_choices(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    check(setup, config, random_batch(config, indices=[[1, 1], [0, 1], [3, 3], [1, 1], [2, 0]]))


@on_every_setup
def test_all_tokens_twice_to_one_expert(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    check(setup, config, random_batch(config, indices=[[2, 2]] * 5))


@on_every_setup
def test_an_index_of_minus_one_contributes_nothing(setup: Setup) -> None:
    config = setup.config(n_activated_experts=3, expert_bias=True)
    batch = random_batch(config, indices=[[-1, 0, 3], [2, -1, 1], [-1, -1, -1], [3, 1, -1], [0, 1, 2]])
    weights = batch.weights.masked_fill(batch.indices < 0, torch.nan)
    found = check(setup, config, batch.with_(weights=weights))
    assert not found["weights"][batch.indices < 0].any()
    assert not found["output"][2].any()
    assert not found["x"][2].any()


@on_every_setup
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_values_of_masked_rows_change_nothing(setup: Setup, bias: bool, poison: float) -> None:
    """They change no other token, as `x.sum() * 0` would, and no expert that only masked tokens chose."""
    config = setup.config(expert_bias=bias)
    batch = some_masked(random_batch(config, indices=[[3, 0], [0, 1], [1, 0], [3, 1], [1, 0], [0, 3]]))
    parameters = random_parameters(config)
    masked = ~batch.token_mask
    clean = run(setup.layer(config, parameters), batch)
    assert_near(clean, expected(config, parameters, batch), config.dtype)
    poisoned = batch.with_(
        x=batch.x.masked_fill(masked[:, None], poison),
        weights=batch.weights.masked_fill(masked[:, None], poison),
        grad=batch.grad.masked_fill(masked[:, None], poison),
    )
    found = run(setup.layer(config, parameters), poisoned)
    assert_same(found, clean)
    for name in ("output", "x", "weights"):
        assert not found[name][masked].any(), name
    for name in parameters:
        assert not found[name][2:].any(), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@on_cpu_and_gpu
def test_masked_tokens_with_indices_of_any_integer_dtype(setup: Setup, dtype: torch.dtype) -> None:
    """With 256 experts, the last is 255. In uint8, −1 is also 255."""
    unsigned = dtype is torch.uint8
    config = setup.config(n_routed_experts=256 if unsigned else 120, dim=8, expert_bias=True)
    last = config.n_routed_experts - 1
    batch = some_masked(random_batch(config, indices=[[last, 0], [0, 1], [1, last], [3, last], [1, 0], [last, 3]]))
    check(setup, config, batch.with_(indices=batch.indices.to(dtype)))


@on_cpu_and_gpu
def test_a_masked_token_may_have_any_index(setup: Setup) -> None:
    config = setup.config()
    batch = some_masked(random_batch(config))
    parameters = random_parameters(config)
    right = expected(config, parameters, batch)
    indices = batch.indices.masked_fill(~batch.token_mask[:, None], 1 << 40)
    assert_near(run(setup.layer(config, parameters), batch.with_(indices=indices)), right, config.dtype)


@on_every_setup
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_moe_inter_dim_may_equal_dim(setup: Setup, activation: str) -> None:
    """Then transposed weights also fit. relu2 has only square weights."""
    config = setup.config(moe_inter_dim=16, expert_activation=activation, expert_bias=True)
    check(setup, config, random_batch(config))


@on_every_setup
def test_as_many_tokens_as_dim_and_as_many_experts_as_tokens(setup: Setup) -> None:
    config = setup.config(n_routed_experts=8, n_activated_experts=8, dim=8, moe_inter_dim=8, expert_bias=True)
    check(setup, config, random_batch(config, num_tokens=8))


@on_every_setup
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_router_weight_after_down(setup: Setup, bias: bool) -> None:
    config = setup.config(apply_router_weight_after_down=True, expert_bias=bias)
    check(setup, config, some_masked(random_batch(config)))


@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@on_cpu_and_gpu
def test_the_router_weight_is_applied_before_or_after_the_down_projection(
    setup: Setup, dtype: torch.dtype, after: bool
) -> None:
    """Only rounding shows the difference: a weight just above 1 is lost when it multiplies an activation of 1."""
    config = setup.config(
        dtype=dtype, expert_activation="relu2", n_activated_experts=1, apply_router_weight_after_down=after
    )
    eps = torch.finfo(dtype).eps
    parameters = {name: torch.zeros_like(p) for name, p in random_parameters(config).items()}
    parameters["gate_and_up_projs"][:, 0, 0] = 1
    parameters["down_projs"][:, 0] = 2 - eps
    batch = random_batch(config, indices=[2])
    batch = batch.with_(x=torch.ones_like(batch.x), weights=torch.full_like(batch.weights, 1 + 0.4 * eps))
    output = run(setup.layer(config, parameters), batch)["output"]
    assert output.unique().tolist() == [2.0 if after else 2 - eps]


@on_every_setup
def test_a_token_is_summed_in_float32(setup: Setup) -> None:
    """Sum 256 and seven ones. A sum in bfloat16 would stay at 256, in any order. float16 has no such problem."""
    config = setup.config(n_routed_experts=8, n_activated_experts=8, expert_bias=True)
    parameters = {name: torch.zeros_like(p) for name, p in random_parameters(config).items()}
    parameters["down_proj_bias"] += 1
    parameters["down_proj_bias"][0] = 256
    batch = random_batch(config, indices=[list(range(8))]).with_(weights=torch.ones(1, 8))
    found = run(setup.layer(config, parameters), batch)["output"]
    assert torch.equal(found.cpu(), torch.full((1, 16), 263.0).to(config.dtype))


@on_every_setup
def test_bias_gradients_are_summed_in_float32(setup: Setup) -> None:
    config = setup.config(n_activated_experts=1, expert_bias=True)
    batch = random_batch(config, indices=[1] * 600).with_(weights=torch.ones(600, 1))
    batch = batch.with_(grad=torch.ones_like(batch.grad))
    found = run(setup.layer(config), batch)["down_proj_bias"]
    assert torch.equal(found[1].cpu(), torch.full((16,), 600.0).to(config.dtype))
