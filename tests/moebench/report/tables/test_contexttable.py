"""The table of contexts has each context beside plain of the same backend, with what it costs and saves."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from moebench.report.tables.contexttable import ContextTable
from moebench.report.tables.tables import summary
from moebench.results.compare import beside_plain
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, ok

MIB = 1 << 20


def train(context: str = "plain", **fields: object) -> object:
    return case(1024, mode="train", context=context, **fields)


def memory(peak: float, saved: float | None) -> dict[str, object]:
    return {"peak_memory_bytes": round(peak * MIB), "saved_memory_bytes": None if saved is None else round(saved * MIB)}


def rows() -> list[Record]:
    return [
        ok(train("checkpoint"), "te", 6.0, **memory(50, 0)),
        ok(train(), "te", 4.0, **memory(100, 80)),
        ok(train("accumulate:2"), "te", 5.0, **memory(60, None)),
        ok(train(), "loop", 8.0, **memory(10, 5)),
        ok(train("checkpoint"), "loop", 12.0, **memory(10, 1)),
        ok(train("fsdp2", dp_size=2), "loop", 16.0, **memory(20, 5)),
        ok(train("offload"), "gmm", 3.0),  # without a row of plain
        ok(train(), "triton", 2.0),  # without a context
        bad(train("offload"), Status.oom, "te"),
    ]


def printed(table: object, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def lines_of(lines: Sequence[str], backend: str) -> list[list[str]]:
    return [line.split()[1:] for line in lines if line.split()[:1] == [backend]]


def test_each_context_is_beside_plain_of_its_backend() -> None:
    lines = printed(ContextTable(beside_plain(to_frame(rows()))))
    assert lines[0].startswith("context vs plain, ")
    assert lines_of(lines, "te") == [
        ["plain", "4.000", "1.00x", "100", "MiB", "1.00x", "80.0", "MiB", "1.00x"],
        ["accumulate:2", "5.000", "1.25x", "60.0", "MiB", "0.60x", "-", "-"],
        ["checkpoint", "6.000", "1.50x", "50.0", "MiB", "0.50x", "0", "B", "0.00x"],
    ]
    assert [line[:3] for line in lines_of(lines, "loop")] == [
        ["plain", "8.000", "1.00x"],
        ["checkpoint", "12.00", "1.50x"],
        ["fsdp2", "DP", "2"],
    ]


def test_a_backend_without_plain_or_without_contexts_has_no_line() -> None:
    frame = beside_plain(to_frame(rows()))
    assert set(frame["backend"]) == {"te", "loop"}
    assert set(frame["status"]) == {Status.ok}
    assert beside_plain(to_frame(rows()[3:4])).empty


def test_another_case_is_not_compared_with() -> None:
    other = ok(train("checkpoint", seed=1), "loop", 1.0)
    assert beside_plain(to_frame([rows()[3], other])).empty


def test_a_ratio_to_nothing_is_null() -> None:
    frame = beside_plain(to_frame([ok(train(), **memory(0, 0)), ok(train("checkpoint"), **memory(1, 1))]))
    assert frame["peak_of_plain"].isna().all()
    assert frame["time_of_plain"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("width", [70, 100, 160])
def test_the_summary_has_the_table_where_there_are_contexts(width: int) -> None:
    two = [*rows(), *(ok(case(256, mode="train", context=name), "loop", 1.0) for name in ("plain", "checkpoint"))]
    lines = printed(summary(to_frame(two)), width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("context vs plain") for line in lines)
    assert not any(line.startswith("context vs plain") for line in printed(summary(to_frame(rows()[3:4])), width))
