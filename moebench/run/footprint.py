"""Estimate the memory that a job will take, from the shapes of its case.

The estimate follows the three stages of moebench.measure.job. First the module is built. Then the module makes two
passes (forward and, in mode train, backward), and the tensors of the two passes are kept. Then the passes are compared
with the float64 reference. The estimate assumes that steps are not fused; fused steps need less memory. The estimate
leaves out contexts, fragmentation and the memory that moebench.measure.ceilings needs. It also leaves out communication
buffers, except those of a dispatcher that reserves rows.
"""

from dataclasses import dataclass

from moebench.measure.protocol import PASSES
from moebench.workload.backends import adapters_of, collective_of, described, engine_of, reserves_rows
from moebench.workload.case import ITEMSIZE, Case, Job, weight_bytes, width

#: Number of float32 buffers [N, I] that an activation holds at once: (forward, train). An activation that clamps or
#: adds biases holds more buffers.
_TEMPORARIES = {"plain": (4, 8), "clamped": (7, 11)}
#: The rows of the busiest rank, divided by an even share of the rows, for `zipf` routing and recorded traces. This is a
#: rough value.
_SKEW = 2.0
#: moebench.parity.batches runs experts together up to this many numbers.
TOGETHER = 1 << 21
#: Bytes per element [T, D]. _SUMS is for the reference's sums over experts on all ranks' tokens: the output and its
#: gradient, each exactly and by chance in float64, and of three runs that round in float32. _COMPARED is for the
#: comparison of the rank's own tokens.
_SUMS, _COMPARED = 2 * (8 + 8 + 3 * 4), 50


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of the job's largest rank at each stage."""

    building: int
    passes: int
    parity: int

    @property
    def peak_bytes(self) -> int:
        return max(self.building, self.passes, self.parity)


@dataclass(frozen=True)
class _Sizes:
    """Sizes on the job's largest rank: the rows that it computes on and the bytes that it holds."""

    num_tokens: int  # the rank's own tokens
    all_tokens: int  # tokens of all ranks together
    reached: int  # tokens that the dispatcher brings to the rank
    rows: float
    rows_of_expert: float
    parameter_bytes: int
    trained_bytes: int  # of the parameters that get gradients
    expert_numbers: int  # parameters of one expert
    input_bytes: int


def footprint(job: Job) -> Footprint:
    """Estimate the memory of the job's largest rank.

    Earlier cases add nothing, because a worker keeps from earlier cases only the tensors that this case also uses.
    """
    case, sizes = job.case, _sizes(job)
    weights, inputs = sizes.parameter_bytes, sizes.input_bytes
    token_bytes = case.dim * ITEMSIZE[case.dtype]
    num_kept = 2 if case.mode == "train" else 1  # tensors [T, D] of a pass: the output, and in train the gradient of x
    kept = num_kept * sizes.num_tokens * token_bytes + (sizes.trained_bytes if case.mode == "train" else 0)
    whole = case.ep_size * weights  # the module has the experts of all ranks until they are spread over the ranks
    settled = 2 * weights + 2 * inputs  # the case's and the module's weights; the inputs and the copy of them
    settled += _reserved_bytes(job, sizes)
    return Footprint(
        building=weights + inputs + whole + (weights if case.ep_size > 1 else 0),
        passes=int(settled + (PASSES - 1) * kept + _pass_bytes(job, sizes)),
        parity=int(settled + PASSES * kept + _reference_bytes(case, sizes)),
    )


def pass_bytes(job: Job) -> int:
    """Estimate the bytes that one pass allocates at its peak, without parameters and inputs.

    The column `peak_memory_bytes` has the measured value. A pass reaches its peak while it computes the activation (in
    a backward, the activation's gradient), or while it writes the gradients of parameters. FP8 keeps its copies of the
    parameters from forward to backward.
    """
    return _pass_bytes(job, _sizes(job))


def _pass_bytes(job: Job, sizes: _Sizes) -> int:
    case, itemsize = job.case, ITEMSIZE[job.case.dtype]
    is_train = case.mode == "train"
    clamps = case.expert_bias or case.swiglu_limit > 0 or case.expert_activation in ("quick_geglu", "swigluoai")
    temporaries = _TEMPORARIES["clamped" if clamps else "plain"][is_train]
    inter, wide, acc = case.moe_inter_dim, width(case), max(4, itemsize)
    activating = wide * itemsize + temporaries * inter * acc + is_train * (case.dim + inter) * itemsize
    multiplying = (case.dim + wide + inter) * itemsize + 2 * inter * acc
    quantised = sizes.parameter_bytes if is_train and _is_fp8(job) else 0
    tokens = (1 + is_train) * (sizes.num_tokens + sizes.reached) * case.dim * itemsize
    if _is_one_by_one(job):  # it adds the experts' outputs in float32
        tokens += sizes.reached * case.dim * (acc + itemsize)
    at_activation = sizes.rows * activating + quantised
    at_gradients = sizes.rows * multiplying + _weight_copies(job) * sizes.trained_bytes
    return int(tokens + max(at_activation, at_gradients))


