"""The figures of sentences.py and tables.py about contexts of training and adapters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from experts.catalog import LORA
from moebench.workload.spec import available_sweeps, load_sweep
from tests.figures import data, quoted
from tests.figures.data import ADAPTERS, TRAINING, TRAINING_OF_TWO, results, select, the
from tests.figures.markdown import markdown
from tests.figures.quoted import WORDS

BACKENDS, CHECKPOINTS = ("triton", "torch_mm", "te"), ("checkpoint", "checkpoint_experts", "checkpoint_reentrant")
CONTEXTS = (
    "plain",
    *CHECKPOINTS,
    "compile",
    "compile+checkpoint",
    "offload",
    "accumulate:4",
    "checkpoint+accumulate:4",
)
#: The engine with whose times those of a backend are compared.
ENGINES = {**{name: name for name in BACKENDS}, "triton_main_grad": "triton"}
ADAPTED = {"triton_lora": "triton", "torch_mm_lora": "torch_mm"}
MIB = 2**20


def _row(backend: str, context: str) -> pd.Series:
    return the(results(TRAINING), backend=backend, context=context)


def contexts() -> str:
    header = ["backend", "context", "time, ms", "95% interval, ms", "× `plain`", "GPU busy, ms"]
    header += ["peak, MiB", "kept for backward, MiB"]

    def rows() -> Iterator[list[Any]]:
        for row in _in_order():
            interval = " to ".join(f"{row[f'time_ms_{end}']:.2f}" for end in ("low", "high"))
            busy = f"{row['busy_ms']:.2f}" if row["waits"] else "–"
            sizes = (_mib(row[f"{what}_memory_bytes"]) for what in ("peak", "saved"))
            plain_ms = _row(ENGINES[row["backend"]], "plain")["time_ms"]
            times = (f"{row['time_ms']:.2f}", interval, f"{row['time_ms'] / plain_ms:.2f}", busy)
            yield [f"`{row['backend']}`", f"`{row['context']}`", *times, *sizes]

    return markdown(header, rows())


def _in_order() -> Iterator[pd.Series]:
    for backend in (*BACKENDS, "triton_main_grad"):
        for context in CONTEXTS:
            if len(found := select(results(TRAINING), backend=backend, context=context)):
                yield the(found)


def contexts_of_two() -> str:
    header = [
        "subject",
        "dispatcher",
        "backend",
        "context",
        "time, ms",
        "× `plain`",
        "GPU busy, ms",
        "peak, MiB",
        "kept, MiB",
    ]

    def rows() -> Iterator[list[Any]]:
        frame = results(TRAINING_OF_TWO)
        for (subject, dispatcher, backend), found in frame.groupby(
            ["subject", "dispatcher", "backend"], observed=True, sort=False
        ):
            plain_ms = the(found, context="plain")["time_ms"]
            for _, row in found.iterrows():
                busy = f"{row['busy_ms']:.2f}" if row["waits"] else "–"
                sizes = (_mib(row[f"{what}_memory_bytes"]) for what in ("peak", "saved"))
                times = (f"{row['time_ms']:.2f}", f"{row['time_ms'] / plain_ms:.2f}", busy)
                yield [subject, f"`{dispatcher}`", f"`{backend}`", f"`{row['context']}`", *times, *sizes]

    return markdown(header, rows())


def of_two() -> dict[str, Any]:
    """What checkpoints cost with two expert-parallel ranks."""
    frame = results(TRAINING_OF_TWO)
    alone = select(frame, subject="experts", dispatcher="symm_mem")
    times = {backend: select(alone, backend=backend).set_index("context")["time_ms"] for backend in BACKENDS[:2]}
    whole = [one["checkpoint"] / one["plain"] for one in times.values()]
    (experts,) = {f"{one['checkpoint_experts'] / one['plain']:.2f}" for one in times.values()}
    kept = {
        context: select(alone, context=context)["saved_memory_bytes"] / MIB for context in alone["context"].unique()
    }
    jobs = data.document(f"{TRAINING_OF_TWO}/run.json")["num_jobs"]
    (tokens,) = frame["num_tokens"].unique()
    return {
        "measured": len(frame),
        "jobs": jobs,
        "tokens": tokens,
        "low": f"{min(whole):.2f}",
        "high": f"{max(whole):.2f}",
        "experts": experts,
        "kept": f"{max(kept['checkpoint_experts']):.0f}",
        "least": f"{max(kept['checkpoint']):.0f}",
    }


def _mib(num_bytes: float) -> str:
    return "–" if pd.isna(num_bytes) else f"{num_bytes / MIB:.0f}"


def run() -> dict[str, Any]:
    frame = results(TRAINING)
    assert len(list(_in_order())) == len(frame) == data.document(f"{TRAINING}/run.json")["num_jobs"]
    assert set(frame["model"]) == {"qwen3-30b-a3b"}
    assert {job.case.context for job in load_sweep(available_sweeps()["training"]).jobs()} == set(CONTEXTS)
    (tokens,) = frame["num_tokens"].unique()
    return {"jobs": len(frame), "tokens": tokens, "fewer": tokens // 4, "contexts": WORDS[len(CONTEXTS)]}


def _over_plain(column: str, backends: tuple[str, ...]) -> list[float]:
    return [
        _row(backend, context)[column] / _row(backend, "plain")[column]
        for backend in backends
        for context in CHECKPOINTS
    ]


def micro_batches() -> dict[str, str]:
    """What main gradients save in a step of four micro-batches."""
    apart, added = (_row(backend, "accumulate:4") for backend in ("triton", "triton_main_grad"))
    return {
        "time": f"{apart['time_ms']:.2f}",
        "peak": _mib(apart["peak_memory_bytes"]),
        "less": f"{added['time_ms']:.2f}",
        "share": f"{added['time_ms'] / apart['time_ms']:.2f}",
        "lower": _mib(added["peak_memory_bytes"]),
    }


def of_compile() -> dict[str, str]:
    """What torch.compile does to a layer's time and memory."""
    compiled = [_row(backend, "compile") for backend in ("triton", "torch_mm")]
    columns = ("compiled_graphs", "graph_breaks", "recompiled_graphs")
    assert all([row[name] for name in columns] == [1, 0, 1] for row in compiled)
    plain = [_row(backend, "plain") for backend in ("triton", "torch_mm")]
    (over,) = {f"{a['time_ms'] / b['time_ms']:.2f}" for a, b in zip(compiled, plain, strict=True)}
    (more,) = {_mib(a["peak_memory_bytes"] - b["peak_memory_bytes"]) for a, b in zip(compiled, plain, strict=True)}
    return {"over": over, "more": more, "breaks": f"{_row('te', 'compile')['graph_breaks']:.0f}"}


