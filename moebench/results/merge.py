"""Merge several results folders into one."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine.comparability import differences
from moebench.machine.environment import Environment
from moebench.results.files import (
    ENVIRONMENT_NAME,
    ENVIRONMENTS_NAME,
    all_or_nothing,
    check_empty,
    writable,
    write_atomically,
)
from moebench.results.folder import Result, open_result
from moebench.results.frame import to_frame, to_records, write
from moebench.results.record import Record
from moebench.results.rounds import merged_sessions
from moebench.workload.case import KEY, JobKey, key_of

_KEY = list(KEY)


def merged(results: Sequence[Result], names: Sequence[str], *, newest: bool) -> Result:
    """Return one result that has the rows and the environments of all results. `names` are for the error message.

    If several results have the same job, `newest` decides. If it is true, the job keeps the row of the run that began
    last; if the run ids are equal, the row of the last of `results`. If it is false, this raises ResultsError.
    """
    frames = [result.frame.assign(result=name) for result, name in zip(results, names, strict=True)]
    rows = pd.concat(frames, ignore_index=True)
    twice = rows[rows.duplicated(_KEY, keep=False)]
    if len(twice) and not newest:
        jobs, first = twice.drop_duplicates(_KEY), key_of(twice.iloc[0].to_dict())
        holders = twice.loc[(twice[_KEY] == twice.iloc[0][_KEY]).all(axis=1), "result"]
        raise ResultsError(
            f"{len(jobs)} jobs stand in several results, for example {first.backend!r} on {first.case_id} in "
            f"{' and '.join(holders)}; a merged result has each job once; --newest takes the row measured last, "
            "--sessions keeps the rounds of all"
        )
    last = rows.sort_values("run_id", kind="stable").drop_duplicates(_KEY, keep="last")
    return Result(last.sort_index().drop(columns="result").reset_index(drop=True), _environments(results))


def replaced(old: Result, new: Result) -> Result:
    """Return a result with the rows of `new`, and the rows of `old` for jobs that `new` does not have."""
    both = pd.concat([old.frame, new.frame], ignore_index=True).drop_duplicates(_KEY, keep="last")
    return Result(both.reset_index(drop=True), _environments([old, new]))


def as_sessions(results: Sequence[Result]) -> Result:
    """Return one result in which each job has the rounds of all results. Each result is a session of its own.

    Raises ResultsError if a job has rows of several environments or schemas, or twice those of one run.
    """
    rows: dict[JobKey, list[Record]] = {}
    for row in (row for result in results for row in to_records(result.frame)):
        rows.setdefault(row.key, []).append(row)
    together = [some[0] if len(some) == 1 else merged_sessions(some) for some in rows.values()]
    return Result(to_frame(together), _environments(results))


def _environments(results: Sequence[Result]) -> dict[str, Environment]:
    """Return the environments of all results by `env_id`. Raises ResultsError if two of one id are not the same."""
    found: dict[str, Environment] = {}
    for env_id, some in (item for result in results for item in result.environments.items()):
        others = differences(found.get(env_id, some), some)
        if others:
            raise ResultsError(
                f"env_id {env_id}: two results give this id to different environments ({others[0]}), but an id stands "
                "for one; a file was edited or copied: measure again"
            )
        found[env_id] = some
    return found


def save(result: Result, folder: Path) -> list[Path]:
    """Write results.parquet, results.csv and the environments into `folder`. Return the paths.

    One environment goes into environment.json, several into environments/ID.json. Raises UsageError if a file cannot be
    written; the folder is then left empty or absent if it was so before.
    """
    with writable(folder), all_or_nothing(folder):
        written = write(result.frame, folder)
        several = len(result.environments) > 1
        for env_id, environment in sorted(result.environments.items()):
            path = folder / ENVIRONMENTS_NAME / f"{env_id}.json" if several else folder / ENVIRONMENT_NAME
            written.append(_write_environment(environment, path))
    return written


def _write_environment(environment: Environment, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, environment.to_json().encode())
    return path


def merge(paths: Sequence[Path], out: Path, *, newest: bool = False, sessions: bool = False) -> list[Path]:
    """Merge results into the folder `out`, which is new or empty. Return the paths of the written files.

    If several results have the same job, `sessions` keeps the rounds of all, and `newest` the row of the newest.

    The file run.json in `out` lists the merged results. Raises UsageError if `out` is a file or a folder that is not
    empty. Raises ResultsError if results cannot be opened, or if two results have the same job and `newest` is false.
    """
    with writable(out):
        check_empty(out)
    results = [open_result(path) for path in paths]
    result = as_sessions(results) if sessions else merged(results, [str(path) for path in paths], newest=newest)
    sources = [
        {"path": str(path), "run_ids": sorted(set(some.frame["run_id"])), "num_jobs": len(some.frame)}
        for path, some in zip(paths, results, strict=True)
    ]
    with writable(out), all_or_nothing(out):
        written = save(result, out)
        write_atomically(out / "run.json", (json.dumps({"merged": sources}, indent=2) + "\n").encode())
    return [*written, out / "run.json"]
