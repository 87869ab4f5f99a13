"""Name cases, backends and machines in words. Tables, plots and pages all use the names from this module.

Rows are a frame, or `Columns` if a caller has no frame.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pandas as pd

from moebench import escapes
from moebench.workload.backends import REFERENCE
from moebench.workload.case import Case
from moebench.workload.context import PLAIN
from moebench.workload.models import SHAPE_AXES, shape_name

#: Columns of rows as lists, with None for null.
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Description:
    """The descriptions of the cases of some rows, in parts such as `tokens`, `dtype` and `mode`."""

    shared: dict[str, str]  #: parts that are the same in every row, except settings at their defaults
    varying: dict[str, list[str]]  #: for each part that differs, its text in each row
    num_rows: int

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """For each row, the texts of its varying parts."""
        return list(zip(*self.varying.values(), strict=True)) or [()] * self.num_rows

    @property
    def labels(self) -> list[str]:
        """For each row, the texts of its varying parts, joined by spaces."""
        return [" ".join(filter(None, row)) for row in self.rows]

    @property
    def headings(self) -> list[str]:
        """For each row, its varying parts in words, such as `4096 tokens, train`.

        If all varying parts of a row are at their defaults, the text is `defaults`. If nothing varies, it is empty.
        """
        texts = [
            ", ".join(_in_words(part, text) for part, text in zip(self.varying, row, strict=True) if text)
            for row in self.rows
        ]
        return [text or ("defaults" if any(texts) else "") for text in texts]

    def title(self, *without: str) -> str:
        """Return the shared parts in words, except the parts named in `without`."""
        return ", ".join(text for part, text in self.shared.items() if part not in without)


def describe(rows: pd.DataFrame | Columns) -> Description:
    """Describe the case of each row, and separate the parts that all rows share from the parts that differ."""
    texts = {name: _texts(rows, columns, text) for name, (columns, text) in _PARTS.items()}
    if any(texts["context"]):  # where contexts differ, the default has its name too
        texts["context"] = [text or PLAIN for text in texts["context"]]
    values = {name: list(dict.fromkeys(some)) for name, some in texts.items()}
    shared = {name: _in_words(name, found[0]) for name, found in values.items() if len(found) == 1 and found[0]}
    for place in ("machine", "run"):
        shared.pop(place, None)  # the function `machine` below writes the machine and the date
    varying = {name: some for name, some in texts.items() if len(values[name]) > 1}
    return Description(shared, varying, len(texts["run"]))


def _texts(rows: pd.DataFrame | Columns, columns: Sequence[str], text: Callable[..., str]) -> list[str]:
    """Return the text of each row. `text` makes it of the row's values in `columns`, once for equal values."""
    made = cache(lambda *values: escapes.line(text(*values)))
    return list(map(made, *(_cells(rows, name) for name in columns)))


def _cells(rows: pd.DataFrame | Columns, name: str) -> Sequence[Any]:
    """Return the cells of a column, with None for null."""
    if isinstance(rows, Mapping):
        return rows[name]
    if rows.empty:  # a frame of no rows may have no columns
        return []
    column = rows[name]
    cells, nulls = column.tolist(), column.isna()
    return [None if null else cell for cell, null in zip(cells, nulls, strict=True)] if nulls.any() else cells


def _in_words(part: str, text: str) -> str:
    """Return the text of a part. The name of the part follows the text of `tokens` and `routing`: `4096 tokens`."""
    return f"{text} {part}" if part in ("tokens", "routing") else text


def rank_load_text(rank_load: str) -> str:
    """Return in words how tokens are spread over ranks. The text is empty if all ranks have equally many."""
    return _RANK_LOADS.get(rank_load, rank_load)


def panel_title(rows: pd.DataFrame, first: str, routing: str, rank_load: str) -> str:
    """Return the title of one panel in a figure of `rows`.

    The title begins with `first`. The panel's routing follows if `rows` have several routings, and the panel's rank
    load follows if `rows` have several rank loads.
    """
    texts = {"routing": routing, "rank_load": rank_load_text(rank_load)}
    return ", ".join([first, *(text for name, text in texts.items() if text and rows[name].nunique() > 1)])


_RANK_LOADS = {"even": "", "uneven": "uneven ranks", "one-empty": "one empty rank"}


#: A forward of at most this many tokens is a step of decoding. Servers replay such a step as a CUDA graph.
DECODE_TOKENS = 512


