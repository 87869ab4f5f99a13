"""Plan -> workers -> journal. Supervises the processes in which backends run, and keeps what they measured.

No torch here: a backend that breaks its process cannot break this one.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

import moebench
from moebench.case import Job
from moebench.environment import Environment, cpu_cores_usable
from moebench.record import Journal, Record, Status, record
from moebench.spec import Policy

POLL_S = 0.02
#: A worker that has not said `ready` by then does not start: importing torch and opening a GPU take seconds.
START_TIMEOUT_S = 180.0
LOG_LINES = 12


class RunnerError(Exception):
    """A run that cannot go on: what happened, and where to look."""


class Refused(RunnerError):
    """A run that cannot begin by the user's mistake: a backend or a device that is not there, one line each."""


class Interrupted(Exception):
    """SIGINT or SIGTERM reached the supervisor."""


@dataclass(frozen=True)
class Plan:
    """What is measured in processes of its own, in which order, and where its results go.

    Of several rounds each is a plan. Where `experts_folder` is given, a folder that holds a package `experts`, workers
    import that one: this harness then drives another revision's backends.
    """

    jobs: tuple[Job, ...]
    policy: Policy
    folder: Path
    run_id: str
    device: str | None = None
    round: int = 0
    experts_folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and how many jobs it left when its time was spent or it was interrupted."""

    records: tuple[Record, ...]
    num_left: int
    interrupted: bool = False


def new_run_id(sweep: str) -> str:
    """A name for a run's folder: when it began, and of which sweep."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{sweep}"


def execute(
    *plans: Plan, on_record: Callable[[Record], None] = lambda row: None, time_budget_s: float | None = None
) -> Outcome:
    """Measure every job of the plans, one plan after the other, each record in its journal before the next job starts.

    A job whose process dies or hangs gets a record that says so, and the next jobs a new process. Ctrl-C, SIGTERM and
    the time budget, of all plans together, end the run; what was measured stays. Raises RunnerError where no worker
    starts, Refused where one says that it was asked for what is not there.
    """
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    records: list[Record] = []
    interrupted = False
    with _signals_raise():
        try:
            for plan in plans:
                _execute(plan, records, on_record, deadline)
        except Interrupted:
            interrupted = True
    return Outcome(tuple(records), sum(len(plan.jobs) for plan in plans) - len(records), interrupted)


def _execute(plan: Plan, records: list[Record], on_record: Callable[[Record], None], deadline: float | None) -> None:
    """Measure the jobs of one plan; their records are added to `records`."""
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    journal = Journal(plan.folder / "journal.jsonl")
    before = len(records)

    def keep(row: Record) -> None:
        journal.append(row)
        records.append(row)
        on_record(row)

    jobs = sorted(plan.jobs, key=lambda job: job.case.ep_size)  # a group of ranks measures all jobs of its size
    while (left := jobs[len(records) - before :]) and not _past(deadline):
        same_size = itertools.takewhile(lambda job: job.case.ep_size == left[0].case.ep_size, left)
        with _Worker(plan, tuple(same_size)) as worker:
            worker.supervise(keep, deadline)


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


