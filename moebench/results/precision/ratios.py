"""Say where FP8 pays: the time of the fastest FP8 backend divided by the time of the fastest backend without FP8.

A map of these ratios has the rows per expert in one direction and `moe_inter_dim` in the other. Both decide whether the
matrix products take the time, which FP8 halves at best, or reading and writing, which quantisation adds to. `dim` is
not a direction of the map, and a map has one `dim`.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moebench.results.advise import MOST_APART, matching
from moebench.results.labels import backend_labels
from moebench.results.record import Status
from moebench.workload.backends import adapters_of, described, engine_of
from moebench.workload.case import Case

_SIXTEEN_BITS = ("bfloat16", "float16")
#: Fields in which a cell of the map may differ from the workload that the user asks about.
_FREE = ("model", "num_tokens", "seed", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")


@dataclass(frozen=True)
class Cell:
    """One measured case on one machine: the fastest backend with FP8 and the fastest one without. Times are in ms.

    `fp8_engines` has the fastest backend of each engine that computes in FP8 with its time, the fastest engine first.
    """

    machine: str
    mode: str
    rows_per_expert: float
    moe_inter_dim: int
    dim: int
    fp8: str
    fp8_ms: float
    other: str
    other_ms: float
    fp8_engines: tuple[tuple[str, float], ...] = ()

    @property
    def ratio(self) -> float:
        """The time with FP8 divided by the time without. FP8 pays if it is below 1."""
        return self.fp8_ms / self.other_ms


@dataclass(frozen=True)
class Precision:
    """What one machine's results say about FP8 for a workload.

    `ratio` is the time with FP8 divided by the time without. `cells` are the measured cases that it comes from: the
    workload itself, or else the neighbours on the map.
    """

    machine: str
    ratio: float
    cells: tuple[Cell, ...]
    is_measured: bool

    @property
    def pays(self) -> bool:
        """Whether FP8 takes less time."""
        return self.ratio < 1


def cells(frame: pd.DataFrame) -> list[Cell]:
    """Return a cell for each case that was measured with and without FP8 on the same machine."""
    names = frame["backend"].astype(str)
    is_whole = names.map(lambda name: adapters_of(name) is None).astype(bool)
    usable = frame[(frame["status"] == Status.ok) & frame["dtype"].isin(_SIXTEEN_BITS) & is_whole]
    usable = usable.assign(label=backend_labels(usable), is_fp8=usable["backend"].map(_is_fp8).astype(bool))
    newest = usable.sort_values("run_id").drop_duplicates(["case_id", "device", "gpu", "label"], keep="last")
    found = []
    for _, case in newest.groupby(["case_id", "device", newest["gpu"].astype("str").fillna("")], sort=False):
        ordered = case.sort_values("time_ms")
        found_by = {bool(row["is_fp8"]): row for row in ordered.drop_duplicates("is_fp8").to_dict("records")}
        if len(found_by) < 2:
            continue
        fp8, other = found_by[True], found_by[False]
        found.append(
            Cell(
                _machine(fp8),
                str(fp8["mode"]),
                rows_per_expert(fp8),
                int(fp8["moe_inter_dim"]),
                int(fp8["dim"]),
                *(str(fp8["label"]), float(fp8["time_ms"]), str(other["label"]), float(other["time_ms"])),
                fp8_engines=_fastest_of_engines(ordered[ordered["is_fp8"]]),
            )
        )
    return found


def _fastest_of_engines(ordered: pd.DataFrame) -> tuple[tuple[str, float], ...]:
    """Return the label and time of each engine's fastest backend, from rows that begin with the fastest one."""
    fastest = ordered.assign(engine=ordered["backend"].map(_engine)).drop_duplicates("engine")
    return tuple((str(row["label"]), float(row["time_ms"])) for row in fastest.to_dict("records"))


def _engine(backend: object) -> str:
    """Return the name of a backend's engine, or the backend's own name if it is another library's layer."""
    engine = engine_of(str(backend))
    return str(backend) if engine is None else engine.name


def rows_per_expert(case: Mapping[Any, Any]) -> float:
    """Return the average number of rows of an expert: each token of each rank has one row for each of its experts."""
    tokens = case["num_tokens"] * case["ep_size"]
    return float(tokens * case["n_activated_experts"] / case["n_routed_experts"])


