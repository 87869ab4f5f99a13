"""Annotations stay on one line each, and no content breaks the step summary."""

import re

import pytest

from moebench.report import github
from tests.moebench.gated import gated, job_of, ok, one_of_each, steady, waits


@pytest.fixture(scope="module")
def result():
    return one_of_each()


ANNOTATION = re.compile(r"::(error|warning) title=([^:,\n\r]*)::([^\n\r]*)")


def test_annotations_are_workflow_commands(result):
    found = [ANNOTATION.fullmatch(line).groups() for line in github.annotations(result)]
    assert [level for level, _, _ in found] == ["error"] * 3 + ["warning"]
    titles = [title.replace("%3A", ":") for _, title, _ in found]
    assert titles == ["moebench: REGRESSED"] * 2 + ["moebench: MISSING", "moebench: INCONCLUSIVE"]
    messages = "\n".join(message for _, _, message in found)
    assert "+5.1%25 (" in messages
    assert r"died \x1b[31m100%25" in messages
    assert not re.search("%(?!25|0A|0D)", messages)


def test_no_more_annotations_than_github_shows():
    jobs = [job_of(number) for number in range(1, 31)]
    many = gated([ok(job, steady(20)) for job in jobs], [ok(job, steady(20, 2.0)) for job in jobs])
    lines = github.annotations(many)
    assert len(lines) == 10
    assert "and 21 more" in lines[-1]
    nothing = gated([ok(jobs[0], steady())], [ok(jobs[0], steady(seed=1))])
    assert github.annotations(nothing) == []


def test_the_step_summary_is_a_table_that_nothing_breaks(result):
    text = github.summary(result)
    assert text.startswith("## moebench gate: 2 REGRESSED, 1 MISSING, 1 INCONCLUSIVE, 1 NEW, 1 PASS\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {9}
    assert len(rows) == 6 + 2 * 2
    assert "<b>" not in text
    assert "earlier against later rounds" in text


def test_the_gpus_own_time_is_named_where_it_was_compared(result):
    slow = gated([waits(job_of(), steady(), steady())], [waits(job_of(), steady(seed=1), steady(time_ms=1.05, seed=2))])
    (line,) = github.annotations(slow)
    assert ", busy_ms +5.0%25 (" in line
    assert line.endswith("busy: slower")
    header = (
        "| verdict | backend | case | time | smallest slowdown found | GPU's own time | memory | error / budget | why |"
    )
    assert header in github.summary(slow).splitlines()
    rows = [row for row in github.summary(slow).splitlines() if row.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}
    assert "GPU's own time" not in github.summary(result)
    assert "busy_ms" not in "".join(github.annotations(result))
