"""How results are spoken of, the same in tables, plots and pages. No torch here."""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moebench.workload.backends import REFERENCE
from moebench.workload.case import Case
from moebench.workload.models import SHAPE_AXES, shape_name


@dataclass(frozen=True)
class Description:
    """What tells the cases of a frame apart, and what they share."""

    shared: dict[str, str]  #: parts that are the same in every row, without those at their default
    varying: pd.DataFrame  #: a column a part that differs, a row a row of the frame, all strings

    @property
    def labels(self) -> "pd.Series[str]":
        """The varying parts of each row in one string."""
        texts = [" ".join(filter(None, row)) for row in self.varying.to_numpy()]
        return pd.Series(texts, index=self.varying.index, dtype="str")

    @property
    def headings(self) -> "pd.Series[str]":
        """The varying parts of each row in words, `4096 tokens, train`; `defaults` where that leaves a row without."""
        texts = [
            ", ".join(_in_words(str(part), text) for part, text in zip(self.varying, row, strict=True) if text)
            for row in self.varying.to_numpy()
        ]
        texts = [text or ("defaults" if any(texts) else "") for text in texts]
        return pd.Series(texts, index=self.varying.index, dtype="str")

    def title(self, *without: str) -> str:
        """The shared parts in words, but for those named."""
        return ", ".join(text for part, text in self.shared.items() if part not in without)


def describe(frame: pd.DataFrame) -> Description:
    """Split what describes the case of each row into what all rows share and what varies."""
    parts = pd.DataFrame([_parts(row) for row in frame.to_dict("records")], index=frame.index, dtype="str")
    values = {str(name): parts[name].unique() for name in parts}
    shared = {name: _in_words(name, found[0]) for name, found in values.items() if len(found) == 1 and found[0]}
    for place in ("machine", "run"):
        shared.pop(place, None)  # `machine` below says where and when
    return Description(shared, parts[[name for name, found in values.items() if len(found) > 1]])


def _in_words(part: str, text: str) -> str:
    """A part as it reads without a column's title above it."""
    return f"{text} {part}" if part in ("tokens", "routing") else text


def rank_load_text(rank_load: str) -> str:
    """How tokens are spread over ranks, in words; empty where all have as many."""
    return _RANK_LOADS.get(rank_load, rank_load)


def panel_title(rows: pd.DataFrame, first: str, routing: str, rank_load: str) -> str:
    """Of the panel of one routing and load in a figure of `rows`: `first`, and what of the two differs there."""
    texts = {"routing": routing, "rank_load": rank_load_text(rank_load)}
    return ", ".join([first, *(text for name, text in texts.items() if text and rows[name].nunique() > 1)])


_RANK_LOADS = {"even": "", "uneven": "uneven ranks", "one-empty": "one empty rank"}


def shape_names(frame: pd.DataFrame) -> list[str]:
    """The model of each row, or the shape it has of its own: e64k6d1024i512."""
    return [_shape_name(row) for row in frame.to_dict("records")]


def _shape_name(row: Mapping[Hashable, Any]) -> str:
    return shape_name(row) if pd.isna(row["model"]) else str(row["model"])


def _parts(row: Mapping[Hashable, Any]) -> dict[str, str]:
    """What describes a case, in words; empty for a setting at its default."""
    return {
        "experts": _shape_name(row),
        "tokens": str(row["num_tokens"]),
        "dtype": row["dtype"],
        "mode": row["mode"],
        "routing": row["routing"],
        "activation": row["expert_activation"] + ("+bias" if row["expert_bias"] else ""),
        **{name: _setting(name, row[name]) for name in _SETTINGS},
        "rank_load": rank_load_text(row["rank_load"]),
        "machine": _machine_name(row["gpu"], row["device"]),
        "run": row["run_id"],
    }


#: Fields of a case that have a part of their own in `_parts`, or share one.
_NAMED = (
    *(*SHAPE_AXES, "model", "num_tokens", "dtype", "mode", "routing", "expert_activation", "expert_bias"),
    "rank_load",
)
#: All others, which are told where they are not at their default.
_SETTINGS = tuple(name for name in Case.model_fields if name not in _NAMED)
#: How a setting reads; one that is not here reads as its name with its value.
_TEXTS = {
    "activation_alpha": "alpha {:g}",
    "activation_limit": "limit {:g}",
    "apply_router_weight_after_down": "weight after down",
    "masked_share": "{:.0%} masked",
    "ep_size": "EP {}",
    "seed": "seed {}",
}


def _setting(name: str, value: Any) -> str:
    """A field of a case in words; empty at its default."""
    default = Case.model_fields[name].default
    if value == default or (pd.isna(value) and default is None):
        return ""
    if name in _TEXTS:
        return _TEXTS[name].format(value)
    words = name.replace("_", " ")
    return (words if value else f"no {words}") if isinstance(default, bool) else f"{name} {_short(value)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machine_name(gpu: Any, device: Any) -> str:
    names = [name for name in (gpu, device) if not pd.isna(name)]
    return {"cpu": "CPU"}.get(names[0], str(names[0])) if names else ""


_FIRST = ("model", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "dtype", "expert_activation")
_LAST = ("expert_bias", "masked_share", "ep_size", "routing", "rank_load", "mode", "num_tokens", "seed", "case_id")
CASE_ORDER = (*_FIRST, *(name for name in Case.model_fields if name not in (*_FIRST, *_LAST)), *_LAST)


def in_case_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows sorted for reading: like cases together, forward before train, few tokens before many.

    A row that names no machine, as that of a crash, gets its run's.
    """
    runs = frame.groupby("run_id")
    machines = {name: frame[name].fillna(runs[name].transform("first")) for name in ("device", "gpu")}
    return frame.assign(**machines).sort_values(list(CASE_ORDER), kind="stable", ignore_index=True)


def backend_labels(frame: pd.DataFrame) -> "pd.Series[str]":
    """The backend of each row, with its dispatcher where there is one: `te+deepep`."""
    dispatchers = frame["dispatcher"].map(lambda name: "" if name == "local" else f"+{name}")
    return (frame["backend"] + dispatchers).astype("str")


def in_order(labels: Iterable[str]) -> list[str]:
    """Distinct backend labels as they are shown everywhere: the reference first, then by name."""
    return sorted(set(labels), key=lambda label: (label.partition("+")[0] != REFERENCE, label))


def machine(frame: pd.DataFrame) -> str:
    """Where and when rows were measured: GPU (or CPU), cold or warm L2, and the date if the run's id begins with it."""
    places = dict.fromkeys(map(_machine_name, frame["gpu"], frame["device"]))
    caches = [f"L2 {state}" for state in frame["l2"].dropna().unique()]
    dates = sorted({"-".join(found.groups()) for run in frame["run_id"] if (found := _DATE.match(run))})
    span = dates if len(dates) < 3 else [f"{dates[0]} to {dates[-1]}"]
    return ", ".join(text for text in [*places, *caches, *span] if text)


_DATE = re.compile(r"(20\d\d)-?([01]\d)-?([0-3]\d)(?!\d)")
