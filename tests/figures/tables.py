"""The tables in documents that follow from the committed results. `make results` writes them.

In a document, a table is between `<!-- table NAME, written by `make results` -->` and `<!-- end of table NAME -->`.
To add one, write a function here and add it to TABLES.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from moebench.results.stats import relative_half_width, series_interval
from moebench.workload.models import SHAPE_AXES, shape_name
from tests.figures import data, fp8, gmm, kernels, rounds, scaled, skewed, training, two_gpus
from tests.figures import peers as peer_figures
from tests.figures.markdown import markdown

_BEGIN, _END = "<!-- table {}, written by `make results` -->", "<!-- end of table {} -->"


def _named(shape: tuple[int, ...]) -> str:
    return shape_name(dict(zip(SHAPE_AXES, shape, strict=True)))


def peers() -> str:
    backends = ["torch_mm", "torch_mm_save_time", "triton", "gmm", "te"]
    backends += ["peer_sonicmoe", "peer_automodel_torch_mm", "peer_transformers"]
    header = ["shape", "tokens", "backend", "forward, TFLOP/s", "share", "train, TFLOP/s", "share", "train peak, MiB"]

    def rows() -> Iterator[list[Any]]:
        for shape, num_tokens in data.SHAPES.items():
            for backend in backends:
                found = data.peers_of(backend, shape)
                cells: list[str] = []
                for mode in ("forward", "train"):
                    row = data.the(found, mode=mode)
                    cells += [f"{row['tflops']:.0f}", f"{row['grouped_ms'] / row['time_ms']:.2f}"]
                peak = data.the(found, mode="train")["peak_memory_bytes"] / 2**20
                yield [_named(shape), num_tokens, f"`{backend}`", *cells, f"{peak:.0f}"]

    return markdown(header, rows())


def decode() -> str:
    backends = ["torch_mm", "triton", "peer_transformers"]
    frame = data.select(data.of_shape(data.results(data.DECODE), (128, 8, 2048, 768)), mode="forward")

    def rows() -> Iterator[list[str]]:
        for num_tokens in (1, 4, 16, 64, 128, 256):
            case = data.select(frame, num_tokens=num_tokens)
            measured = [data.the(case, backend=backend)["graph_time_ms"] for backend in backends]
            bounds = [case[column].median() for column in ("roofline_ms", "grouped_ms")]
            yield [str(num_tokens), *(f"{ms:.3f}" for ms in (*bounds, *measured))]

    return markdown(["tokens", "weights", "products", *(f"`{name}`" for name in backends)], rows())


def two_gpus_with_symm_mem() -> str:
    header = ["model", "mode", "tokens", "products", "collectives", "`triton`", "`torch_mm`", "`triton` over the limit"]
    header += ["exposed in a forward", "fastest other dispatcher"]

    def rows() -> Iterator[list[Any]]:
        for one in two_gpus.compared():
            limits = (f"{one.triton[column]:.2f}" for column in ("grouped_ms", "collective_ms"))
            times = (f"{row['time_ms']:.2f}" for row in (one.triton, one.torch_mm))
            other = "–"
            if one.other is not None:
                other = f"{one.other['time_ms']:.2f} (`{one.other['backend']}`, `{one.other['dispatcher']}`)"
            over = two_gpus.range_of(one.over_limit)
            yield [one.model, one.mode, one.num_tokens, *limits, *times, over, f"{one.exposed_ms:.2f}", other]

    return markdown(header, rows())


def four_gpus() -> str:
    ways = ("allgather", "alltoall", "deepep")
    layers = [(backend, way) for backend in ("torch_mm", "triton") for way in ways]
    frame = data.select(data.results(data.FOUR_GPUS), model="qwen3-30b-a3b", routing="uniform", rank_load="even")

    def rows() -> Iterator[list[Any]]:
        for mode in ("forward", "train"):
            for num_tokens in (16, 128, 1024, 4096, 16384):
                case = data.select(frame, mode=mode, num_tokens=num_tokens)
                times_ms = case.set_index(["backend", "dispatcher"])["time_ms"]
                bare = data.the(case, backend="torch_mm", dispatcher="alltoall")[["grouped_ms", "collective_ms"]]
                cells = [f"{times_ms[layer]:.2f}" if layer in times_ms else "–" for layer in layers]
                over = f"{times_ms.min() / bare.sum():.1f}"
                yield [mode, num_tokens, *(f"{ms:.2f}" for ms in bare), *cells, over]

    columns = (f"`{backend}`, `{way}`" for backend, way in layers)
    return markdown(["mode", "tokens", "products", "collectives", *columns, "ratio"], rows())


def bandwidth() -> str:
    return _bandwidth(data.SYMM_MEM)


def bandwidth_of_four() -> str:
    return _bandwidth(data.FOUR_GPUS)


def _bandwidth(name: str) -> str:
    counts = (4096, 16384)
    frame = data.bandwidths(name)
    columns = [(way, num_tokens) for way in ("dispatch", "combine") for num_tokens in counts]

    def cell(dispatcher: str, way: str, num_tokens: int) -> str:
        row = data.the(frame, dispatcher=dispatcher, way=way, num_tokens=num_tokens)
        return f"{row['fraction']:.2f} ({row['gb_per_s']:.0f} GB/s)"

    header = ["dispatcher", *(f"{way}, {num_tokens} tokens" for way, num_tokens in columns)]
    rows = ([f"`{name}`", *(cell(name, *column) for column in columns)] for name in frame["dispatcher"].unique())
    return markdown(header, rows)


def precision() -> str:
    frame = data.results(data.GPU)
    halves = [relative_half_width(*series_interval(data.samples_of(row))) for _, row in frame.iterrows()]
    reach = frame.assign(reaches=[half <= 0.005 for half in halves]).groupby("waits")["reaches"]
    kinds = {
        False: "do not wait for the GPU: `torch_mm`, `torch_mm_save_time`, `triton`",
        True: "wait for the GPU (flag `synchronises`): `gmm`, `te`, FP8, `loop`",
    }
    rows = ([text, reach.size()[waits], f"{reach.mean()[waits]:.0%}"] for waits, text in kinds.items())
    return markdown(["calls that", "jobs", "half the interval at most 0.5%"], rows)


def repeatability() -> str:
    rounds, gpus = data.between_rounds(), data.between_gpus()
    compared = {
        "two rounds, calls that do not wait": data.select(rounds, waits=False),
        "two rounds, calls that wait": data.select(rounds, waits=True),
        "two H200s, `torch_mm` and `torch_mm_save_time`": data.select(gpus, waits=False),
        "two H200s, calls that wait": data.select(gpus, waits=True),
    }

    def cells(rows: pd.DataFrame) -> list[Any]:
        apart = (rows["other_ms"] / rows["one_ms"] - 1).abs()
        return [len(rows), f"{(apart <= 0.01).mean():.0%}", f"{apart.median():.1%}", f"{apart.max():.1%}"]

    header = ["compared", "jobs", "medians within 1%", "median difference", "largest"]
    return markdown(header, ([text, *cells(rows)] for text, rows in compared.items()))


def scaling() -> str:
    rows = scaled.rows(scaled.COMMANDS)

    def cells() -> Iterator[list[Any]]:
        for (size, command), some in rows.groupby(["size", "command"], sort=False):
            now, before = (select_one(some, revision) for revision in ("after", "before"))
            past = ["–", "–"] if before is None else [f"{before['cpu_s']:.1f}", f"{before['cpu_s'] / now['cpu_s']:.1f}"]
            yield [f"`{command}`", f"{size:,}", past[0], f"{now['cpu_s']:.1f}", past[1], mebibytes(now)]

    return markdown(["command", "size", "before, s of CPU", "now, s of CPU", "ratio", "now, MiB"], cells())


def supervisor() -> str:
    header = ["revision", "workers", "jobs", "a job takes, s", "jobs/s", "share of a core", "CPU per job, ms"]
    header += ["wait, ms", "longest 1%, ms", "MiB"]

    def cells() -> Iterator[list[Any]]:
        for row in scaled.rows(scaled.SUPERVISOR).to_dict("records"):
            revision = "now" if row["revision"] == "after" else row["revision"]
            speed = [f"{row['jobs_per_s']:.0f}", f"{row['cpu_share']:.0%}", f"{row['cpu_ms_per_job']:.2f}"]
            waits = [f"{row[name]:.1f}" for name in ("wait_ms", "wait_99_ms")]
            counts = [row["num_workers"], f"{row['num_jobs']:,}", f"{row['job_s']:g}"]
            yield [revision, *counts, *speed, *waits, mebibytes(row)]

    return markdown(header, cells())


def mebibytes(row: Mapping[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f}"


def select_one(some: pd.DataFrame, revision: str) -> Any:
    found = data.select(some, revision=revision).to_dict("records")
    return found[0] if found else None


#: The function that makes each table, by document and name of the table.
TABLES: Mapping[tuple[str, str], Callable[[], str]] = {
    ("docs/measured.md", table.__name__): table
    for table in (
        *(
            peers,
            rounds.beside_sonicmoe,
            rounds.beside_others,
            kernels.counters,
            peer_figures.steps,
            peer_figures.steps_again,
            gmm.traces,
            decode,
            rounds.decode_again,
            skewed.skewed,
            two_gpus_with_symm_mem,
            kernels.profiles,
            four_gpus,
        ),
        *(bandwidth, kernels.vdev, bandwidth_of_four, precision, repeatability),
    )
} | {
    ("docs/scaling.md", "scaling"): scaling,
    ("docs/scaling.md", "supervisor"): supervisor,
    ("docs/training.md", "contexts"): training.contexts,
    ("docs/training.md", "contexts_of_two"): training.contexts_of_two,
    ("docs/training.md", "adapters"): training.adapters,
    ("docs/fp8.md", "fp8"): fp8.fp8,
    ("docs/fp8.md", "fp8_map"): fp8.ratios_on_the_map,
    ("docs/fp8.md", "fp8_between_ranks"): fp8.between_ranks,
    ("docs/fp8.md", "fp8_dispatches"): fp8.dispatches,
}


def written(text: str, name: str, table: str) -> str:
    """Return the text with this table between its markers. Raises ValueError if they are not there once each."""
    begin, end = _BEGIN.format(name), _END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"table {name}: the document needs one line `{begin}` and one line `{end}`")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{table}\n{end}{rest.partition(end)[2]}"


def without_tables(text: str) -> str:
    return re.sub(_BEGIN.format(r"(\w+)") + ".*?" + _END.format(r"\1"), " ", text, flags=re.DOTALL)
