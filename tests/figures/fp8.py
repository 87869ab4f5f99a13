"""The tables of docs/fp8.md."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from moebench.results.precision.ratios import cells, crossings
from tests.figures.data import FP8, FP8_MAP, FP8_OF_TWO, FP8_OF_TWO_LATER, SHAPES, bandwidths, results, select, the
from tests.figures.markdown import markdown

MIB = 2**20


def fp8() -> str:
    header = ["shape", "tokens", "mode", "backend", "rounds", "time, ms", "`triton` takes", "from a graph, ms"]
    header += ["`triton` takes", "peak, MiB", "quantised weights, MiB", "parity error over its budget"]
    frame = results(FP8)

    def rows() -> Iterator[list[Any]]:
        for (experts, k, dim, inter), tokens in SHAPES.items():
            for mode in ("forward", "train"):
                case = select(frame, n_routed_experts=experts, dim=dim, moe_inter_dim=inter, mode=mode)
                other = the(case, backend="triton")
                for backend in ("triton", "triton_fp8", "deep_gemm_fp8"):
                    row = the(case, backend=backend)
                    times = [
                        text
                        for name in ("time_ms", "graph_time_ms")
                        for text in (f"{row[name]:.3f}", f"{other[name] / row[name]:.2f} ×")
                    ]
                    kept = row["cached_weight_bytes"]
                    yield [
                        *(f"e{experts}k{k}d{dim}i{inter}", tokens, mode, f"`{backend}`", row["num_rounds"], *times),
                        *(f"{row['peak_memory_bytes'] / MIB:.0f}", "–" if not kept > 0 else f"{kept / MIB:.0f}"),
                        f"{row['parity_worst']:.2f}",
                    ]

    return markdown(header, rows())


def ratios_on_the_map() -> str:
    some = cells(results(FP8_MAP))
    counts = sorted({one.rows_per_expert for one in some})
    header = ["mode", "`moe_inter_dim`", *(f"{count:g} rows per expert" for count in counts), "FP8 pays from"]

    def rows() -> Iterator[list[Any]]:
        for mode in ("forward", "train"):
            own = [one for one in some if one.mode == mode]
            for inter, start in crossings(own).items():
                found = {one.rows_per_expert: f"{one.ratio:.2f}" for one in own if one.moe_inter_dim == inter}
                pays = "nowhere" if start is None else f"{start or min(found):.0f} rows"
                yield [mode, inter, *(found[count] for count in counts), pays]

    return markdown(header, rows())


def between_ranks() -> str:
    header = ["layer", "tokens", "mode", "dispatcher", "backend", "time, ms", "from a graph, ms", "dispatched, MiB"]
    header += ["over `triton`"]
    frame = pd.concat([results(FP8_OF_TWO), results(FP8_OF_TWO_LATER)], ignore_index=True)
    frame = frame.assign(layer=[_layer(row) for row in frame.to_dict("records")])
    case_of = ["layer", "num_tokens", "mode", "dispatcher"]

    def rows() -> Iterator[list[Any]]:
        # The model comes before the shape, and the rank without tokens after the even loads.
        for (layer, tokens, mode, dispatcher), case in sorted(
            frame.groupby(case_of), key=lambda group: _order(group[0])
        ):
            for backend in ("triton", "triton_fp8", "triton_fp8_rows"):
                if not len(select(case, backend=backend)):
                    continue
                row = the(case, backend=backend)
                graph = f"{row['graph_time_ms']:.3f}" if row["graph_time_ms"] > 0 else "–"
                sent, bf16 = row["dispatch_bytes"], the(case, backend="triton")["dispatch_bytes"]
                yield [
                    *(layer, tokens, mode, f"`{dispatcher}`", f"`{backend}`", f"{row['time_ms']:.3f}", graph),
                    *(f"{sent / MIB:.2f}", f"{sent / bf16:.3f}"),
                ]

    return markdown(header, rows())


def _layer(row: dict[str, Any]) -> str:
    shape = "e{n_routed_experts}k{n_activated_experts}d{dim}i{moe_inter_dim}".format(**row)
    name = "Qwen3-30B-A3B" if row["model"] == "qwen3-30b-a3b" else shape
    return f"{name}, zipf, a rank without tokens" if row["rank_load"] == "one-empty" else name


def _order(case: tuple[Any, ...]) -> tuple[Any, ...]:
    layer, *others = case
    return (not layer.startswith("Qwen"), "," in layer, *others)


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
