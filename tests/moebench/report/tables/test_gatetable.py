"""The table of a gate has the worst job first, says why, and shows the smallest effect that would be seen."""

import pytest
from rich.console import Console

from moebench.report.tables.gatetable import GateTable
from tests.moebench.gated import JOBS, gated, job_of, one_of_each, steady, waits


@pytest.fixture(scope="module")
def result():
    return one_of_each()


def printed(result, width=100):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(GateTable(result))
    return capture.get()


def test_the_table_has_the_worst_first_and_says_why(result):
    lines = printed(result, 160).splitlines()
    verdicts = [line.split()[0] for line in lines if line.startswith(("REGR", "MISS", "INCON", "NEW", "PASS"))]
    assert verdicts[:6] == ["REGRESSED", "REGRESSED", "MISSING", "INCONCLUSIVE", "NEW", "PASS"]
    slow = next(line for line in lines if "+5.1%" in line)
    assert "+25.00%" in slow
    assert "0.25" in slow
    assert slow.startswith("REGRESSED time, memory "), "the row says which measure regressed"
    text = "\n".join(lines)
    assert "REGRESSED memory: peak 95.4 MiB -> 119 MiB" in text
    assert "while `moebench compare` divides two medians" in text
    assert f"REGRESSED time: slower: loop on {JOBS['slow'].case.case_id}" in text
    assert "measure more with --rounds" in text
    assert lines[-1] == "gate: 2 REGRESSED, 1 MISSING, 1 INCONCLUSIVE, 1 NEW, 1 PASS"


def test_the_table_shows_what_could_have_been_seen(result):
    text = printed(result, 160)
    smallest = next(job.time.smallest_effect for job in result.jobs if job.key[0] == JOBS["same"].case.case_id)
    (row,) = (line for line in text.splitlines() if line.startswith("PASS"))
    assert f"{smallest:.1%}" in row


def test_the_table_says_what_was_measured_where(result):
    assert printed(result).splitlines()[1] == "NVIDIA H200, L2 cold, 2026-11-23"
    assert "e8k2d256i512, bfloat16, forward, uniform routing" in printed(result).splitlines()[0]


def test_80_columns_are_enough(result):
    assert max(map(len, printed(result, 80).splitlines())) <= 80


def test_the_gpus_own_time_has_a_column_where_it_was_compared(result):
    slow = gated([waits(job_of(), steady(), steady())], [waits(job_of(), steady(seed=1), steady(time_ms=1.05, seed=2))])
    text = printed(slow, 160)
    header, row = (next(line for line in text.splitlines() if line.startswith(some)) for some in ("verdict", "REGRE"))
    assert header.split() == ["verdict", "backend", "case", "time", "sees", "busy", "memory", "err"]
    assert "+5.0% (" in row[header.index("sees") :]
    assert "REGRESSED busy: slower: loop on " in text
    assert "busy: change of the GPU's own time" in text
    assert max(map(len, printed(slow, 80).splitlines())) <= 80
    assert "busy" not in printed(result, 160)
