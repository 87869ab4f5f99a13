"""Choose each token's experts and their routing weights, as the routers of published models do."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experts.activations import accumulation_dtype
from experts.autocast import autocast_off
from experts.config import MoEConfig
from experts.errors import ConfigError

#: DeepSeek-V3 adds it to the sum by which it divides.
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a router chooses experts. The fields have NeMo AutoModel's names; the defaults are a plain softmax router.

    score_func: "softmax" or "sigmoid" of a token's logits gives its scores [E].
    norm_topk_prob: whether the weights of a token's choices are divided by their sum.
    n_expert_groups, n_limited_groups: the experts stand in `n_expert_groups` groups of equal size, and a token chooses
    only from its `n_limited_groups` best groups.
    correction_bias: whether a bias [E], which gets no gradient, is added to the scores to choose, but not to weigh.
    route_scale: a factor of all routing weights.
    """

    score_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    correction_bias: bool = False
    route_scale: float = 1.0


class Router(nn.Module):
    """A linear layer without bias, and the choice of the K best experts.

    The formula is DeepSeek-V3's (`DeepseekV3MoE` in transformers, 2026-11); Qwen3, Mixtral and OLMoE use parts of it.
    The parameter `weight` [E, D] has the config's dtype. Logits, scores and routing weights are float32 (float64 for
    float64). The bias is the buffer `e_score_correction_bias` [E] in float32. A group is as good as its best expert or,
    with a correction bias, as the sum of its two best.

    Raises ConfigError for groups that do not fit the experts, and for an unknown `score_func`.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoEConfig, router: RouterConfig) -> None:
        super().__init__()
        _check(config, router)
        self.config, self.router = config, router
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim, dtype=config.dtype))
        bias = torch.zeros(config.n_routed_experts) if router.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routing weights [T, K] and the indices [T, K] int64 of the chosen experts of tokens x [T, D]."""
        router = self.router
        acc = accumulation_dtype(x_TD.dtype)
        with autocast_off(x_TD):
            logits_TE = F.linear(x_TD.to(acc), self.weight.to(acc))
        scores_TE = logits_TE.softmax(dim=-1) if router.score_func == "softmax" else logits_TE.sigmoid()
        bias_E = self.e_score_correction_bias
        choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
        if router.n_limited_groups < router.n_expert_groups:
            choice_TE = self._in_best_groups(choice_TE)
        indices_TK = choice_TE.topk(self.config.n_activated_experts, dim=-1).indices
        weights_TK = scores_TE.gather(1, indices_TK)
        if router.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        return weights_TK * router.route_scale, indices_TK

    def _in_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Return the scores with −∞ for the experts outside of each token's best groups."""
        grouped = choice_TE.unflatten(1, (self.router.n_expert_groups, -1))
        summed = 1 if self.e_score_correction_bias is None else 2
        goodness = grouped.topk(summed, dim=-1).values.sum(dim=-1)
        best = goodness.topk(self.router.n_limited_groups, dim=-1).indices
        is_out = torch.ones_like(goodness, dtype=torch.bool).scatter(1, best, False)
        allowed_TE: Tensor = grouped.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(1)
        return allowed_TE

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Draw the weight from a normal distribution with standard deviation `init_std`, and set the bias to zero.

        A weight on the meta device is first allocated on `buffer_device`.
        """
        if self.weight.is_meta:
            self.to_empty(device=buffer_device)
        self.weight.normal_(std=init_std)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()


def _check(config: MoEConfig, router: RouterConfig) -> None:
    groups, limited, experts = router.n_expert_groups, router.n_limited_groups, config.n_routed_experts
    if router.score_func not in ("softmax", "sigmoid"):
        raise ConfigError(f"score_func = {router.score_func!r} is not a score of a router; give 'softmax' or 'sigmoid'")
    if groups < 1 or experts % groups:
        raise ConfigError(
            f"n_expert_groups = {groups} does not divide n_routed_experts = {experts}; groups have equal sizes"
        )
    if not 1 <= limited <= groups:
        raise ConfigError(f"n_limited_groups = {limited} must be from 1 to n_expert_groups = {groups}")
    if limited * (experts // groups) < config.n_activated_experts:
        raise ConfigError(
            f"n_limited_groups = {limited} groups of {experts // groups} experts hold fewer than n_activated_experts = "
            f"{config.n_activated_experts}; raise n_limited_groups"
        )
    if router.correction_bias and limited < groups and experts // groups < 2:
        raise ConfigError(
            f"n_expert_groups = {groups} gives groups of one expert; with correction_bias a group needs two experts"
        )
