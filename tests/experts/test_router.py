"""The router against formulas written for one token and one expert at a time, and against worked examples."""

import math
from typing import Any

import pytest
import torch

from experts import ConfigError
from experts.router import Router, RouterConfig
from tests.experts.layers import BF16, F32, F64, moe_config

EXPERTS, CHOSEN, DIM = 12, 4, 5
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised": {"norm_topk_prob": True},
    "scaled": {"route_scale": 2.5},
    "sigmoid": {"score_func": "sigmoid"},
    "softmax-groups": {"n_expert_groups": 4, "n_limited_groups": 2},
    "deepseek-v3": {
        "score_func": "sigmoid",
        "norm_topk_prob": True,
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "correction_bias": True,
        "route_scale": 2.5,
    },
}


def router_of(name: str, dtype: torch.dtype = F64) -> Router:
    config = moe_config(n_routed_experts=EXPERTS, n_activated_experts=CHOSEN, dim=DIM, dtype=dtype)
    made = Router(config, RouterConfig(**ROUTERS[name]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator))
        if made.e_score_correction_bias is not None:
            made.e_score_correction_bias.copy_(torch.randn(EXPERTS, generator=generator) / 2)
    return made


def tokens(num_tokens: int = 40) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(6), dtype=F64)


def choose(name: str, made: Router, x: list[float]) -> dict[int, float]:
    """Return the chosen experts of one token with their weights."""
    rules = RouterConfig(**ROUTERS[name])
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in made.weight.tolist()]
    if rules.score_func == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    bias = [0.0] * EXPERTS if made.e_score_correction_bias is None else made.e_score_correction_bias.tolist()
    value = [score + add for score, add in zip(scores, bias, strict=True)]
    size, summed = EXPERTS // rules.n_expert_groups, 2 if rules.correction_bias else 1

    def goodness(group: int) -> float:
        return sum(sorted(value[group * size : (group + 1) * size])[-summed:])

    groups = sorted(range(rules.n_expert_groups), key=goodness)[-rules.n_limited_groups :]
    allowed = [expert for expert in range(EXPERTS) if expert // size in groups]
    best = sorted(allowed, key=lambda expert: value[expert])[-CHOSEN:]
    total = sum(scores[expert] for expert in best) if rules.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * rules.route_scale for expert in best}


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_the_formula(name: str) -> None:
    made, x = router_of(name), tokens()
    weights, indices = made(x)
    assert weights.dtype is F64
    assert indices.dtype is torch.int64
    for row, row_weights, row_indices in zip(x.tolist(), weights.tolist(), indices.tolist(), strict=True):
        found = dict(zip(row_indices, row_weights, strict=True))
        assert found == pytest.approx(choose(name, made, row), rel=1e-12)


def test_the_rules_change_choices_and_weights() -> None:
    """Otherwise the tests above would show nothing about them."""
    chosen = {name: router_of(name)(tokens())[1].sort(dim=1).values for name in ROUTERS}
    assert torch.equal(chosen["softmax"], chosen["sigmoid"])
    for name in ("softmax-groups", "deepseek-v3"):
        assert not torch.equal(chosen["softmax"], chosen[name])
    assert not torch.equal(chosen["softmax-groups"], chosen["deepseek-v3"])


def test_an_example_of_deepseek_v3_worked_by_hand() -> None:
    """Two groups of two experts. The better single expert is in group 0, but group 1 has the larger sum."""
    config = moe_config(n_routed_experts=4, n_activated_experts=2, dim=1, dtype=F32)
    rules = RouterConfig(**ROUTERS["deepseek-v3"] | {"n_expert_groups": 2, "n_limited_groups": 1})
    made = Router(config, rules)
    scores = torch.tensor([0.9, 0.1, 0.5, 0.4])
    with torch.no_grad():
        made.weight.copy_(torch.logit(scores).unsqueeze(1))
        assert made.e_score_correction_bias is not None
        made.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.1, 0.3]))
    weights, indices = made(torch.ones(1, 1))
    assert indices.tolist() == [[3, 2]]  # 0.7 and 0.6 with the bias: 1.3 against 1.0 of group 0
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.5]]) / 0.9 * 2.5)


@pytest.mark.parametrize("name", ["renormalised", "deepseek-v3"])
def test_gradients_are_those_of_the_weights_alone(name: str) -> None:
    made, x = router_of(name), tokens(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: made(given)[0], (x,))
    made(x)[0].sum().backward()
    assert made.weight.grad is not None
    assert [key for key, _ in made.named_parameters()] == ["weight"]  # the bias is a buffer


def test_low_precision_tokens_have_scores_in_float32() -> None:
    made = router_of("softmax", BF16)
    x = tokens().to(BF16)
    with torch.autocast("cpu", BF16):
        weights, indices = made(x)
    wide = router_of("softmax", BF16).to(F32)
    right_weights, right_indices = wide(x.float())
    assert weights.dtype is F32
    assert torch.equal(weights, right_weights)
    assert torch.equal(indices, right_indices)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score_func": "tanh"}, "score_func = 'tanh' is not a score of a router"),
        ({"n_expert_groups": 5}, "n_expert_groups = 5 does not divide n_routed_experts = 12"),
        ({"n_expert_groups": 4, "n_limited_groups": 5}, "n_limited_groups = 5 must be from 1 to n_expert_groups = 4"),
        ({"n_expert_groups": 4, "n_limited_groups": 1}, "n_limited_groups = 1 groups of 3 experts hold fewer than"),
        ({"n_expert_groups": 12, "n_limited_groups": 4, "correction_bias": True}, "groups of one expert"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(fields: dict[str, Any], said: str) -> None:
    config = moe_config(n_routed_experts=EXPERTS, n_activated_experts=CHOSEN, dim=DIM)
    with pytest.raises(ConfigError, match=said):
        Router(config, RouterConfig(**fields))


def test_init_weights_allocates_a_router_on_the_meta_device() -> None:
    with torch.device("meta"):
        config = moe_config(n_routed_experts=EXPERTS, n_activated_experts=CHOSEN, dim=DIM)
        made = Router(config, RouterConfig(**ROUTERS["deepseek-v3"]))
    made.init_weights(torch.device("cpu"), init_std=0.5)
    assert made.weight.std().item() == pytest.approx(0.5, rel=0.3)
    assert made.e_score_correction_bias is not None
    assert made.e_score_correction_bias.tolist() == [0.0] * EXPERTS
