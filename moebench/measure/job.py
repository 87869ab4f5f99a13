"""Measure one job in this process: build, check and time a backend, measure its memory, return the record's fields."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from experts import Unsupported
from moebench.measure import clock, memory, timing
from moebench.measure.breakdown import breakdown
from moebench.measure.cache import Workload
from moebench.measure.call import DRAWN, Call, NoSpeed, Samples
from moebench.measure.ceilings import Ceilings
from moebench.measure.profiling import Busy, busy_of_calls, executed, trace
from moebench.measure.protocol import PASSES
from moebench.measure.samplers import captured
from moebench.measure.subject import Measured, Subject, backend_of, make_subject, reason_of, verdict_fields
from moebench.measure.timing import Timing, TimingPolicy
from moebench.measure.trials import examine
from moebench.parity.adapters import lora_of
from moebench.parity.judge import ParityVerdict, Unfit, are_identical
from moebench.parity.passes import run_pass
from moebench.parity.reference import Tensors
from moebench.results.record import IMPOSSIBLE, Status
from moebench.results.stats import MIN_SAMPLES
from moebench.workload.case import Job
from moebench.workload.context import PLAIN
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import Ranks

#: The columns that say where a job's time went. The rest of `job_s` is the measurement of memory, the profile and the
#: checked passes.
PHASES = ("setup_s", "ceilings_s", "parity_s", "timing_s")
#: The columns that a job without a speed keeps.
WITHOUT_SPEED = ("warmup_ms", "deterministic", "parity_worst", "parity_worst_tensor", "parity_errors", *PHASES)
#: The timing of a CUDA graph may take this share of the time cap (the most seconds of sampling), because the times of
#: the graph's replays differ little.
GRAPH_SHARE = 0.25
#: The most calls that are profiled for the GPU's own time, and the share of the time cap that more than MIN_SAMPLES
#: calls may take.
BUSY_CALLS, BUSY_SHARE = 20, 0.25
#: A time that is impossibly short is measured again this many times, each time after its ceilings.
REPEATS = 2


def measure_job(job: Job, workload: Workload, policy: TimingPolicy) -> Measured:
    """Return the measured fields of the job's record: `status`, and the fields that go with this status.

    A job of `moebench parity` is not timed. Unsupported, and a case on which no backend can be judged, become a status;
    other exceptions of the backend are not caught. A backend that has replaced a clock has the status `mismatch`.
    """
    try:
        measured = _Job(job, workload, policy).measure() if job.check is None else examine(job, workload)
    except Unsupported as reason:
        return {"status": Status.unsupported, "detail": reason_of(reason)}
    except Unfit as reason:
        return {"status": Status.unsupported, "detail": str(reason)}
    replaced = dict.fromkeys(name for names in workload.ranks.tell(clock.replaced()) for name in names)
    if replaced and measured["status"] is Status.ok:
        return _without_speed(measured, f"the backend replaced {', '.join(replaced)}: no time of it is believed")
    return measured


def _without_speed(measured: Measured, detail: str) -> Measured:
    kept = {name: measured[name] for name in WITHOUT_SPEED if name in measured}
    return kept | {"status": Status.mismatch, "detail": detail}


@dataclass(frozen=True)
class _Timed:
    """The times of a call, and the ceilings that they were compared with."""

    timing: Timing
    graph_time_ms: float | None
    busy: Busy
    bounds: Ceilings
    steps: list[int]  # of a trace, for each sample


class _Job:
    """A job that is measured."""

    def __init__(self, job: Job, workload: Workload, policy: TimingPolicy) -> None:
        self.job, self.case, self.workload = job, job.case, workload
        self.replay = workload.begin(job)
        self.policy = policy.sampling_each(self.replay.steps if self.replay else ())
        self.device, self.ranks = workload.device, workload.ranks
        self.phases = clock.Phases(workload.device)

    def measure(self) -> Measured:
        """Return the fields of the record. Raises Unsupported, and all errors of the backend."""
        backend = backend_of(self.job, self.workload)
        with self.phases.of("setup_s"):
            self.workload.inputs(self.case), self.workload.parameters(self.case)
        bounds = self._ceilings(backend.fp8 is not None, lora_of(backend) is not None)  # before the module's memory
        with self.phases.of("setup_s"):
            # a backend may write into its inputs: the next one needs the originals
            handed = self.workload.inputs(self.case).clone()
            held = memory.Held(self.device)
            subject = make_subject(backend, self.job, self.workload)
        started = clock.perf_counter()
        subject.settle(handed)
        passes = [subject.run(handed)]
        clock.finish(self.device)
        measured: Measured = {"warmup_ms": (clock.perf_counter() - started) * 1e3}
        held_bytes = held.bytes_beside(subject.module, passes[0].values())
        pass_bytes = sum(tensor.nbytes for tensor in passes[0].values())
        if not _fit(PASSES * pass_bytes, self.device, self.ranks):  # two sets of gradients of the largest layers
            verdict = self._judge(subject, passes)
            passes.clear()
            if not verdict.passed:
                return measured | self.phases.spent_s | verdict_fields(verdict)
        passes += [subject.run(handed) for _ in range(PASSES - 1)]
        verdict = self._judge(subject, passes)
        measured["deterministic"] = are_identical(passes, self.ranks) if len(passes) == PASSES else None
        if not verdict.passed:
            return measured | self.phases.spent_s | verdict_fields(verdict)
        judged = {"output": passes[-1]["output"].clone()}  # it may be overwritten
        passes.clear()
        try:
            measured |= self._speed_and_memory(subject, handed, bounds, pass_bytes, held_bytes)
            self._check_after(subject, judged)
        except NoSpeed as reason:
            found = verdict_fields(reason.verdict or verdict)
            return _without_speed(measured | self.phases.spent_s | found, str(reason))
        return measured | self.phases.spent_s | verdict_fields(verdict)

    def _ceilings(self, is_fp8: bool, is_frozen: bool, *, anew: bool = False) -> Ceilings:
        cold = self.policy.cold_l2 and self.device.type == "cuda"
        with self.phases.of("ceilings_s"):
            return self.workload.ceilings(self.job, is_fp8, cold, is_frozen=is_frozen, anew=anew)

    def _judge(
        self, subject: Subject, passes: list[Tensors], inputs: Inputs | None = None, mode: str | None = None
    ) -> ParityVerdict:
        with self.phases.of("parity_s"):
            case = self.case.model_copy(update={"mode": mode or self.case.mode})
            return subject.judge(passes, inputs, case=case)

    def _check_after(self, subject: Subject, judged: Tensors) -> None:
        """Check the output once more, because a kernel may go wrong after many calls. Raises NoSpeed if it is wrong."""
        after = run_pass(subject.module, subject.inputs.clone(), "forward", self.case.surroundings.num_micro_batches)
        if are_identical([judged, after], self.ranks):  # the same bits need no second verdict
            return
        verdict = self._judge(subject, [after], mode="forward")
        if not verdict.passed:
            raise NoSpeed(f"{verdict.worst}, in a call after timing", verdict)

    def _speed_and_memory(
        self, subject: Subject, handed: Inputs, bounds: Ceilings, pass_bytes: int, held_bytes: int | None
    ) -> Measured:
        """Return the fields of a right backend. Raises NoSpeed if its times must not be believed."""
        case, job, device, ranks = self.case, self.job, self.device, self.ranks
        call = Call(subject.module, handed, case.mode, case.surroundings.num_micro_batches)
        ran, weighed = executed(call.forward, device), self._weigh(call, subject)
        taken = memory.largest(weighed, held_bytes, ranks, subject.module)  # before a graph makes a layer keep more
        fits = _fit(DRAWN * pass_bytes + (weighed.peak_bytes or 0), device, ranks)
        samples = Samples(call, subject.inputs, partial(self._judge, subject), ranks, fits, self.replay, subject.around)
        if subject.graphs is not None:
            subject.graphs.end_warm_calls()
        timed = self._time(call, samples, bounds, subject)
        parts = breakdown(subject.module, call.forward, device, ranks, samples.prepare, timed.timing.hidden_ms, job)
        call.clear()
        if self.workload.trace is not None:
            trace(call.stages, call.clear, device, self.workload.trace)
        return {
            "executed": ran,
            **taken,
            **parts,
            **self._compiler(subject),
            "l2": ("cold" if self.policy.cold_l2 else "warm") if device.type == "cuda" else None,
            **self._speed(timed, subject.flops),
        }

    def _weigh(self, call: Call, subject: Subject) -> memory.Memory:
        """Return the memory of a call. Nobody counts the memory that compiled code takes on a CPU."""
        call.clear()
        if subject.graphs is not None and self.device.type == "cpu":
            return memory.Memory(None, None)
        weighed = memory.measure_memory(call.forward, call.backward if len(call.stages) > 1 else None, self.device)
        call.clear()
        return weighed

    def _compiler(self, subject: Subject) -> Measured:
        """Return the columns about the compiler, after a call with one token less. Raises NoSpeed if it is wrong."""
        if subject.graphs is None:
            return {}
        shorter = subject.inputs.without_last()
        verdict = self._judge(subject, [subject.pass_on(shorter.clone())], shorter)
        if not verdict.passed:
            raise NoSpeed(f"{verdict.worst}, in a call with one token less", verdict)
        return subject.graphs.columns

    def _time(self, call: Call, samples: Samples, bounds: Ceilings, subject: Subject) -> _Timed:
        """Time the call. If the time is impossibly short, measure the ceilings and the time again.

        Raises NoSpeed if a sample is wrong, or if the time stays impossibly short.
        """
        reason = ""
        for repeat in range(REPEATS + 1):
            if repeat:
                bounds = self._ceilings(subject.fp8 is not None, subject.lora is not None, anew=True)
            with self.phases.of("timing_s"):
                stages, prepare, keep = call.stages, samples.prepare, samples.keep
                timed = timing.time_stages(stages, self.device, self.policy, prepare, self.ranks, keep)
                steps = samples.check()
                call.clear()
            reason = self.ranks.tell(self._impossible(timed, bounds))[0]
            if not reason:
                with self.phases.of("timing_s"):
                    graph_time_ms = self._graph_time_ms(call, samples, timed)
                    busy = self._busy(call, samples, timed)
                return _Timed(timed, graph_time_ms, busy, bounds, steps)
        raise NoSpeed(reason)

    def _impossible(self, timed: Timing, bounds: Ceilings) -> str:
        """Return why no layer can be this fast here, or an empty text.

        With a warm L2 cache, a call may find its bytes there. On a CPU, torch computes products in 16 bits so slowly
        that a layer which computes in float32 is faster.
        """
        is_limit = self.policy.cold_l2 if self.device.type == "cuda" else self.case.dtype in ("float32", "float64")
        what, limit_ms = max(bounds.limits_ms.items(), key=lambda limit: limit[1])
        if not is_limit or timed.time_ms >= IMPOSSIBLE * limit_ms:
            return ""
        return (
            f"impossibly fast: {timed.time_ms:.4g} ms, but {what} alone took {limit_ms:.4g} ms; "
            f"{REPEATS + 1} times in turn the time was less than {IMPOSSIBLE} of such a limit"
        )

    def _graph_time_ms(self, call: Call, samples: Samples, timed: Timing) -> float | None:
        """Return the milliseconds of a replay of the call in a CUDA graph. All ranks return the same.

        The result is None on a CPU, outside of the context `plain`, where memory is short, for a call that synchronises
        or cannot be captured on a rank, and for a graph with wrong results.
        """
        if (
            self.case.context != PLAIN
            or self.device.type != "cuda"
            or not samples.fits
            or any(self.ranks.tell("synchronises" in timed.flags))
        ):
            return None
        shorter = replace(self.policy, time_cap_s=GRAPH_SHARE * self.policy.time_cap_s)
        with captured(call.stages, call.clear, self.device, self.ranks) as replay:
            if replay is None:
                return None
            found = timing.time_stages([replay], self.device, shorter, samples.renew, self.ranks, samples.keep)
            try:
                samples.check()
            except NoSpeed:
                return None
            return found.time_ms

    def _busy(self, call: Call, samples: Samples, timed: Timing) -> Busy:
        """Return the GPU's own time in a call that waits for the GPU. Another call is not profiled."""
        if self.device.type != "cuda" or not self.ranks.tell("synchronises" in timed.flags)[0]:
            return Busy()
        affordable = int(BUSY_SHARE * self.policy.time_cap_s * 1e3 / timed.host_time_ms)
        num_calls = min(BUSY_CALLS, max(MIN_SAMPLES, affordable))
        found = busy_of_calls(call.stages, self.device, num_calls, self.policy.cold_l2, samples.prepare, self.ranks)
        call.clear()
        return found.within(timed.time_ms)

    def _speed(self, timed: _Timed, num_flops: float) -> Measured:
        """Return the fields of the times, and of the ceilings that they are compared with."""
        found, bounds = timed.timing, timed.bounds
        return {
            **(self.replay.columns(timed.steps, found.samples_ms, found.marked) if self.replay else {}),
            **timed.busy.columns,
            "flags": found.flags + timed.busy.flags,
            "time_ms": found.time_ms,
            "time_ms_low": found.time_ms_low,
            "time_ms_high": found.time_ms_high,
            "converged": found.converged,
            "host_time_ms": found.host_time_ms,
            "graph_time_ms": timed.graph_time_ms,
            "backward_ms": found.stage_ms[1] if len(found.stage_ms) > 1 else None,
            "skew_ms": found.skew_ms,
            "num_samples": len(found.samples_ms),
            "samples_ms": found.samples_ms,
            "sample_marked": found.marked,
            "sm_clock_mhz": found.sm_clock_mhz,
            "tokens_per_s": self.case.num_active_tokens / found.time_ms * 1e3,
            "tflops": num_flops / found.time_ms / 1e9,
            "roofline_ms": bounds.roofline_ms,
            "roofline_fraction": bounds.roofline_ms / found.time_ms,
            "dense_ms": bounds.dense_ms,
            "grouped_ms": bounds.grouped_ms,
            "collective_ms": bounds.collective_ms,
            "copy_gb_per_s": bounds.copy_gb_per_s,
        }


def _fit(num_bytes: int, device: torch.device, ranks: Ranks) -> bool:
    """Whether every rank has this much free memory. On a CPU, it is taken for granted."""
    if device.type == "cpu":
        return True
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return all(ranks.tell(num_bytes < free))
