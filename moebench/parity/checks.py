"""What `moebench parity` looks for: named checks, each some small cases and a probe of them. No torch here.

Each is a fault that shipped in somebody's expert layer. moebench.measure.probes runs them, moebench.run.audit reports.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moebench.workload.backends import DISPATCHERS
from moebench.workload.case import ACTIVATIONS, DTYPES, Case, Job

Probe = Literal[
    "passes",
    "profiled",
    "dropped",
    "duplicates",
    "unnormalised",
    "amplified",
    "input_dtypes",
    "strided",
    "other_inputs",
    "repeated",
    "state_dict",
    "in_place",
    "large",
]
Fields = dict[str, Any]

SHAPE: Fields = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 128, "moe_inter_dim": 64}
HOSTILE: Fields = {"mode": "train", "expert_bias": True, "masked_share": 0.125}
BASE: Fields = {"num_tokens": 48, **SHAPE, **HOSTILE}


@dataclass(frozen=True)
class Check:
    """Cases (what differs from BASE) that `probe` is run on, in every one of `dtypes`."""

    name: str
    looks_for: str
    cases: tuple[Fields, ...] = ({},)
    probe: Probe = "passes"
    dtypes: tuple[str, ...] = DTYPES
    dispatchers: tuple[str, ...] = ("local",)


#: Clamped activations, whose gradient jumps at the limit: a row is wide enough that one value that FP8's rounding
#: carries over the limit is a small part of it.
_WIDE: Fields = {"moe_inter_dim": 512, "n_routed_experts": 4}
_CLAMPED: Fields = {**_WIDE, "activation_alpha": 0.7, "activation_limit": 5.0}
_OF_ACTIVATION: dict[str, Fields] = {"swigluoai": _CLAMPED, "quick_geglu": _CLAMPED}
_FORMS: tuple[Fields, ...] = (
    *({"expert_activation": name, **_OF_ACTIVATION.get(name, {})} for name in ACTIVATIONS),
    {"swiglu_limit": 5.0, **_WIDE},
)

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check(
            "activations",
            "every activation with and without biases: halves or interleaved columns, alpha, limits, weighted biases",
            tuple({**form, "expert_bias": bias} for form in _FORMS for bias in (True, False)),
        ),
        Check(
            "limits",
            "limits that many values meet, a slope far from the default: clamps and alpha that are missing",
            tuple(
                {"mode": "forward", "activation_alpha": 0.3, "activation_limit": 5.0, **form}
                for form in (
                    {"expert_activation": "swigluoai"},
                    {"expert_activation": "quick_geglu"},
                    {"swiglu_limit": 5.0},
                )
            ),
            "amplified",
        ),
        Check(
            "weight-after-down",
            "apply_router_weight_after_down, for a gated and an ungated activation",
            tuple(
                {"expert_activation": name, "expert_bias": bias, "apply_router_weight_after_down": True}
                for name in ("swiglu", "relu2")
                for bias in (True, False)
            ),
        ),
        Check(
            "routing-weights",
            "routing weights that do not sum to one, one expert a token, weights of zero; and their gradient",
            ({}, {"n_activated_experts": 1}, {"apply_router_weight_after_down": True}),
            "unnormalised",
        ),
        Check(
            "masked-tokens",
            "masked rows hold NaN, which must not leak; some masked and all",
            ({"masked_share": 0.4}, {"masked_share": 0.4, "mode": "forward"}, {"masked_share": 1.0}),
        ),
        Check("dropped-choices", "indices of -1, of some choices and of all choices of a token", ({},), "dropped"),
        Check(
            "duplicate-experts", "a token that chooses an expert twice", ({"n_activated_experts": 4},), "duplicates"
        ),
        Check(
            "empty-experts",
            "experts without tokens: their gradients are zeros, not None and not memory that nobody wrote",
            tuple({"routing": "empty:0.5", "expert_bias": bias} for bias in (True, False)),
        ),
        Check("one-hot", "every token on the same experts, one and two of them", tuple(
            {"routing": "one-hot", "n_activated_experts": count} for count in (1, 2))),
        Check(
            "few-tokens",
            "no token at all, and one",
            tuple({"num_tokens": count, "mode": mode, "masked_share": 0.0}
                  for count in (0, 1) for mode in ("train", "forward")),
        ),
        Check(
            "equal-dimensions",
            "weights transposed where both dimensions are equal, of either projection",
            (
                {"dim": 64, "moe_inter_dim": 64},
                {"dim": 64, "moe_inter_dim": 64, "expert_activation": "relu2"},
                {"dim": 128, "moe_inter_dim": 64, "expert_activation": "geglu"},
            ),
        ),
        Check(
            "many-experts",
            "more than ten experts, whose names sort in another order than their numbers",
            ({"n_routed_experts": 24, "n_activated_experts": 6}, {"n_routed_experts": 24, "routing": "zipf"}),
        ),
        Check(
            "many-tokens",
            "one wrong row in ten thousand, offsets of 16 bits",
            ({"num_tokens": 10_240, "dim": 32, "moe_inter_dim": 16},),
        ),
        Check("layouts", "inputs and gradients that are not contiguous, by columns, strided, expanded", (
            {}, {"mode": "forward"}), "strided"),
        Check("input-dtypes", "indices in int32, routing weights in bfloat16", ({},), "input_dtypes"),
        Check(
            "other-inputs",
            "what is kept from a call with other tokens, or more of them: stale buffers and gradients",
            ({}, {"mode": "forward"}),
            "other_inputs",
        ),
        Check("repeated", "right at first and wrong later, or now and then: every call of many", ({},), "repeated"),
        Check(
            "state-dict",
            "a round trip through the loop's module, and other weights loaded after a call; more than ten experts",
            ({"n_routed_experts": 12}, {"n_routed_experts": 12, "expert_activation": "relu2", "expert_bias": False}),
            "state_dict",
        ),
        Check("updated-weights", "parameters changed in place after a call, as an optimizer does", ({},), "in_place"),
        Check(
            "determinism",
            "whether two runs agree bit by bit, which is told, not judged: many rows an expert",
            ({"num_tokens": 512, "n_activated_experts": 4},),
        ),
        Check("fallback", "another backend behind the name: what ran is told, not judged", ({},), "profiled"),
        Check(
            "expert-parallel",
            "two ranks against one process: unequal loads, a rank without tokens, experts without any",
            tuple(
                {"ep_size": 2, "rank_load": load, "routing": routing}
                for load, routing in (("even", "zipf"), ("uneven", "uniform"), ("one-empty", "empty:0.5"))
            ),
            dispatchers=DISPATCHERS,
        ),
        Check(
            "large-offsets",
            "more than 2^31 permuted elements, on a GPU with the memory for it",
            ({"num_tokens": 66_560, "n_routed_experts": 32, "n_activated_experts": 8, "dim": 4096},),
            "large",
            ("bfloat16",),
        ),
    )
}  # fmt: skip


def suite_jobs(
    backends: Sequence[str],
    checks: Sequence[str] = tuple(CHECKS),
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
) -> list[Job]:
    """Every case of the named checks in every dtype, with every backend: backends of a case one after the other."""
    return [
        Job(case=case, backend=backend, dispatcher=dispatcher, check=check.name)
        for check in (CHECKS[name] for name in checks)
        for case in _cases(check, dtypes, seed)
        for dispatcher in check.dispatchers
        for backend in backends
    ]


def _cases(check: Check, dtypes: Sequence[str], seed: int) -> Iterator[Case]:
    for dtype in dtypes:
        if dtype in check.dtypes:
            for fields in check.cases:
                yield Case.model_validate({**BASE, "dtype": dtype, "seed": seed, **fields})
