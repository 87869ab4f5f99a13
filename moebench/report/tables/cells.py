"""Write and style the cells of tables: numbers with a limited width, and statuses."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from moebench.machine.units import size
from moebench.results.labels import is_decode
from moebench.results.record import GOOD, Status

Row = Mapping[Hashable, Any]  # a row of a frame with the columns `label` and `fastest`

GRAPH_LEGEND = "graph: ms when a CUDA graph replays the call, in decoding and with several ranks"
FASTEST, DIM = "bold green", "dim"
STATUS_STYLES = {Status.unsupported: DIM, Status.oom: "yellow"}


def human(value: float) -> str:
    """Return the value with three significant digits and a decimal suffix: 105K, 1.23M. Below 1, it has two digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for power, suffix in ((9, "G"), (6, "M"), (3, "K"), (0, "")):
        scaled = float(f"{value:.3g}") / 10**power
        if scaled >= 1:
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled)))}f}{suffix}"
    return f"{value:#.2g}"


def rate(value: float) -> str:
    """Return the value like `human`, or a dash if it was not measured."""
    return "-" if math.isnan(value) else human(value)


def milliseconds(time_ms: float) -> str:
    """Return a time in at most six characters. The time may be infinite, because an end of an interval can be."""
    decimals = 4 if time_ms < 0.1 else 3 - math.floor(math.log10(min(max(time_ms, 1), 1000)))
    return f"{time_ms:.{decimals}f}"


def part_milliseconds(time_ms: float) -> str:
    """Return the time of a part in at most five characters, or a dash if the part was not measured."""
    if math.isnan(time_ms):
        return "-"
    if 0 < time_ms < 0.0005:
        return "<.001"
    texts = [f"{time_ms:.{decimals}f}" for decimals in (3, 2, 1, 0)]
    return next((text for text in texts if len(text) <= 5), texts[-1])


def half_interval(row: Row) -> str:
    """Return half the width of the time's 95% confidence interval, as a share of the time, in at most four characters.

    The text is a dash if the row has no time.
    """
    share = (row["time_ms_high"] - row["time_ms_low"]) / 2 / row["time_ms"]
    if math.isnan(share):
        return "-"
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def marks(row: Row) -> str:
    """Return the marks before a time: `*` for the fastest of its case, `~` for a time too close to the fastest to call.

    A row without the column `close` has no `~`.
    """
    return f"{'*' * bool(row['fastest'])}{'~' * bool(row.get('close', False))}"


def times_text(times: float) -> str:
    """Return how many times as long as the fastest a row takes, in at most five characters, or a dash if not known."""
    if math.isnan(times):
        return "-"
    return f"{times:.{2 if times < 9.995 else 1 if times < 99.95 else 0}f}x"


def memory(num_bytes: float) -> str:
    """Return a number of bytes with a binary suffix, or a dash if it was not measured."""
    return "-" if pd.isna(num_bytes) else size(num_bytes)


def percent(share: float) -> str:
    """Return a share in at most four characters, or a dash if it was not measured."""
    return "-" if math.isnan(share) else f"{share:.0%}"


def graph_times(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the time of a replayed CUDA graph in ms, in the rows whose readers need it; null in all other rows.

    These are steps of decoding, which servers replay, and layers on several ranks, which launch so many kernels that
    the host is often slower than the GPU.
    """
    return rows["graph_time_ms"].where(is_decode(rows) | rows["ep_size"].gt(1)).astype("float64")


def mismatch(row: Row) -> tuple[str, str]:
    """Return how large the error of a row is, and the tensor with the worst error (empty if not known)."""
    times = f"{row['parity_worst']:.3g}" + "x" * math.isfinite(row["parity_worst"])
    return f"MISMATCH {times}", "" if pd.isna(row["parity_worst_tensor"]) else str(row["parity_worst_tensor"])


def status_text(status: Status) -> str:
    """Return the text of a status. Capitals mark a failure."""
    return status.value if status in GOOD else status.value.upper()


def style_of(row: Row) -> str:
    """Return the colour and weight of a row's cell."""
    status = Status(row["status"])
    if status is Status.ok:
        return FASTEST if row["fastest"] else ""
    return STATUS_STYLES.get(status, "bold red")
