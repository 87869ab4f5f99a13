"""Store and find baselines: results that a gate compares new results with.

Each machine with its software has one baseline, in one folder. The name of a baseline has the name of the GPU (or of
the CPU) and a fingerprint. The fingerprint covers everything that must be equal before times may be compared
(`Environment.comparable`). A gate finds the baseline of a candidate by the fingerprint.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import ResultsError
from moebench.machine.comparability import facts
from moebench.machine.environment import Environment
from moebench.names import as_name
from moebench.results.folder import Result, open_result
from moebench.results.merge import as_sessions, replaced, save
from moebench.verdicts.findings import rounds_of, sessions_of
from moebench.workload.case import key_of

BASELINES = Path("results") / "published" / "baselines"


@dataclass(frozen=True)
class Baseline:
    """A stored baseline: its folder, and the results in the folder."""

    path: Path
    result: Result
    replaced: tuple[str, ...] = ()  # what the update that made this baseline replaced, in words

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def environment(self) -> Environment:
        (environment,) = self.result.environments.values()
        return environment

    @property
    def rounds(self) -> tuple[int, int]:
        """The smallest and the largest number of rounds of the jobs that have a time."""
        counts = [len(rounds_of(row)) for row in self.result.frame.to_dict("records") if rounds_of(row)]
        return min(counts, default=0), max(counts, default=0)

    def as_dict(self) -> dict[str, Any]:
        """Return facts for a table or JSON: jobs, rounds and runs of the baseline, its machine and its software."""
        frame, (least, most) = self.result.frame, self.rounds
        runs = {run for some in frame["run_id"] for run in some.split(" | ")}
        return {
            "name": self.name,
            "jobs": len(frame),
            "rounds": str(least) if least == most else f"{least} to {most}",
            "sessions": max(len(set(sessions_of(row).values())) for row in frame.to_dict("records")),
            "runs": ", ".join(sorted(runs)),
            "revision": self.environment.git_revision,
            **{what: text for what, text in facts(self.environment).items() if text not in ("none", "any")},
        }


def name_of(environment: Environment) -> str:
    """Return the name of an environment's baseline: `nvidia-h200-e4e1d3dc1b02`. The number of GPUs does not count."""
    names = sorted({gpu.name for gpu in environment.gpus})
    machine = "-".join(names) if names else environment.cpu_model
    return f"{as_name(machine) or 'unknown'}-{environment.env_id}"


def stored(root: Path = BASELINES) -> list[Baseline]:
    """Return all stored baselines, sorted by name. Raises ResultsError if a folder in `root` is not a baseline."""
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    return [_opened(folder) for folder in folders]


def _opened(folder: Path) -> Baseline:
    result = open_result(folder)
    if len(result.environments) != 1:
        raise ResultsError(
            f"{folder}: the folder has {len(result.environments)} environments, but a baseline has one; "
            "make it again with `moebench baseline update`"
        )
    return Baseline(folder, result)


def update(path: Path | Sequence[Path], root: Path = BASELINES, *, add: bool = False) -> Baseline:
    """Take runs into the baseline of their machine and software, and return the baseline.

    Rows of the runs replace stored rows of the same jobs, also if the stored rows are newer: the user named the runs.
    If `path` has several runs, each is a session of its own. With `add`, the stored rounds stay, and the runs are
    further sessions. Raises ResultsError if the results come from several environments, if no file beside the results
    describes their environment, or if a run is given twice.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    parts = [_of_one_environment(some) for some in paths]
    new = as_sessions(parts) if len(parts) > 1 else parts[0]
    if len(new.environments) > 1:
        raise ResultsError(
            f"{' and '.join(map(str, paths))}: the runs are of the environments {', '.join(sorted(new.environments))}; "
            "a baseline has one; give runs of one machine and software"
        )
    (environment,) = new.environments.values()
    folder = root / name_of(environment)
    if not folder.exists():
        return _saved(new, folder)
    old = _opened(folder).result
    if add:
        return _saved(as_sessions([old, new]), folder)
    return _saved(replaced(old, new), folder, _replaced(old, new))


def _of_one_environment(path: Path) -> Result:
    new = open_result(path)
    ids = sorted(set(new.frame["env_id"]))
    if len(ids) != 1 or ids[0] not in new.environments:
        raise ResultsError(
            f"{path}: the rows are of the environments {', '.join(ids)}, the files beside them describe "
            f"{', '.join(sorted(new.environments)) or 'none'}; a baseline needs one environment and its file; "
            "give a run's folder"
        )
    return Result(new.frame, {ids[0]: new.environments[ids[0]]})


def _replaced(old: Result, new: Result) -> tuple[str, ...]:
    """Return in words which stored jobs the new rows replace, one text per stored run."""
    keys = set(map(key_of, new.frame.to_dict("records")))
    runs = Counter(row["run_id"] for row in old.frame.to_dict("records") if key_of(row) in keys)
    by = ", ".join(sorted(set(new.frame["run_id"])))
    return tuple(f"{count} jobs of run {run} by run {by}" for run, count in sorted(runs.items()))


def _saved(result: Result, folder: Path, changes: tuple[str, ...] = ()) -> Baseline:
    save(result, folder)
    return Baseline(folder, result, changes)


def matching(candidate: Result, root: Path = BASELINES) -> Baseline:
    """Return the baseline of the candidate's machine and software. Raises ResultsError if none is stored."""
    ids = sorted(set(candidate.frame["env_id"]))
    there = stored(root)
    found = [baseline for baseline in there if baseline.environment.env_id in ids]
    if not found:
        names = ", ".join(baseline.name for baseline in there) or "none"
        raise ResultsError(
            f"no baseline of this machine and software ({', '.join(ids)}) in {root}; there are {names}; "
            "store one with `moebench baseline update DIR`, or name one as baseline:NAME"
        )
    return found[0]


def named(name: str, root: Path = BASELINES) -> Baseline:
    """Return the baseline with that name. Raises ResultsError if no baseline has the name."""
    there = {baseline.name: baseline for baseline in stored(root)}
    if name not in there:
        raise ResultsError(f"baseline:{name}: no such baseline in {root}; there are {', '.join(there) or 'none'}")
    return there[name]
