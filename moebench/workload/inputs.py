"""Make the seeded tensors of a case: tokens, routing, parameters and output gradient, the same for every backend.

The values are chosen so that faults show. Projections keep every intermediate value near 1. Biases are far from zero.
Masked rows are NaN. Clamped activations reach their limit at three standard deviations (LIMIT_IN_STDS in
moebench.workload.case says why).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from experts import MoEConfig
from moebench.workload.case import Case
from moebench.workload.driven import parameter_shapes
from moebench.workload.replay import Replay, replay

BIAS_STD = 0.5
DEFAULT_ZIPF_EXPONENT = 1.0
DEFAULT_EMPTY_SHARE = 0.5


@dataclass(frozen=True)
class Inputs:
    """The tensors that one forward and backward pass reads. Masked rows of x are NaN."""

    x_TD: Tensor  # the case's dtype
    token_mask_T: Tensor  # bool
    weights_TK: Tensor  # float32 (float64 where the case is float64); each row sums to 1
    indices_TK: Tensor  # int64
    grad_TD: Tensor  # gradient of the output; contiguous, the case's dtype

    @property
    def active_indices_TK(self) -> Tensor:
        """The expert indices [T, K] int64, with −1 where the token is masked."""
        return self.indices_TK.masked_fill(~self.token_mask_T.unsqueeze(-1), -1)

    def clone(self) -> "Inputs":
        return Inputs(*(getattr(self, field.name).clone() for field in fields(self)))

    def without_last(self) -> "Inputs":
        """Return the inputs without the last token. Without tokens, the inputs are unchanged."""
        return Inputs(*(getattr(self, field.name)[: max(0, len(self.x_TD) - 1)] for field in fields(self)))


def moe_config(case: Case) -> MoEConfig:
    """Return the configuration of a case's expert layer."""
    return MoEConfig(**{name: getattr(case, name) for name in MoEConfig.__dataclass_fields__})


def make_parameters(case: Case, device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """Return the stacked parameters of a rank's experts by name, in the case's dtype.

    Projections are drawn from N(0, 1/fan-in), and the first projection is multiplied by `case.gain`. Biases are drawn
    from N(0, 0.5²).
    """
    config = moe_config(case)
    generator = torch.Generator(device).manual_seed(_seed(case, rank))
    n_local_experts = case.n_routed_experts // case.ep_size
    deviations = {
        "gate_and_up_projs": case.gain / math.sqrt(case.dim),
        "down_projs": 1 / math.sqrt(case.moe_inter_dim),
    }
    return {
        name: torch.empty((n_local_experts, *shape[1:]), dtype=config.dtype, device=device).normal_(
            std=deviations.get(name, BIAS_STD), generator=generator
        )
        for name, shape in parameter_shapes(config).items()
    }


def _seed(case: Case, rank: int) -> int:
    return (case.seed + 0x9E3779B1 * rank) % 2**32  # torch's generator on a CPU reads only 32 bits of a seed


def make_inputs(case: Case, device: torch.device, rank: int = 0, routing_file: str | None = None) -> Inputs:
    """Return a rank's tokens, mask, routing and output gradient.

    If the routing is a trace, `routing_file` is its file, and the routing is the one of the first step of `replay`.
    Raises InputsError for a trace that does not fit the case.
    """
    generator = torch.Generator(device).manual_seed(_seed(case, rank) + 1)
    dtype = moe_config(case).dtype
    num_tokens = case.tokens_of_rank(rank)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    x_TD, grad_TD = normal(num_tokens, case.dim), normal(num_tokens, case.dim)
    choices = (num_tokens, case.n_activated_experts)
    weights_TK = torch.randn(
        choices, dtype=torch.promote_types(dtype, torch.float32), device=device, generator=generator
    ).softmax(dim=-1)
    indices_TK = draw_routing(case, generator, rank, routing_file)
    order_T = torch.randperm(num_tokens, device=device, generator=generator)
    token_mask_T = order_T < case.active_tokens_of_rank(rank)
    x_TD.masked_fill_(~token_mask_T.unsqueeze(-1), math.nan)
    return Inputs(x_TD, token_mask_T, weights_TK, indices_TK, grad_TD)


def redraw(inputs: Inputs, generator: torch.Generator) -> None:
    """Draw new x, routing weights and output gradient from the distributions of `make_inputs`, in place.

    The mask and the indices stay. Masked rows of x are NaN.
    """
    for values in (inputs.x_TD, inputs.grad_TD, inputs.weights_TK):
        values.normal_(generator=generator)
    inputs.weights_TK.copy_(inputs.weights_TK.softmax(dim=-1))
    inputs.x_TD.masked_fill_(~inputs.token_mask_T.unsqueeze(-1), math.nan)


def draw_routing(case: Case, generator: torch.Generator, rank: int = 0, routing_file: str | None = None) -> Tensor:
    """Return the expert indices [T, K] int64 of a rank's tokens.

    The experts of one token differ from each other, except in a recorded trace.
    """
    kind, _, argument = case.routing.partition(":")
    n_experts, num_tokens = case.n_routed_experts, case.tokens_of_rank(rank)
    device = generator.device
    if kind == "trace":
        return torch.from_numpy(replay(case, routing_file).indices_of(0, rank)).to(device, torch.int64)
    if kind == "balanced":
        return _balanced(case, num_tokens, generator)
    # Experts are drawn without replacement in proportion to their popularity: take the K largest values of
    # log popularity + Gumbel noise (Kool, van Hoof and Welling 2019, "Stochastic beams and where to find them").
    # All ranks have the same popular experts.
    popularity = torch.Generator(device).manual_seed(case.seed)
    by_rank = torch.randperm(n_experts, device=device, generator=popularity)
    log_popularity_E = torch.zeros(n_experts, device=device)
    if kind == "zipf":
        exponent = float(argument or DEFAULT_ZIPF_EXPONENT)
        log_popularity_E[by_rank] = -exponent * torch.arange(1, n_experts + 1, device=device).log()
    elif kind == "one-hot":
        log_popularity_E[by_rank[case.n_activated_experts :]] = -math.inf
    elif kind == "empty":
        share = float(argument or DEFAULT_EMPTY_SHARE)
        num_empty = min(round(share * n_experts), n_experts - case.n_activated_experts)
        log_popularity_E[by_rank[:num_empty]] = -math.inf
    uniform_TE = torch.rand((num_tokens, n_experts), device=device, generator=generator)
    gumbel_TE = -torch.log(-torch.log(uniform_TE.clamp(1e-20, 1 - 2**-24)))
    return (log_popularity_E + gumbel_TE).topk(case.n_activated_experts, dim=-1).indices


def _balanced(case: Case, num_tokens: int, generator: torch.Generator) -> Tensor:
    slots_TK = torch.arange(num_tokens * case.n_activated_experts, device=generator.device)
    indices_TK = (slots_TK % case.n_routed_experts).view(num_tokens, case.n_activated_experts)
    return indices_TK[torch.randperm(num_tokens, device=generator.device, generator=generator)]


def route(inputs: Inputs, replay: Replay, step: int, rank: int) -> None:
    """Give the tokens the routing of a step of a trace, in place."""
    inputs.indices_TK.copy_(torch.from_numpy(replay.indices_of(step, rank)))
