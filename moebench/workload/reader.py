"""Read the tables of a sweep file, and collect every mistake in the tables."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moebench.errors import UsageError
from moebench.workload.axes import (
    AXES,
    DEFAULTS,
    DISPATCHERS,
    FIXED_BY_MODEL,
    UNKNOWN,
    case_key,
    case_values,
    combinations,
    cut,
    did_you_mean,
    example,
    is_match,
    listed,
    rule_for,
    shown,
)
from moebench.workload.backends import expanded
from moebench.workload.case import Case
from moebench.workload.modelconfig import read_model
from moebench.workload.models import SHAPE_AXES, Model

Read = dict[str, tuple[object, ...]]  # axes as they were read; UNKNOWN stands for a wrong value

# axes with values that can make a combination impossible
_OF_CONTEXT = ("context", "dp_size", "mode", "num_tokens", "routing", "subject")
_DECISIVE = {*SHAPE_AXES, "model", "ep_size", "rank_load", "dispatcher", *_OF_CONTEXT}


class SweepReader:
    """Reads one document and collects every mistake in it.

    The reader replaces a wrong value by UNKNOWN, which may be any value. One mistake then neither hides nor causes
    other mistakes.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.folder = Path(origin).parent
        self.mistakes: dict[str, None] = {}

    def read(self, document: dict[str, Any], head: type[BaseModel], policy: type[BaseModel]) -> dict[str, Any]:
        """Return the fields of a SweepSpec. They are valid only if `mistakes` is empty.

        `head` is the model of the sweep's top-level keys, and `policy` is the model of its policy table.
        """
        self.unknown_keys("", document, (*head.model_fields, "policy", "defaults", "grid", "exclude"))
        found = self.fields("", head, {key: document[key] for key in head.model_fields if key in document})
        found["policy"] = self.fields("policy.", policy, self.table("policy", document.get("policy", {})))
        grids = self.grids(document)
        excludes = self.excludes(document)
        self.sweep(grids, excludes)
        return found | {"grids": tuple(grids), "excludes": tuple(excludes.values())}

    def wrong(self, place: str, message: str) -> None:
        self.mistakes[f"{self.origin}: {place}: {message}" if place else f"{self.origin}: {message}"] = None

    def unknown_keys(self, prefix: str, table: Mapping[str, object], valid: Sequence[str]) -> list[str]:
        """Report keys that are not valid. Return for each the valid key closest to it, or else the key itself."""
        meant = []
        for key in (key for key in table if key not in valid):
            close = difflib.get_close_matches(cut(key), valid, n=1)
            hint = did_you_mean(key, valid) or f"valid keys are {listed(valid)}"
            self.wrong(f"{prefix}{cut(key)} = {shown(table[key])}", f"there is no such key; {hint}")
            meant += close or [key]
        return meant

    def fields(self, prefix: str, model: type[BaseModel], table: dict[str, Any]) -> dict[str, Any]:
        """Report the mistakes that `model` finds in the table, and return the table unchanged."""
        self.unknown_keys(prefix, table, tuple(model.model_fields))
        try:
            model.model_validate(table)
        except ValidationError as error:
            for details in error.errors():
                name = str(details["loc"][0])
                if details["type"] == "missing":
                    self.wrong(f"{prefix}{name}", f"is missing; add {name} = {example(name)}")
                elif details["type"] != "extra_forbidden":
                    rule = rule_for(name, table[name], details)
                    self.wrong(f"{prefix}{name} = {shown(table[name])}", rule)
        return table

    def table(self, key: str, raw: object) -> dict[str, Any]:
        if isinstance(raw, dict):
            return raw
        self.wrong(f"{key} = {shown(raw)}", f"must be one table; write [{key}] above its keys")
        return {}

    def tables(self, key: str, raw: object) -> list[tuple[str, dict[str, Any]]]:
        """Return each table of an array of tables, with its place."""
        if isinstance(raw, list) and all(isinstance(table, dict) for table in raw):
            return [(f"{key}[{number}]", table) for number, table in enumerate(raw)]
        self.wrong(f"{key} = {shown(raw)}", f"must be an array of tables; write [[{key}]] above the keys of each table")
        return [(key, raw)] if isinstance(raw, dict) else []

    def axes(self, place: str, table: Mapping[str, object]) -> Read:
        read = {name: self.axis(f"{place}.{name}", name, raw) for name, raw in table.items() if name in AXES}
        for meant in self.unknown_keys(f"{place}.", table, tuple(AXES)):
            read.setdefault(meant, (UNKNOWN,))
        return read

    def axis(self, place: str, name: str, raw: object) -> tuple[object, ...]:
        """Return the values of one axis, which the file writes as a scalar or a list."""
        if raw == []:
            self.wrong(f"{place} = []", f"an axis needs at least one value; for example {name} = [{example(name)}]")
            return (UNKNOWN,)
        read: list[object] = []
        for number, value in expanded(name, raw if isinstance(raw, list) else [raw]):
            at = f"{place}[{number}] = {shown(value)}" if isinstance(raw, list) else f"{place} = {shown(value)}"
            try:
                valid = AXES[name].validate_python(value, context=self.folder)
                if name == "model":
                    valid = read_model(valid, self.folder)
            except ValidationError as error:
                self.wrong(at, rule_for(name, value, error.errors()[0]))
                valid = UNKNOWN
            except UsageError as error:
                self.wrong(at, str(error).removeprefix(f"model {cut(str(value))}: "))
                valid = UNKNOWN
            if valid is not UNKNOWN and valid in read:
                self.wrong(at, "is already in the list; remove it")
            else:
                read.append(valid)
        return tuple(read)

    def grids(self, document: Mapping[str, Any]) -> list[Read]:
        defaults = self.table("defaults", document.get("defaults", {}))
        default_axes = self.axes("defaults", defaults)
        if not document.get("grid"):
            self.wrong(
                "grid", "the sweep has no grid; add [[grid]] with num_tokens, backend, and model or the shape axes"
            )
            return []
        grids = []
        for place, table in self.tables("grid", document["grid"]):
            axes = default_axes | self.axes(place, table)
            where = {**dict.fromkeys(defaults, "defaults"), **dict.fromkeys(table, place)}
            grids.append(self.shape(place, axes, where))
        return grids

    def shape(self, place: str, axes: Read, where: Mapping[str, str]) -> Read:
        """Return the axes of one grid, with UNKNOWN for required axes that are missing.

        `where` says which table each key is in.
        """
        models = [model for model in axes.get("model", ()) if isinstance(model, Model)]
        fixed = dict.fromkeys([*FIXED_BY_MODEL, *(name for model in models for name in model.fields)])
        twice = [name for name in fixed if name in where and "model" in where]
        for name in twice:
            rule = f"{where['model']}.model fixes it; remove one of the two, because a grid has model or the shape axes"
            self.wrong(f"{where[name]}.{name}", rule)
        missing = [name for name in ("num_tokens", "backend") if name not in axes]
        shapeless = [name for name in SHAPE_AXES if name not in axes] if "model" not in axes else []
        if len(shapeless) == len(SHAPE_AXES):
            self.wrong(place, f"the grid has no shape; add model, or {listed(SHAPE_AXES)}, here or in [defaults]")
        else:
            missing += shapeless
        for name in missing:
            self.wrong(f"{place}.{name}", f"is missing; add {name} = {example(name)}, here or in [defaults]")
        return axes | dict.fromkeys([*missing, *shapeless, *(["model"] if twice else [])], (UNKNOWN,))

    def excludes(self, document: Mapping[str, Any]) -> dict[str, Read]:
        """Return the excludes by their place."""
        excludes = {}
        for place, table in self.tables("exclude", document.get("exclude", [])):
            if not table:
                self.wrong(place, "an exclude without keys leaves out every job; name what to leave out, or remove it")
            else:
                excludes[place] = self.axes(place, table)
        return excludes

    def sweep(self, grids: Sequence[Read], excludes: Mapping[str, Read]) -> None:
        """Report the mistakes that only the combinations show.

        These mistakes are impossible combinations, excludes that match no job, and excludes that leave out every job.
        """
        dead, left = dict.fromkeys(excludes), 0
        impossible: dict[tuple[object, ...], list[str]] = {}  # many combinations differ only in the backend
        for number, axes in enumerate(grids):
            for combination in combinations(axes):
                matches = {place: is_match(exclude, combination) for place, exclude in excludes.items()}
                dead = {place: None for place in dead if matches[place] is False}
                if True in matches.values():
                    continue
                left += 1
                spared = any(match is None and _DECISIVE & excludes[place].keys() for place, match in matches.items())
                if spared:
                    continue
                case = (*case_key(combination), combination["dispatcher"])
                if case not in impossible:
                    impossible[case] = _impossible(combination)
                for message in impossible[case]:
                    self.wrong(f"grid[{number}]", message)
        for place in dead if grids else ():
            self.wrong(place, "matches no job of this sweep; correct it or remove it")
        if grids and not left:
            self.wrong("exclude", "the excludes leave out every job; remove an exclude or add a grid")


def _impossible(combination: Mapping[str, object]) -> list[str]:
    """Return the reasons why a combination of valid values is not a job; an empty list if it is a job."""
    ep_size, dispatcher = combination["ep_size"], combination["dispatcher"]
    messages = []
    if dispatcher == "local" and ep_size != 1:
        messages.append(
            f'dispatcher = "local" at ep_size = {ep_size}: tokens must move between ranks; take '
            f"{listed(DISPATCHERS[1:])}; at ep_size = 1 the dispatcher is always local"
        )
    if combination["n_routed_experts"] is UNKNOWN:
        return messages
    stand_ins = {**dict.fromkeys(Case.model_fields, 1), **DEFAULTS}
    values = case_values(combination)
    known = {name: stand_ins[name] if values[name] is UNKNOWN else values[name] for name in stand_ins}
    if any(values[name] is UNKNOWN for name in _OF_CONTEXT):
        known |= {name: DEFAULTS[name] for name in ("context", "dp_size", "subject")}
    try:
        Case.model_validate(known)
    except ValidationError as error:
        for details in error.errors():
            messages += details["msg"].removeprefix("Value error, ").splitlines()
    return messages
