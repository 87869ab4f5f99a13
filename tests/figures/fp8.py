"""The tables of docs/fp8.md."""

from collections.abc import Iterator
from typing import Any

from tests.figures.data import FP8, FP8_OF_TWO, bandwidths, results, select, the
from tests.figures.markdown import markdown

MIB = 2**20


def fp8() -> str:
    header = ["shape", "tokens", "mode", "backend", "time, ms", "`triton` takes", "from a graph, ms", "`triton` takes"]
    header += ["peak, MiB", "quantised weights, MiB", "parity error over its budget"]
    frame = results(FP8)

    def rows() -> Iterator[list[Any]]:
        for mode in ("forward", "train"):
            case = select(frame, mode=mode)
            other = the(case, backend="triton")
            for backend in ("triton", "triton_fp8", "deep_gemm_fp8"):
                row = the(case, backend=backend)
                shape = "e{n_routed_experts}k{n_activated_experts}d{dim}i{moe_inter_dim}".format(**row)
                times = [
                    text
                    for name in ("time_ms", "graph_time_ms")
                    for text in (f"{row[name]:.3f}", f"{other[name] / row[name]:.2f} ×")
                ]
                kept = row["cached_weight_bytes"]
                yield [
                    *(shape, row["num_tokens"], mode, f"`{backend}`", *times, f"{row['peak_memory_bytes'] / MIB:.0f}"),
                    *("–" if not kept > 0 else f"{kept / MIB:.0f}", f"{row['parity_worst']:.2f}"),
                ]

    return markdown(header, rows())


def between_ranks() -> str:
    header = [
        "tokens",
        "mode",
        "dispatcher",
        "backend",
        "time, ms",
        "from a graph, ms",
        "dispatched, MiB",
        "over `triton`",
    ]
    frame = results(FP8_OF_TWO)

    def rows() -> Iterator[list[Any]]:
        for (tokens, mode, dispatcher), case in frame.groupby(["num_tokens", "mode", "dispatcher"], observed=True):
            for backend in ("triton", "triton_fp8", "triton_fp8_rows"):
                if not len(select(case, backend=backend)):
                    continue
                row = the(case, backend=backend)
                graph = f"{row['graph_time_ms']:.3f}" if row["graph_time_ms"] > 0 else "–"
                sent, bf16 = row["dispatch_bytes"], the(case, backend="triton")["dispatch_bytes"]
                yield [
                    *(tokens, mode, f"`{dispatcher}`", f"`{backend}`", f"{row['time_ms']:.3f}", graph),
                    *(f"{sent / MIB:.2f}", f"{sent / bf16:.3f}"),
                ]

    return markdown(header, rows())


def dispatches() -> str:
    header = ["dispatcher", "rows", "bytes from a rank", "time, ms", "GB/s"]

    def rows() -> Iterator[list[Any]]:
        for _, row in select(bandwidths(FP8_OF_TWO), way="dispatch", dispatcher=["symm_mem", "deepep"]).iterrows():
            dtype = "FP8 with scales" if row["fp8_rows"] else "bfloat16"
            yield [
                *(f"`{row['dispatcher']}`", dtype, f"{row['num_bytes']:,}"),
                *(f"{row['ms']:.3f}", f"{row['gb_per_s']:.0f}"),
            ]

    return markdown(header, rows())
