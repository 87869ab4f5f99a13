"""Make a small table of what Nsight Compute counted: one row for each kernel.

    ncu --clock-control none --section SpeedOfLight --page details --print-details all --print-units base --csv
        python step.py > counted.csv
    python -m moebench.measure.studies.counters counted.csv --out counters.csv

`ncu` must not fix the clock, so that the table has the clock at which the kernel runs in a step. It runs each kernel
several times, apart from the others.
"""

import io
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from moebench.errors import UsageError
from moebench.measure.studies import places, run

#: The columns of the table: the name of Nsight Compute's metric, and the factor to the column's unit.
METRICS = {
    "duration_ms": ("Duration", 1e-6),
    "sm_clock_ghz": ("SM Frequency", 1e-9),
    "tensor_active_percent": ("SM: Pipe Tensor Cycles Active", 1.0),
    "dram_percent": ("DRAM Throughput", 1.0),
    "l2_percent": ("L2 Cache Throughput", 1.0),
}
#: The units in which the factors above take the metrics.
_UNITS = {"Duration": "ns", "SM Frequency": "hz"}
_NEEDED = ["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"]
_LONGEST = 60


def table(text: str) -> pd.DataFrame:
    """Return one row for each kernel of the page `details` of ncu, as CSV, in the order in which the kernels ran.

    Percentages are shares of the highest rate that the GPU has at its clock. `tensor_active_percent` is the share of
    all cycles of the kernel in which tensor cores work. Raises UsageError if a column or a metric is missing, or has
    another unit.
    """
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("==")]
    try:
        found = pd.read_csv(io.StringIO("".join(lines)), usecols=_NEEDED, thousands=",")
    except ValueError as error:
        raise UsageError(
            f"this is not CSV of ncu's page details: {error}; run ncu with --page details --csv"
        ) from error
    found = found[found["Metric Name"].isin([name for name, _ in METRICS.values()])]
    for name, unit in _UNITS.items():
        others = set(found.loc[found["Metric Name"] == name, "Metric Unit"]) - {unit}
        if others:
            raise UsageError(
                f"{name}: its unit is {', '.join(sorted(map(str, others)))}; run ncu with --print-units base"
            )
    by_kernel = found.groupby(["ID", "Kernel Name", "Metric Name"])["Metric Value"].first().unstack()
    absent = [name for name, _ in METRICS.values() if name not in by_kernel or by_kernel[name].isna().any()]
    if absent or by_kernel.empty:
        raise UsageError(f"a kernel has no {', '.join(absent)}; run ncu with --section SpeedOfLight")
    names = by_kernel.index.get_level_values("Kernel Name")
    values: dict[str, Any] = {"kernel": [_short(name) for name in names]}
    for column, (name, factor) in METRICS.items():
        numbers = by_kernel[name].astype(str).str.replace(",", "").astype(float)
        values[column] = (numbers * factor).round(6).to_numpy()
    return pd.DataFrame(values)


def _short(kernel: str) -> str:
    return kernel if len(kernel) <= _LONGEST else f"{kernel[: _LONGEST - 1]}…"


def main(counted: Annotated[Path, typer.Argument(help="what ncu printed")], out: Path | None = None) -> None:
    """Print one line for each kernel that Nsight Compute measured."""
    places("cpu", out)
    try:
        text = counted.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{counted}: {error}; name a file that ncu wrote") from error
    rows = table(text)
    print(rows.to_string(index=False))
    if out is not None:
        rows.to_csv(out, index=False)


if __name__ == "__main__":
    run(main, "moebench.measure.studies.counters")
