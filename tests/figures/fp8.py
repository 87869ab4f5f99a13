"""The table of docs/fp8.md."""

from collections.abc import Iterator
from typing import Any

from tests.figures.data import FP8, results, the
from tests.figures.markdown import markdown

MIB = 2**20


def fp8() -> str:
    header = ["shape", "tokens", "mode", "backend", "time, ms", "× `triton_fp8`", "TFLOP/s", "peak, MiB"]
    header += ["quantised weights, MiB", "parity error over its budget"]
    frame = results(FP8)

    def rows() -> Iterator[list[Any]]:
        for backend in ("triton", "triton_fp8"):
            row = the(frame, backend=backend)
            shape = "e{n_routed_experts}k{n_activated_experts}d{dim}i{moe_inter_dim}".format(**row)
            over = row["time_ms"] / the(frame, backend="triton_fp8")["time_ms"]
            kept = row["cached_weight_bytes"]
            yield [
                *(shape, row["num_tokens"], row["mode"], f"`{backend}`", f"{row['time_ms']:.3f}", f"{over:.2f}"),
                *(f"{row['tflops']:.0f}", f"{row['peak_memory_bytes'] / MIB:.0f}"),
                *("–" if not kept > 0 else f"{kept / MIB:.0f}", f"{row['parity_worst']:.2f}"),
            ]

    return markdown(header, rows())
