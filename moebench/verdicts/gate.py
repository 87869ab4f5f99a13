"""Compare two results, and give a verdict on the time, the memory and the parity of every job.

A job whose call waits for the GPU also has a verdict on the GPU's own time (`busy_ms`). moebench.verdicts.times gives
the verdicts on the times of all jobs together, on `time_ms` and on `busy_ms` in one family of tests.
moebench.verdicts.findings gives the verdicts on the memory and the parity of each job. docs/gating.md is the user's
reference.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pandas as pd

from moebench.errors import EXIT_FAILED, EXIT_OK, EXIT_UNDECIDED, ResultsError
from moebench.machine.comparability import Difference, clock_difference
from moebench.results.folder import once_for_each_row, rows_of, without_samples
from moebench.results.labels import CASE_ORDER, backend_labels, describe, machine
from moebench.results.stats import THRESHOLD
from moebench.verdicts import findings, times
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.findings import BY_ROUND, Finding, Pair, Row, clock_mhz, is_null, sessions_of
from moebench.verdicts.times import Sides, TimeVerdict
from moebench.verdicts.verdict import Severity, Verdict
from moebench.workload.case import KEY, JobKey, key_of

#: The functions that return the median of each round of a row, by measure.
Medians = Mapping[str, Callable[[Row], dict[int, float]]]


@dataclass(frozen=True)
class Judged:
    """The verdict on a job, and its evidence.

    `time` and `busy` are None if the times, or the GPU's own times, were not compared. `baseline` and `candidate` are
    the rows of the job; a row is None if that result does not have the job.
    """

    key: JobKey
    case: str  # in words, the settings that distinguish the case from the other cases
    backend: str  # with its dispatcher, as in every table and plot
    findings: tuple[Finding, ...]
    time: TimeVerdict | None
    busy: TimeVerdict | None
    baseline: Row | None
    candidate: Row | None

    @cached_property
    def verdict(self) -> Verdict:
        """The worst verdict of all findings."""
        return min((finding.verdict for finding in self.findings), key=lambda verdict: verdict.rank)

    def finding(self, measure: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.measure == measure), None)

    def cells(self, column: str) -> tuple[Any, Any]:
        """Return the value of a column in the baseline and in the candidate. A value that was not measured is None."""
        values = [None if row is None else row[column] for row in (self.baseline, self.candidate)]
        one, two = (None if is_null(value) else value for value in values)
        return one, two


@dataclass(frozen=True)
class SelfComparison:
    """The gate's rules applied to two sides between which nothing changed, so that every alarm is false."""

    name: str
    num_compared: int  # the number of jobs that were compared
    num_alarms: int  # the number of compared jobs with the verdict REGRESSED or IMPROVED
    num_below: int  # the number of compared jobs with a p-value below 5%; by chance, at most 10% of the jobs

    def __str__(self) -> str:
        if not self.num_compared:
            return f"{self.name}: too few rounds to judge"
        share = self.num_below / self.num_compared
        return (
            f"{self.name}: {self.num_alarms} false alarms in {self.num_compared} jobs; "
            f"p < 5% either way in {share:.1%} of them (by chance 10% or less)"
        )


