"""Each backend of a case has a line, the fastest first, with every number under its title.

If the parts of a forward pass do not fit, they have a line of their own.
"""

import io
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from moebench.report.tables.tables import summary
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, family, ok

ENGINES = ("loop", "torch_mm", "gmm", "te_fp8_current")
DISPATCHERS = ("allgather", "alltoall", "deepep")
PAIRS = [(engine, dispatcher) for engine in ENGINES for dispatcher in DISPATCHERS]
PARTS = {"dispatch_ms": 0.125, "compute_ms": 2.5, "combine_ms": 10.25, "skew_ms": 0.03125}


def ep_rows(count: int = 128, **fields: Any) -> list[Record]:
    of = case(count, ep_size=2, **fields)
    return [
        ok(of, engine, 2.0 + at, dispatcher, **{**PARTS, "dispatch_ms": at + 0.125})
        for at, (engine, dispatcher) in enumerate(PAIRS)
    ]


def lines(rows: list[Record], width: int = 90) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(to_frame(rows)))
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, printed)) <= width
    return [line.rstrip() for line in printed]


def under(titles: str, line: str) -> dict[str, str]:
    """Return the text of `line` under each title. Each column ends where its title ends."""
    ends = [titles.index(title) + len(title) for title in titles.split()]
    starts = [ends[0] - 6, *(end for end, _ in pairwise(ends))]
    cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return dict(zip(titles.split(), (cell.lstrip("! ") for cell in cells), strict=True))


def test_twelve_pairs_have_a_line_each_with_every_number_under_its_title() -> None:
    printed = lines(list(reversed(ep_rows())) + ep_rows(1024))
    assert [printed.count(heading) for heading in ("128 tokens", "1024 tokens")] == [1, 1]
    start = printed.index("1024 tokens")
    titles, *pairs = printed[start + 1 : start + 14]
    assert [line.split()[0] for line in pairs] == [f"{engine}+{dispatcher}" for engine, dispatcher in PAIRS]
    assert under(titles, next(line for line in pairs if line.startswith("te_fp8_current+alltoall"))) == {
        "ms": "12.00",
        "±": "15%",
        "×fastest": "6.00x",
        "memory": "1000 KiB",
        "err": "0.25",
        "disp": "10.12",
        "comp": "2.500",
        "comb": "10.25",
        "skew": "0.031",
    }


def test_one_process_has_no_parts() -> None:
    printed = lines([row for engine in (*ENGINES, "te") for row in family(engine)])
    _, titles = (line for line in printed if " ms " in line and not line.startswith("ms"))
    assert titles.split() == ["tokens", "ms", "±", "×fastest", "memory", "err", "tok/s", "TF/s"]


def test_the_fastest_of_a_case_is_marked_whatever_dispatches_it() -> None:
    rows = ep_rows() + ep_rows(1024)
    rows[7] = ok(case(128, ep_size=2), "gmm", 1.0, "alltoall")
    rows[-1] = ok(case(1024, ep_size=2), "te_fp8_current", 1.5, "deepep", converged=False)
    marked = [line.split()[:3] for line in lines(rows) if "*" in line and not line.startswith("*")]
    best = [["128", "gmm+alltoall"], ["1024", "te_fp8_current+deepep"]]
    assert [line.split()[:2] for line in lines(rows) if line.split()[:1] in (["128"], ["1024"])][:2] == best
    assert marked == [["gmm+alltoall", "*", "1.000"], ["te_fp8_current+deepep", "*", "1.500"]]


def test_what_is_not_ok_says_so_and_why_below() -> None:
    rows = ep_rows()
    of = case(128, ep_size=2)
    rows[0] = bad(of, Status.oom, "loop", "allgather", detail="12 GiB wanted")
    rows[4] = bad(
        of, Status.mismatch, "torch_mm", "alltoall", detail="wrong", parity_worst=37.4, parity_worst_tensor="dX"
    )
    rows[5] = bad(of, Status.crash, "torch_mm", "deepep", detail="signal 11")
    printed = lines(rows)
    for words in (
        ["loop+allgather", "oom"],
        ["torch_mm+alltoall", "MISMATCH", "37.4x", "dX"],
        ["torch_mm+deepep", "CRASH"],
    ):
        assert [line for line in printed if line.split() == words]
    assert "loop+allgather: oom: 12 GiB wanted" in printed
    assert "torch_mm+alltoall: mismatch: wrong" in printed


