"""The columns of what is measured. A new one is declared here, and measured in moebench.measure.job.

Units are in the names. What was not measured is None, never 0.
"""

from typing import Annotated

from pydantic import BaseModel, Field

from moebench.results.columns import Column, Rounds

_NO_PARTS = "at EP size 1, where a module has no `dispatcher` to listen to, unless ok"


class Measured(BaseModel):
    """Times, ceilings, memory and parity, in the order of the columns."""

    time_ms: Annotated[
        float | None,
        Field(gt=0),
        Column(
            Rounds.COMPUTED,
            "median of the samples; device time on a GPU, the steady clock on a CPU; forward and backward in mode "
            "`train`; of several rounds, the median of their medians",
            "ms",
            is_speed=True,
        ),
    ] = None
    time_ms_low: Annotated[
        float | None,
        Column(
            Rounds.COMPUTED,
            "lower end of the 95% interval of that median, which is wider where a sample depends on the one before",
            "ms",
            is_speed=True,
        ),
    ] = None
    time_ms_high: Annotated[float | None, Column(Rounds.COMPUTED, "its upper end", "ms", is_speed=True)] = None
    converged: Annotated[
        bool | None,
        Column(
            Rounds.ALL,
            "whether half the interval is at most the target's share of `time_ms`; where it is not, the time cap came "
            "first, or the target was out of reach",
        ),
    ] = None
    host_time_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "wall-clock time of one call, from an idle device until it is synchronised",
            "ms",
            is_speed=True,
        ),
    ] = None
    graph_time_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "median of replays of the same call from a CUDA graph, which leaves the host out",
            "ms",
            null="on a CPU, at an EP size above 1, where the call waits for the GPU or cannot be captured, unless ok",
            is_speed=True,
        ),
    ] = None
    backward_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "median of the backward part of `time_ms`",
            "ms",
            null="in mode `forward`, unless ok",
            is_speed=True,
        ),
    ] = None
    dispatch_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN, "part of a forward: tokens go to the ranks of their experts", "ms", _NO_PARTS, is_speed=True
        ),
    ] = None
    compute_ms: Annotated[
        float | None, Column(Rounds.MEDIAN, "part of a forward: the experts compute", "ms", _NO_PARTS, is_speed=True)
    ] = None
    combine_ms: Annotated[
        float | None, Column(Rounds.MEDIAN, "part of a forward: the outputs go back", "ms", _NO_PARTS, is_speed=True)
    ] = None
    skew_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "median over samples of the slowest rank's time less the fastest rank's",
            "ms",
            null="at EP size 1, unless ok",
            is_speed=True,
        ),
    ] = None
    warmup_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "the first calls, with compilation, autotuning and first allocations; no average includes them",
            "ms",
            null="did not get so far",
        ),
    ] = None
    num_samples: Annotated[int | None, Column(Rounds.SUM, "number of samples")] = None
    samples_ms: Annotated[
        tuple[float, ...] | None, Column(Rounds.SAMPLES, "the raw samples, in order", "ms", is_speed=True)
    ] = None
    sample_rounds: Annotated[
        tuple[int, ...] | None, Column(Rounds.SAMPLES, "the round, a fresh process each, of each sample", is_speed=True)
    ] = None
    sample_marked: Annotated[
        tuple[bool, ...] | None,
        Column(
            Rounds.SAMPLES,
            "whether the sample ran at another clock than most, or while the GPU was slowed down: the sample is kept, "
            "and every figure here leaves it out",
            is_speed=True,
        ),
    ] = None
    sm_clock_mhz: Annotated[
        int | None,
        Column(
            Rounds.LOWER_MEDIAN,
            "clock of the GPU's multiprocessors around the samples that are not marked",
            "MHz",
            null="on a CPU, where NVML does not say, unless ok",
        ),
    ] = None
    tokens_per_s: Annotated[
        float | None,
        Column(
            Rounds.COMPUTED,
            "tokens that the mask keeps, the mean over ranks, by `time_ms`; per GPU (per process on a CPU)",
            "1/s",
            is_speed=True,
        ),
    ] = None
    tflops: Annotated[
        float | None,
        Column(
            Rounds.COMPUTED,
            "useful work by `time_ms`, per GPU: 6·T·K·dim·inter forward (4 ungated), three times that in mode `train`; "
            "T: tokens that the mask keeps, the mean over ranks",
            "10¹² FLOP/s",
            is_speed=True,
        ),
    ] = None

    roofline_fraction: Annotated[
        float | None, Column(Rounds.COMPUTED, "`roofline_ms` over `time_ms`", is_speed=True)
    ] = None
    roofline_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "the longest of `dense_ms`, `collective_ms` and the time to copy the least bytes that a pass moves: "
            "parameters of experts with tokens, tokens in and out, in mode `train` all gradients (on a CPU and with a "
            "warm cache no bytes count)",
            "ms",
        ),
    ] = None
    dense_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "the case's matrix products (two forward, six in mode `train`) as if one expert had all rows; in FP8 for "
            "FP8 backends",
            "ms",
            null="no rows, FP8 of a shape that `torch._scaled_mm` does not take, unless ok",
        ),
    ] = None
    grouped_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "the same products by torch's grouped GEMM, on rows that are sorted already",
            "ms",
            null="except in bfloat16 on CUDA, unless ok",
        ),
    ] = None
    collective_ms: Annotated[
        float | None,
        Column(
            Rounds.MEDIAN,
            "the raw collective that carries the tokens out and back (in mode `train` twice): all-gather and "
            "reduce-scatter for `allgather`, else all-to-all",
            "ms",
            null="at EP size 1, unless ok",
        ),
    ] = None
    copy_gb_per_s: Annotated[
        float | None, Column(Rounds.MEDIAN, "a copy within memory; bytes read and bytes written count", "10⁹ bytes/s")
    ] = None

    peak_memory_bytes: Annotated[
        int | None,
        Column(
            Rounds.WORST,
            "most that was allocated above the settled floor; weights and inputs are in the floor, weight gradients "
            "above it",
            "bytes",
        ),
    ] = None
    saved_memory_bytes: Annotated[
        int | None,
        Column(
            Rounds.WORST,
            "what forward leaves allocated for backward; its output does not count",
            "bytes",
            null="in mode `forward`, unless ok",
        ),
    ] = None
    reserved_memory_bytes: Annotated[
        int | None,
        Column(
            Rounds.WORST,
            "what torch's caching allocator takes from the GPU for the call, after its cache was emptied; what it has "
            "above the peak is lost to fragments",
            "bytes",
            null="on a CPU, unless ok",
        ),
    ] = None
    outside_torch_bytes: Annotated[
        int | None,
        Column(
            Rounds.WORST,
            "GPU memory in use after the call that is not torch's: CUDA contexts, NCCL, DeepEP's buffers, and any "
            "other process on that GPU",
            "bytes",
            null="on a CPU, unless ok",
        ),
    ] = None

    parity_worst: Annotated[
        float | None,
        Column(
            Rounds.WORST,
            "the worst error over its budget: at most 1 passes; `inf` where a value is not finite, or must be zero and "
            "is not",
            null="not compared",
        ),
    ] = None
    parity_worst_tensor: Annotated[
        str | None,
        Column(
            Rounds.OF_WORST,
            "the tensor with that error: `output`, or the gradient of an input or a parameter",
            null="not compared",
        ),
    ] = None
    parity_errors: Annotated[
        dict[str, float] | None,
        Column(
            Rounds.WORST,
            "JSON object, error over budget by tensor; `moebench.results.frame.parity_errors(cell)` reads it",
            null="not compared",
        ),
    ] = None
    deterministic: Annotated[
        bool | None,
        Column(
            Rounds.ALL,
            "whether both checked passes gave the same bits, on every rank, on a CPU with torch's deterministic "
            "algorithms: a property, no fault",
            null="not compared, or memory holds only one pass",
        ),
    ] = None
