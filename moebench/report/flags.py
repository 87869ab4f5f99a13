"""Explain the flags of rows in one line each, and say which flags all rows share. docs/results.md explains them too."""

from collections.abc import Collection, Mapping

import pandas as pd

from moebench.results.record import Status

FLAGS: Mapping[str, str] = {
    "synchronises": "the call waits for the GPU, so its time includes host time",
    "no_busy_time": "the call waits for the GPU, and its GPU time could not be measured in every round",
    "clock_changed": "some samples ran at another GPU clock; the times leave them out",
    "slowed_down": "heat or a power brake slowed the GPU down",
    "changed_settings": "the backend left settings of torch changed, and the times may depend on them",
    "changed_process": "the backend left its process changed",
    "other_environment": "the run was resumed in another environment; only its last rounds count",
    "impossibly_fast": "less than 0.8 of the shortest time that the machine can reach",
}


def explained(flag: str) -> str:
    """Return a flag with its explanation."""
    return f"{flag}: {FLAGS[flag]}" if flag in FLAGS else flag


def shared_flags(rows: pd.DataFrame) -> list[str]:
    """Return the flags that all rows with a time have, if there are several rows."""
    flags = [set(flags) for flags in rows.loc[rows["status"] == Status.ok, "flags"]]
    return sorted(set.intersection(*flags)) if len(flags) > 1 else []


def own_flags(rows: pd.DataFrame, shared: Collection[str]) -> "pd.Series[bool]":
    """Return which rows have a flag that is not among `shared`."""
    return rows["flags"].map(lambda flags: bool(set(flags) - set(shared))).astype(bool)
