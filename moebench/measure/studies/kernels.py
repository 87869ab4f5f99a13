"""Say what the GPU does in each call of a trace that `moebench run --profile` wrote.

    python -m moebench.measure.studies.kernels FOLDER/traces/*triton*rank0.json --out kernels.json

A trace has a few calls one after another, and the host waits for the GPU after each of them. Therefore the GPU begins
each call without work, and the profiler slows the host. The time of a group of kernels is the GPU's own, but `span_ms`
and `idle_ms` are longer than in a call that nobody profiles, and a kernel that waits for another rank waits longer.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moebench.errors import UsageError
from moebench.measure.profiling import COMMUNICATION, PRODUCT, busy_us
from moebench.measure.studies import places, run

#: The groups of kernels, by patterns of their names. The first pattern that matches gives the group. `waiting` has
#: kernels that do little but wait for other ranks, `communication` those that send rows, and `rows` those that gather
#: rows, add them up or activate them.
GROUPS = {
    "waiting": re.compile(r"symmetric_memory::barrier|deep_ep::\w+::\w*notify"),
    "communication": re.compile(rf"{COMMUNICATION.pattern}|^push(_back)?$", re.IGNORECASE),
    "products": re.compile(rf"{PRODUCT.pattern}|^(multiply_rows|(sum|add)_outer_(products|slabs))$", re.IGNORECASE),
    "rows": re.compile(r"^(_gather|_activate|_activate_backward|_sum|sum_rows|pack|take_rows)$"),
    "sort": re.compile(
        r"^(_mask|_count|_place|place|plan|list_tiles|(take|pack|unpack)_choices)$|DeviceScan|get_dispatch_layout"
    ),
    "copies": re.compile(r"^Mem(cpy|set)\b|elementwise|CatArray"),
}
#: The group of a kernel whose name no pattern matches.
OTHER = "other"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
#: CUDA functions in which the host waits for the GPU.
WAITS = re.compile(r"cuda(Stream|Event|Device)Synchronize")
_CALL = re.compile(r"call (\d+)")


def group_of(name: str) -> str:
    """Return the group of a kernel, a copy or a memset: a key of GROUPS, or OTHER."""
    return next((group for group, pattern in GROUPS.items() if pattern.search(name)), OTHER)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one row for each call of a trace, which may be gzipped, in the order of the calls.

    `kernels` counts kernels, `copies` copies and memsets. `NAME_ms` is the sum of the times of a group. `span_ms` goes
    from the start of the first kernel to the end of the last, and for `idle_ms` of it, the GPU does nothing. `waits`
    counts the CUDA functions in which the host waits for the GPU, without the one with which the profile ends the call,
    and `copies_to_host` the copies to the host. A library that polls memory to wait is not seen here. Raises UsageError
    if the file is no trace with calls.
    """
    events = _events(path)
    calls = sorted(
        (event["ts"], event["ts"] + event["dur"], int(found[1]))
        for event in events
        if event.get("cat") == "user_annotation" and (found := _CALL.fullmatch(event["name"]))
    )
    if not calls:
        raise UsageError(f"{path}: the trace has no calls; take one that `moebench run --profile` wrote")
    for start, end, number in calls:
        within = [event for event in events if "dur" in event and start <= event["ts"] < end]
        yield {"trace": path.name.partition(".json")[0], "call": number, **_row(within)}


def _row(events: list[dict[str, Any]]) -> dict[str, Any]:
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in on_gpu]
    sums = Counter(dict.fromkeys((*GROUPS, OTHER), 0.0))
    for event in on_gpu:
        sums[group_of(event["name"])] += event["dur"]
    num_kernels = sum(event["cat"] == "kernel" for event in on_gpu)
    waits = sum(bool(WAITS.fullmatch(event["name"])) for event in events if event.get("cat") == "cuda_runtime")
    start, end = min((first for first, _ in spans), default=0.0), max((last for _, last in spans), default=0.0)
    product = min((event["ts"] for event in on_gpu if group_of(event["name"]) == "products"), default=None)
    return {
        "kernels": num_kernels,
        "copies": len(on_gpu) - num_kernels,
        **{f"{group}_ms": _ms(us) for group, us in sums.items()},
        "span_ms": _ms(end - start),
        "idle_ms": _idle_ms(spans, start, end),
        "idle_before_products_ms": None if product is None else _idle_ms(spans, start, product),
        "waits": max(waits - 1, 0),
        "copies_to_host": sum("DtoH" in event["name"] for event in on_gpu),
    }


def _ms(us: float) -> float:
    return round(us / 1e3, 6)


def _idle_ms(spans: list[tuple[float, float]], start: float, end: float) -> float:
    """Return for how long none of the spans runs between two times in microseconds."""
    return _ms(end - start - busy_us((first, min(last, end)) for first, last in spans if first < end))


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        packed = path.read_bytes()
        text = gzip.decompress(packed) if path.suffix == ".gz" else packed
        return [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name a trace") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: it is not a trace in JSON; name a file of the folder traces") from error


def main(
    traces: Annotated[list[Path], typer.Argument(help="traces (.json or .json.gz)")], out: Path | None = None
) -> None:
    """Print what the GPU does in each call of traces."""
    places("cpu", out)
    rows = [row for path in traces for row in rows_of(path)]
    for row in rows:
        groups = ", ".join(f"{group} {row[f'{group}_ms']:.3f}" for group in (*GROUPS, OTHER))
        print(f"{row['trace']}, call {row['call']}: {row['kernels']} kernels, {row['copies']} copies; ms: {groups}")
        early = row["idle_before_products_ms"]
        before = "" if early is None else f" ({early:.3f} ms before the first product)"
        print(f"  span {row['span_ms']:.3f} ms, idle {row['idle_ms']:.3f} ms{before}, {row['waits']} waits of the host")
    if out is not None:
        out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "moebench.measure.studies.kernels")
