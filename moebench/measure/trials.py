"""Try a backend as a job of `moebench parity` asks: play one trial, or search for a trial that fails.

A trial that fails is shrunk here, because the process that met the fault can meet it again.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from experts import Unsupported
from moebench.measure.cache import Workload
from moebench.measure.context.layer import NO_MAIN_GRADS, adds_to_main_grads
from moebench.measure.protocol import told
from moebench.measure.subject import Measured, reason_of
from moebench.parity.adapters import lora_of
from moebench.parity.checks import SEARCH, Search, command
from moebench.parity.judge import TensorError, Unfit
from moebench.parity.play.listing import listing
from moebench.parity.play.play import Play, most_tokens
from moebench.parity.play.player import Stage
from moebench.parity.space.trial import AXES, RANK_AXES, Trial
from moebench.results.record import Status
from moebench.workload.backends import reserves_rows
from moebench.workload.case import DTYPES, Job
from moebench.workload.driven import get_backend
from moebench.workload.inputs import moe_config
from moebench.workload.ranks import Ranks

#: Sizes of rows that every engine takes are multiples of this many elements.
ALIGNED = 16


@dataclass(frozen=True)
class Failure:
    """A trial that failed, as it was played, and why: the worst error of any rank, or the error that it raised."""

    trial: Trial
    play: Play
    worst: TensorError | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """One line that says what is wrong."""
        if self.worst is not None:
            return str(self.worst)
        return f"{type(self.error).__name__}: {told(self.error)}".splitlines()[0]


@dataclass
class Tried:
    """What the trials of a job showed so far."""

    num_ok: int = 0
    num_unfit: int = 0
    unsupported: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    worst_tensor: str = "output"
    deterministic: bool | None = None


class Trier:
    """A backend that is tried on this process's device, with the job's dispatcher where there are several ranks."""

    def __init__(self, job: Job, workload: Workload) -> None:
        self.job = job
        self.backend, self.workload, self.ranks = get_backend(job.backend), workload, workload.ranks
        self.dispatcher = None if self.ranks.mesh is None else job.dispatcher
        self.tried = Tried()
        self._alone: DeviceMesh | None = None

    def first_failure(self, trials: Iterable[Trial]) -> Failure | None:
        """Play the trials until one fails; return None if none does."""
        for trial in trials:
            failure = self.play(trial)
            if failure is not None:
                return failure
        return None

    def play(self, trial: Trial) -> Failure | None:
        """Play a trial, or the nearest one that the backend supports. Return the failure, or None."""
        play = None
        try:
            trial = self.supported(trial)
            self.workload.tell(trial.text)
            play = Play(trial, self._stage(trial))
            verdict = play.run()
        except Unfit:
            self.tried.num_unfit += 1
            return None
        except Unsupported as reason:
            words = reason_of(reason)
            self.tried.unsupported[words] = self.tried.unsupported.get(words, 0) + 1
            return None
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the job's status is oom, which is no fault of the backend
        except Exception as error:
            if play is None or self.ranks.size > 1:  # other ranks wait for this one: only a new group can go on
                error.add_note(command(self.job, trial.text))
                raise
            return Failure(trial, play, error=error)
        worsts = self.ranks.tell(verdict.worst)
        worst = max(worsts, key=lambda one: one.over_budget)
        if worst.over_budget > 1:
            return Failure(trial, play, worst)
        self._keep(play, worst.over_budget, worst.tensor)
        return None

    def _keep(self, play: Play, worst: float, tensor: str) -> None:
        tried = self.tried
        tried.num_ok += 1
        if worst >= tried.worst:
            tried.worst, tried.worst_tensor = worst, tensor
        if play.deterministic is not None:
            tried.deterministic = play.deterministic and tried.deterministic is not False

    def supported(self, trial: Trial) -> Trial:
        """Return the trial with dimensions and dtypes that the backend takes. Raises Unsupported if it takes none."""
        reason: Unsupported | None = None
        for candidate in _candidates(trial):
            config = moe_config(candidate.case)
            problem = self.backend.unsupported(self.workload.device, config, self.dispatcher)
            if problem is None and candidate.params != candidate.dtype:
                own = config.with_dtype(getattr(torch, candidate.params))
                if self.backend.unsupported(self.workload.device, own, self.dispatcher) is not None:
                    return replace(candidate, param_dtype="same")
            if problem is None:
                return candidate
            reason = reason or problem
        assert reason is not None
        raise reason

    def _stage(self, trial: Trial) -> Stage:
        ranks = self.ranks
        if ranks.mesh is not None and trial.group == "alone":
            ranks = Ranks(0, 1, self._mesh_alone())
        device = self.workload.device
        lora = lora_of(self.backend)
        return Stage(lambda one: self._build(one, ranks), device, self.backend.fp8, lora, ranks, self.ranks.rank)

    def _mesh_alone(self) -> DeviceMesh:
        """Return a mesh in which each rank is a group of its own."""
        if self._alone is None:
            shape = (self.ranks.size, 1)
            self._alone = init_device_mesh(self.workload.device.type, shape, mesh_dim_names=("dp", "ep"))["ep"]
        return self._alone

    def _build(self, trial: Trial, ranks: Ranks) -> nn.Module:
        config = moe_config(trial.case).with_dtype(getattr(torch, trial.params))
        with self.workload.device:
            # a dispatcher that reserves rows would take their number from the first call, and later calls may have more
            room = {"max_tokens_per_rank": most_tokens(trial)} if reserves_rows(self.dispatcher or "") else {}
            layer = self.backend.build(config, self.dispatcher, **room)
        if adds_to_main_grads(layer):
            raise Unsupported(NO_MAIN_GRADS)
        layer.to(self.workload.device)
        if ranks.mesh is not None:
            spread: Callable[[DeviceMesh], None] = layer.init_token_dispatcher  # type: ignore[assignment]
            spread(ranks.mesh)
        return layer


def _candidates(trial: Trial) -> Iterable[Trial]:
    """Yield the trial, then the nearest ones in dimensions and dtypes."""
    up = {name: -(-getattr(trial, name) // ALIGNED) * ALIGNED for name in ("dim", "moe_inter_dim")}
    for dtype in (trial.dtype, *(name for name in ("bfloat16", *DTYPES) if name != trial.dtype)):
        scale = min(trial.x_scale, 4.0) if dtype == "float16" else trial.x_scale  # float16 overflows
        own = replace(trial, dtype=dtype, x_scale=scale)
        yield own
        yield replace(own, **up)


def examine(job: Job, workload: Workload) -> Measured:
    """Do what a job of `moebench parity` asks, and return the measured fields of its record.

    Raises Unsupported if the backend can run none of its trials here.
    """
    assert job.check is not None
    trier = Trier(job, workload)
    if job.check.startswith(SEARCH):
        search = Search.parse(job.check)
        failure = trier.first_failure(_for_seconds(search, workload.ranks))
    else:
        failure = trier.first_failure([Trial.parse(job.check)])
    if failure is not None:
        return _failed(job, trier, failure)
    tried = trier.tried
    if not tried.num_ok:
        unfit = "no backend can be judged on it: its values overflow in its dtype"
        raise Unsupported(next(iter(tried.unsupported), unfit))
    refused = sum(tried.unsupported.values())
    return {
        "status": Status.ok,
        "parity_worst": tried.worst,
        "parity_worst_tensor": tried.worst_tensor,
        "deterministic": tried.deterministic,
        "detail": f"{tried.num_ok} cases; {tried.num_unfit} overflow, {refused} are unsupported",
    }


def _for_seconds(search: Search, ranks: Ranks) -> Iterator[Trial]:
    """Yield the search's trials until its time is spent. The first rank draws them, and looks at the clock, for all."""
    from moebench.parity.space.search import drawn  # imports hypothesis, which a worker that measures does not need

    started = time.monotonic()
    trials = drawn(search.axes, search.seed) if ranks.rank == 0 else iter(())
    while True:
        is_over = time.monotonic() - started >= search.seconds
        trial = ranks.tell(None if is_over else next(trials, None))[0]
        if trial is None:
            return
        yield trial