def test_what_was_not_measured_is_a_dash() -> None:
    rows = ep_rows()
    rows[3] = ok(case(128, ep_size=2), "torch_mm", 9.0, "allgather", tokens_per_s=None, time_ms_low=None)
    printed = lines(rows, 102)
    titles = next(line for line in printed if "skew" in line)
    cells = under(titles, next(line for line in printed if line.startswith("torch_mm+allgather")))
    assert [title for title, cell in cells.items() if cell == "-"] == ["±", "disp", "comp", "comb", "skew", "tok/s"]


def test_a_flag_is_marked_and_explained_once() -> None:
    rows = [ok(case(128, ep_size=2), "te", 1.0, name, flags=("synchronises",), **PARTS) for name in DISPATCHERS]
    rows += [ok(case(128, ep_size=2), "gmm", 1.0, name, **PARTS) for name in DISPATCHERS]
    printed = lines(rows)
    assert [line.split()[0] for line in printed if "0.25!" in line] == [f"te+{name}" for name in DISPATCHERS]
    assert "\n".join(printed).count("synchronises") == 1
    assert "\n".join(printed[-2:]).replace("\n", " ").endswith("(te+allgather, te+alltoall, te+deepep x3)")


@pytest.mark.parametrize("width", [60, 70])
def test_where_the_width_is_short_the_parts_stand_below(width: int) -> None:
    printed = lines(ep_rows(), width)
    at = next(at for at, line in enumerate(printed) if line.startswith("gmm+deepep"))
    first, second = (next(line for line in printed if line.split()[:1] == [title]) for title in ("ms", "disp"))
    assert under(first, printed[at])["ms"] == "10.00"
    assert under(second, printed[at + 1]) == {"disp": "8.125", "comp": "2.500", "comb": "10.25", "skew": "0.031"}


def test_a_long_label_is_folded_before_its_dispatcher() -> None:
    rows = ep_rows() + [ok(case(128, ep_size=2), "te_fp8_current_cached", 9.0, name, **PARTS) for name in DISPATCHERS]
    printed = lines(rows, 60)
    folded = [at for at, line in enumerate(printed) if line.startswith("te_fp8_current_cached")]
    assert [printed[at + 1].split()[0] for at in folded] == [f"+{name}" for name in DISPATCHERS]
    assert all("9.000" in printed[at] for at in folded)
    assert not [line for line in lines(rows, 120) if line.strip().startswith("+")], "whole where there is room"


def test_a_narrow_encoding_gets_only_its_characters() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80).print(summary(to_frame(ep_rows())))
    file.seek(0)
    assert "+/-" in file.read()


def test_a_case_that_only_others_differ_from_is_named_too() -> None:
    printed = lines(ep_rows() + ep_rows(rank_load="one-empty"))
    assert [line for line in printed if line in ("defaults", "one empty rank")] == ["defaults", "one empty rank"]


def test_the_gpus_own_time_has_a_column_where_a_row_has_it() -> None:
    rows = ep_rows()
    rows[3] = ok(case(128, ep_size=2), "torch_mm", 9.0, "allgather", busy_ms=0.625, **PARTS)
    printed = lines(rows, 100)
    titles = next(line for line in printed if "skew" in line)
    assert titles.split()[-6:-1] == ["busy", "disp", "comp", "comb", "skew"]
    assert under(titles, next(line for line in printed if line.startswith("torch_mm+allgather")))["busy"] == "0.625"
    assert under(titles, next(line for line in printed if line.startswith("torch_mm+deepep")))["busy"] == "-"
    assert [line for line in printed if line.startswith("busy: median ms in which the GPU worked")]
    assert not [line for line in lines(ep_rows(), 100) if "busy" in line]
    alone = [ok(case(128), f"engine{number}", 9.0, busy_ms=0.5 + number) for number in range(6)]
    (titles,) = {line for line in lines(alone) if " tok/s " in line and not line.startswith("tok/s")}
    assert titles.split() == ["ms", "±", "×fastest", "memory", "err", "busy", "tok/s", "TF/s"]
