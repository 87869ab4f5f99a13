"""Declare the columns of measured values. To add a column, declare it here, and measure it in moebench.measure.job.

Column names end in their unit. A value that was not measured is None, not 0.
"""

from typing import Annotated

from pydantic import BaseModel, Field

from moebench.results.columns import IN_JSON, LONGEST_MS, Bytes, Column, Count, Part, Rate, Rounds, Time

#: An end of an interval may be infinite.
Low = Annotated[float, Field(le=LONGEST_MS), IN_JSON]
High = Annotated[float, Field(ge=0), IN_JSON]

_NO_BUSY = (
    "on a CPU; if the call does not wait for the GPU; if the profile is not complete (flag `no_busy_time`); unless ok"
)
_NO_PARTS = "at EP size 1; if the module has no attribute `dispatcher`; unless ok"


def _of_steps(rounds: Rounds, means: str, unit: str = "") -> Column:
    return Column(rounds, means, unit, "if the routing is not a trace; unless ok")


def _of_part(means: str) -> Column:
    return Column(Rounds.MEDIAN, f"part of a forward pass: {means}", "ms", _NO_PARTS)


def _of_memory(means: str, null: str = "unless ok") -> Column:
    return Column(Rounds.WORST, means, "bytes", null)


class Measured(BaseModel):
    """Times, ceilings and memory, in the order of the columns."""

    time_ms: Annotated[
        Time | None,
        Column(
            Rounds.COMPUTED,
            "median of the samples; mode `train` times forward and backward together; moebench reads the device's "
            "clock on a GPU and the steady clock on a CPU; with several rounds, the median of the rounds' medians",
            "ms",
        ),
    ] = None
    time_ms_low: Annotated[
        Low | None,
        Column(
            Rounds.COMPUTED,
            "lower end of the 95% confidence interval of `time_ms`; it is wider if samples depend on each other",
            "ms",
        ),
    ] = None
    time_ms_high: Annotated[
        High | None, Column(Rounds.COMPUTED, "upper end of the 95% confidence interval of `time_ms`", "ms")
    ] = None
    converged: Annotated[
        bool | None,
        Column(
            Rounds.ALL,
            "whether half the width of the 95% confidence interval is at most the target share of `time_ms`; if "
            "`false`, the job had used up its sampling time (the time cap), or stopped early because the target was "
            "out of reach",
        ),
    ] = None
    host_time_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "wall-clock time of one call: it starts on an idle device and ends when the device has finished",
            "ms",
        ),
    ] = None
    graph_time_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "median time of the call when a CUDA graph replays it; host time does not count; with several ranks, all "
            "ranks replay the call together, and each sample is the time of the slowest rank",
            "ms",
            null="on a CPU; if memory is short; if the call synchronises or cannot be captured, on any rank; if a "
            "replay that was judged gave a wrong result; unless ok",
        ),
    ] = None
    busy_ms: Annotated[
        Time | None,
        Column(
            Rounds.COMPUTED,
            "the GPU's own time in a call that waits for the GPU: how long a kernel, a copy or a memset of the call "
            "runs, as the median of profiled calls; at an EP size above 1, kernels that communicate do not count; with "
            "several rounds, the median of the rounds' medians",
            "ms",
            _NO_BUSY,
        ),
    ] = None
    busy_ms_low: Annotated[
        Low | None, Column(Rounds.COMPUTED, "lower end of the 95% confidence interval of `busy_ms`", "ms", _NO_BUSY)
    ] = None
    busy_ms_high: Annotated[
        High | None, Column(Rounds.COMPUTED, "upper end of the 95% confidence interval of `busy_ms`", "ms", _NO_BUSY)
    ] = None
    backward_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "median time of the backward pass, which is a part of `time_ms`",
            "ms",
            null="in mode `forward`; unless ok",
        ),
    ] = None
    dispatch_ms: Annotated[
        Part | None,
        _of_part(
            "until the dispatcher has sent the tokens to the ranks of their experts; the three parts are of one pass "
            "on its slowest rank, and add up to its time",
        ),
    ] = None
    compute_ms: Annotated[Part | None, _of_part("the experts compute")] = None
    combine_ms: Annotated[Part | None, _of_part("the dispatcher sends the outputs back, until the pass ends")] = None
    dispatch_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "what a forward pass's dispatch sends to other ranks for the rows of tokens, with the scales of rows in "
            "FP8, but without routing weights and indices; of the rank that sends most",
            _NO_PARTS,
        ),
    ] = None
    skew_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "time of the slowest rank minus time of the fastest rank, as the median over samples",
            "ms",
            null="at EP size 1; unless ok",
        ),
    ] = None
    warmup_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "time of the first calls with compilation, autotuning and first allocations; no other time includes them",
            "ms",
            null="if the job ended before this step",
        ),
    ] = None
    num_samples: Annotated[Count | None, Column(Rounds.SUM, "number of samples")] = None
    samples_ms: Annotated[tuple[Time, ...] | None, Column(Rounds.SAMPLES, "the raw samples, in order", "ms")] = None
    sample_rounds: Annotated[
        tuple[Count, ...] | None,
        Column(Rounds.SAMPLES, "round of each sample; each round is a fresh process"),
    ] = None
    sample_marked: Annotated[
        tuple[bool, ...] | None,
        Column(
            Rounds.SAMPLES,
            "for each sample, whether the GPU ran at another clock than for most samples, or was slowed down; "
            "`samples_ms` keeps such samples, and the statistics leave them out",
        ),
    ] = None
    busy_samples_ms: Annotated[
        tuple[Time, ...] | None, Column(Rounds.SAMPLES, "`busy_ms` of each profiled call, in order", "ms", _NO_BUSY)
    ] = None
    busy_sample_rounds: Annotated[
        tuple[Count, ...] | None, Column(Rounds.SAMPLES, "round of each entry of `busy_samples_ms`", "", _NO_BUSY)
    ] = None
    sm_clock_mhz: Annotated[
        Count | None,
        Column(
            Rounds.LOWER_MEDIAN,
            "clock of the GPU's multiprocessors around the samples that are not marked in `sample_marked`",
            "MHz",
            null="on a CPU; if NVML does not report it; unless ok",
        ),
    ] = None
    num_steps: Annotated[Count | None, _of_steps(Rounds.LOWER_MEDIAN, "steps of the trace that were timed")] = None
    step_p50_ms: Annotated[
        Time | None, _of_steps(Rounds.MEDIAN, "median of the times of the steps, each the median of its samples", "ms")
    ] = None
    step_p99_ms: Annotated[Time | None, _of_steps(Rounds.MEDIAN, "99th percentile of these times", "ms")] = None
    expert_rows: Annotated[
        tuple[Count, ...] | None, _of_steps(Rounds.SAME, "rows of each expert in all steps, before the token mask")
    ] = None
    rank_rows: Annotated[tuple[Count, ...] | None, _of_steps(Rounds.SAME, "rows of the experts of each rank")] = None
    expert_skew: Annotated[
        Rate | None, _of_steps(Rounds.SAME, "rows of a step's busiest expert divided by the average, mean over steps")
    ] = None
    rank_skew: Annotated[Rate | None, _of_steps(Rounds.SAME, "the same for the rows of ranks")] = None
    tokens_per_s: Annotated[
        Rate | None,
        Column(
            Rounds.COMPUTED,
            "tokens that the mask keeps, as the mean over ranks, divided by `time_ms`; per GPU (per process on a CPU)",
            "1/s",
        ),
    ] = None
    tflops: Annotated[
        Rate | None,
        Column(
            Rounds.COMPUTED,
            "useful work divided by `time_ms`, per GPU: 6·T·K·dim·inter in mode `forward` (4 instead of 6 for ungated "
            "activations), three times as much in mode `train`, another number with adapters (`@lora`); T: tokens that "
            "the mask keeps, as the mean over ranks; K: experts per token",
            "10¹² FLOP/s",
        ),
    ] = None

    roofline_fraction: Annotated[Rate | None, Column(Rounds.COMPUTED, "`roofline_ms` divided by `time_ms`")] = None
    roofline_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "the largest of three times: `dense_ms`, `collective_ms`, and the time to copy the bytes that every "
            "backend must move: the parameters of experts that have tokens (for FP8 backends in one byte per number), "
            "the rows of x of tokens that have an expert, all rows of the output, and in mode `train` also the "
            "gradients of these rows and of all parameters; on a CPU and with a warm cache the time to copy does not "
            "count",
            "ms",
        ),
    ] = None
    dense_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "time of the case's matrix products (two in mode `forward`, six in mode `train`) as if one expert had all "
            "rows; FP8 matrix products for FP8 backends",
            "ms",
            null="if no expert has a row; in FP8 if `torch._scaled_mm` does not take the shape; unless ok",
        ),
    ] = None
    grouped_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "time of the same matrix products with torch's grouped GEMM; the rows are already sorted by expert",
            "ms",
            null="except in bfloat16 on CUDA; unless ok",
        ),
    ] = None
    collective_ms: Annotated[
        Part | None,
        Column(
            Rounds.MEDIAN,
            "time of the bare collectives that send the tokens out and back (twice in mode `train`): all-gather and "
            "reduce-scatter for `allgather`, all-to-all for the other dispatchers; rows that a backend sends in FP8 "
            "have as many bytes here",
            "ms",
            null="at EP size 1; unless ok",
        ),
    ] = None
    copy_gb_per_s: Annotated[
        Rate | None,
        Column(Rounds.MEDIAN, "speed of a copy within memory; bytes read and bytes written both count", "10⁹ bytes/s"),
    ] = None
    peak_memory_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "the largest amount of memory that the call had allocated, without the memory that was in use before the "
            "call; weights and inputs were in use before, weight gradients were not",
        ),
    ] = None
    saved_memory_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "memory that the forward pass leaves allocated for the backward pass; the output does not count",
            null="in mode `forward`; unless ok",
        ),
    ] = None
    cached_weight_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "memory in which the layer keeps quantised weights from call to call; it is not a part of "
            "`peak_memory_bytes`",
            null="if the module has no attribute `cached_weight_bytes`; unless ok",
        ),
    ] = None
    reserved_memory_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "memory that torch's caching allocator takes from the GPU for the call, starting with an empty cache; the "
            "part above `peak_memory_bytes` is lost to fragmentation",
            null="on a CPU; unless ok",
        ),
    ] = None
    outside_torch_bytes: Annotated[
        Bytes | None,
        _of_memory(
            "GPU memory that is in use after the call and does not belong to torch: CUDA contexts, NCCL, the "
            "buffers of `deepep` and `symm_mem`, and every other process on that GPU",
            null="on a CPU; unless ok",
        ),
    ] = None
    untracked_memory_bytes: Annotated[
        Count | None,
        _of_memory(
            "memory taken since the backend was built that no tensor of torch holds, for example by numpy; on a CPU at "
            "the peak of the call, on a GPU after it; coarse, see [concepts.md](concepts.md#memory)",
            null="if the system does not report it; unless ok",
        ),
    ] = None
