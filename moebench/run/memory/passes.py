"""Estimate what a pass of a job takes and keeps, beside its parameters and inputs.

The case's context changes the estimate. W is the bytes of the parameters that get gradients, n is their number, and N
is the number of micro-batches. These are the rules of a train step:

accumulate: The activations are those of T/N tokens. The main gradients take 4·n bytes (8·n in float64), beside the W
bytes of a micro-batch's gradients. If the two dtypes differ, the largest parameter's gradient is there once more,
because it is cast.
fsdp2: A rank holds W / dp_size of the parameters, or 4·n / dp_size with main gradients. A pass gathers the parameters,
which takes W. When FSDP reduces the gradients, the buffer that it sends takes as much as they do. Main gradients are
shards: 4·n / dp_size.
checkpoint, checkpoint_reentrant, checkpoint_experts: The peak of one layer stays, because its backward computes again
what forward did not keep. The reentrant kind also holds the output [T, D] of the second forward. A layer keeps less
between forward and backward (`kept_bytes`).
offload: Nothing that autograd saves stays on the GPU. Backward brings the parameters and x back as copies. With a
checkpoint, autograd saves neither. The estimate is that of a GPU. On a CPU, nothing moves.
"""

from moebench.run.memory.sizes import is_fp8, is_one_by_one, main_size, sizes_of
from moebench.workload.backends import described, engine_of
from moebench.workload.case import ITEMSIZE, Job, width

#: Number of float32 buffers [N, I] that an activation holds at once: (forward, train). An activation that clamps or
#: adds biases holds more buffers.
_TEMPORARIES = {"plain": (4, 8), "clamped": (7, 11)}


def held_weight_bytes(job: Job) -> int:
    """Return the bytes of the parameters that a rank holds between its passes, adapters included."""
    case, sizes = job.case, sizes_of(job)
    if not case.surroundings.fsdp2:
        return sizes.parameter_bytes
    is_wide = case.surroundings.num_micro_batches > 1
    return sizes.parameter_bytes * (main_size(case) if is_wide else 1) // case.dp_size


def gradient_bytes(job: Job) -> int:
    """Return the bytes of the parameters' gradients that a step leaves on a rank: with fsdp2, shards."""
    return sizes_of(job).main_bytes // job.case.dp_size


def pass_bytes(job: Job) -> int:
    """Estimate the bytes that one pass allocates at its peak, without parameters and inputs.

    The column `peak_memory_bytes` has the measured value. A pass reaches its peak while it computes the activation (in
    a backward, the activation's gradient), while it writes the gradients of parameters, or while FSDP reduces these.
    FP8 keeps its copies of the parameters from forward to backward. This module's docstring says what contexts change.
    """
    case, sizes, context = job.case, sizes_of(job), job.case.surroundings
    itemsize, batches, is_train = ITEMSIZE[case.dtype], context.num_micro_batches, case.mode == "train"
    clamps = case.expert_bias or case.swiglu_limit > 0 or case.expert_activation in ("quick_geglu", "swigluoai")
    temporaries = _TEMPORARIES["clamped" if clamps else "plain"][is_train]
    inter, wide, acc = case.moe_inter_dim, width(case), max(4, itemsize)
    activating = wide * itemsize + temporaries * inter * acc + is_train * (case.dim + inter) * itemsize
    multiplying = (case.dim + wide + inter) * itemsize + 2 * inter * acc
    quantised = sizes.parameter_bytes if is_train and is_fp8(job) else 0
    at_activation = sizes.rows / batches * activating + quantised
    at_gradients = sizes.rows / batches * multiplying + _weight_copies(job) * sizes.trained_bytes + _cast_bytes(job)
    tokens: float = (1 + is_train) * (sizes.num_tokens + sizes.reached / batches) * case.dim * itemsize
    if is_one_by_one(job):  # it adds the experts' outputs in float32
        tokens += sizes.reached / batches * case.dim * (acc + itemsize)
    peak = tokens + _brought_bytes(job) + max(at_activation, at_gradients)
    shards = sizes.main_bytes / case.dp_size
    if context.fsdp2 and is_train:
        results = 2 * sizes.num_tokens * case.dim * itemsize  # the output and the gradient of x
        peak = max(peak, results + sizes.main_bytes + max(sizes.trained_bytes, shards))
    return int(peak + (shards if batches > 1 else 0))


