"""The best table has one line per case, names what is too close to call, and fits the terminal."""

import io

import pytest
from rich.console import Console

from moebench.report.tables.besttable import BestTable
from moebench.report.tables.tables import summary
from moebench.results.frame import to_frame
from moebench.results.record import Record
from tests.moebench.drawn import case, ok

EXACT = {"time_ms_low": None, "time_ms_high": None}


def rows() -> list[Record]:
    times = {128: {"loop": 4.0, "te": 2.0}, 4096: {"loop": 8.0, "te": 8.01, "gmm": 8.02}}
    return [
        ok(case(count), backend, time_ms, graph_time_ms=time_ms / 2, **EXACT)
        for count, of_case in times.items()
        for backend, time_ms in of_case.items()
    ]


def printed(table: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_each_case_has_a_line_with_time_memory_and_lead(width: int) -> None:
    lines = printed(BestTable(to_frame(rows())), width)
    assert max(map(len, lines)) <= width
    titles = next(line for line in lines if line.startswith("tokens"))
    assert titles.split()[:6] == ["tokens", "fastest", "ms", "graph", "memory", "lead"]
    assert [line.split()[:7] for line in lines if line.strip().startswith(("128 ", "4096 "))] == [
        ["128", "te", "2.000", "1.000", "125", "KiB", "2.00x"],
        ["4096", "loop", "~", "te", "and", "1", "more"],
    ]
    assert "wins in 2 cases: te 1, too close to call 1" in lines


def test_the_backend_that_the_lead_is_over_is_named_where_there_is_room() -> None:
    for width, has_next in ((60, False), (120, True)):
        (line,) = (line for line in printed(BestTable(to_frame(rows())), width) if line.strip().startswith("128 "))
        assert line.endswith("loop") == has_next


def test_it_comes_before_all_backends_where_there_are_several_cases() -> None:
    lines = printed(summary(to_frame(rows())), 80)
    assert lines.index("wins in 2 cases: te 1, too close to call 1") < next(
        at for at, line in enumerate(lines) if "×fastest" in line
    )
    assert not [line for line in printed(summary(to_frame(rows()[:2])), 80) if line.startswith("wins in")]