def of_offload() -> dict[str, str]:
    times = (_row("triton", context)["time_ms"] for context in ("offload", "plain"))
    return {"over": f"{next(times) / next(times):.1f}"}


def costs() -> dict[str, str]:
    """What checkpoints cost in time and save in memory."""
    saved = {
        (one, context): _row(one, context)["saved_memory_bytes"] / MIB for one in BACKENDS for context in CONTEXTS[:4]
    }
    times = _over_plain("time_ms", ("triton", "torch_mm"))
    peaks = _over_plain("peak_memory_bytes", ("triton", "torch_mm"))
    reentrant = [_row(one, "checkpoint_reentrant") for one in ("triton", "torch_mm")]
    other = [_row(one, "checkpoint") for one in ("triton", "torch_mm")]
    assert all(a["time_ms_high"] < b["time_ms_low"] for a, b in zip(reentrant, other, strict=True))
    more = [(a["peak_memory_bytes"] - b["peak_memory_bytes"]) / MIB for a, b in zip(reentrant, other, strict=True)]
    assert min(peaks) >= 1, "a checkpoint does not lower the peak within one layer"
    (few,) = {round(saved[one, "checkpoint"]) for one in BACKENDS}
    (kept,) = {round(saved[one, "plain"]) for one in ("triton", "torch_mm")}
    plain, tokens = _row("triton", "plain"), _row("triton", "plain")["num_tokens"]
    return {
        "low": f"{min(times):.2f}",
        "high": f"{max(times):.2f}",
        "kept": f"{kept}",
        "few": f"{few}",
        "peak": f"{plain['peak_memory_bytes'] / MIB:.0f}",
        "more": f"{max(more):.0f}",
        "x": f"{tokens * plain['dim'] * 2 / MIB:.0f}",
        "te_kept": f"{saved['te', 'plain']:.0f}",
    }


def of_te() -> dict[str, str]:
    """The host's part of the time of `te`."""
    own = ("plain", *CHECKPOINTS)
    assert all(_row("te", context)["waits"] and not _row("te", context)["converged"] for context in own)
    assert not any(_row(one, context)["waits"] for one in BACKENDS[:2] for context in own)
    plain, busy = _row("te", "plain"), _over_plain("busy_ms", ("te",))
    return {
        "time": f"{plain['time_ms']:.1f}",
        "busy": f"{plain['busy_ms']:.1f}",
        "low": f"{min(busy):.2f}",
        "high": f"{max(busy):.2f}",
        "experts": str(plain["n_routed_experts"]),
    }


