"""What is measured: a `Case` is one workload, a `Job` is one backend on it. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moebench.workload.models import shape_name

DTYPES = ("float64", "float32", "bfloat16", "float16")
ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")
UNGATED = ("relu2",)

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Activation = Literal["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"]
Mode = Literal["forward", "train"]
RankLoad = Literal["even", "uneven", "one-empty"]
#: What cases must share to share their weights.
Weights = tuple[object, ...]
#: More is a slip of the pen: no machine has the memory, and columns are integers of 64 bits.
LARGEST = 2**31
Positive = Annotated[int, Field(gt=0, lt=LARGEST)]

# kind[:argument]; moebench.workload.inputs draws them, docs/sweeps.md says what each means
ROUTING_PATTERN = r"^(uniform|balanced|one-hot|zipf(:\d+(\.\d+)?)?|empty(:0?\.\d+)?|trace:.+)$"


#: Clamped activations meet their limit at so many standard deviations of the first projection's output: often enough to
#: be seen where the limit is missing, seldom enough that rounding across it stays below the budgets.
LIMIT_IN_STDS = 3.0


class CaseFields(BaseModel):
    """The fields of a case, which a row of results has too: each is an axis of sweeps and a column of results.

    A field stands at its column's place. Its description is the column's meaning in docs/results.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Annotated[
        Mode, Field(description="`forward` (under no_grad) or `train` (forward and backward, no optimizer)")
    ] = "forward"
    num_tokens: Annotated[
        int,
        Field(
            ge=0,
            lt=LARGEST,
            description="tokens per rank; where `rank_load` is not `even`, the tokens of the ranks that have most",
        ),
    ]
    n_routed_experts: Annotated[Positive, Field(description="experts, over all ranks")]
    n_activated_experts: Annotated[Positive, Field(description="experts that each token chooses")]
    dim: Annotated[Positive, Field(description="width of a token")]
    moe_inter_dim: Annotated[Positive, Field(description="width inside an expert")]
    model: Annotated[str | None, Field(description="preset that the shape comes from; a shape of its own has none")] = (
        None
    )
    dtype: Annotated[
        Dtype,
        Field(description="`float64`, `float32`, `bfloat16` or `float16`; FP8 is part of a backend's name"),
    ] = "bfloat16"
    expert_activation: Annotated[Activation, Field(description="activation between the two projections")] = "swiglu"
    expert_bias: Annotated[bool, Field(description="whether both projections have biases")] = False
    activation_alpha: Annotated[float, Field(description="alpha of `quick_geglu` and `swigluoai`")] = 1.702
    activation_limit: Annotated[
        float, Field(gt=0, description="where `quick_geglu` and `swigluoai` clamp what the first projection gives")
    ] = 7.0
    swiglu_limit: Annotated[
        float, Field(ge=0, description="where `swiglu` clamps what the first projection gives; 0 for no clamp")
    ] = 0.0
    apply_router_weight_after_down: Annotated[
        bool, Field(description="whether the routing weight multiplies after the down projection, not before it")
    ] = False
    routing: Annotated[
        str,
        Field(
            pattern=ROUTING_PATTERN,
            description="`uniform`, `balanced`, `one-hot`, `zipf:…`, `empty:…` or `trace:…` "
            "([sweeps.md](sweeps.md#routing))",
        ),
    ] = "uniform"
    masked_share: Annotated[
        float, Field(ge=0, le=1, description="share of the tokens that the token mask drops, 0 to 1")
    ] = 0.0
    ep_size: Annotated[Positive, Field(description="ranks that share the experts")] = 1
    rank_load: Annotated[
        RankLoad,
        Field(
            description="how many tokens each rank has: `even`, `uneven` or `one-empty` "
            "([sweeps.md](sweeps.md#expert-parallelism)); always `even` at EP size 1"
        ),
    ] = "even"
    seed: Annotated[int, Field(ge=0, lt=2**31, description="seed of weights, tokens and routing")] = 0


