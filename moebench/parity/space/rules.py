"""Say which values of the space fit together: what a layer admits, and what is small enough to be tried."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import and_
from typing import Any

from moebench.parity.space.trial import MANY_TOKENS, Row, Trial, of_row

_Item = tuple[str, Any]

CLAMPED = ("swigluoai", "quick_geglu")
#: What a case may hold at most, so that the oracle finishes it soon.
MOST_PARAMETER_BYTES = 64 << 20
MOST_MULTIPLY_ADDS = 2e9
MOST_ROWS = 2 * MANY_TOKENS
#: A random number for every pair of a token and an expert draws the routing.
MOST_DRAWN = 1 << 22
#: Cases with more rows than this are short, and cases that repeat a call have at most this many rows and experts.
MOST_TAKEN_LONG = 600
MOST_REPEATED, MOST_EXPERTS_REPEATED, LARGEST_DIM_REPEATED = 66, 4, 33


def misfits(trial: Trial) -> Iterator[str]:
    """Yield why a trial cannot be tried; nothing if it can."""
    for names, holds, problem in _RULES:
        if not holds(trial):
            yield f"{problem}: {', '.join(f'{name} = {getattr(trial, name)}' for name in names)}"


def limits() -> list[str]:
    """Return what a case must not be, one line for each rule."""
    return list(dict.fromkeys(problem for _, _, problem in _RULES))


def fitting(row: Row, name: str, values: Iterable[Any]) -> list[Any]:
    """Return those values of the axis `name` that fit with the values of other axes in `row`."""
    values = tuple(values)
    fit = [True] * len(values)
    for number, needed, before, after in _rules_of(name):
        if row.keys() >= needed:
            fit = list(map(and_, fit, _hold(number, _items(row, before), name, values, _items(row, after))))
    return [value for value, fits in zip(values, fit, strict=True) if fits]


@lru_cache
def _rules_of(name: str) -> list[tuple[int, frozenset[str], tuple[str, ...], tuple[str, ...]]]:
    """Return the rules that read the axis: number, other fields that must be there, and fields read before and after.

    "all" experts are as many as there are, so a rule about their number also reads how many there are.
    """
    read = [(*names, "n_routed_experts") if "n_activated_experts" in names else names for names, _, _ in _RULES]
    return [
        (number, frozenset(_RULES[number][0]) - {name}, *_beside(name, fields))
        for number, fields in enumerate(read)
        if name in fields
    ]


def _beside(name: str, fields: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    place = fields.index(name)
    return fields[:place], tuple(field for field in fields[place:] if field != name)


def _items(row: Row, names: tuple[str, ...]) -> tuple[_Item, ...]:
    return tuple([(name, row[name]) for name in names if name in row])


@lru_cache(1 << 16)
def _hold(
    number: int, before: tuple[_Item, ...], name: str, values: tuple[Any, ...], after: tuple[_Item, ...]
) -> list[bool]:
    """Return whether the rule holds for each value of the axis."""
    holds, row = _RULES[number][1], {**dict(before), **dict(after)}
    return [holds(of_row({**row, name: value})) for value in values]


def _calls(trial: Trial) -> int:
    return sum(step.startswith(("call", "backward")) for step in trial.steps)


_MATRICES = ("dim", "moe_inter_dim")
_ROWS = ("num_tokens", "n_activated_experts")
_Rule = tuple[tuple[str, ...], Callable[[Trial], bool], str]
#: The fields that must agree, how they must, and what is wrong if they do not.
_RULES: tuple[_Rule, ...] = (
    (
        ("num_tokens", "n_routed_experts", "n_activated_experts", *_MATRICES),
        lambda one: (
            min(one.n_routed_experts, one.n_activated_experts, one.dim, one.moe_inter_dim) > 0 <= one.num_tokens
        ),
        "sizes must be positive, and num_tokens may be 0",
    ),
    (
        ("n_activated_experts", "n_routed_experts"),
        lambda one: one.n_activated_experts <= one.n_routed_experts,
        "a token cannot choose more experts than there are",
    ),
    (
        ("n_routed_experts", "ep_size"),
        lambda one: one.ep_size > 0 and one.n_routed_experts % one.ep_size == 0,
        "every rank holds the same number of experts",
    ),
    (
        ("expert_activation", "limit"),
        lambda one: (
            (one.limit > 0) if one.expert_activation in CLAMPED else not one.limit or one.expert_activation == "swiglu"
        ),
        "swigluoai and quick_geglu need a limit above 0, and geglu and relu2 have none",
    ),
    (
        ("expert_activation", "alpha"),
        lambda one: one.alpha == 1.702 or one.expert_activation in CLAMPED,
        "only swigluoai and quick_geglu have an alpha",
    ),
    (
        ("index_dtype", "n_routed_experts"),
        lambda one: one.n_routed_experts <= {"int8": 128, "uint8": 256}.get(one.index_dtype, 1 << 15),
        "the dtype does not count all experts",
    ),
    (
        ("index_dtype", "choices"),
        lambda one: one.index_dtype != "uint8" or one.choices in ("distinct", "duplicates"),
        "uint8 has no -1",
    ),
    (
        ("dtype", "param_dtype", "x_scale", "weights"),
        lambda one: (
            "float16" not in (one.dtype, one.params)
            or one.x_scale <= 4
            or (one.x_scale <= 300 and one.weights == "small")
        ),
        "float16 overflows",
    ),
    (
        ("dtype", "param_dtype", "grad"),
        lambda one: "float16" not in (one.dtype, one.params) or one.grad in ("normal", "halves"),
        "float16 overflows",
    ),
    (
        ("wanted", "steps"),
        lambda one: "repeat" not in one.steps or one.wanted in ("all", "nothing"),
        "repeat wants all gradients or none",
    ),
    (("wanted", "expert_bias"), lambda one: one.wanted != "biases" or one.expert_bias, "the layer has no biases"),
    (
        ("n_routed_experts", *_MATRICES),
        lambda one: 24 * one.dim * one.moe_inter_dim * one.n_routed_experts <= MOST_PARAMETER_BYTES,
        f"the parameters would have more than {MOST_PARAMETER_BYTES >> 20} MiB in float64",
    ),
    (
        (*_ROWS, *_MATRICES, "steps"),
        lambda one: 3 * one.dim * one.moe_inter_dim * one.num_rows * _calls(one) <= MOST_MULTIPLY_ADDS,
        f"there would be more than {MOST_MULTIPLY_ADDS:.0e} multiply-adds",
    ),
    (
        _ROWS,
        lambda one: one.num_rows <= MOST_ROWS,
        f"there would be more than {MOST_ROWS} rows",
    ),
    (
        ("num_tokens", "n_routed_experts"),
        lambda one: one.num_tokens * one.n_routed_experts <= MOST_DRAWN,
        f"there would be more than {MOST_DRAWN} pairs of a token and an expert",
    ),
    (
        (*_ROWS, *_MATRICES),
        lambda one: one.num_rows * (one.dim + 2 * one.moe_inter_dim) <= MOST_DRAWN,
        f"the rows would have more than {MOST_DRAWN} elements",
    ),
    (
        ("steps", *_ROWS),
        lambda one: "repeat" not in one.steps or one.num_rows <= MOST_REPEATED,
        f"repeat takes at most {MOST_REPEATED} rows",
    ),
    (
        ("steps", "n_routed_experts"),
        lambda one: "repeat" not in one.steps or one.n_routed_experts <= MOST_EXPERTS_REPEATED,
        f"repeat takes at most {MOST_EXPERTS_REPEATED} experts",
    ),
    (
        ("steps", *_MATRICES),
        lambda one: "repeat" not in one.steps or max(one.dim, one.moe_inter_dim) <= LARGEST_DIM_REPEATED,
        f"repeat takes dims of at most {LARGEST_DIM_REPEATED}",
    ),
    (
        ("steps", "n_routed_experts"),
        lambda one: one.n_routed_experts <= 100 or _calls(one) <= 2,
        "more than 100 experts are called at most twice",
    ),
    (
        ("steps", "num_tokens"),
        lambda one: one.num_tokens <= MOST_TAKEN_LONG or _calls(one) <= 2,
        f"more than {MOST_TAKEN_LONG} tokens are taken at most twice",
    ),
    (
        ("steps", "dtype", "param_dtype", "weights_dtype"),
        lambda one: "call:autocast" not in one.steps or "float16" not in (one.dtype, one.params, one.weights_dtype),
        "torch refuses float16 beside bfloat16 in autocast",
    ),
    (
        ("num_tokens", *_MATRICES),
        lambda one: one.num_tokens <= MOST_TAKEN_LONG or max(one.dim, one.moe_inter_dim) <= 33,
        f"more than {MOST_TAKEN_LONG} tokens have dims of at most 33",
    ),
)
