"""Time the backends of a sweep in turns in one process, and compare the first backend of each case with the others.

    python -m moebench.measure.studies.turns skewed-wide --out skewed.json
    python -m moebench.measure.studies.turns gpu-wide --only triton --only torch_mm --filter model=olmoe --out FILE.json

A turn takes one sample of each backend, and the next turn takes them in the opposite order. All backends read the same
weights and inputs. The L2 cache is cold, as in `moebench run`. The ratio of a turn is the time of the first backend
divided by the time of another one. The study prints the median ratio of all turns and its 95% interval, and marks the
ratios whose whole interval is above 1. If two backends are equally fast, one of 40 such intervals is above 1 by chance:
measure the cases again that are marked, with `--case ID` and a larger `--time-cap-s`.

`moebench run` measures each job more carefully, and needs seconds for each. This study leaves out its parity checks,
new values for each sample, and ceilings. It only looks for gross errors: outputs and gradients of the tokens must be
near those of the first backend. The time of one process does not show how processes differ.
"""

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experts.errors import RegistryError
from experts.registry import get_backend
from moebench.errors import UsageError
from moebench.machine import environment
from moebench.measure import clock, timing
from moebench.measure.cache import Workload
from moebench.measure.call import Call
from moebench.measure.samplers import make_sampler
from moebench.measure.studies import places, run
from moebench.measure.studies.products import layer_of
from moebench.measure.timing import TimingPolicy
from moebench.parity.reference import Tensors
from moebench.results.files import writable, write_atomically
from moebench.results.record import Status
from moebench.results.stats import MIN_SAMPLES, relative_half_width, series_interval
from moebench.workload.case import Case
from moebench.workload.context import PLAIN
from moebench.workload.inputs import moe_config
from moebench.workload.models import EXPERTS, shape_name
from moebench.workload.ranks import ALONE
from moebench.workload.selection import select

WARM_UPS = 3
#: Results of two backends may differ by this part of their size. FP8 differs by about half of it.
MOST_DIFFERENCE = 0.1

Row = dict[str, Any]


def ratios_of(turns: Sequence[Sequence[float]], other: int) -> tuple[float, float, float]:
    """Return the median of the turns' ratios, first backend / backend number `other`, and its 95% interval."""
    return series_interval([turn[0] / turn[other] for turn in turns])


def take_turns(calls: Sequence[Call], device: torch.device, policy: TimingPolicy) -> list[tuple[float, ...]]:
    """Return the milliseconds of each call in each turn. The calls must be warm.

    The turns end as the policy says, whose interval is here that of each ratio. There are at least MIN_SAMPLES turns,
    whatever the time cap.
    """
    turns: list[tuple[float, ...]] = []
    with ExitStack() as stack, timing.no_garbage_collection():
        samplers = []
        for call in calls:
            given = call.stages, device, policy.cold_l2, call.clear, call.clear, ALONE
            samplers.append(stack.enter_context(make_sampler(*given)))
            call.clear()  # no call holds its gradients while another one runs
        started = clock.perf_counter()
        while True:
            order = list(enumerate(samplers))[:: -1 if len(turns) % 2 else 1]
            times = {place: sampler.sample(1).totals_ms[0] for place, sampler in order}
            turns.append(tuple(times[place] for place in range(len(calls))))
            if len(turns) < MIN_SAMPLES:
                continue
            width = max(relative_half_width(*ratios_of(turns, other)) for other in range(1, len(calls)))
            converged = width <= policy.interval_target and len(turns) >= policy.least_samples
            if converged or clock.perf_counter() - started >= policy.time_cap_s:
                return turns


def measure_case(case: Case, backends: Sequence[str], workload: Workload, policy: TimingPolicy) -> Iterator[Row]:
    """Yield a row for each backend but the first. Raises torch.OutOfMemoryError."""
    config, device = moe_config(case), workload.device
    for name in backends:
        if (reason := get_backend(name).unsupported(device, config)) is not None:
            yield {"status": Status.unsupported, "detail": f"{name}: {reason.reason}"}
            return
    inputs, parameters = workload.inputs(case), workload.parameters(case)
    calls = [Call(layer_of(name, parameters, config), inputs, case.mode) for name in backends]
    results = [_warm(call, device) for call in calls]
    differences = [_difference(results[0], result) for result in results]
    turns = take_turns(calls, device, policy)
    times = [statistics.median(column) for column in zip(*turns, strict=True)]
    for place, name in list(enumerate(backends))[1:]:
        row: Row = {"backend": backends[0], "other": name, "difference": differences[place]}
        if not differences[place] <= MOST_DIFFERENCE:
            yield {**row, "status": Status.mismatch, "detail": f"results differ by {differences[place]:.3g}"}
            continue
        ratio, low, high = ratios_of(turns, place)
        row |= {"status": Status.ok, "time_ms": times[0], "other_time_ms": times[place]}
        row |= {"ratio": ratio, "ratio_low": low, "ratio_high": high, "slower": low > 1}
        samples = {"samples_ms": 0, "other_samples_ms": place}  # to the nanosecond, as there are many
        yield row | {name: [round(turn[number], 6) for turn in turns] for name, number in samples.items()}


