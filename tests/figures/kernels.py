"""The figures of sentences.py and tables.py about single kernels: profiles of a train step, counters, torch's vdev."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from experts.gemm.tiling import LARGE
from moebench.workload.models import SHAPE_AXES, shape_name
from tests.figures import data
from tests.figures.data import PEERS_AGAIN, PROFILED, PUBLISHED, SHAPES_AGAIN, results, select, the
from tests.figures.markdown import markdown

QWEN = "qwen3-30b-a3b"
#: The dispatchers before `symm_mem`, and `symm_mem`.
WAYS = ("alltoall", "allgather", "deepep", "symm_mem")
#: The groups of the study `kernels` that do something else than to wait for another rank.
WORK = ("products", "rows", "sort", "communication", "copies")
#: Kernels of this duration in ms are in the table of counters.
SHORTEST_MS = 0.05
PRODUCTS, SUMS = ("grouped_gemm", "multiply_rows", "sum_outer_products"), ("_activate", "_activate_backward", "_sum")
#: The dense bfloat16 operations of one multiprocessor of an H200 in one cycle.
FLOPS_PER_CYCLE = 4096


def _profile(dispatcher: str) -> dict[str, Any]:
    """The call of the trace that took the GPU the shortest time, with the sum of the times of its work."""
    rows = data.document(f"{PROFILED}/kernels.json")["rows"]
    calls = [row for row in rows if f"--triton--{dispatcher}--" in row["trace"]]
    assert len(calls) == 3
    shortest = min(calls, key=lambda row: row["span_ms"])
    return {**shortest, "work_ms": sum(shortest[f"{group}_ms"] for group in WORK)}


def _timed(dispatcher: str) -> pd.Series:
    case = select(results(PROFILED), model=QWEN, num_tokens=4096, mode="train")
    return the(case, backend="triton", dispatcher=dispatcher)


def profiles() -> str:
    header = ["dispatcher", "kernels", "copies", "products", "rows", "sort", "messages", "copying", "their sum"]
    header += ["barriers", "timed step", "span under the profiler", "idle in the span", "CUDA calls that wait"]

    def rows() -> Iterator[list[Any]]:
        for way in WAYS:
            one = _profile(way)
            times = [one[f"{group}_ms"] for group in WORK]
            times += [one["work_ms"], one["waiting_ms"], _timed(way)["time_ms"], one["span_ms"], one["idle_ms"]]
            yield [f"`{way}`", one["kernels"], one["copies"], *(f"{ms:.2f}" for ms in times), one["waits"]]

    return markdown(header, rows())


def before_and_after() -> dict[str, str]:
    """How long timed steps take over the sum of the times of their kernels, without barriers."""
    over = {way: _timed(way)["time_ms"] / _profile(way)["work_ms"] for way in WAYS}
    assert all(_timed(way)["waits"] == (way != "symm_mem") for way in WAYS)
    before = [over[way] for way in WAYS[:-1]]
    assert all(_profile(way)[what] == 1 for way in WAYS[:2] for what in ("waits", "copies_to_host"))
    assert _profile("deepep")["waits"] == _profile("symm_mem")["waits"] == 0
    return {
        "low": f"{min(before):.1f}",
        "high": f"{max(before):.1f}",
        "after": f"{over['symm_mem']:.2f}",
        "kernels": str(_profile("symm_mem")["kernels"]),
        "fewest": str(min(_profile(way)["kernels"] for way in WAYS)),
    }


def _counted(shape: tuple[int, ...]) -> pd.DataFrame:
    name = shape_name(dict(zip(SHAPE_AXES, shape, strict=True)))
    frame = pd.read_csv(PUBLISHED / PEERS_AGAIN / f"counters-{name}-{SHAPES_AGAIN[shape]}.csv")
    found = frame[frame["duration_ms"] >= SHORTEST_MS].reset_index(drop=True)
    assert set(found["kernel"]) == {*PRODUCTS, *SUMS}
    return found


def counters() -> str:
    header = ["shape", "kernel", "ms", "clock, GHz", "tensor cores", "DRAM", "L2"]

    def rows() -> Iterator[list[Any]]:
        for shape in SHAPES_AGAIN:
            for row in _counted(shape).to_dict("records"):
                shares = (f"{row[f'{name}_percent']:.0f}%" for name in ("tensor_active", "dram", "l2"))
                name = shape_name(dict(zip(SHAPE_AXES, shape, strict=True)))
                yield [name, f"`{row['kernel']}`", f"{row['duration_ms']:.3f}", f"{row['sm_clock_ghz']:.2f}", *shares]

    return markdown(header, rows())


def reached() -> dict[str, str]:
    """What tensor cores and memory reach, at which clock."""
    frame = pd.concat([_counted(shape) for shape in SHAPES_AGAIN])
    products, sums = (frame[frame["kernel"].isin(names)] for names in (PRODUCTS, SUMS))
    gradients = products[products["kernel"] == "sum_outer_products"]
    assert products["dram_percent"].max() < sums["dram_percent"].min()

    def ends(name: str, column: pd.Series, digits: int = 0) -> dict[str, str]:
        return {f"{name}_low": f"{column.min():.{digits}f}", f"{name}_high": f"{column.max():.{digits}f}"}

    return {
        **ends("tensor", products["tensor_active_percent"]),
        **ends("gradients", gradients["tensor_active_percent"]),
        **ends("dram", sums["dram_percent"]),
        **ends("clock", products["sm_clock_ghz"], 2),
        **ends("fast", sums["sm_clock_ghz"], 2),
    }


def between_tiles() -> dict[str, str]:
    """The cycles per tile in which tensor cores do not work, for the products of rows.

    A tile that adds up `depth` terms takes tensor cores 2 · rows · columns · depth / FLOPS_PER_CYCLE cycles.
    """
    cycles: dict[str, list[float]] = {name: [] for name in PRODUCTS[:2]}
    depths, shares = [], []
    for shape in SHAPES_AGAIN:
        _, _, dim, inter = shape
        found = _counted(shape)
        # gather and multiply by up, multiply by down, gather and multiply back by down, multiply back by up
        for kernel, of_kernel in {"grouped_gemm": (dim, dim), "multiply_rows": (inter, 2 * inter)}.items():
            for share, depth in zip(select(found, kernel=kernel)["tensor_active_percent"], of_kernel, strict=True):
                busy = 2 * LARGE.rows * LARGE.columns * depth / FLOPS_PER_CYCLE
                cycles[kernel].append(busy * (100 / share - 1))
                if kernel == "multiply_rows":
                    depths.append(depth)
                    shares.append(share)
    assert [share for _, share in sorted(zip(depths, shares, strict=True))] == sorted(shares), "deeper tiles reach more"
    assert len(set(depths)) == len(depths)
    own, gathered = cycles["multiply_rows"], cycles["grouped_gemm"]
    rounded = {"low": min(own), "high": max(own), "gathered_low": min(gathered), "gathered_high": max(gathered)}
    return {name: f"{round(value, -2):,.0f}" for name, value in rounded.items()} | {
        "short": str(min(depths)),
        "long": str(max(depths)),
        "short_share": f"{min(shares):.0f}",
        "long_share": f"{max(shares):.0f}",
        "flops": str(FLOPS_PER_CYCLE),
    }


def _vdev() -> Iterator[tuple[dict[str, Any], float]]:
    """Each shape, with the time of the whole dispatch of `symm_mem` in ms."""
    dispatch = select(data.bandwidths(PROFILED), dispatcher="symm_mem", way="dispatch")
    of_dim = {2048: QWEN, 7168: "deepseek-v3"}
    for row in data.document(f"{PROFILED}/vdev.json")["rows"]:
        yield row, the(dispatch, model=of_dim[row["dim"]], num_tokens=row["num_tokens"])["ms"]


def vdev() -> str:
    header = ["tokens", "dim", "rows sent", "sort", "`all_to_all_vdev`", "`all_to_all_vdev_2d`"]
    header += ["`all_to_all_vdev_2d_offset`", "NCCL", "dispatch of `symm_mem`"]
    columns = ("gather", "vdev", "vdev_2d", "vdev_2d_offset", "all_to_all_single")

    def rows() -> Iterator[list[Any]]:
        for row, ours_ms in _vdev():
            times = (*(row[column] for column in columns), ours_ms)
            yield [row["num_tokens"], row["dim"], row["rows"], *(f"{ms:.3f}" for ms in times)]

    return markdown(header, rows())


def of_vdev() -> dict[str, str]:
    """The time of torch's operators over that of other ways to send the same rows."""
    over_nccl, over_ours, over_flat = [], [], []
    for row, ours_ms in _vdev():
        over_nccl.append(row["vdev"] / row["all_to_all_single"])
        over_ours.append((row["gather"] + row["vdev"]) / ours_ms)
        over_flat.append(row["vdev_2d"] / row["vdev"])
    assert min(over_nccl) > 1
    return {
        "nccl_low": f"{min(over_nccl):.1f}",
        "nccl_high": f"{max(over_nccl):.1f}",
        "ours_low": f"{min(over_ours):.1f}",
        "ours_high": f"{max(over_ours):.1f}",
        "flat_low": f"{min(over_flat):.0f}",
        "flat_high": f"{max(over_flat):.0f}",
    }
