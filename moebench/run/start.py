"""Start a planned run, and write its sweep, run.json and results into its folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from moebench.errors import Refused, UsageError
from moebench.machine.environment import Environment
from moebench.results.files import write_again, write_atomically, writing_to
from moebench.results.journal import JOURNAL_NAME, Journal
from moebench.results.record import Record
from moebench.run.lock import check_new, locked
from moebench.run.request import RunPlan
from moebench.run.runfile import RUN_NAME, SWEEP_NAME, environment_changes
from moebench.run.runner import Outcome, execute
from moebench.run.workers.group import Site
from moebench.run.workers.ray import ray_cluster
from moebench.run.workers.slurm import slurm_cluster


def start_run(run_plan: RunPlan, on_record: Callable[[Record], None]) -> Outcome:
    """Run the plan and write its results into its folder. The outcome includes the folder's earlier records.

    A new run that is refused leaves no folder, so that the corrected command can use the same name. Raises UsageError
    if another process writes into the folder, and the errors of moebench.run.runner.execute.
    """
    folder = run_plan.folder
    with writing_to(folder), locked(folder):
        _check_unchanged(run_plan)
        write_atomically(folder / SWEEP_NAME, run_plan.sweep_text)
        run_plan.run.write(folder)

        def check(environment: Environment) -> None:
            changes = environment_changes(folder, environment) if run_plan.is_resumed else []
            if changes and not run_plan.force:
                raise Refused(
                    f"--resume {folder}: the environment has changed: {'; '.join(changes)}; --force resumes anyway"
                )

        try:
            with _site(run_plan) as site:
                outcome = execute(
                    *run_plan.rounds,
                    on_record=on_record,
                    on_environment=check,
                    time_budget_s=run_plan.time_budget_s,
                    site=site,
                    earlier=run_plan.earlier,
                )
            write_again(folder / SWEEP_NAME, run_plan.sweep_text)  # a backend may have changed or removed the files
            write_again(folder / RUN_NAME, run_plan.run.content)
        except Refused:
            if not (run_plan.is_resumed or (folder / JOURNAL_NAME).exists()):
                _remove(folder)
            raise
    return replace(outcome, records=(*run_plan.earlier, *outcome.records))


@contextmanager
def _site(run_plan: RunPlan) -> Iterator[Site | None]:
    """Yield the cluster that runs the workers, and end at the end what was started there; None for this machine."""
    device, logs = run_plan.run.asked.device, run_plan.folder / "logs"
    if run_plan.ray is not None:
        cluster = ray_cluster(run_plan.ray, device, logs)
    elif run_plan.slurm:
        cluster = slurm_cluster(device, logs)
    else:
        yield None
        return
    try:
        yield cluster
    finally:
        cluster.end()


def _check_unchanged(run_plan: RunPlan) -> None:
    """Raise UsageError where another run wrote into the folder between this run's planning and its lock."""
    folder = run_plan.folder
    if not run_plan.is_resumed:
        check_new(folder)
    elif len(list(Journal(folder / JOURNAL_NAME))) != len(run_plan.earlier):
        raise UsageError(f"{folder}: another process resumed the run in the meantime; give the command again")


def _remove(folder: Path) -> None:
    """Remove a folder that was empty or absent before this run."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # a link to a folder stays, and so does the working folder
        folder.rmdir()
