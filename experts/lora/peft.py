"""Convert adapters between the stacked layout and the matrices that peft saves for stacked weights.

For a parameter [E, in, out], peft's `target_parameters` saves A of all experts as the weight `lora_A` [E·R, in], with
the experts one after another, and B as the weight `lora_B` [out, R·E], with the experts of each rank index side by side
(peft/tuners/lora/layer.py, `ParamWrapper`). In both layouts an expert adds alpha / rank · A @ B to its weight.
"""

from torch import Tensor

from experts.errors import InputError


def to_peft(a_EPR: Tensor, b_ERQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return peft's weights `lora_A` [E·R, P] and `lora_B` [Q, R·E] for adapters A [E, P, R] and B [E, R, Q].

    All experts must be on this rank. Raises InputError for tensors that are no pair of stacked adapters.
    """
    if a_EPR.ndim != 3 or b_ERQ.ndim != 3 or (a_EPR.shape[0], a_EPR.shape[2]) != tuple(b_ERQ.shape[:2]):
        raise InputError(
            f"A {list(a_EPR.shape)} and B {list(b_ERQ.shape)} must be [experts, rows, rank] and [experts, rank, "
            "columns]; pass the two adapters of one projection"
        )
    return a_EPR.mT.flatten(0, 1).contiguous(), b_ERQ.permute(2, 1, 0).flatten(1).contiguous()


def from_peft(a: Tensor, b: Tensor, n_routed_experts: int) -> tuple[Tensor, Tensor]:
    """Return the adapters A [E, P, R] and B [E, R, Q] for peft's weights `lora_A` [E·R, P] and `lora_B` [Q, R·E].

    Raises InputError for tensors that are no pair of such weights of `n_routed_experts` experts.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % n_routed_experts:
        raise InputError(
            f"lora_A {list(a.shape)} and lora_B {list(b.shape)} must be [experts · rank, rows] and [columns, rank · "
            f"experts] of {n_routed_experts} experts; pass the two weights of one parameter"
        )
    rank = a.shape[0] // n_routed_experts
    a_EPR = a.unflatten(0, (n_routed_experts, rank)).mT
    b_ERQ = b.unflatten(1, (rank, n_routed_experts)).permute(2, 1, 0)
    return a_EPR.contiguous(), b_ERQ.contiguous()
