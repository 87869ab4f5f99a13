"""Run the jobs of plans in worker processes, and append each record to the journal.

Backends run in worker processes, on this machine or on the nodes of a cluster, so a backend that breaks its process
cannot break this one. Only this process writes the journal.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from moebench.errors import Refused, RunnerError
from moebench.machine.environment import Environment
from moebench.results.files import (
    ENVIRONMENT_NAME,
    ENVIRONMENTS_NAME,
    content_of,
    write_again,
    write_atomically,
    writing_to,
)
from moebench.results.journal import JOURNAL_NAME, Journal
from moebench.results.record import Record
from moebench.run.plan import Plan, new_run_id
from moebench.run.stop import Stop
from moebench.run.workers.crew import Crew
from moebench.run.workers.group import Site
from moebench.run.workers.local import Here

__all__ = ["Outcome", "Plan", "Refused", "RunnerError", "execute", "new_run_id", "writing_to"]


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and how many jobs it left because its time budget ran out or a signal interrupted it.

    `notes` say which GPUs the run stopped using, and why.
    """

    records: tuple[Record, ...]
    num_left: int
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def execute(
    *plans: Plan,
    on_record: Callable[[Record], None] = lambda row: None,
    on_environment: Callable[[Environment], None] = lambda environment: None,
    time_budget_s: float | None = None,
    site: Site | None = None,
    earlier: Sequence[Record] = (),
) -> Outcome:
    """Measure every job of the plans, one plan after the other, on this machine or on the `site`.

    Each record is in its plan's journal before `on_record` gets it. A job whose process dies or hangs gets a record
    that says so, and a new process measures the next jobs. Ctrl-C, SIGTERM and SIGHUP end the run at once. When the
    time budget (of all plans together) is spent, the run ends after the jobs that are running. The records of measured
    jobs stay in the journal. `on_environment` gets the environment of each worker before the worker gets a job.
    `earlier` are the records that the run already has.

    Raises RunnerError where no worker starts, the disk is full, or the cluster is gone. Raises Refused where a worker
    reports that a requested backend or device is not there.
    """
    run = Run(plans, Stop.after(time_budget_s), on_record, on_environment)
    run.begun |= {row.case_id: row.env_id for row in reversed(earlier)}
    with run.stop.at_signals(), run.kept():
        for plan in plans:
            with writing_to(plan.folder):
                (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
                for processes in sorted({job.case.processes for job in plan.jobs}):
                    Crew(plan, processes, run, site or Here(plan.slots)).work()
    run.notes += [] if site is None else site.notes
    return run.outcome


@dataclass
class Run:
    """What the plans have measured so far, and whether the run should end."""

    plans: Sequence[Plan]
    stop: "Stop"
    on_record: Callable[[Record], None]
    on_environment: Callable[[Environment], None]
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    journals: dict[Path, Journal] = field(default_factory=dict)  # by their folder
    environments: dict[Path, bytes] = field(default_factory=dict)  # the content of each file
    begun: dict[str, str] = field(default_factory=dict)  # case_id -> env_id of its first record

    def keep(self, plan: Plan, row: Record) -> None:
        """Write the record to the plan's journal, and only then pass it on."""
        journal = self.journals.get(plan.folder) or Journal(plan.folder / JOURNAL_NAME)
        self.journals[plan.folder] = journal
        journal.append(row)
        self.records.append(row)
        self.begun.setdefault(row.case_id, row.env_id)
        self.on_record(row)

    def meet(self, plan: Plan, environment: Environment) -> None:
        """Check the environment of a new worker with `on_environment`, and write it to the plan's folder.

        The check comes before the worker measures anything.
        """
        self._keep_environments()
        self.on_environment(environment)
        file = _file_of(environment, plan.folder)
        content = content_of(file)
        if content is None:
            content = environment.to_json().encode()
            file.parent.mkdir(exist_ok=True)
            write = write_again if os.path.lexists(file) else write_atomically
            write(file, content)
        self.environments.setdefault(file, content)

    def _keep_environments(self) -> None:
        for file, content in self.environments.items():
            if content_of(file) != content:
                self.notes.append(f"{file}: another process changed or removed it; moebench wrote it again")
                write_again(file, content)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """At the end of the block, write again what another process changed or removed of the run's results."""
        try:
            yield
        except BaseException:  # the error of the run is the one to tell
            with suppress(RunnerError):
                self._keep_all()
            raise
        self._keep_all()

    def _keep_all(self) -> None:
        for journal in self.journals.values():
            journal.keep()
            if journal.num_restored:
                self.notes.append(
                    f"{journal.path}: another process changed or removed it {journal.num_restored} times during the "
                    "run; moebench wrote it again, and no row is lost"
                )
        self._keep_environments()

    @property
    def outcome(self) -> Outcome:
        num_left = sum(len(plan.jobs) for plan in self.plans) - len(self.records)
        return Outcome(tuple(self.records), num_left, self.stop.interrupted, tuple(self.notes))


def _file_of(environment: Environment, folder: Path) -> Path:
    """Return the folder's file for an environment.

    The run's own environment has the file ENVIRONMENT_NAME. A run that was resumed by force may have further
    environments, which have files in ENVIRONMENTS_NAME.
    """
    first = folder / ENVIRONMENT_NAME
    was = Environment.from_file(first) if first.exists() else environment
    if was.env_id != environment.env_id:
        return folder / ENVIRONMENTS_NAME / f"{environment.env_id}.json"
    if was.code != environment.code:  # times may be compared, but other code ran
        return folder / ENVIRONMENTS_NAME / f"{environment.env_id}-{environment.code_name}.json"
    return first
