"""Count the rows and the bytes of a job's largest rank, from the shapes of its case."""

from collections.abc import Hashable
from dataclasses import dataclass

from moebench.workload.backends import adapters_of, collective_of, described, engine_of, reserves_rows
from moebench.workload.case import ITEMSIZE, Case, Job, weight_bytes, width
from moebench.workload.models import block_of

#: The rows of the busiest rank, divided by an even share of the rows, for `zipf` routing and recorded traces. This is a
#: rough value.
_SKEW = 2.0


@dataclass(frozen=True)
class Sizes:
    """Sizes on the job's largest rank: the rows that it computes on and the bytes that it holds."""

    num_tokens: int  # the rank's own tokens
    all_tokens: int  # tokens of all ranks that share the experts
    reached: int  # tokens that the dispatcher brings to the rank
    rows: float
    rows_of_expert: float
    parameter_bytes: int
    trained_bytes: int  # of the parameters that get gradients
    main_bytes: int  # of the gradients that a whole step leaves behind
    expert_numbers: int  # parameters of one expert
    input_bytes: int


def layer_of(job: Job) -> Hashable:
    """Return what the memory of a job depends on: its case, its dispatcher, and properties that many backends share."""
    backend, engine = described(job.backend), engine_of(job.backend)
    properties = None if engine is None else (engine.one_by_one, engine.counts_rows, engine.stacked)
    saves = None if backend is None else backend.save
    return job.case, job.dispatcher, is_fp8(job), properties, saves, adapters_of(job.backend)


def sizes_of(job: Job) -> Sizes:
    """Return the sizes on the job's largest rank."""
    case, itemsize = job.case, ITEMSIZE[job.case.dtype]
    counts = [case.tokens_of_rank(rank) for rank in range(case.ep_size)]
    all_tokens, num_local = sum(counts), case.n_routed_experts // case.ep_size
    reached = _reached(job, max(counts), all_tokens)
    most = reached * min(case.n_activated_experts, num_local)
    local_rows = min(most, _skew(case) * all_tokens * case.n_activated_experts / case.ep_size)
    rows_of_expert = min(all_tokens, _skew(case) * local_rows / num_local)
    rows = local_rows if _counts_rows(job) else reached * case.n_activated_experts
    if is_one_by_one(job) and case.mode == "forward":
        rows = rows_of_expert  # experts run one after the other, and each frees its rows
    expert = case.dim * width(case) + case.moe_inter_dim * case.dim
    lora = adapters_of(job.backend)
    thin = 0 if lora is None else lora.rank * (2 * case.dim + width(case) + case.moe_inter_dim)
    adapter_bytes = num_local * thin * itemsize
    around_bytes = _around_numbers(case) * itemsize
    trained = (adapter_bytes or weight_bytes(case)) + around_bytes
    choices = 16 * case.n_activated_experts  # bytes of a token's weights and int64 indices
    return Sizes(
        num_tokens=max(counts),
        all_tokens=all_tokens,
        reached=reached,
        rows=rows,
        rows_of_expert=rows_of_expert,
        parameter_bytes=weight_bytes(case) + adapter_bytes + around_bytes,
        trained_bytes=trained,
        main_bytes=trained * (main_size(case) if case.surroundings.num_micro_batches > 1 else 1),
        expert_numbers=expert,
        input_bytes=max(counts) * (2 * case.dim * itemsize + choices),
    )


def _around_numbers(case: Case) -> int:
    """Return the number of parameters of a block's router and shared experts; 0 without a block."""
    block = block_of(case.subject, case.model)
    if block is None:
        return 0
    shared = int(block.get("n_shared_experts", 0)) * (width(case) + case.moe_inter_dim)
    return case.dim * (case.n_routed_experts + shared + bool(block.get("shared_expert_gate")))


def _reached(job: Job, most: int, all_tokens: int) -> int:
    """Return the number of tokens that the dispatcher brings to a rank.

    All-gather brings all ranks' tokens, padded to `most`, the largest number of tokens of any rank. A dispatcher that
    reserves rows brings as many rows, also if nobody filled them. Other dispatchers bring the tokens that chose an
    expert of the rank. With K choices spread evenly over the ranks, a token chooses at least one expert of the rank
    with probability 1 − (1 − 1/ranks)^K.
    """
    case = job.case
    if collective_of(job.dispatcher) == "all_gather" or reserves_rows(job.dispatcher):
        return most * case.ep_size
    return round(all_tokens * min(1.0, _skew(case) * (1 - (1 - 1 / case.ep_size) ** case.n_activated_experts)))


def main_size(case: Case) -> int:
    """Return the bytes of a number in main gradients, divided by those of a number of the case."""
    return max(4, ITEMSIZE[case.dtype]) // ITEMSIZE[case.dtype]


def is_fp8(job: Job) -> bool:
    """Whether a job's backend uses FP8, by the catalog, or by the name of a backend that the catalog lacks."""
    backend = described(job.backend)
    return "fp8" in job.backend if backend is None else backend.fp8 is not None


def is_one_by_one(job: Job) -> bool:
    engine = engine_of(job.backend)
    return engine is not None and engine.one_by_one


def _counts_rows(job: Job) -> bool:
    engine = engine_of(job.backend)
    return engine is not None and engine.counts_rows


def _skew(case: Case) -> float:
    """Return the rows of the busiest rank (and of its busiest expert), divided by an even share.

    For `one-hot` the value is the upper limit, the number of experts.
    """
    kind, _, argument = case.routing.partition(":")
    if kind == "empty":
        return 1 / max(1 - float(argument or 0.5), 1 / case.n_routed_experts)
    return {"uniform": 1.0, "balanced": 1.0, "one-hot": float(case.n_routed_experts)}.get(kind, _SKEW)