def _smallest(failing: Trial, fails: Callable[[Trial], bool], ranks: Ranks) -> Trial:
    """Return the smallest trial that fails. The first rank chooses what is tried, and all ranks try it.

    Hypothesis does not choose the same trials in every process.
    """
    from moebench.parity.space.search import SHRINK_S, smallest

    # the number of ranks stays: this group of processes has it
    axes = {**AXES, **(RANK_AXES if ranks.size > 1 else {}), "ep_size": (failing.ep_size,)}
    started = time.monotonic()

    def lead(trial: Trial) -> bool:
        ranks.tell(trial)
        return fails(trial)

    if ranks.rank == 0:
        shrunk = smallest(failing, lead, lambda: time.monotonic() - started > SHRINK_S, axes)
        ranks.tell(None)
        return ranks.tell(shrunk)[0]
    while (trial := ranks.tell(None)[0]) is not None:
        fails(trial)
    return ranks.tell(failing)[0]


def _has_nan(failure: Failure) -> bool:
    """Whether a tensor that is wrong has NaN."""
    compared = failure.play.failed
    return compared is not None and any(
        tensor.is_floating_point() and bool(tensor.isnan().any()) for one in compared.tensors for tensor in one.values()
    )


def _failed(job: Job, trier: Trier, failure: Failure) -> Measured:
    """Return the fields for a failure, with the smallest trial that fails, its command and its lines of Python."""
    failures = {failure.trial: failure}

    def fails(trial: Trial) -> bool:
        found = trier.play(trial)
        if found is not None:
            failures[found.trial] = failures[trial] = found
        return found is not None

    shrunk = _smallest(failure.trial, fails, trier.ranks)
    smaller = failures[shrunk]
    if trier.dispatcher is None and not _has_nan(smaller):
        filled = trier.play(replace(smaller.trial, memory="poisoned"))
        if filled is not None and _has_nan(filled):  # memory that nobody wrote has other values in each process
            smaller = filled
    lines = [smaller.reason, command(job, smaller.trial.text)]
    if trier.dispatcher is None:
        lines += listing(job.backend, smaller.play)
    detail = "\n".join(lines)
    if smaller.worst is None:
        return {"status": Status.error, "detail": detail}
    return {
        "status": Status.mismatch,
        "detail": detail,
        "parity_worst": smaller.worst.over_budget,
        "parity_worst_tensor": smaller.worst.tensor,
    }