def _warm(call: Call, device: torch.device) -> Tensors:
    """Return copies of the last warm call's output and gradients of the tokens, without those of the parameters."""
    for _ in range(WARM_UPS):
        call.clear()
        for stage in call.stages:
            stage()
    tokens = ("output", "x.grad", "weights.grad")
    found = {name: tensor.float() for name, tensor in call.result().items() if name in tokens}
    call.clear()
    clock.finish(device)
    return found


def _difference(one: Tensors, other: Tensors) -> float:
    """Return the largest difference of two results' tensors, each over the size of the first; infinite without one."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((other[name] - right).norm() / right.norm()) for name, right in one.items())


def main(
    sweep: Annotated[str, typer.Argument(help="a sweep that comes with moebench, or a file")],
    filters: Annotated[list[str], typer.Option("--filter", help="as of moebench run; repeatable")] = [],  # noqa: B006
    case: Annotated[list[str], typer.Option(help="the id of a case, as of moebench run; repeatable")] = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="instead of the sweep's backends; repeatable")] = [],  # noqa: B006
    device: str | None = None,
    time_cap_s: Annotated[float, typer.Option(help="most seconds of turns per case, beside the warm-up")] = 0.3,
    time_budget: Annotated[float | None, typer.Option(min=0, help="start no new case after this many minutes")] = None,
    out: Annotated[Path | None, typer.Option(help="a file .json, which has each case as soon as it ends")] = None,
) -> None:
    """Time the backends of each case in turns, and say where the first one is slower than another."""
    jobs = select(sweep, (), filters, case, only)
    cases = {one: [job.backend for job in some] for one, some in itertools.groupby(jobs, key=lambda job: job.case)}
    for one, backends in cases.items():
        _check(one, backends)
    on = places(device, out)
    workload, policy = Workload(on), TimingPolicy(TimingPolicy.default(on).interval_target, time_cap_s)
    described = environment.collect(on.type).model_dump(mode="json")
    rows: list[Row] = []
    started, num_done = clock.perf_counter(), 0
    for one, backends in cases.items():
        if time_budget is not None and clock.perf_counter() - started >= 60 * time_budget:
            break
        what = {name: getattr(one, name) for name in ("case_id", "model", "num_tokens", "routing", "mode", "dtype")}
        try:
            found = list(measure_case(one, backends, workload, policy))
        except (MemoryError, torch.OutOfMemoryError) as error:
            found = [{"status": Status.oom, "detail": str(error)}]
        torch.cuda.empty_cache()
        rows += [{**what, "shape": shape_name(dict(one)), **row} for row in found]
        num_done += 1
        for row in rows[len(rows) - len(found) :]:
            print(_line(row), flush=True)
        if out is not None:
            content = json.dumps({"environment": described, "time_cap_s": time_cap_s, "rows": rows}) + "\n"
            with writable(out):
                write_atomically(out, content.encode())
    ratios = [row for row in rows if row["status"] == Status.ok]
    slower = sum(row["slower"] for row in ratios)
    print(f"{num_done} of {len(cases)} cases; {len(ratios)} ratios, {slower} of them wholly above 1")


def _check(case: Case, backends: Sequence[str]) -> None:
    """Raise UsageError for a case that the study cannot measure."""
    if case.processes.num_ranks > 1 or case.context != PLAIN or case.subject != EXPERTS:
        raise UsageError(f"{case.case_id}: the study measures experts alone, on one rank and in the context {PLAIN}")
    if len(backends) < 2:
        raise UsageError(f"{case.case_id}: there is only {backends[0]}; name two backends or more with --only")
    for name in backends:
        try:
            get_backend(name)
        except RegistryError as error:
            raise UsageError(f"backend {name}: {error}") from error


def _line(row: Row) -> str:
    what = f"{row['model'] or row['shape']:<18} {row['num_tokens']:>6} {row['routing']:<10} {row['mode']:<8}"
    if row["status"] != Status.ok:
        return f"{what} {row['status']}: {row['detail'].splitlines()[0] if row['detail'] else ''}"
    interval = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    names = f"{row['backend']} {row['time_ms']:.4f} ms, {row['other']} {row['other_time_ms']:.4f} ms"
    return f"{what} {names}: {interval}{' slower' if row['slower'] else ''}"


if __name__ == "__main__":
    run(main, "moebench.measure.studies.turns")
