"""Write the verdicts of a gate for GitHub Actions, as annotations and as a step summary in Markdown.

An annotation is a workflow command (`::error title=…::message`). `moebench.escapes` escapes its text.
For each level (error, warning), GitHub shows at most ten annotations per step. If there are more, the tenth annotation
says how many are not shown. The summary has all verdicts.
"""

from collections.abc import Iterator

from moebench import escapes
from moebench.report.gatewords import (
    busy_change,
    change,
    has_busy,
    in_verdict_order,
    memory_change,
    parity_change,
    reasons,
    smallest_effect,
    total,
)
from moebench.verdicts.gate import GateResult, Judged
from moebench.verdicts.verdict import Severity

MOST_ANNOTATIONS = 9  # of each level; the tenth annotation says how many more there are


def annotations(result: GateResult) -> list[str]:
    """Return workflow commands: one error per failed job, and one warning per reason why jobs are undecided."""
    failed = [job for job in in_verdict_order(result) if job.verdict.severity is Severity.FAILED]
    errors = [_command("error", f"moebench: {job.verdict}", _sentence(job)) for job in failed]
    open_ = reasons(result.jobs, {Severity.UNDECIDED})
    warnings = [_command("warning", f"moebench: {verdict}", f"{why}: {whom}") for (verdict, why), whom in open_.items()]
    if result.compared_nothing:
        warnings += [_command("warning", "moebench", note) for note in result.notes]
    return [*_at_most("error", errors), *_at_most("warning", warnings)]


def _at_most(level: str, lines: list[str]) -> list[str]:
    rest = len(lines) - MOST_ANNOTATIONS
    more = [_command(level, "moebench", f"and {rest} more: see the summary of the step")] if rest > 0 else []
    return [*lines[:MOST_ANNOTATIONS], *more]


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={escapes.command_property(title)}::{escapes.command(message)}"


def _sentence(job: Judged) -> str:
    decided = [finding for finding in job.findings if finding.verdict is job.verdict]
    found = "; ".join(f"{finding.measure}: {finding.reason}" for finding in decided)
    busy = f", busy_ms {busy_change(job)}" if has_busy([job]) else ""
    return f"{job.backend} on {job.key.case_id} ({change(job)}{busy}): {found}"


def summary(result: GateResult) -> str:
    """Return the step summary in Markdown: the total, a table of jobs that did not pass, and a table of passed jobs."""
    return "\n".join(_summary(result)) + "\n"


def _summary(result: GateResult) -> Iterator[str]:
    yield f"## moebench gate: {total(result)}"
    yield ""
    for difference in result.differences:
        yield f"* environments differ: {escapes.markdown(str(difference))}"
    for comparison in result.self_comparisons:
        yield f"* {escapes.markdown(str(comparison))}"
    for note in result.notes:
        yield f"* {escapes.markdown(note)}"
    shown = [job for job in in_verdict_order(result) if job.verdict.severity is not Severity.PASSED]
    passed = [job for job in result.jobs if job.verdict.severity is Severity.PASSED]
    if shown:
        yield ""
        yield from _table(shown, has_busy(result.jobs))
    if passed:
        yield ""
        yield f"<details><summary>{len(passed)} PASS</summary>"
        yield ""
        yield from _table(passed, has_busy(result.jobs))
        yield ""
        yield "</details>"


def _table(jobs: list[Judged], busy: bool) -> Iterator[str]:
    titles = ("verdict", "backend", "case", "time", "smallest slowdown found", *["GPU's own time"] * busy)
    titles += ("memory", "error / budget", "why")
    yield "| " + " | ".join(titles) + " |"
    yield "| " + " | ".join(["---"] * len(titles)) + " |"
    for job in jobs:
        why = "; ".join(
            f"{some.measure}: {some.reason}" for some in job.findings if some.verdict.severity is not Severity.PASSED
        )
        cells = (
            *(job.verdict.value, job.backend, job.case, change(job), smallest_effect(job)),
            *[busy_change(job)] * busy,
            *(memory_change(job), parity_change(job), why),
        )
        yield "| " + " | ".join(map(escapes.markdown, cells)) + " |"