def is_decode(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows are a step of decoding: a forward of at most DECODE_TOKENS tokens."""
    return frame["mode"].eq("forward") & frame["num_tokens"].le(DECODE_TOKENS)


def shape_names(frame: pd.DataFrame) -> list[str]:
    """Return the name of the model of each row. Without a model, the name is made of the shape: `e64k6d1024i512`."""
    return list(map(cache(_shape_name), *(_cells(frame, name) for name in _SHAPE)))


_SHAPE = (*SHAPE_AXES, "model")


def _shape_name(*values: Any) -> str:
    *shape, model = values
    return shape_name(dict(zip(SHAPE_AXES, shape, strict=True))) if model is None else str(model)


#: Fields of a case that `_PARTS` lists by hand.
_NAMED = (
    *(*SHAPE_AXES, "model", "num_tokens", "dtype", "mode", "routing", "expert_activation", "expert_bias"),
    "rank_load",
)
#: The fields of a case that `_NAMED` does not list. A description has such a field only if it is not at its default.
_SETTINGS = tuple(name for name in Case.model_fields if name not in _NAMED)
#: How to write a setting. A setting that has no entry here is written as its name and its value.
_TEXTS = {
    "activation_alpha": "alpha {:g}",
    "activation_limit": "limit {:g}",
    "apply_router_weight_after_down": "weight after down",
    "masked_share": "{:.0%} masked",
    "ep_size": "EP {}",
    "context": "{}",
    "dp_size": "DP {}",
    "subject": "{}",
    "seed": "seed {}",
}


def _setting(name: str, value: Any) -> str:
    """Return a field of a case in words. The text is empty if the field is at its default."""
    default = Case.model_fields[name].default
    if value == default:
        return ""
    if name in _TEXTS:
        return _TEXTS[name].format(value)
    words = name.replace("_", " ")
    return (words if value else f"no {words}") if isinstance(default, bool) else f"{name} {_short(value)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machine_name(gpu: Any, device: Any) -> str:
    names = [name for name in (gpu, device) if name is not None]
    return {"cpu": "CPU"}.get(names[0], escapes.line(str(names[0]))) if names else ""


def _activation(name: str, has_bias: bool) -> str:
    return name + ("+bias" if has_bias else "")


#: The parts of a description: the columns that each part is made of, and the function that makes its text of their
#: values. A setting at its default has an empty text.
_PARTS: Mapping[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "experts": (_SHAPE, _shape_name),
    "tokens": (("num_tokens",), str),
    **{name: ((name,), str) for name in ("dtype", "mode", "routing")},
    "activation": (("expert_activation", "expert_bias"), _activation),
    **{name: ((name,), partial(_setting, name)) for name in _SETTINGS},
    "rank_load": (("rank_load",), rank_load_text),
    "machine": (("gpu", "device"), _machine_name),
    "run": (("run_id",), str),
}


_FIRST = ("model", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "dtype", "expert_activation")
_LAST = ("expert_bias", "masked_share", "ep_size", "routing", "rank_load", "mode", "num_tokens", "seed", "case_id")
CASE_ORDER = (*_FIRST, *(name for name in Case.model_fields if name not in (*_FIRST, *_LAST)), *_LAST)


def in_case_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows sorted for reading: similar cases together, forward before train, few tokens before many.

    If a row has no device or GPU, for example after a crash, it gets the device and the GPU of another row of its run.
    """
    runs = frame.groupby("run_id")
    machines = {name: frame[name].fillna(runs[name].transform("first")) for name in ("device", "gpu")}
    return frame.assign(**machines).sort_values(list(CASE_ORDER), kind="stable", ignore_index=True)


def backend_labels(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return the backend of each row, with its dispatcher if it is not `local`: `te+deepep`."""
    return pd.Series(_texts(frame, ("backend", "dispatcher"), _label), index=frame.index, dtype="str")


def _label(backend: str, dispatcher: str) -> str:
    return backend if dispatcher == "local" else f"{backend}+{dispatcher}"


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the distinct backend labels in the order of all tables and plots: the reference first, then by name."""
    return sorted(set(labels), key=lambda label: (label.partition("+")[0] != REFERENCE, label))


def machine(rows: pd.DataFrame | Columns) -> str:
    """Return where and when rows were measured: GPU or CPU, cold or warm L2 cache, and the dates of their runs."""
    places = dict.fromkeys(map(_machine_name, _cells(rows, "gpu"), _cells(rows, "device")))
    caches = [f"L2 {state}" for state in dict.fromkeys(_cells(rows, "l2")) if state is not None]
    dates = sorted({"-".join(found.groups()) for run in set(_cells(rows, "run_id")) if (found := _DATE.match(run))})
    span = dates if len(dates) < 3 else [f"{dates[0]} to {dates[-1]}"]
    return ", ".join(text for text in [*places, *caches, *span] if text)


_DATE = re.compile(r"(20\d\d)-?([01]\d)-?([0-3]\d)(?!\d)")
