"""Measure one job in this process: build, check and time a backend, measure its memory, return the record's fields."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experts import Unsupported
from moebench.measure import memory, timing
from moebench.measure.breakdown import breakdown
from moebench.measure.cache import Workload
from moebench.measure.ceilings import Ceilings
from moebench.measure.profiling import executed, trace
from moebench.measure.protocol import PASSES
from moebench.measure.samplers import Stage, captured
from moebench.measure.subject import Measured, backend_of, make_subject, verdict_fields
from moebench.measure.timing import TimingPolicy
from moebench.measure.trials import examine
from moebench.parity.judge import ParityVerdict, Unfit, are_identical, run_pass
from moebench.parity.reference import Tensors
from moebench.results.record import Status, flags_of_speed
from moebench.workload.case import Case, Job
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import Ranks

#: The columns that say where a job's time went. The rest of `job_s` is the measurement of memory, the profile and the
#: checked passes.
PHASES = ("setup_s", "ceilings_s", "parity_s", "timing_s")
#: The timing of a CUDA graph may take this share of the time cap (the most seconds of sampling), because the times of
#: the graph's replays differ little.
GRAPH_SHARE = 0.25


def measure_job(job: Job, workload: Workload, policy: TimingPolicy) -> Measured:
    """Return the measured fields of the job's record: `status`, and the fields that go with this status.

    A job of `moebench parity` is not timed. Unsupported, and a case on which no backend can be judged, become a status;
    other exceptions of the backend are not caught.
    """
    try:
        return _measure(job, workload, policy) if job.check is None else examine(job, workload)
    except Unsupported as reason:
        return {"status": Status.unsupported, "detail": reason.reason}
    except Unfit as fault:
        return {"status": Status.unsupported, "detail": str(fault)}


def _measure(job: Job, workload: Workload, policy: TimingPolicy) -> Measured:
    case, device, ranks = job.case, workload.device, workload.ranks
    backend = backend_of(job, workload)
    phases = _Phases(device)
    with phases.of("setup_s"):
        workload.inputs(case), workload.parameters(case)
    with phases.of("ceilings_s"):  # before the module takes its part of the memory
        bounds = workload.ceilings(job, backend.fp8 is not None, policy.cold_l2 and device.type == "cuda")
    with phases.of("setup_s"):
        subject = make_subject(backend, job, workload)
        handed = subject.inputs.clone()  # a backend may write into its inputs: the next backend needs the originals
    started = time.perf_counter()
    subject.settle(handed)
    passes = [subject.run(handed)]
    _synchronize(device)
    measured: Measured = {"warmup_ms": (time.perf_counter() - started) * 1e3}

    def judge(passes: list[Tensors], case: Case = case) -> ParityVerdict:
        with phases.of("parity_s"):
            return subject.judge(passes, case=case)

    if not _fit_together(passes, device, ranks):  # two sets of gradients of the largest layers do not fit
        verdict = judge(passes)
        passes.clear()
        if not verdict.passed:
            return _with_verdict(measured | phases.spent_s, verdict)
    passes += [subject.run(handed) for _ in range(PASSES - 1)]
    verdict = judge(passes)
    measured["deterministic"] = are_identical(passes, ranks) if len(passes) == PASSES else None
    judged = {"output": passes[-1]["output"].clone()} if verdict.passed else {}  # it may be overwritten
    passes.clear()
    if verdict.passed:
        measured |= _speed_and_memory(subject.module, handed, case, policy, workload, phases)
        measured |= _against(bounds, measured)
        # the module must still be right after timing: a kernel that goes wrong after many calls gets no speed
        after = run_pass(subject.module, handed, "forward")
        if not are_identical([judged, after], ranks):  # the same bits need no second verdict
            of_after = judge([after], case.model_copy(update={"mode": "forward"}))
            verdict = verdict if of_after.passed else of_after
    return _with_verdict(measured | phases.spent_s, verdict)


class _Phases:
    """The wall-clock seconds of a job's parts, by the name of their column."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.spent_s: Measured = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            _synchronize(self._device)
            self.spent_s[name] = self.spent_s.get(name, 0.0) + time.perf_counter() - started


def _against(bounds: Ceilings, measured: Measured) -> Measured:
    """Return the fields of the case's ceilings, and the fraction of its roofline that the job reached."""
    return {
        "roofline_ms": bounds.roofline_ms,
        "roofline_fraction": bounds.roofline_ms / measured["time_ms"],
        "dense_ms": bounds.dense_ms,
        "grouped_ms": bounds.grouped_ms,
        "collective_ms": bounds.collective_ms,
        "copy_gb_per_s": bounds.copy_gb_per_s,
        "flags": measured["flags"] + flags_of_speed(measured["time_ms"], bounds.roofline_ms),
    }


