"""What stands in a table's cells: numbers in a fixed number of characters, statuses, styles. No torch here."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from moebench.results.record import GOOD, Status

Row = Mapping[Hashable, Any]  # of a frame, with `label` and `fastest`

FASTEST, DIM = "bold green", "dim"
STATUS_STYLES = {Status.unsupported: DIM, Status.oom: "yellow"}


def human(value: float) -> str:
    """Three significant digits with a decimal suffix, 105K, 1.23M; two below 1."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for power, suffix in ((9, "G"), (6, "M"), (3, "K"), (0, "")):
        scaled = float(f"{value:.3g}") / 10**power
        if scaled >= 1:
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled)))}f}{suffix}"
    return f"{value:#.2g}"


def rate(value: float) -> str:
    """As `human`; a dash for what was not measured."""
    return "-" if math.isnan(value) else human(value)


def milliseconds(time_ms: float) -> str:
    """A time in at most six characters; an end of an interval may be infinite."""
    decimals = 4 if time_ms < 0.1 else 3 - math.floor(math.log10(min(max(time_ms, 1), 1000)))
    return f"{time_ms:.{decimals}f}"


def part_milliseconds(time_ms: float) -> str:
    """A part of a time in at most five characters; a dash for what was not measured."""
    if math.isnan(time_ms):
        return "-"
    if 0 < time_ms < 0.0005:
        return "<.001"
    texts = [f"{time_ms:.{decimals}f}" for decimals in (3, 2, 1, 0)]
    return next((text for text in texts if len(text) <= 5), texts[-1])


def half_interval(row: Row) -> str:
    """Half the interval of the median over the median, in at most four characters; a dash where there is none."""
    share = (row["time_ms_high"] - row["time_ms_low"]) / 2 / row["time_ms"]
    if math.isnan(share):
        return "-"
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def marks(row: Row) -> str:
    """Before a time: `*` the fastest of its case, `~` not converged."""
    return f"{'*' * bool(row['fastest'])}{'~' * (row['converged'] is False)}"


def mismatch(row: Row) -> tuple[str, str]:
    """How wrong a row is, and in which tensor."""
    times = f"{row['parity_worst']:.3g}" + "x" * math.isfinite(row["parity_worst"])
    return f"MISMATCH {times}", "" if pd.isna(row["parity_worst_tensor"]) else str(row["parity_worst_tensor"])


def status_text(status: Status) -> str:
    """A status other than ok; in capitals where it is a failure."""
    return status.value if status in GOOD else status.value.upper()


def style_of(row: Row) -> str:
    """How a row's cell is printed where there is colour."""
    status = Status(row["status"])
    if status is Status.ok:
        return FASTEST if row["fastest"] else ""
    return STATUS_STYLES.get(status, "bold red")
