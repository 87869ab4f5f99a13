"""Estimate the memory that a job will take, from the shapes of its case.

The estimate follows the three stages of moebench.measure.job. First the module is built. Then the module makes two
passes (forward and, in mode train, backward), and the tensors of the two passes are kept. Then the passes are compared
with the float64 reference. The estimate assumes that steps are not fused; fused steps need less memory. The estimate
leaves out CUDA contexts, fragmentation and the memory that moebench.measure.ceilings needs. It also leaves out
communication buffers, except those of a dispatcher that reserves rows, and what the router and the shared experts of a
block compute.

moebench.run.memory.passes says what the context of a case changes.
"""

from dataclasses import dataclass

from moebench.measure.protocol import PASSES
from moebench.parity.together import ON_GPU, Together
from moebench.run.memory.passes import held_weight_bytes, pass_bytes
from moebench.run.memory.sizes import Sizes, sizes_of
from moebench.workload.backends import reserves_rows
from moebench.workload.case import ITEMSIZE, Case, Job, width

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


def footprint(job: Job, together: Together = ON_GPU) -> Footprint:
    """Estimate the memory of the job's largest rank. The oracle runs as many experts together as `together` allows.

    Earlier cases add nothing, because a worker keeps from earlier cases only the tensors that this case also uses.
    """
    case, sizes = job.case, sizes_of(job)
    weights, inputs = sizes.parameter_bytes, sizes.input_bytes
    token_bytes = case.dim * ITEMSIZE[case.dtype]
    num_kept = 2 if case.mode == "train" else 1  # tensors [T, D] of a pass: the output, and in train the gradient of x
    kept = num_kept * sizes.num_tokens * token_bytes + (sizes.main_bytes if case.mode == "train" else 0)
    whole = case.ep_size * weights  # the module has the experts of all ranks until they are spread over the ranks
    held = held_weight_bytes(job)
    settled = weights + held + 2 * inputs  # the case's and the module's weights; the inputs and the copy of them
    settled += _reserved_bytes(job, sizes)
    # FSDP first has the rank's whole parameters in the dtype of their shards
    sharding = held * (1 + case.dp_size) if case.surroundings.fsdp2 else 0
    return Footprint(
        building=weights + inputs + max(whole + (weights if case.ep_size > 1 else 0), sharding),
        passes=int(settled + (PASSES - 1) * kept + pass_bytes(job)),
        parity=int(settled + PASSES * kept + _reference_bytes(case, sizes, together)),
    )


def _reference_bytes(case: Case, sizes: Sizes, together: Together) -> float:
    """Return the bytes of the float64 reference and its comparison with the rank's passes.

    The bytes are those of the inputs of all ranks, data-parallel ones included, of the sums over experts, of the
    experts that the oracle runs together, and of the comparison of the rank's own tokens.
    """
    all_tokens, rows_of_expert = sizes.all_tokens * case.dp_size, sizes.rows_of_expert * case.dp_size
    gathered = 0 if case.processes.num_ranks == 1 else 2 * all_tokens * case.dim * ITEMSIZE[case.dtype]
    most = max(1, together.most(max(1, round(rows_of_expert)), 2 * case.dim * width(case)))
    num_experts = min(case.n_routed_experts / case.ep_size, most)
    expert = num_experts * (36 if case.mode == "train" else 21) * sizes.expert_numbers
    rows = 12 * num_experts * rows_of_expert * (4 * case.dim + 2 * width(case) + 4 * case.moe_inter_dim)
    sums = _SUMS * all_tokens * case.dim
    return gathered + sums + max(expert + rows, _COMPARED * sizes.num_tokens * case.dim)


def _reserved_bytes(job: Job, sizes: Sizes) -> int:
    """Return the bytes of a dispatcher's memory: rows, float32 weights and int32 indices of all ranks' tokens."""
    if not reserves_rows(job.dispatcher):
        return 0
    case = job.case
    return sizes.reached * (case.dim * ITEMSIZE[case.dtype] + 8 * case.n_activated_experts)
