"""Sweep files: TOML -> `SweepSpec` -> jobs, and what a command line selects among jobs. No torch here.

A wrong file gets every mistake in it in one `SweepError`. docs/sweeps.md is the user's reference.
"""

import difflib
import json
import math
import operator
import re
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from moebench.case import Case, Job
from moebench.models import MODELS

SHAPE_AXES = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
DISPATCHERS = ("local", "allgather", "alltoall", "deepep")

Value = bool | int | float | str
Axes = dict[str, tuple[Value, ...]]


class SweepError(Exception):
    """A sweep, filter or backend name that cannot be used: every mistake, one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__(mistakes)
        self.mistakes = list(mistakes)

    def __str__(self) -> str:
        return "\n".join(self.mistakes)


class Policy(BaseModel):
    """How jobs are measured. `interval_target` is the half width of the median's 95% interval over the median.

    None leaves it to moebench.timing, by device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    interval_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    time_cap_s: Annotated[float, Field(gt=0)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    l2: Literal["cold", "warm"] = "cold"


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: Annotated[str, Field(pattern=r"^[^\n]*$")] = ""


class SweepSpec(_Head):
    """A validated sweep: the union of its `grids` (cartesian products, defaults merged in) less its `excludes`."""

    policy: Policy = Policy()
    grids: tuple[Axes, ...]
    excludes: tuple[Axes, ...] = ()

    def jobs(self) -> list[Job]:
        """The jobs, each once: those with the same weights together, then by case, then by backend, in file order."""
        found = {
            _job(combination): None
            for axes in self.grids
            for combination in _combinations(axes)
            if not any(_match(exclude, combination) for exclude in self.excludes)
        }
        return _in_order(found)


# Reading a file


def available_sweeps() -> dict[str, Path]:
    """Names and files of the sweeps in ./suites and in the suites folder beside the package; the former win."""
    folders = (Path(__file__).parent.parent / "suites", Path("suites"))
    found = {path.stem: path for folder in folders for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


def find_sweep(name_or_path: str | Path) -> Path:
    """The sweep file at that path or, of that name, in `available_sweeps`; SweepError lists those there are."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    sweeps = available_sweeps()
    name = str(name_or_path)
    if name not in sweeps:
        hint = _did_you_mean(name, sweeps) or "give a path or a name"
        raise SweepError([f"{name}: no such file, and no such sweep in suites/; {hint}; there are {_listed(sweeps)}"])
    return sweeps[name]


def load_sweep(path: Path) -> SweepSpec:
    """The sweep in that file; SweepError names every mistake in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError([f"{path}: cannot be read: {error}; give a TOML file in UTF-8"]) from error
    return parse_sweep(text, str(path))


def parse_sweep(text: str, origin: str) -> SweepSpec:
    """The sweep in `text`. `origin`, the file's path, is named in mistakes; traces are relative to its folder."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SweepError([_syntax_mistake(text, origin, str(error))]) from error
    reader = _Reader(origin)
    spec = reader.read(document)
    if spec is None:
        raise SweepError(list(reader.mistakes))
    return spec


def _syntax_mistake(text: str, origin: str, message: str) -> str:
    rule, _, place = message.removesuffix(")").partition(" (at ")
    line = re.match(r"line (\d+)", place)
    quoted = f" {text.split(chr(10))[int(line[1]) - 1].strip()!r}" if line else ""
    return f"{origin}: {place}:{quoted} is not TOML: {rule}; strings need quotes, lists need commas and brackets"


# Axes: their types are those of Case's fields


def _openable(routing: str, info: ValidationInfo) -> str:
    """A recorded trace as a path that can be opened from here; `info.context` is the sweep file's folder."""
    kind, _, written = routing.partition(":")
    if kind != "trace" or info.context is None:
        return routing
    path = (info.context / written).resolve()
    if not path.is_file():
        raise PydanticCustomError("no_trace", "there is no file {path}", {"path": str(path)})
    return f"trace:{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"


_BACKEND = r"^[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?$"


def _axis_types() -> dict[str, Any]:
    fields: dict[str, Any] = {name: field.rebuild_annotation() for name, field in Case.model_fields.items()}
    literal: Any = Literal
    annotated: Any = Annotated
    return fields | {
        "model": literal[tuple(MODELS)],
        "routing": annotated[fields["routing"], AfterValidator(_openable)],
        "backend": annotated[str, Field(pattern=_BACKEND)],
        "dispatcher": literal[DISPATCHERS],
    }


_UNKNOWN: Final = object()  # stands for a value that a mistake hides

_TYPES = _axis_types()
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_AXES: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(type_, config=_STRICT) for name, type_ in _TYPES.items()}
_CHOICES = {name: get_args(_TYPES[name]) for name in ("model", "mode", "dtype", "expert_activation", "dispatcher")}
_CHOICES["l2"] = ("cold", "warm")
_NUMBERS = tuple(name for name, field in Case.model_fields.items() if field.annotation in (int, float))
_FIXED_BY_MODEL = tuple(dict.fromkeys(name for preset in MODELS.values() for name in preset))
_DEFAULTS = {name: field.default for name, field in Case.model_fields.items() if not field.is_required()}
_DECISIVE = {*SHAPE_AXES, "model", "ep_size", "dispatcher"}  # what makes a combination impossible
_RULES = {
    "name": 'must be letters, digits, ".", "_" and "-", a letter or digit first',
    "description": "must be one line of text",
    "backend": 'must be a name, or "module:attribute" for a backend of your own',
    "routing": "must be one of uniform, balanced, one-hot, zipf[:s], empty[:share], trace:FILE.npy",
}
_EXAMPLES = {
    **_DEFAULTS,
    **{name: MODELS["qwen3-30b-a3b"][name] for name in SHAPE_AXES},
    "num_tokens": 128,
    "interval_target": 0.02,
    "time_cap_s": 1.0,
    "timeout_s": 300.0,
    "name": "quick",
    "description": "one line",
    "backend": "loop",
}


def _rule(name: str, value: object, error: ErrorDetails) -> str:
    """The rule that `value` of the field `name` breaks, and the remedy."""
    if name in _CHOICES:
        hint = _did_you_mean(value, _CHOICES[name]) or "take one of them"
        return f"must be one of {_listed(_CHOICES[name])}; {hint}"
    if error["type"] == "no_trace":
        return f"{error['msg']}; a trace's path is absolute or relative to the sweep file's folder"
    rule = _RULES.get(name) or error["msg"].replace("Input should be", "must be")
    return f"{rule}; for example {name} = {_shown(_EXAMPLES[name])}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"


def _did_you_mean(word: object, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(valid), n=1)
    return f'did you mean "{close[0]}"?' if close else ""


# Combinations: one value for every axis


def _combinations(axes: Mapping[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    """Each combination of the axes, complete: with the model's shape, Case's defaults, and the dispatcher in force."""
    for values in product(*axes.values()):
        combination = {**_DEFAULTS, "dispatcher": "allgather", **dict(zip(axes, values, strict=True))}
        model = combination["model"]
        if model is _UNKNOWN:
            combination |= dict.fromkeys(_FIXED_BY_MODEL, _UNKNOWN)
        elif model is not None:
            combination |= MODELS[str(model)]
        if combination["ep_size"] is _UNKNOWN:
            combination["dispatcher"] = _UNKNOWN
        elif combination["ep_size"] == 1:
            combination["dispatcher"] = "local"
        yield combination


def _match(exclude: Mapping[str, Sequence[object]], combination: Mapping[str, object]) -> bool | None:
    """Whether the combination has one of the values for every key; None where a mistake leaves that open."""
    matches: bool | None = True
    for name, values in exclude.items():
        value = combination.get(name, _UNKNOWN)
        if value is _UNKNOWN or (_UNKNOWN in values and value not in values):
            matches = None
        elif value not in values:
            return False
    return matches


def _job(combination: Mapping[str, object]) -> Job:
    case = Case.model_validate({name: combination[name] for name in Case.model_fields})
    return Job(case=case, backend=str(combination["backend"]), dispatcher=str(combination["dispatcher"]))


def _impossible(combination: Mapping[str, object]) -> list[str]:
    """Why no job can be made of a combination whose values are each valid."""
    ep_size, dispatcher = combination["ep_size"], combination["dispatcher"]
    messages = []
    if dispatcher == "local" and ep_size != 1:
        messages.append(
            f'dispatcher = "local" at ep_size = {ep_size}: tokens must move between ranks; take '
            f"{_listed(DISPATCHERS[1:])}; ep_size = 1 is local whatever the axis says"
        )
    if combination["n_routed_experts"] is _UNKNOWN:
        return messages
    stand_ins = {**dict.fromkeys(Case.model_fields, 1), **_DEFAULTS}
    known = {name: stand_ins[name] if combination[name] is _UNKNOWN else combination[name] for name in stand_ins}
    try:
        Case.model_validate(known)
    except ValidationError as error:
        for details in error.errors():
            messages += details["msg"].removeprefix("Value error, ").splitlines()
    return messages


def _in_order(jobs: Iterable[Job]) -> list[Job]:
    """Same weights together, then by EP size, case and backend; among equals the first to come is first."""
    ranks: dict[Hashable, int] = {}

    def rank(key: Hashable) -> int:
        return ranks.setdefault(key, len(ranks))

    def weights(case: Case) -> Hashable:
        shape = (case.n_routed_experts, case.dim, case.moe_inter_dim, case.is_gated)
        return (*shape, case.dtype, case.expert_bias, case.seed)

    return sorted(jobs, key=lambda job: (rank(weights(job.case)), job.case.ep_size, rank(job.case), rank(job.backend)))


_Read = dict[str, tuple[object, ...]]  # axes as they were read, _UNKNOWN among them


class _Reader:
    """Reads one document and gathers every mistake in it.

    A wrong value is read on as _UNKNOWN, which may be anything, so that one mistake neither hides nor causes others.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.folder = Path(origin).parent
        self.mistakes: dict[str, None] = {}

    def read(self, document: dict[str, Any]) -> SweepSpec | None:
        self.unknown_keys("", document, ("name", "description", "policy", "defaults", "grid", "exclude"))
        head = self.fields("", _Head, {key: document[key] for key in ("name", "description") if key in document})
        policy = self.fields("policy.", Policy, self.table("policy", document.get("policy", {})))
        grids = self.grids(document)
        excludes = self.excludes(document)
        self.sweep(grids, excludes)
        if self.mistakes:
            return None
        found = {"policy": policy, "grids": tuple(grids), "excludes": tuple(excludes.values())}
        return SweepSpec.model_validate(head | found)

    def wrong(self, place: str, message: str) -> None:
        self.mistakes[f"{self.origin}: {place}: {message}" if place else f"{self.origin}: {message}"] = None

    def unknown_keys(self, prefix: str, table: Mapping[str, object], valid: Sequence[str]) -> list[str]:
        """Reports keys that are not valid; returns those that were meant, or else the keys themselves."""
        meant = []
        for key in (key for key in table if key not in valid):
            close = difflib.get_close_matches(key, valid, n=1)
            hint = _did_you_mean(key, valid) or f"valid keys are {_listed(valid)}"
            self.wrong(f"{prefix}{key} = {_shown(table[key])}", f"there is no such key; {hint}")
            meant += close or [key]
        return meant

    def fields(self, prefix: str, model: type[BaseModel], table: dict[str, Any]) -> dict[str, Any]:
        """The table as it is, with the mistakes that `model` finds in it reported."""
        self.unknown_keys(prefix, table, tuple(model.model_fields))
        try:
            model.model_validate(table)
        except ValidationError as error:
            for details in error.errors():
                name = str(details["loc"][0])
                if details["type"] == "missing":
                    self.wrong(f"{prefix}{name}", f"is missing; add {name} = {_shown(_EXAMPLES[name])}")
                elif details["type"] != "extra_forbidden":
                    rule = _rule(name, table[name], details)
                    self.wrong(f"{prefix}{name} = {_shown(table[name])}", rule)
        return table

    def table(self, key: str, raw: object) -> dict[str, Any]:
        if isinstance(raw, dict):
            return raw
        self.wrong(f"{key} = {_shown(raw)}", f"must be one table; write [{key}] above its keys")
        return {}

    def tables(self, key: str, raw: object) -> list[tuple[str, dict[str, Any]]]:
        """Each table of an array of tables, with its place."""
        if isinstance(raw, list) and all(isinstance(table, dict) for table in raw):
            return [(f"{key}[{number}]", table) for number, table in enumerate(raw)]
        self.wrong(f"{key} = {_shown(raw)}", f"must be an array of tables; write [[{key}]] above each one's keys")
        return [(key, raw)] if isinstance(raw, dict) else []

    def axes(self, place: str, table: Mapping[str, object]) -> _Read:
        read = {name: self.axis(f"{place}.{name}", name, raw) for name, raw in table.items() if name in _AXES}
        for meant in self.unknown_keys(f"{place}.", table, tuple(_AXES)):
            read.setdefault(meant, (_UNKNOWN,))
        return read

    def axis(self, place: str, name: str, raw: object) -> tuple[object, ...]:
        """The values of one axis, a scalar or a list."""
        if raw == []:
            self.wrong(f"{place} = []", f"an axis has at least one value; for example {name} = [{_example(name)}]")
            return (_UNKNOWN,)
        read: list[object] = []
        for number, value in enumerate(raw if isinstance(raw, list) else [raw]):
            at = f"{place}[{number}] = {_shown(value)}" if isinstance(raw, list) else f"{place} = {_shown(value)}"
            try:
                valid = _AXES[name].validate_python(value, context=self.folder)
            except ValidationError as error:
                self.wrong(at, _rule(name, value, error.errors()[0]))
                valid = _UNKNOWN
            if valid is not _UNKNOWN and valid in read:
                self.wrong(at, "stands in the list already; remove it")
            else:
                read.append(valid)
        return tuple(read)

    def grids(self, document: Mapping[str, Any]) -> list[_Read]:
        defaults = self.table("defaults", document.get("defaults", {}))
        default_axes = self.axes("defaults", defaults)
        if not document.get("grid"):
            self.wrong("grid", "there is none; add [[grid]] with num_tokens, backend, and model or the shape axes")
            return []
        grids = []
        for place, table in self.tables("grid", document["grid"]):
            axes = default_axes | self.axes(place, table)
            where = {**dict.fromkeys(defaults, "defaults"), **dict.fromkeys(table, place)}
            grids.append(self.shape(place, axes, where))
        return grids

    def shape(self, place: str, axes: _Read, where: Mapping[str, str]) -> _Read:
        """The axes of one grid, what it must have in place. `where` says which table each key stands in."""
        twice = [name for name in _FIXED_BY_MODEL if name in where and "model" in where]
        for name in twice:
            rule = f"{where['model']}.model fixes it; remove one of the two: a grid has model or the shape axes"
            self.wrong(f"{where[name]}.{name}", rule)
        missing = [name for name in ("num_tokens", "backend") if name not in axes]
        shapeless = [name for name in SHAPE_AXES if name not in axes] if "model" not in axes else []
        if len(shapeless) == len(SHAPE_AXES):
            self.wrong(place, f"there is no shape; add model, or {_listed(SHAPE_AXES)}, here or in [defaults]")
        else:
            missing += shapeless
        for name in missing:
            self.wrong(f"{place}.{name}", f"is missing; add {name} = {_example(name)}, here or in [defaults]")
        return axes | dict.fromkeys([*missing, *shapeless, *(["model"] if twice else [])], (_UNKNOWN,))

    def excludes(self, document: Mapping[str, Any]) -> dict[str, _Read]:
        """The excludes by their place."""
        excludes = {}
        for place, table in self.tables("exclude", document.get("exclude", [])):
            if not table:
                self.wrong(place, "a table without keys leaves out every job; name what to leave out, or remove it")
            else:
                excludes[place] = self.axes(place, table)
        return excludes

    def sweep(self, grids: Sequence[_Read], excludes: Mapping[str, _Read]) -> None:
        """Reports what only the combinations show: impossible ones, dead excludes, and that nothing is left."""
        dead, left = dict.fromkeys(excludes), 0
        for number, axes in enumerate(grids):
            for combination in _combinations(axes):
                matches = {place: _match(exclude, combination) for place, exclude in excludes.items()}
                dead = {place: None for place in dead if matches[place] is False}
                if True in matches.values():
                    continue
                left += 1
                spared = any(match is None and _DECISIVE & excludes[place].keys() for place, match in matches.items())
                for message in () if spared else _impossible(combination):
                    self.wrong(f"grid[{number}]", message)
        for place in dead if grids else ():
            self.wrong(place, "matches no job of this sweep; correct it or remove it")
        if grids and not left:
            self.wrong("exclude", "every job is left out, the sweep is empty; remove an exclude or add a grid")


def _example(name: str) -> str:
    return _shown(_EXAMPLES[name] if name in _EXAMPLES else _CHOICES[name][0])


# Selecting jobs

_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def filter_jobs(jobs: Sequence[Job], filters: Sequence[str]) -> list[Job]:
    """The jobs that pass every filter: KEY=V1,V2, KEY!=V1,V2, and for numbers KEY<V, KEY<=V, KEY>V, KEY>=V.

    Keys are the axes of a sweep. Raises SweepError with the mistakes of all filters.
    """
    tests: list[Callable[[Job], bool]] = []
    mistakes: list[str] = []
    for text in filters:
        try:
            tests.append(_test(text))
        except SweepError as error:
            mistakes += error.mistakes
    if mistakes:
        raise SweepError(mistakes)
    return [job for job in jobs if all(test(job) for test in tests)]


def _test(text: str) -> Callable[[Job], bool]:
    parts = re.fullmatch(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)(.*)", text)
    keys = f"keys are {_listed(_AXES)}"
    if parts is None:
        raise SweepError([f"filter {text!r}: must be KEY=V1,V2, KEY!=V1,V2, KEY<V, KEY<=V, KEY>V or KEY>=V; {keys}"])
    key, sign, written = parts.groups()
    if key not in _AXES:
        hint = _did_you_mean(key, _AXES)
        raise SweepError([f"filter {text!r}: there is no key {key!r}; {hint + ' ' if hint else ''}{keys}"])
    if sign in _ORDERS:
        if key not in _NUMBERS:
            raise SweepError([f"filter {text!r}: {key} has no order; use = or !=; numbers are {_listed(_NUMBERS)}"])
        bound, compare = _number(text, written), _ORDERS[sign]
        return lambda job: compare(_value(job, key), bound)
    values = [_filter_value(text, key, word.strip()) for word in written.split(",")]
    return lambda job: (_value(job, key) in values) == (sign == "=")


def _value(job: Job, key: str) -> Any:
    return getattr(job if key in ("backend", "dispatcher") else job.case, key)


def _number(text: str, written: str) -> float:
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SweepError([f"filter {text!r}: {written.strip()!r} is not a number; compare with one number"])
    return number


def _filter_value(text: str, key: str, word: str) -> object:
    try:
        return _AXES[key].validate_strings(word)
    except ValidationError as error:
        raise SweepError([f"filter {text!r}: {word!r}: {_rule(key, word, error.errors()[0])}"]) from error


def select_backends(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The cases of `jobs`, each once for every named backend and every dispatcher it has; without names, `jobs`."""
    wrong = [name for name in names if not re.fullmatch(_BACKEND, name)]
    if wrong:
        raise SweepError([f"backend {name!r}: {_RULES['backend']}; for example my_module:MyExperts" for name in wrong])
    if not names:
        return list(jobs)
    dispatchers: dict[Case, dict[str, None]] = {}
    for job in jobs:
        dispatchers.setdefault(job.case, {})[job.dispatcher] = None
    return [
        Job(case=case, backend=name, dispatcher=dispatcher)
        for case in dispatchers
        for name in dict.fromkeys(names)
        for dispatcher in dispatchers[case]
    ]