class Case(CaseFields):
    """One workload of an expert layer, whatever backend runs it.

    `num_tokens` counts tokens per rank, at most: `rank_load` says how many of the ranks have so many. `mode` "forward"
    runs under no_grad, "train" is forward and backward without an optimizer. `masked_share` is the share of tokens that
    the token mask drops.
    """

    model_config = ConfigDict(strict=True)

    @model_validator(mode="after")
    def _fields_agree(self) -> "Case":
        mistakes = []
        if self.n_activated_experts > self.n_routed_experts:
            mistakes.append(
                f"n_activated_experts = {self.n_activated_experts} exceeds n_routed_experts = {self.n_routed_experts}: "
                "a token cannot choose more experts than there are; lower it, or exclude the pair"
            )
        if self.n_routed_experts % self.ep_size:
            mistakes.append(
                f"n_routed_experts = {self.n_routed_experts} does not divide by ep_size = {self.ep_size}: "
                "every rank holds as many experts; choose a divisor, or exclude the pair"
            )
        if self.rank_load != "even" and self.ep_size == 1:
            mistakes.append(
                f"rank_load = {self.rank_load} needs ranks, but ep_size = 1: choose a larger one, or exclude the pair"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def case_id(self) -> str:
        """Readable name and a hash of every field that differs from its default, so that a new field keeps old ids."""
        shape = self.model or shape_name(dict(self))
        fields = json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        routing = self.routing.partition(":")[0]
        return f"{shape}-t{self.num_tokens}-{self.dtype}-{self.mode}-{routing}-ep{self.ep_size}-{digest}"

    @property
    def weights(self) -> Weights:
        """All that `moebench.workload.inputs.make_parameters` reads: cases with equal ones have the same weights."""
        shape = (self.n_routed_experts, self.dim, self.moe_inter_dim, self.is_gated)
        return (*shape, self.dtype, self.expert_bias, self.seed, self.ep_size, self.gain)

    @property
    def gain(self) -> float:
        """The standard deviation of the first projection's output, which the weights are drawn for."""
        if self.expert_activation in ("quick_geglu", "swigluoai"):
            return self.activation_limit / LIMIT_IN_STDS
        if self.expert_activation == "swiglu" and self.swiglu_limit > 0:
            return self.swiglu_limit / LIMIT_IN_STDS
        return 1.0

    @property
    def is_gated(self) -> bool:
        return self.expert_activation not in UNGATED

    def flops(self) -> float:
        """Useful floating-point operations per rank, the mean over ranks.

        Forward: 6·T·K·dim·inter gated, 4·T·K·dim·inter ungated; forward and backward three times that. Masked tokens do
        no useful work and do not count.
        """
        rows = self.num_active_tokens * self.n_activated_experts
        forward = (6 if self.is_gated else 4) * rows * self.dim * self.moe_inter_dim
        return float(3 * forward if self.mode == "train" else forward)

    def tokens_of_rank(self, rank: int) -> int:
        """Tokens that a rank has: all as many, from few to many ("uneven"), or the last none ("one-empty")."""
        if self.rank_load == "uneven":
            return -(-self.num_tokens * (rank + 1) // self.ep_size)
        return 0 if self.rank_load == "one-empty" and rank == self.ep_size - 1 else self.num_tokens

    def active_tokens_of_rank(self, rank: int) -> int:
        """Tokens of a rank that the token mask keeps."""
        num_tokens = self.tokens_of_rank(rank)
        return num_tokens - round(num_tokens * self.masked_share)

    @property
    def num_active_tokens(self) -> float:
        """Tokens that the token mask keeps, the mean over ranks."""
        return sum(self.active_tokens_of_rank(rank) for rank in range(self.ep_size)) / self.ep_size


class JobKey(NamedTuple):
    """What names a job among others, in a sweep, a journal and a frame."""

    case_id: str
    backend: str
    dispatcher: str
    check: str | None = None


#: The columns that name a row of a frame. What was measured has no check.
KEY = ("case_id", "backend", "dispatcher")


def key_of(row: Mapping[Any, Any]) -> JobKey:
    """The key of the job that a row of a frame is about."""
    return JobKey(*(row[name] for name in KEY))


class Job(BaseModel):
    """One backend on one case: what a row of results is about.

    With `check`, a name in moebench.parity.checks, it is examined as that check asks; without, measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: Case
    backend: str
    dispatcher: str = "local"
    check: str | None = None

    @property
    def key(self) -> JobKey:
        return JobKey(self.case.case_id, self.backend, self.dispatcher, self.check)
