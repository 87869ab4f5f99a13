"""A gate's verdicts as GitHub Actions shows them: annotations, and a step summary in Markdown. No torch here.

Annotations are workflow commands (`::error title=…::message`) in the escaping that GitHub's toolkit defines. GitHub
shows ten of a level for each step; the rest is counted in one line, and the summary has them all.
"""

from collections.abc import Iterator

from moebench.report.gatewords import (
    change,
    in_verdict_order,
    memory_change,
    parity_change,
    reasons,
    smallest_effect,
    total,
)
from moebench.verdicts.gate import GateResult, Judged
from moebench.verdicts.verdict import Severity

MOST_ANNOTATIONS = 9  # and one that counts the rest


def annotations(result: GateResult) -> list[str]:
    """Workflow commands, a line each: an error for each job that failed, a warning for each reason of those open."""
    failed = [job for job in in_verdict_order(result) if job.verdict.severity is Severity.FAILED]
    errors = [_command("error", f"moebench: {job.verdict}", _sentence(job)) for job in failed]
    open_ = reasons(result.jobs, {Severity.UNDECIDED})
    warnings = [_command("warning", f"moebench: {verdict}", f"{why}: {whom}") for (verdict, why), whom in open_.items()]
    return [*_at_most("error", errors), *_at_most("warning", warnings)]


def _at_most(level: str, lines: list[str]) -> list[str]:
    rest = len(lines) - MOST_ANNOTATIONS
    more = [_command(level, "moebench", f"and {rest} more: see the summary of the step")] if rest > 0 else []
    return [*lines[:MOST_ANNOTATIONS], *more]


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _sentence(job: Judged) -> str:
    decided = [finding for finding in job.findings if finding.verdict is job.verdict]
    found = "; ".join(f"{finding.measure}: {finding.reason}" for finding in decided)
    return f"{job.backend} on {job.key.case_id} ({change(job)}): {found}"


def summary(result: GateResult) -> str:
    """The step summary: the total, a table of what is not PASS, and what the gate could have seen."""
    return "\n".join(_summary(result)) + "\n"


def _summary(result: GateResult) -> Iterator[str]:
    yield f"## moebench gate: {total(result)}"
    yield ""
    for difference in result.differences:
        yield f"* environments differ: {_cell(str(difference))}"
    for comparison in result.self_comparisons:
        yield f"* {_cell(str(comparison))}"
    shown = [job for job in in_verdict_order(result) if job.verdict.severity is not Severity.PASSED]
    passed = [job for job in result.jobs if job.verdict.severity is Severity.PASSED]
    if shown:
        yield ""
        yield from _table(shown)
    if passed:
        yield ""
        yield f"<details><summary>{len(passed)} PASS</summary>"
        yield ""
        yield from _table(passed)
        yield ""
        yield "</details>"


def _table(jobs: list[Judged]) -> Iterator[str]:
    yield "| verdict | backend | case | time | smallest effect seen | memory | error / budget | why |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for job in jobs:
        why = "; ".join(
            f"{some.measure}: {some.reason}" for some in job.findings if some.verdict.severity is not Severity.PASSED
        )
        cells = (
            *(job.verdict.value, job.backend, job.case, change(job), smallest_effect(job)),
            *(memory_change(job), parity_change(job), why),
        )
        yield "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text as it stands in a cell of Markdown: no cell ends early, nothing is read as HTML."""
    marked = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(marked.split())