def _fit_together(passes: list[Tensors], device: torch.device, ranks: Ranks) -> bool:
    """Whether every rank has enough free memory to hold PASSES passes at once and to compute them."""
    if device.type == "cpu":
        return True
    one_pass = sum(tensor.nbytes for tensor in passes[0].values())
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return all(ranks.tell(PASSES * one_pass < free))


def _with_verdict(measured: Measured, verdict: ParityVerdict) -> Measured:
    found = verdict_fields(verdict)
    if verdict.passed:
        return measured | found
    return {name: measured[name] for name in ("warmup_ms", "deterministic", *PHASES) if name in measured} | found


def _speed_and_memory(
    module: nn.Module, inputs: Inputs, case: Case, policy: TimingPolicy, workload: Workload, phases: _Phases
) -> Measured:
    device, ranks = workload.device, workload.ranks
    call = _Call(module, inputs, case.mode)
    ran = executed(call.forward, device)
    call.clear()
    weighed = memory.measure_memory(call.forward, call.backward if case.mode == "train" else None, device)
    call.clear()
    with phases.of("timing_s"):
        timed = timing.time_stages(call.stages, device, policy, call.clear, ranks)
        call.clear()
        graph_time_ms = _graph_time_ms(call, timed, device, policy, ranks)
    parts = breakdown(module, call.forward, device, ranks)
    call.clear()
    if workload.trace is not None:
        trace(call.stages, call.clear, device, workload.trace)
    return {
        "executed": ran,
        **_largest(weighed, ranks),
        **parts,
        "l2": ("cold" if policy.cold_l2 else "warm") if device.type == "cuda" else None,
        "flags": timed.flags,
        "time_ms": timed.time_ms,
        "time_ms_low": timed.time_ms_low,
        "time_ms_high": timed.time_ms_high,
        "converged": timed.converged,
        "host_time_ms": timed.host_time_ms,
        "graph_time_ms": graph_time_ms,
        "backward_ms": timed.stage_ms[1] if case.mode == "train" else None,
        "skew_ms": timed.skew_ms,
        "num_samples": len(timed.samples_ms),
        "samples_ms": timed.samples_ms,
        "sample_marked": timed.marked,
        "sm_clock_mhz": timed.sm_clock_mhz,
        "tokens_per_s": case.num_active_tokens / timed.time_ms * 1e3,
        "tflops": case.flops() / timed.time_ms / 1e9,
    }


def _graph_time_ms(
    call: "_Call", timed: timing.Timing, device: torch.device, policy: TimingPolicy, ranks: Ranks
) -> float | None:
    """Return the milliseconds of a replay of the call in a CUDA graph.

    The result is None on a CPU, with several ranks, for a call that synchronises, and for a call that cannot be
    captured.
    """
    if device.type != "cuda" or ranks.size > 1 or "synchronises" in timed.flags:
        return None
    shorter = dataclasses.replace(policy, time_cap_s=GRAPH_SHARE * policy.time_cap_s)
    with captured(call.stages, call.clear, device) as replay:
        return None if replay is None else timing.time_stages([replay], device, shorter).time_ms


def _largest(weighed: memory.Memory, ranks: Ranks) -> Measured:
    """Return each memory figure of the rank where this figure is largest."""
    by_rank = ranks.tell(weighed)
    figures: dict[str, list[int | None]] = {
        "peak_memory_bytes": [rank.peak_bytes for rank in by_rank],
        "saved_memory_bytes": [rank.saved_bytes for rank in by_rank],
        "reserved_memory_bytes": [rank.reserved_bytes for rank in by_rank],
        "outside_torch_bytes": [rank.outside_bytes for rank in by_rank],
    }
    return {name: max((figure for figure in row if figure is not None), default=None) for name, row in figures.items()}


class _Call:
    """The call that is timed and whose memory is measured: forward and, in mode train, the backward of its output."""

    def __init__(self, module: nn.Module, inputs: Inputs, mode: str) -> None:
        self._module, self._inputs, self._train = module, inputs, mode == "train"
        self._x_TD = inputs.x_TD.detach().requires_grad_(self._train)
        self._weights_TK = inputs.weights_TK.detach().requires_grad_(self._train)
        self._output_TD: Tensor | None = None

    @property
    def stages(self) -> list[Stage]:
        return [self.forward, self.backward] if self._train else [self.forward]

    def forward(self) -> Tensor:
        inputs = self._inputs
        with torch.set_grad_enabled(self._train):
            output: Tensor = self._module(self._x_TD, inputs.token_mask_T, self._weights_TK, inputs.indices_TK)
        self._output_TD = output
        return output

    def backward(self, output_TD: Tensor | None = None) -> None:
        output_TD = self._output_TD if output_TD is None else output_TD
        assert output_TD is not None
        self._output_TD = None
        output_TD.backward(self._inputs.grad_TD)

    def clear(self) -> None:
        """Drop the last call's output and gradients, so that the next backward does not add to these gradients."""
        self._output_TD = None
        self._x_TD.grad = self._weights_TK.grad = None
        self._module.zero_grad(set_to_none=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