def _brought_bytes(job: Job) -> float:
    """Return the bytes that a context holds beside the layer's own: parameters and tokens that come back."""
    case, sizes, context = job.case, sizes_of(job), job.case.surroundings
    token_bytes = sizes.num_tokens / context.num_micro_batches * case.dim * ITEMSIZE[case.dtype]
    moves = context.offload and context.checkpoint is None
    tokens = token_bytes if moves or context.checkpoint == "checkpoint_reentrant" else 0
    return tokens + (moves + context.fsdp2) * sizes.parameter_bytes


def _cast_bytes(job: Job) -> float:
    """Return the bytes of a gradient of the largest parameter that is cast to the dtype of main gradients."""
    case, sizes, context = job.case, sizes_of(job), job.case.surroundings
    if context.num_micro_batches == 1 or context.fsdp2 or main_size(case) == 1:
        return 0
    return sizes.main_bytes * case.dim * width(case) / sizes.expert_numbers


def kept_bytes(job: Job) -> int:
    """Estimate the bytes that a layer keeps from its forward to its backward, without its inputs; 0 in mode forward.

    The column `saved_memory_bytes` has the measured value. With micro-batches, it is what one of them keeps. By the
    context, a layer keeps:

    plain: the output of the first projection [rows, 2I], and the order of the rows, 24 bytes for each choice of a
    token. A backend that saves time keeps the input rows [rows, D] as well. An engine that cannot choose also keeps the
    activation [rows, I]. An engine that runs the experts one by one keeps no order, but what autograd saves of the
    activation and of the sum in float32. FP8 keeps its copies of the parameters. Expert parallelism keeps the tokens
    that reached the rank.
    checkpoint, offload: the order of the rows.
    checkpoint_experts: the order of the rows, and the rows and choices that dispatch brought.
    checkpoint_reentrant: nothing.
    """
    case, sizes, context = job.case, sizes_of(job), job.case.surroundings
    if case.mode == "forward" or context.checkpoint == "checkpoint_reentrant":
        return 0
    itemsize, acc, inter = ITEMSIZE[case.dtype], max(4, ITEMSIZE[case.dtype]), case.moe_inter_dim
    choices, is_spread = sizes.reached * case.n_activated_experts, case.ep_size > 1
    order = 0 if is_one_by_one(job) else 24 * choices
    brought = is_spread * sizes.reached * case.dim * itemsize
    kept: float = order
    if context.checkpoint == "checkpoint_experts":
        kept += 8 * choices + brought + 4 * is_spread * choices
    elif context.checkpoint is None and not context.offload:
        a_row = width(case) * itemsize
        saves = _saves(job)
        a_row += case.dim * itemsize if saves != "memory" else 0
        a_row += inter * itemsize if saves is None else 0
        a_row += (3 * inter + case.dim) * acc if is_one_by_one(job) else 0
        kept += brought + sizes.rows * a_row + (sizes.parameter_bytes if is_fp8(job) else 0)
    return int(kept / context.num_micro_batches)


def _saves(job: Job) -> str | None:
    """Return what the backend saves by keeping more or less for backward; None for a backend without the choice."""
    backend, engine = described(job.backend), engine_of(job.backend)
    if backend is None or engine is None or not engine.stacked or engine.one_by_one:
        return None
    return backend.save or "memory"


def _weight_copies(job: Job) -> float:
    """Return the bytes of gradients and of an engine's copies of the parameters, divided by the parameters' bytes.

    The values were measured on an H200, 2026-11-23. For a backward, FP8 quantises the parameters in both directions.
    Where experts run one by one, autograd adds up the gradients of all experts.
    """
    if job.case.mode == "forward":
        return 1 / 3 if is_fp8(job) else 0.0
    return 5 / 3 if is_fp8(job) or is_one_by_one(job) else 1.0
