"""Count the weights of an expert layer, and the bytes that one rank needs for them and for their optimizer."""

from moebench.workload.case import Case

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
