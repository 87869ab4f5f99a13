"""Measure several plans at once: the plans' workers run side by side and take turns, job by job.

A disturbance of the machine that lasts seconds then affects all plans alike. This way of measuring is for CPUs. On a
GPU, the memory of all workers would have to fit at the same time.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moebench.machine.gpus import places
from moebench.results.files import writing_to
from moebench.results.record import Record
from moebench.run.backlog import own_backend
from moebench.run.plan import Plan
from moebench.run.runner import Outcome, Run
from moebench.run.stop import Stop
from moebench.run.supervisor import WorkerProcess
from moebench.run.workers.crew import POLL_S
from moebench.run.workers.local import LocalPlace
from moebench.workload.case import Job


def execute_in_turns(
    *rounds: Sequence[Plan], on_record: Callable[[Record], None], time_budget_s: float | None = None
) -> Outcome:
    """Measure the plans of each round side by side: for each job, the plans take turns in random order.

    The jobs run in the order that the plans have. The order must be the same in all plans of a round, but a plan may
    lack some of the jobs. Raises the errors of moebench.run.runner.execute.
    """
    plans = [plan for together in rounds for plan in together]
    run = Run(plans, Stop.after(time_budget_s), on_record, lambda environment: None)
    with run.stop.at_signals(), run.kept():
        for together in rounds:
            with writing_to(together[0].folder):
                for plan in together:
                    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
                _Turns(together, run).work()
    return run.outcome


@dataclass
class _Turns:
    """The workers of one round, one for each plan that has begun."""

    plans: Sequence[Plan]
    run: Run
    workers: dict[int, WorkerProcess] = field(default_factory=dict)  # by the number of their plan

    def work(self) -> None:
        """Measure every job in all plans that have it, then end the workers."""
        draw = random.Random(f"{self.plans[0].run_id} {self.plans[0].round}")
        jobs = dict.fromkeys(job for plan in self.plans for job in plan.jobs)
        processes = None
        try:
            for job in sorted(jobs, key=lambda job: job.case.processes):
                if job.case.processes != processes:
                    self._end_all()  # a worker has as many ranks as its jobs
                    processes = job.case.processes
                have_it = [number for number, plan in enumerate(self.plans) if job in plan.jobs]
                for number in draw.sample(have_it, len(have_it)):
                    if self.run.stop():
                        return
                    self._measure(number, job)
        finally:
            self._end_all()

    def _measure(self, number: int, job: Job) -> None:
        """Take one turn: wait until the job has its record. If the worker dies before the job begins, start another."""
        while not self.run.stop.interrupted:
            worker = self.workers.get(number)
            if worker is not None and not worker.may_take([job]):
                self.workers.pop(number).end()
                worker = None
            worker = worker or self._start(number, job)
            if not worker.unfinished:
                worker.give([job])
            self._hear(number, worker)
            is_told = not worker.unfinished
            if worker.over or (is_told and own_backend(job)):
                self.workers.pop(number).end()
            if is_told:
                return

    def _start(self, number: int, job: Job) -> WorkerProcess:
        place = places(self.plans[number].slots, job.case.processes.num_ranks)[0]
        self.workers[number] = WorkerProcess(self.plans[number], LocalPlace(place), job.case.processes)
        return self.workers[number]

    def _hear(self, number: int, worker: WorkerProcess) -> None:
        """Keep the records that the worker reported. If it reported none, wait a little."""
        plan, knew = self.plans[number], worker.environment
        rows = list(worker.watch(lambda: self.run.stop.interrupted))
        if knew is None and worker.environment is not None:
            self.run.meet(plan, worker.environment)
        for row in rows:
            self.run.keep(plan, row)
        if not rows and not worker.over:
            time.sleep(POLL_S)

    def _end_all(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()
