"""Define what is measured: a `Case` is one workload, and a `Job` is one backend on one case."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from moebench.names import Name
from moebench.workload.context import PLAIN, Context, Processes, canonical
from moebench.workload.models import EXPERTS, Subject, block_mistakes, shape_name

DTYPES = ("float64", "float32", "bfloat16", "float16")
ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")
UNGATED = ("relu2",)

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Activation = Literal["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"]
Mode = Literal["forward", "train"]
RankLoad = Literal["even", "uneven", "one-empty"]
#: The values that two cases must share to have the same weights.
Weights = tuple[object, ...]
#: A number of this size or above is a typing mistake, because no machine has enough memory for it. Columns of results
#: hold numbers as 64-bit integers.
LARGEST = 2**31
Positive = Annotated[int, Field(gt=0, lt=LARGEST)]

# kind[:argument]; moebench.workload.inputs draws each kind, and docs/sweeps.md says what each kind means
ROUTING_PATTERN = r"^(uniform|balanced|one-hot|zipf(:\d+(\.\d+)?)?|empty(:0?\.\d+)?|trace:.+)$"


#: The limit of a clamped activation, in standard deviations of the first projection's output. At this distance, enough
#: values reach the limit to expose a missing limit. They are also few enough that the values which rounding carries
#: across the limit stay within the budgets.
LIMIT_IN_STDS = 3.0


class CaseFields(BaseModel):
    """The fields that a case shares with a row of results. Each is an axis of sweeps and a column of results.

    The fields are in the order of the columns. A field's description is the column's meaning in docs/results.md. Fields
    are invalid where they contradict each other, for example more activated than routed experts.
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
            description="tokens per rank; where `rank_load` is not `even`, the largest number of tokens of any rank",
        ),
    ]
    n_routed_experts: Annotated[Positive, Field(description="number of experts on all ranks together")]
    n_activated_experts: Annotated[Positive, Field(description="number of experts that each token chooses")]
    dim: Annotated[Positive, Field(description="width of a token")]
    moe_inter_dim: Annotated[Positive, Field(description="width of an expert's hidden layer")]
    model: Annotated[
        Name | None,
        Field(description="model that the shape comes from; null where the sweep writes out the shape"),
    ] = None
    dtype: Annotated[
        Dtype,
        Field(description="`float64`, `float32`, `bfloat16` or `float16`; FP8 is part of a backend's name"),
    ] = "bfloat16"
    expert_activation: Annotated[Activation, Field(description="activation between the two projections")] = "swiglu"
    expert_bias: Annotated[bool, Field(description="whether both projections have biases")] = False
    activation_alpha: Annotated[
        float, Field(allow_inf_nan=False, description="the factor alpha in `quick_geglu` and `swigluoai`")
    ] = 1.702
    activation_limit: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="limit at which `quick_geglu` and `swigluoai` clamp the output of the first projection",
        ),
    ] = 7.0
    swiglu_limit: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="limit at which `swiglu` clamps the output of the first projection; 0 for no clamp",
        ),
    ] = 0.0
    apply_router_weight_after_down: Annotated[
        bool,
        Field(description="whether the routing weight is multiplied in after the down projection; otherwise before it"),
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
    context: Annotated[
        str,
        AfterValidator(canonical),
        Field(description="what surrounds the layer: `plain`, `checkpoint`, … ([sweeps.md](sweeps.md#contexts))"),
    ] = PLAIN
    dp_size: Annotated[
        Positive, Field(description="groups of `ep_size` ranks, over which `fsdp2` shards the layer")
    ] = 1
    subject: Subject = EXPERTS
    seed: Annotated[int, Field(ge=0, lt=2**31, description="seed of weights, tokens and routing")] = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        mistakes = []
        if self.n_activated_experts > self.n_routed_experts:
            mistakes.append(
                f"n_activated_experts = {self.n_activated_experts} exceeds n_routed_experts = {self.n_routed_experts}: "
                "a token cannot choose more experts than there are; lower it, or exclude the pair"
            )
        if self.n_routed_experts % self.ep_size:
            mistakes.append(
                f"n_routed_experts = {self.n_routed_experts} does not divide by ep_size = {self.ep_size}: "
                "every rank holds the same number of experts; choose a divisor, or exclude the pair"
            )
        if self.rank_load != "even" and self.ep_size == 1:
            mistakes.append(
                f"rank_load = {self.rank_load} needs several ranks, but ep_size = 1; raise ep_size, or exclude the pair"
            )
        mistakes += self.surroundings.mistakes(self.mode, self.num_tokens, self.dp_size, self.routing)
        mistakes += block_mistakes(dict(self))
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def surroundings(self) -> Context:
        """The parts of the context."""
        return Context.parse(self.context)


class Case(CaseFields):
    """One workload of an expert layer, independent of the backend that runs it.

    The fields' descriptions in `CaseFields` say what each field means.
    """

    model_config = ConfigDict(strict=True)

    @property
    def case_id(self) -> str:
        """A readable name with a hash of every field that differs from its default.

        A new field at its default does not change the ids of old cases.
        """
        shape = self.model or shape_name(dict(self))
        fields = json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        routing = self.routing.partition(":")[0]
        return f"{shape}-t{self.num_tokens}-{self.dtype}-{self.mode}-{routing}-ep{self.ep_size}-{digest}"

    @property
    def weights(self) -> Weights:
        """The values that `moebench.workload.inputs.make_parameters` reads: equal for cases with the same weights."""
        shape = (self.n_routed_experts, self.dim, self.moe_inter_dim, self.is_gated)
        return (*shape, self.dtype, self.expert_bias, self.seed, self.ep_size, self.gain)

    @property
    def gain(self) -> float:
        """The standard deviation that the first projection's output has with the drawn weights."""
        if self.expert_activation in ("quick_geglu", "swigluoai"):
            return self.activation_limit / LIMIT_IN_STDS
        if self.expert_activation == "swiglu" and self.swiglu_limit > 0:
            return self.swiglu_limit / LIMIT_IN_STDS
        return 1.0

    @property
    def processes(self) -> Processes:
        """The processes that run the case together."""
        return Processes(self.ep_size * self.dp_size, self.dp_size)

    @property
    def is_gated(self) -> bool:
        return self.expert_activation not in UNGATED

    def flops(self) -> float:
        """Return the useful floating-point operations of one rank, as the mean over ranks.

        Forward has 6·T·K·dim·inter operations if the activation is gated, and 4·T·K·dim·inter if it is not gated. Mode
        "train" has three times as many. T is the number of tokens that the token mask keeps. Masked tokens do no useful
        work and do not count.
        """
        rows = self.num_active_tokens * self.n_activated_experts
        forward = (6 if self.is_gated else 4) * rows * self.dim * self.moe_inter_dim
        return float(3 * forward if self.mode == "train" else forward)

    def tokens_of_rank(self, rank: int) -> int:
        """Return the number of tokens of a rank.

        All ranks have num_tokens, with two exceptions, alike in each of the dp_size groups of ranks. With `rank_load`
        "uneven", the number rises in equal steps, rounded up, to num_tokens on the last rank. With `rank_load`
        "one-empty", the last rank has no tokens.
        """
        rank %= self.ep_size
        if self.rank_load == "uneven":
            return -(-self.num_tokens * (rank + 1) // self.ep_size)
        return 0 if self.rank_load == "one-empty" and rank == self.ep_size - 1 else self.num_tokens

    def active_tokens_of_rank(self, rank: int) -> int:
        """Return the number of a rank's tokens that the token mask keeps."""
        num_tokens = self.tokens_of_rank(rank)
        return num_tokens - round(num_tokens * self.masked_share)

    @property
    def num_active_tokens(self) -> float:
        """The number of tokens of one rank that the token mask keeps, as the mean over ranks."""
        return sum(self.active_tokens_of_rank(rank) for rank in range(self.ep_size)) / self.ep_size


class JobKey(NamedTuple):
    """The values that identify a job in a sweep, a journal and a frame."""

    case_id: str
    backend: str
    dispatcher: str
    check: str | None = None


#: The columns that identify a row of a frame. `check` is left out, because measured jobs have no check.
KEY = ("case_id", "backend", "dispatcher")


def key_of(row: Mapping[Any, Any]) -> JobKey:
    """Return the key of the job that a row of a frame is about."""
    return JobKey(*(row[name] for name in KEY))


class Job(BaseModel):
    """One backend on one case. A row of results is about one job.

    Where `check` has the text of a case or a search of moebench.parity.checks, the worker tries it; otherwise it
    measures the job. If the case's routing is a trace, `routing_file` is the file that has it. The file is no part of
    what identifies the job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: Case
    backend: str
    dispatcher: str = "local"
    check: str | None = None
    routing_file: str | None = None

    @property
    def key(self) -> JobKey:
        return JobKey(self.case.case_id, self.backend, self.dispatcher, self.check)


#: Bytes of a number of each dtype.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def width(case: Case) -> int:
    """Return the width of the first projection's output."""
    return case.moe_inter_dim * (2 if case.is_gated else 1)


def num_weights(case: Case) -> int:
    """Return the number of weights on one rank, biases included."""
    expert = case.dim * width(case) + case.moe_inter_dim * case.dim
    biases = width(case) + case.dim if case.expert_bias else 0
    return case.n_routed_experts // case.ep_size * (expert + biases)


def weight_bytes(case: Case) -> int:
    """Return the bytes of the weights on one rank."""
    return num_weights(case) * ITEMSIZE[case.dtype]


def adam_bytes(case: Case) -> int:
    """Return the bytes that Adam in float32 adds on one rank.

    Adam keeps two moments of each weight in float32. If the weights are narrower than float32, it also keeps a float32
    copy of each weight.
    """
    copies = 2 if ITEMSIZE[case.dtype] >= 4 else 3
    return num_weights(case) * copies * 4