class _Worker:
    """One worker process and what it was given. Leaving the context ends it, and all that it started."""

    def __init__(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self._plan, self._jobs = plan, jobs
        number = len(list((plan.folder / "logs").glob("worker-*.log")))
        self._log = plan.folder / "logs" / f"worker-{number}.log"
        self._events = plan.folder / "logs" / f"worker-{number}.events.jsonl"
        self._job_file = plan.folder / "logs" / f"worker-{number}.jobs.json"
        self._environment: Environment | None = None
        self._num_ranks = jobs[0].case.ep_size

    def __enter__(self) -> "_Worker":
        work_list = {
            "run_id": self._plan.run_id,
            "policy": self._plan.policy.model_dump(mode="json"),
            "jobs": [job.model_dump(mode="json") for job in self._jobs],
            "round": self._plan.round,
            "experts_folder": self._plan.experts_folder and str(self._plan.experts_folder.resolve()),
        }
        self._job_file.write_text(json.dumps(work_list))
        self._events.touch()
        command = [*self._launcher(), "-m", "moebench.worker"]
        command += ["--jobs", str(self._job_file), "--events", str(self._events)]
        command += ["--device", self._plan.device] if self._plan.device else []
        with self._log.open("wb") as log:
            # a session of its own: Ctrl-C reaches the supervisor alone, and a hung group is killed as a whole
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._variables(),
            )
        return self

    def _launcher(self) -> list[str]:
        """Python, or torch.distributed's launcher of as many ranks as the jobs have."""
        if self._num_ranks == 1:
            return [sys.executable]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._num_ranks}"]

    def _variables(self) -> dict[str, str]:
        """The environment, with the cores shared out among ranks, which the launcher would not do."""
        variables = dict(os.environ)
        if self._num_ranks > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores_usable() // self._num_ranks)))
        if self._plan.experts_folder is not None:
            # `python -m` would look into the working directory first, where another `experts` may be
            harness = Path(moebench.__file__).resolve().parent.parent
            folders = (self._plan.experts_folder.resolve(), harness, Path.cwd())
            paths = [*map(str, folders), variables.get("PYTHONPATH", "")]
            variables |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        return variables

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def supervise(self, keep: Callable[[Record], None], deadline: float | None) -> None:
        """Keep records until the list is done, the deadline passes, or the worker dies or hangs over a job."""
        running: int | None = None  # the job it is at
        since = time.monotonic()
        num_done = 0
        for event in self._follow():
            if event is None:
                if time.monotonic() - since <= (START_TIMEOUT_S if running is None else self._plan.policy.timeout_s):
                    continue
                if running is not None or not num_done:
                    self._hung(running, keep)
                return
            since = time.monotonic()
            match event["kind"]:
                case "ready":
                    self._meet(Environment.model_validate(event["environment"]))
                case "refused":
                    raise Refused("\n".join(event["mistakes"]))
                case "start":
                    running = event["number"]
                case "record" if event["number"] == running:  # of several ranks that fail, the first is told
                    running, num_done = None, num_done + 1
                    row = Record.model_validate_json(json.dumps(event["record"]))
                    keep(row)
                    if num_done == len(self._jobs) or _past(deadline) or self._is_broken_by(row):
                        return
        if running is not None or not num_done:  # between two jobs nobody is to blame: the next worker goes on
            self._died(running, keep)

    def _is_broken_by(self, row: Record) -> bool:
        """Ranks wait for each other: where one failed, the rest of its group is of no use."""
        return self._num_ranks > 1 and row.status in (Status.oom, Status.error)

    def _follow(self) -> Iterator[dict[str, Any] | None]:
        """Events as they come, and None whenever there is none yet, until the process has ended and all are told."""
        with self._events.open("rb") as file:
            pending = b""
            while True:
                ended = self._process.poll() is not None  # asked first, so that its last lines are still read
                pending += file.read()
                *lines, pending = pending.split(b"\n")
                yield from (json.loads(line) for line in lines)
                if ended:
                    return
                if not lines:
                    yield None
                    time.sleep(POLL_S)

    def _meet(self, environment: Environment) -> None:
        self._environment = environment
        (self._plan.folder / "environment.json").write_text(environment.to_json())

    def _died(self, running: int | None, keep: Callable[[Record], None]) -> None:
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if running is None:
            raise RunnerError(f"a worker {how} before it measured anything; {self._tail()}\nlog: {self._log}")
        keep(self._record(running, Status.crash, f"its process {how}\n{self._tail()}"))

    def _hung(self, running: int | None, keep: Callable[[Record], None]) -> None:
        self._kill()
        if running is None:
            raise RunnerError(f"a worker did not start within {START_TIMEOUT_S:g} s\nlog: {self._log}")
        limit = self._plan.policy.timeout_s
        keep(self._record(running, Status.timeout, f"no result after {limit:g} s (policy timeout_s); killed"))

    def _record(self, running: int, status: Status, detail: str) -> Record:
        environment = self._environment
        assert environment is not None, "a job starts after the worker has said what it runs on"
        gpu = environment.gpus[0].name if environment.gpus else None
        device = environment.device.partition(":")[0]
        ids: dict[str, Any] = {"run_id": self._plan.run_id, "env_id": environment.env_id, "round": self._plan.round}
        return record(self._jobs[running], status, detail=detail, device=device, gpu=gpu, **ids)

    def _tail(self) -> str:
        """The log's last lines; where Python died with a stack, its first: the most recent call leads."""
        lines = self._log.read_text(errors="replace").splitlines()
        deaths = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
        return "\n".join(lines[deaths[-1] :][:LOG_LINES] if deaths else lines[-LOG_LINES:])

    def _kill(self) -> None:
        with suppress(psutil.NoSuchProcess):  # a launcher's ranks are in sessions of their own
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):  # the group outlives a leader that died and left children
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, so that workers are ended and results written."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