def adapters() -> str:
    header = ["tokens", "backend", "forward, ms", "× its engine", "train, ms", "× its engine", "train peak, MiB"]

    def rows() -> Iterator[list[Any]]:
        for num_tokens in (128, 2048, 16384):
            case = select(results(ADAPTERS), num_tokens=num_tokens, routing="uniform", model="qwen3-30b-a3b")
            for backend in ("triton", "triton_lora", "torch_mm", "torch_mm_lora"):
                times = []
                for mode in ("forward", "train"):
                    own = the(case, backend=backend, mode=mode)
                    engine = the(case, backend=ADAPTED.get(backend, backend), mode=mode)
                    over = f"{own['time_ms'] / engine['time_ms']:.2f}" if backend in ADAPTED else "–"
                    times += [f"{own['time_ms']:.2f}", over]
                yield [num_tokens, f"`{backend}`", *times, _mib(own["peak_memory_bytes"])]

    return markdown(header, rows())


def of_adapters() -> dict[str, Any]:
    frame = results(ADAPTERS)
    index = ["model", "num_tokens", "mode", "routing", "backend"]
    times = frame.set_index(index)["time_ms"]
    over = [times.xs(own, level="backend") / times.xs(engine, level="backend") for own, engine in ADAPTED.items()]
    by_mode = {mode: [value for one in over for value in one.xs(mode, level="mode")] for mode in ("forward", "train")}
    few = select(frame, model="qwen3-30b-a3b", num_tokens=2048, mode="train", routing="uniform")
    return {
        "jobs": len(frame),
        "low": f"{min(by_mode['forward']):.2f}",
        "high": f"{max(by_mode['forward']):.2f}",
        "train_low": f"{min(by_mode['train']):.2f}",
        "train_high": f"{max(by_mode['train']):.2f}",
        "peak": _mib(the(few, backend="triton_lora")["peak_memory_bytes"]),
        "engine_peak": _mib(the(few, backend="triton")["peak_memory_bytes"]),
        "rank": LORA.rank,
    }


#: The sentences of docs/training.md, each with the function that computes its figures; see sentences.py.
SENTENCES: tuple[tuple[str, Callable[[], Mapping[str, Any]]], ...] = (
    ("({date}, torch {torch}, bfloat16)", lambda: quoted.environment(TRAINING)),
    ("measured Qwen3-30B-A3B in {contexts} contexts, {jobs} jobs,", run),
    (
        "The table has a train step of {tokens} tokens. The step of `accumulate:4` has four micro-batches of {fewer}",
        run,
    ),
    ("a checkpoint makes the step {low} to {high} times as long.", costs),
    (
        """`triton` and `torch_mm` keep {kept} MiB for backward, and `te` keeps {te_kept} MiB. With `checkpoint`, each
        of them keeps {few} MiB. The tokens themselves, {x} MiB, are inputs, and no context counts them.""",
        costs,
    ),
    ("The peak of `triton` is {peak} MiB with and without `checkpoint`.", costs),
    ("`checkpoint_reentrant` takes up to {more} MiB more.", costs),
    ("the step of four micro-batches takes {time} ms and peaks at {peak} MiB", micro_batches),
    ("The step then takes {less} ms, {share} of the time, and peaks at {lower} MiB.", micro_batches),
    (
        "The step takes {over} times as long as without the compiler, and peaks {more} MiB higher,",
        of_compile,
    ),
    ("`te` breaks the graph {breaks} times.", of_compile),
    ("but the step of `triton` takes {over} times as long:", of_offload),
    (
        """launches kernels for each of the {experts} experts. Its plain step takes {time} ms, of which the GPU works
        for {busy} ms.""",
        of_te,
    ),
    ("The GPU's own time grows to {low} to {high} times with a checkpoint,", of_te),
    ("measured {measured} of {jobs} jobs of two ranks with {tokens} tokens each", of_two),
    (
        """With `symm_mem`, a step with `checkpoint` takes {low} to {high} times as long as a plain one, and one with
        `checkpoint_experts` {experts} times. The latter keeps {kept} MiB instead of {least},""",
        of_two,
    ),
    ("measured low-rank adapters of rank {rank} beside frozen experts", of_adapters),
    ("low-rank-adapters)), {jobs} jobs,", of_adapters),
    (
        """With 2048 tokens, a train step of `triton_lora` peaks at {peak} MiB, and one of `triton` at {engine_peak}
        MiB,""",
        of_adapters,
    ),
    ("A train step with adapters takes {train_low} to {train_high} times as long", of_adapters),
    ("A forward takes {low} to {high} times as long.", of_adapters),
)