def _weight_copies(job: Job) -> float:
    """Return the bytes of gradients and of an engine's copies of the parameters, divided by the parameters' bytes.

    The values were measured on an H200, 2026-11-23. For a backward, FP8 quantises the parameters in both directions.
    Where experts run one by one, autograd adds up the gradients of all experts.
    """
    is_fp8, is_train = _is_fp8(job), job.case.mode == "train"
    if not is_train:
        return 1 / 3 if is_fp8 else 0.0
    return 5 / 3 if is_fp8 or _is_one_by_one(job) else 1.0


def _is_fp8(job: Job) -> bool:
    """Whether a job's backend uses FP8, by the catalog, or by the name of a backend that the catalog lacks."""
    backend = described(job.backend)
    return "fp8" in job.backend if backend is None else backend.fp8 is not None


def _is_one_by_one(job: Job) -> bool:
    engine = engine_of(job.backend)
    return engine is not None and engine.one_by_one


def _counts_rows(job: Job) -> bool:
    engine = engine_of(job.backend)
    return engine is not None and engine.counts_rows


def _reference_bytes(case: Case, sizes: _Sizes) -> float:
    """Return the bytes of the float64 reference and its comparison with the rank's passes.

    The bytes are those of all ranks' inputs, of the sums over experts, of the experts that the oracle runs together,
    and of the comparison of the rank's own tokens.
    """
    gathered = 0 if case.ep_size == 1 else 2 * sizes.all_tokens * case.dim * ITEMSIZE[case.dtype]
    numbers = max(2 * case.dim * width(case), sizes.rows_of_expert * (case.dim * width(case) / 32 + 8))
    together = min(case.n_routed_experts / case.ep_size, max(1.0, TOGETHER // numbers))
    expert = together * (36 if case.mode == "train" else 21) * sizes.expert_numbers
    rows = 12 * together * sizes.rows_of_expert * (4 * case.dim + 2 * width(case) + 4 * case.moe_inter_dim)
    sums = _SUMS * sizes.all_tokens * case.dim
    return gathered + sums + max(expert + rows, _COMPARED * sizes.num_tokens * case.dim)


def _sizes(job: Job) -> _Sizes:
    case, itemsize = job.case, ITEMSIZE[job.case.dtype]
    counts = [case.tokens_of_rank(rank) for rank in range(case.ep_size)]
    all_tokens, num_local = sum(counts), case.n_routed_experts // case.ep_size
    reached = _reached(job, max(counts), all_tokens)
    most = reached * min(case.n_activated_experts, num_local)
    local_rows = min(most, _skew(case) * all_tokens * case.n_activated_experts / case.ep_size)
    rows_of_expert = min(all_tokens, _skew(case) * local_rows / num_local)
    rows = local_rows if _counts_rows(job) else reached * case.n_activated_experts
    if _is_one_by_one(job) and case.mode == "forward":
        rows = rows_of_expert  # experts run one after the other, and each frees its rows
    expert = case.dim * width(case) + case.moe_inter_dim * case.dim
    lora = adapters_of(job.backend)
    thin = 0 if lora is None else lora.rank * (2 * case.dim + width(case) + case.moe_inter_dim)
    adapter_bytes = num_local * thin * itemsize
    choices = 16 * case.n_activated_experts  # bytes of a token's weights and int64 indices
    return _Sizes(
        num_tokens=max(counts),
        all_tokens=all_tokens,
        reached=reached,
        rows=rows,
        rows_of_expert=rows_of_expert,
        parameter_bytes=weight_bytes(case) + adapter_bytes,
        trained_bytes=adapter_bytes or weight_bytes(case),
        expert_numbers=expert,
        input_bytes=max(counts) * (2 * case.dim * itemsize + choices),
    )


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


def _reserved_bytes(job: Job, sizes: _Sizes) -> int:
    """Return the bytes of a dispatcher's memory: rows, float32 weights and int32 indices of all ranks' tokens."""
    if not reserves_rows(job.dispatcher):
        return 0
    case = job.case
    return sizes.reached * (case.dim * ITEMSIZE[case.dtype] + 8 * case.n_activated_experts)


def _skew(case: Case) -> float:
    """Return the rows of the busiest rank (and of its busiest expert), divided by an even share.

    For `one-hot` the value is the upper limit, the number of experts.
    """
    kind, _, argument = case.routing.partition(":")
    if kind == "empty":
        return 1 / max(1 - float(argument or 0.5), 1 / case.n_routed_experts)
    return {"uniform": 1.0, "balanced": 1.0, "one-hot": float(case.n_routed_experts)}.get(kind, _SKEW)