def _machine(row: Mapping[Any, Any]) -> str:
    """Return the GPU's name, or the device where there is none."""
    return str(row["device"] if pd.isna(row["gpu"]) else row["gpu"])


def _is_fp8(backend: object) -> bool:
    entry = described(str(backend))
    return entry is not None and entry.fp8 is not None


def precision(frame: pd.DataFrame, asked: Case) -> list[Precision]:
    """Return what each machine's results say about FP8 for a workload; machines without an answer are left out.

    If the workload itself was measured with and without FP8, the answer is that measurement. Otherwise the answer is
    interpolated on the map: the logarithm of the ratio is linear in the logarithms of the rows per expert and of
    `moe_inter_dim`. Neighbours are at most `MOST_APART` times apart, and nothing is extrapolated.
    """
    same = matching(frame, asked)
    measured = {one.machine: one for one in cells(same[same["num_tokens"] == asked.num_tokens])}
    found = [Precision(name, one.ratio, (one,), True) for name, one in measured.items()]
    wanted = asked.model_dump(exclude=set(_FREE))
    near = cells(frame[frame[list(wanted)].eq(pd.Series(wanted)).all(axis=1)])
    at = rows_per_expert(asked.model_dump())
    for name in dict.fromkeys(one.machine for one in near):
        if name not in measured:
            dims = sorted({one.dim for one in near if one.machine == name}, key=_distance(asked.dim))
            maps = ([one for one in near if (one.machine, one.dim) == (name, dim)] for dim in dims)
            answers = (_on_map(map_, at, asked.moe_inter_dim) for map_ in maps)
            found += [Precision(name, *answer, False) for answer in answers if answer is not None][:1]
    return found


def _distance(of: float) -> Callable[[float], float]:
    return lambda value: abs(math.log(value / of))


def _on_map(some: Sequence[Cell], rows: float, inter: float) -> tuple[float, tuple[Cell, ...]] | None:
    """Return the interpolated ratio at a place of a map, and the cells around it. None if there are none."""
    around = _neighbours([one.moe_inter_dim for one in some], inter)
    logarithms, used = [], []
    for width in around:
        column = {one.rows_per_expert: one for one in some if one.moe_inter_dim == width}
        ends = [column[count] for count in _neighbours(column, rows)]
        if not ends:
            return None
        values = [(one.rows_per_expert, math.log(one.ratio)) for one in ends]
        logarithms.append((float(width), _between(values, rows)))
        used += ends
    return (math.exp(_between(logarithms, inter)), tuple(used)) if logarithms else None


def _neighbours(values: Iterable[float], at: float) -> list[float]:
    """Return the value itself, or the two values around it if they are near enough to each other, or nothing."""
    ordered = sorted(set(values))
    place = bisect.bisect_left(ordered, at)
    if place < len(ordered) and ordered[place] == at:
        return [at]
    if place in (0, len(ordered)) or ordered[place] > MOST_APART * ordered[place - 1]:
        return []
    return ordered[place - 1 : place + 1]


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at a place between one or two points, on a line over the logarithm of the place."""
    (low, first), (high, last) = points[0], points[-1]
    share = math.log(at / low) / math.log(high / low) if high > low else 0.0
    return first * (1 - share) + last * share


def crossings(some: Sequence[Cell]) -> dict[int, float | None]:
    """Return, for each `moe_inter_dim` of a map, the rows per expert from which FP8 pays.

    The number is interpolated where the ratio falls below 1 for the last time. It is 0 if FP8 pays everywhere on the
    map, and None if it does not pay with the most rows.
    """
    found: dict[int, float | None] = {}
    for width in sorted({one.moe_inter_dim for one in some}):
        column = sorted((one for one in some if one.moe_inter_dim == width), key=lambda one: one.rows_per_expert)
        above = [place for place, one in enumerate(column) if one.ratio >= 1]
        if not above:
            found[width] = 0.0
        elif above[-1] == len(column) - 1:
            found[width] = None
        else:
            one, other = column[above[-1]], column[above[-1] + 1]
            share = math.log(one.ratio) / math.log(one.ratio / other.ratio)
            found[width] = one.rows_per_expert * (other.rows_per_expert / one.rows_per_expert) ** share
    return found
