"""Define the checks of `moebench parity`. Each check has some small cases and a probe that runs a backend on them.

Each check looks for a fault that shipped in somebody's expert layer. moebench.measure.probes runs the checks, and
moebench.run.audit reports what they find.
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
    """The cases that `probe` runs on, in each of `dtypes`. `cases` lists only the fields that differ from BASE."""

    name: str
    looks_for: str
    cases: tuple[Fields, ...] = ({},)
    probe: Probe = "passes"
    dtypes: tuple[str, ...] = DTYPES
    dispatchers: tuple[str, ...] = ("local",)


#: The gradient of a clamped activation jumps at the limit. FP8's rounding may carry one value over the limit. These
#: rows are so wide that one such value is a small part of its row.
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
            "a wrong activation, with or without biases: column layout, alpha, limit, bias times routing weight",
            tuple({**form, "expert_bias": bias} for form in _FORMS for bias in (True, False)),
        ),
        Check(
            "limits",
            "a missing clamp or alpha: many values meet the limit, and alpha is far from its default",
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
            "a wrong result with apply_router_weight_after_down, for a gated and an ungated activation",
            tuple(
                {"expert_activation": name, "expert_bias": bias, "apply_router_weight_after_down": True}
                for name in ("swiglu", "relu2")
                for bias in (True, False)
            ),
        ),
        Check(
            "routing-weights",
            "a wrong output or gradient if routing weights do not sum to one or are zero, or if a token has one expert",
            ({}, {"n_activated_experts": 1}, {"apply_router_weight_after_down": True}),
            "unnormalised",
        ),
        Check(
            "masked-tokens",
            "NaN that leaks from the rows of masked tokens, where some tokens are masked, and where all are",
            ({"masked_share": 0.4}, {"masked_share": 0.4, "mode": "forward"}, {"masked_share": 1.0}),
        ),
        Check("dropped-choices", "a wrong result if some or all indices of a token are -1", ({},), "dropped"),
        Check(
            "duplicate-experts",
            "a wrong result if a token chooses the same expert twice or more often",
            ({"n_activated_experts": 4},),
            "duplicates",
        ),
        Check(
            "empty-experts",
            "gradients of experts without tokens that are None or uninitialised memory: they must be zeros",
            tuple({"routing": "empty:0.5", "expert_bias": bias} for bias in (True, False)),
        ),
        Check("one-hot", "a wrong result if all tokens choose the same one or two experts", tuple(
            {"routing": "one-hot", "n_activated_experts": count} for count in (1, 2))),
        Check(
            "few-tokens",
            "a wrong result for a call without tokens, and for a call with one token",
            tuple({"num_tokens": count, "mode": mode, "masked_share": 0.0}
                  for count in (0, 1) for mode in ("train", "forward")),
        ),
        Check(
            "equal-dimensions",
            "a transposed weight of either projection, which no shape reveals because its two dimensions are equal",
            (
                {"dim": 64, "moe_inter_dim": 64},
                {"dim": 64, "moe_inter_dim": 64, "expert_activation": "relu2"},
                {"dim": 128, "moe_inter_dim": 64, "expert_activation": "geglu"},
            ),
        ),
        Check(
            "many-experts",
            "experts in the wrong order: with more than ten, their names sort in another order than their numbers",
            ({"n_routed_experts": 24, "n_activated_experts": 6}, {"n_routed_experts": 24, "routing": "zipf"}),
        ),
        Check(
            "many-tokens",
            "one wrong row in ten thousand, and offsets that overflow 16 bits",
            ({"num_tokens": 10_240, "dim": 32, "moe_inter_dim": 16},),
        ),
        Check(
            "layouts",
            "a wrong result for inputs and gradients that are not contiguous: strided, column-major or expanded",
            ({}, {"mode": "forward"}),
            "strided",
        ),
        Check(
            "input-dtypes",
            "a wrong result for indices in int32 and routing weights in bfloat16",
            ({},),
            "input_dtypes",
        ),
        Check(
            "other-inputs",
            "stale buffers and gradients from an earlier call that had other tokens, or more tokens",
            ({}, {"mode": "forward"}),
            "other_inputs",
        ),
        Check(
            "repeated",
            "a result that is right at first and wrong later, or wrong now and then: each of many calls must be right",
            ({},),
            "repeated",
        ),
        Check(
            "state-dict",
            "weights that a state dict changes, and loaded weights that a call ignores; with more than ten experts",
            ({"n_routed_experts": 12}, {"n_routed_experts": 12, "expert_activation": "relu2", "expert_bias": False}),
            "state_dict",
        ),
        Check(
            "updated-weights",
            "a call that ignores parameters changed in place after the last call, as an optimizer changes them",
            ({},),
            "in_place",
        ),
        Check(
            "determinism",
            "passes that differ in their bits, with many rows per expert; this is reported, not judged",
            ({"num_tokens": 512, "n_activated_experts": 4},),
        ),
        Check(
            "fallback",
            "another backend that runs under the name of this one; the kernel that ran is reported, not judged",
            ({},),
            "profiled",
        ),
        Check(
            "expert-parallel",
            "two ranks that differ from one process: unequal loads, a rank without tokens, experts without tokens",
            tuple(
                {"ep_size": 2, "rank_load": load, "routing": routing}
                for load, routing in (("even", "zipf"), ("uneven", "uniform"), ("one-empty", "empty:0.5"))
            ),
            dispatchers=DISPATCHERS,
        ),
        Check(
            "large-offsets",
            "offsets that overflow with more than 2^31 permuted elements, on a GPU with enough memory",
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
    """Return every case of the named checks in every dtype, each with all backends one after the other."""
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
