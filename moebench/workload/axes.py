"""Define the axes of a sweep: the valid values of each axis, the messages for wrong values, and the combinations."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from moebench.workload.backends import DISPATCHERS as BETWEEN_RANKS
from moebench.workload.backends import GROUPS, is_group
from moebench.workload.case import Case
from moebench.workload.models import MODELS, SHAPE_AXES, Model
from moebench.workload.traces import Captured, find_trace

DISPATCHERS = ("local", *BETWEEN_RANKS)
BACKEND_PATTERN = r"^[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?$"
#: Files of traces have the backend's name in their names.
LONGEST_BACKEND = 100
BACKEND_RULE = 'must be a name, or "module:attribute" for a backend of your own, at most 100 characters'
UNKNOWN: Final = object()  # stands in for a value that was wrong or missing

# The values of the axes. Their types are the types of Case's fields.


def _openable(routing: str, info: ValidationInfo) -> str | Captured:
    """Return the captured routing that trace:PATH names. Other kinds of routing stay as they are.

    `info.context` is the sweep file's folder, where relative paths begin.
    """
    kind, _, written = routing.partition(":")
    if kind != "trace" or info.context is None:
        return routing
    captured = find_trace(routing, info.context)
    if captured is None:
        raise PydanticCustomError("no_trace", "there is no file {path}", {"path": cut(str(info.context / written))})
    return captured


def _axis_types() -> dict[str, Any]:
    fields: dict[str, Any] = {name: field.rebuild_annotation() for name, field in Case.model_fields.items()}
    literal: Any = Literal
    annotated: Any = Annotated
    return fields | {
        "model": str,  # moebench.workload.modelconfig reads it
        "routing": annotated[fields["routing"], AfterValidator(_openable)],
        "backend": annotated[str, Field(pattern=BACKEND_PATTERN, max_length=LONGEST_BACKEND)],
        "dispatcher": literal[DISPATCHERS],
    }


_TYPES = _axis_types()
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
AXES: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(type_, config=_STRICT) for name, type_ in _TYPES.items()}
_NAMED = ("mode", "dtype", "expert_activation", "rank_load", "dispatcher")
_CHOICES = {name: get_args(_TYPES[name]) for name in _NAMED} | {"model": tuple(MODELS), "l2": ("cold", "warm")}
FIXED_BY_MODEL = tuple(dict.fromkeys(name for preset in MODELS.values() for name in preset))
DEFAULTS = {name: field.default for name, field in Case.model_fields.items() if not field.is_required()}
_RULES = {
    "name": 'must be letters, digits, ".", "_" and "-", a letter or digit first, at most 100 characters',
    "description": "must be one line of text",
    "backend": BACKEND_RULE,
    "subject": "must be experts, block, or block:MODEL with the model whose router and shared experts the block has",
    "routing": "must be one of uniform, balanced, one-hot, zipf[:s], empty[:share], trace:PATH",
}
_EXAMPLES = {
    **DEFAULTS,
    **{name: MODELS["qwen3-30b-a3b"][name] for name in SHAPE_AXES},
    "num_tokens": 128,
    "interval_target": 0.02,
    "time_cap_s": 1.0,
    "timeout_s": 300.0,
    "name": "quick",
    "description": "one line",
    "backend": "loop",
}


def rule_for(name: str, value: object, error: ErrorDetails) -> str:
    """Return the rule that `value` of the field `name` breaks, and the remedy."""
    if is_group(name, value):
        return f"there is no such group; the groups of {name} are {listed(GROUPS[name])}"
    if name in _CHOICES:
        hint = did_you_mean(value, _CHOICES[name]) or "take one of them"
        return f"must be one of {listed(_CHOICES[name])}; {hint}"
    if error["type"] == "no_trace":
        return f"{error['msg']}; give a path that is absolute or relative to the sweep file's folder"
    rule = _RULES.get(name) or error["msg"].replace("Input should be", "must be")
    return f"{rule}; for example {name} = {example(name)}"


def shown(value: object) -> str:
    """Return the value as messages quote it: JSON of at most 80 characters."""
    try:
        return cut(json.dumps(value, default=str, ensure_ascii=False))
    except (ValueError, RecursionError):  # thousands of digits, or nested too deeply
        return "..."


def cut(text: str) -> str:
    """Return the text if it has at most 80 characters, else its beginning and three dots."""
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[object]) -> str:
    """Return the names with commas between them, or "none"."""
    return ", ".join(map(str, names)) or "none"


def did_you_mean(word: object, valid: Iterable[str]) -> str:
    """Return a question that names the valid word closest to `word`; an empty string if no word is close."""
    close = difflib.get_close_matches(cut(str(word)), list(valid), n=1)
    return f'did you mean "{close[0]}"?' if close else ""


def example(name: str) -> str:
    """Return a valid value of the field `name`, as a sweep file writes it."""
    return shown(_EXAMPLES[name] if name in _EXAMPLES else _CHOICES[name][0])


# Combinations: one value for every axis


def combinations(axes: Mapping[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    """Yield each combination of the axes as a dict with a value for every axis.

    An axis that `axes` lacks takes its value from the model or from Case's defaults. At ep_size 1 the dispatcher is
    "local". The value of `model` is a `Model` or None.
    """
    defaults = {**DEFAULTS, "dispatcher": BETWEEN_RANKS[0]}
    for values in product(*axes.values()):
        combination = {**defaults}
        combination.update(zip(axes, values, strict=True))
        model = combination["model"]
        if model is UNKNOWN:
            combination |= dict.fromkeys(FIXED_BY_MODEL, UNKNOWN)
        elif isinstance(model, Model):
            combination |= model.fields
            if model.dtype is not None and "dtype" not in axes:
                combination["dtype"] = model.dtype
        if combination["ep_size"] is UNKNOWN:
            combination["dispatcher"] = UNKNOWN
        elif combination["ep_size"] == 1:
            combination["dispatcher"] = "local"
        yield combination


_CASE_BUT_OBJECTS = itemgetter(*(name for name in Case.model_fields if name not in ("model", "routing")))


def case_key(combination: Mapping[str, object]) -> tuple[object, ...]:
    """Return what tells the case of a combination from the cases of others. It takes less time than to make a case."""
    return str(combination["model"]), str(combination["routing"]), *_CASE_BUT_OBJECTS(combination)


def case_values(combination: Mapping[str, object]) -> dict[str, object]:
    """Return the values of a combination that are fields of a case: of a model its name, of a trace its content."""
    model, routing = combination["model"], combination["routing"]
    values = {name: combination[name] for name in Case.model_fields}
    return values | {
        "model": model.name if isinstance(model, Model) else model,
        "routing": routing.text if isinstance(routing, Captured) else routing,
    }


def is_match(exclude: Mapping[str, Sequence[object]], combination: Mapping[str, object]) -> bool | None:
    """Whether the combination has, for every key of `exclude`, one of that key's values.

    The result is None if the answer depends on an UNKNOWN value.
    """
    matches: bool | None = True
    for name, values in exclude.items():
        value = combination.get(name, UNKNOWN)
        if value is UNKNOWN or (UNKNOWN in values and value not in values):
            matches = None
        elif value not in values:
            return False
    return matches