@dataclass(frozen=True)
class GateResult:
    """All verdicts of a gate, with the settings and self-comparisons that show how far to trust the verdicts."""

    jobs: tuple[Judged, ...]
    threshold: float
    false_alarms: float
    self_comparisons: tuple[SelfComparison, ...] = ()
    differences: tuple[Difference, ...] = ()  # between the environments, including the allowed ones
    title: str = ""  # the settings that all cases share, and where and when the two results were measured
    notes: tuple[str, ...] = ()  # what the verdicts do not cover

    @property
    def compared_nothing(self) -> bool:
        """Whether no job has times that were compared. Such a gate says nothing about the candidate's speed."""
        return not any(job.time is not None for job in self.jobs)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many jobs have each verdict, the worst first."""
        found = [job.verdict for job in self.jobs]
        return {verdict: found.count(verdict) for verdict in Verdict if verdict in found}

    @property
    def exit_code(self) -> int:
        """1 if a verdict is REGRESSED or MISSING, else 3 if a verdict is undecided or nothing was compared, else 0."""
        severities = {verdict.severity for verdict in self.counts}
        if Severity.FAILED in severities:
            return EXIT_FAILED
        return EXIT_UNDECIDED if Severity.UNDECIDED in severities or self.compared_nothing else EXIT_OK


def gate(
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    comparability: Comparability,
    *,
    threshold: float = THRESHOLD,
    false_alarms: float = times.FALSE_ALARMS,
    wrong_passes: float = times.WRONG_PASSES,
    self_comparisons: Sequence[SelfComparison] | None = None,
    block_of: Callable[[int], int] | None = None,
) -> GateResult:
    """Return the verdict on every job of two results. `moebench.results.frame.load` opens the frames.

    `threshold` is the smallest slowdown that must not pass, as a share. `false_alarms` and `wrong_passes` are explained
    in moebench.verdicts.times. By default, `self_comparisons` compare the earlier rounds of each result with its later
    rounds. Pass `block_of` if rounds of both results were measured together in blocks: it gets the number of a round
    and returns the round's block. Raises ResultsError if the results have no job in common.
    """
    rows = {"baseline": rows_of(baseline, samples=True), "candidate": rows_of(candidate, samples=True)}
    baseline, candidate = without_samples(baseline), without_samples(candidate)
    before, after = _by_key(baseline, rows["baseline"]), _by_key(candidate, rows["candidate"])
    medians = {measure: once_for_each_row(rounds_of) for measure, rounds_of in BY_ROUND.items()}
    pairs = _pairs(before, after, comparability, together=block_of is not None)
    judged = times.judge_times(_family(pairs, block_of, medians), threshold, false_alarms, wrong_passes)
    time, busy = ({key: judged.get((measure, key)) for key in before | after} for measure in ("time", "busy"))
    found = {key: findings.of_baseline_alone() for key in before}
    found |= {key: findings.of_candidate_alone(row) for key, row in after.items()}
    found |= {key: findings.of_pair(pair, time[key], busy[key]) for key, pair in pairs.items()}
    names = _names(baseline, candidate)
    if self_comparisons is None:
        self_comparisons = [
            some
            for side, of_side in rows.items()
            for some in halves(f"{side}, earlier against later rounds", of_side, threshold, false_alarms, medians)
        ]
    return GateResult(
        tuple(
            Judged(key, *names[key], found[key], time[key], busy[key], before.get(key), after.get(key)) for key in found
        ),
        threshold,
        false_alarms,
        tuple(self_comparisons),
        tuple(dict.fromkeys(difference for pair in pairs.values() for difference in pair.differences)),
        _title(baseline, candidate),
        tuple(_notes([some for some in time.values() if some is not None])),
    )


def _by_key(frame: pd.DataFrame, rows: Sequence[Row]) -> dict[JobKey, Row]:
    """Return the rows in the order of cases. `frame` has the same rows as `rows`, in the same order."""
    order = frame.reset_index(drop=True).sort_values([*CASE_ORDER, "backend", "dispatcher"], kind="stable").index
    return {key_of(rows[number]): rows[number] for number in order}


def _notes(judged: Collection[TimeVerdict]) -> Iterator[str]:
    """Yield what the verdicts do not cover."""
    if not judged:
        yield "nothing was compared: no job has times of both sides that may be compared"
    if any(time.sessions == (1, 1) for time in judged):
        yield (
            "both sides have one session: shifts of the machine between two sessions are not covered; they are with "
            "a baseline of several sessions (`moebench baseline update DIR DIR …`) or with `moebench ab`"
        )


def _pairs(
    before: Mapping[JobKey, Row], after: Mapping[JobKey, Row], comparability: Comparability, *, together: bool
) -> dict[JobKey, Pair]:
    between, pairs = cache(comparability.between), {}
    for key in (key for key in before if key in after):
        differences = between(before[key]["env_id"], after[key]["env_id"])
        pairs[key] = _pair(before[key], after[key], differences, comparability, together)
    if not pairs:
        raise ResultsError(
            f"no job in common: {len(before)} jobs in the baseline, {len(after)} in the candidate, but none with the "
            "same case, backend and dispatcher in both; give two results of one sweep"
        )
    return pairs


def _family(
    pairs: Mapping[JobKey, Pair], block_of: Callable[[int], int] | None, medians: Medians
) -> dict[tuple[str, JobKey], Sides]:
    """Return the round medians of both sides, by measure and job, if both sides have the measure and are comparable."""
    family = {}
    for key, pair in pairs.items():
        if not pair.both_ok or pair.why_incomparable:
            continue
        for measure, rounds_of in medians.items():
            one, two = rounds_of(pair.baseline), rounds_of(pair.candidate)
            if measure == "time" or (one and two):
                family[measure, key] = _apart(pair, one, two) if block_of is None else sides(one, two, block_of)
    return family


def sides(baseline: Mapping[int, float], candidate: Mapping[int, float], block_of: Callable[[int], int]) -> Sides:
    """Return the sides of one job that were measured together. They have the median of each round by its number.

    The sides are empty if they have no block in common.
    """
    blocks = tuple(map(block_of, baseline)), tuple(map(block_of, candidate))
    if not set(blocks[0]) & set(blocks[1]):
        return Sides((), (), ((), ()))
    return Sides(tuple(baseline.values()), tuple(candidate.values()), blocks)


def _apart(pair: Pair, one: Mapping[int, float], two: Mapping[int, float]) -> Sides:
    """Return the sides of one job that were measured apart, with the session of each round."""
    of_one, of_two = (sessions_of(row) for row in (pair.baseline, pair.candidate))
    sessions = tuple(of_one[number] for number in one), tuple(of_two[number] for number in two)
    return Sides(tuple(one.values()), tuple(two.values()), sessions=sessions)


def _pair(
    baseline: Row, candidate: Row, differences: tuple[Difference, ...], comparability: Comparability, together: bool
) -> Pair:
    differences += _differences_of_rows(baseline, candidate, {some.what for some in differences})
    differences += clock_difference(clock_mhz(baseline), clock_mhz(candidate))
    return Pair(baseline, candidate, differences, comparability.forbidding(differences), together)


def _differences_of_rows(baseline: Row, candidate: Row, known: Collection[str]) -> tuple[Difference, ...]:
    """Return the device and the GPU if the rows name others. Environments may be missing, or be those of other rows."""
    cells = {what: (baseline[what], candidate[what]) for what in ("device", "gpu") if what not in known}
    return tuple(
        Difference(what, *(str(some) for some in both))
        for what, both in cells.items()
        if not any(map(is_null, both)) and both[0] != both[1]
    )


def _names(*frames: pd.DataFrame) -> dict[JobKey, tuple[str, str]]:
    """Return the case and the backend of each job in words. If all have the same case, its name is its `case_id`."""
    rows = pd.concat(frames, ignore_index=True).assign(run_id="", device="", gpu="")
    texts = zip(describe(rows).labels, rows["case_id"], backend_labels(rows), strict=True)
    names = ((case or case_id, backend) for case, case_id, backend in texts)
    return dict(zip(map(key_of, rows_of(rows[list(KEY)])), names, strict=True))


def _title(baseline: pd.DataFrame, candidate: pd.DataFrame) -> str:
    shared = describe(pd.concat([baseline, candidate], ignore_index=True)).title()
    places = " -> ".join(dict.fromkeys(machine(frame) for frame in (baseline, candidate)))
    return "\n".join(filter(None, (shared, places)))


def halves(
    name: str, rows: Sequence[Row], threshold: float, false_alarms: float, medians: Medians = BY_ROUND
) -> list[SelfComparison]:
    """Compare the earlier rounds of a result with its later rounds. If the machine drifts, this raises false alarms."""

    def split(rounds: Mapping[int, float]) -> Sides:
        some = tuple(rounds.values())
        return Sides(some[: len(some) // 2], some[len(some) // 2 :])

    return self_comparisons_of(name, rows, split, threshold, false_alarms, 2 * times.MIN_ROUNDS, medians)


def self_comparisons_of(
    name: str,
    rows: Sequence[Row],
    split: Callable[[Mapping[int, float]], Sides],
    threshold: float,
    false_alarms: float,
    min_rounds: int = 1,
    medians: Medians = BY_ROUND,
) -> list[SelfComparison]:
    """Return the self-comparison of the times of a result and, if it has them, of the GPU's own times.

    `split` makes two sides of the rounds of a row. Rows with fewer than `min_rounds` rounds are left out.
    """
    found = []
    for measure, rounds_of in medians.items():
        rounds = [some for row in rows if len(some := rounds_of(row)) >= min_rounds]
        if measure == "time" or rounds:
            title = name if measure == "time" else f"{name}, {measure}_ms"
            family = {number: split(some) for number, some in enumerate(rounds)}
            found.append(self_comparison(title, family, threshold, false_alarms))
    return found


def self_comparison(name: str, family: Mapping[Any, Sides], threshold: float, false_alarms: float) -> SelfComparison:
    """Apply the gate's rules to two sides between which nothing changed, and count the false alarms."""
    found = times.judge_times(family, threshold, false_alarms).values()
    alarms = [some for some in found if some.verdict in (Verdict.REGRESSED, Verdict.IMPROVED)]
    below = [some for some in found if min(some.p_slower, some.p_faster) < 0.05]
    return SelfComparison(name, len(family), len(alarms), len(below))
