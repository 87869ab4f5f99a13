"""The table marks the right backend, shows wrong ones without a speed, and is readable without colour at 80 columns."""

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moebench.errors import UsageError
from moebench.report.flags import FLAGS
from moebench.report.ranking import fastest_rows
from moebench.report.tables.longtable import SORTS
from moebench.report.tables.tables import summary
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status, record
from moebench.workload.case import Case, Job

ROOT = Path(__file__).parents[4]
SHAPE: dict[str, Any] = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 256, "moe_inter_dim": 512}
FULL = {"device": "cuda", "gpu": "NVIDIA H200", "l2": "cold", "tokens_per_s": 1_234_567.0, "tflops": 42.12}
LONG = "acme_kernels.experiments.grouped:FancyGroupedExpertsWithEpilogueFusion"


def case(num_tokens: int = 128, **fields: Any) -> Case:
    return Case(num_tokens=num_tokens, **{**SHAPE, **fields})


def ok(backend: str, time_ms: float, of: Case | None = None, dispatcher: str = "local", **measured: Any) -> Record:
    interval = {"time_ms_low": time_ms * 0.99, "time_ms_high": time_ms * 1.01, "converged": True}
    measured = {**FULL, **interval, "parity_worst": 0.31, **measured}
    job = Job(case=of or case(), backend=backend, dispatcher=dispatcher)
    return record(job, Status.ok, run_id="20261123-run", env_id="e", time_ms=time_ms, **measured)


def bad(backend: str, status: Status, detail: str, of: Case | None = None, **measured: Any) -> Record:
    where = {"device": "cuda", "gpu": "NVIDIA H200"}
    job = Job(case=of or case(), backend=backend)
    return record(job, status, run_id="20261123-run", env_id="e", detail=detail, **{**where, **measured})


def printed(rows: list[Record], width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(summary(to_frame(rows)))
    file.seek(0)
    return file.read()


def fastest(rows: list[Record]) -> list[tuple[str, int]]:
    frame = to_frame(rows)
    marked = frame[fastest_rows(frame)]
    return list(zip(marked["backend"], marked["num_tokens"], strict=True))


def lines_of(rows: list[Record], width: int = 80) -> list[str]:
    return [line.rstrip() for line in printed(rows, width).splitlines()]


def cells(line: str) -> dict[str, str]:
    """Return the columns of a line of one case, at 80 columns."""
    return dict(zip(("label", "ms", "half", "times", "memory", "err", "tok/s", "TF/s"), line.split(), strict=False))


def test_a_line_has_time_interval_ratio_memory_parity_tokens_and_flops() -> None:
    rows = [ok("loop", 1.25, peak_memory_bytes=3 << 19), ok("torch_mm", 0.5, parity_worst=0.875)]
    loop = next(line for line in lines_of(rows) if line.startswith("loop"))
    assert cells(loop.replace(" MiB", "MiB")) == {
        "label": "loop",
        "ms": "1.250",
        "half": "1.0%",
        "times": "2.50x",
        "memory": "1.50MiB",
        "err": "0.31",
        "tok/s": "1.23M",
        "TF/s": "42.1",
    }
    fast = next(line for line in lines_of(rows) if line.startswith("torch_mm"))
    assert fast.split() == ["torch_mm", "*", "0.500", "1.0%", "1.00x", "-", "0.88", "1.23M", "42.1"]


def test_every_table_of_results_has_memory() -> None:
    for rows in ([ok("loop", 1.0)], [ok("te", 1.0, case(ep_size=2), dispatcher="deepep")]):
        for width in (60, 80, 120, 200):
            text = printed([*rows, *[ok("gmm", 2.0, case(256))]], width)
            assert text.count("memory") >= 2, "the title of a column, and the legend"


def test_the_title_has_what_all_rows_share_and_the_rows_what_differs() -> None:
    lines = printed([ok("loop", 1.0, case(n, mode=m)) for n in (128, 4096) for m in ("forward", "train")]).splitlines()
    assert lines[0].rstrip() == "e8k2d256i512, bfloat16, uniform routing, swiglu"
    assert lines[1].rstrip() == "NVIDIA H200, L2 cold, 2026-11-23"
    cases = [" ".join(line.split()[:3]) for line in lines if line.strip().startswith(("128 ", "4096 "))]
    assert cases == ["128 forward loop", "4096 forward loop", "128 train loop", "4096 train loop"]


def test_the_fastest_of_each_case_is_marked() -> None:
    slow, fast = case(128), case(256)
    rows = [ok("loop", 3.0, slow), ok("torch_mm", 2.0, slow), ok("loop", 1.0, fast), ok("torch_mm", 1.5, fast)]
    assert sorted(fastest(rows)) == [("loop", 256), ("torch_mm", 128)]
    text = printed(rows)
    assert "* 2.000" in text
    assert "* 1.000" in text
    assert text.count("*") == 3, "two marks and the legend"


def test_the_mark_of_the_fastest_is_bold_and_green_where_there_is_colour() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    console.print(summary(to_frame([ok("loop", 3.0), ok("torch_mm", 2.0)])))
    assert "\x1b[1;32mtorch_mm  * 2.000" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_mismatch_is_never_the_fastest_and_has_no_speed() -> None:
    wrong = bad("gmm", Status.mismatch, "output is wrong", parity_worst=37.4, parity_worst_tensor="output")
    rows = [ok("loop", 3.0), wrong, ok("torch_mm", 2.0)]
    assert fastest(rows) == [("torch_mm", 128)]
    text = printed(rows)
    assert "MISMATCH 37.4x" in text
    assert "gmm: mismatch: output is wrong" in text
    assert fastest([ok("loop", 3.0), wrong]) == [], "nobody to compare with"


def test_only_ok_competes_even_where_a_file_of_others_has_a_time() -> None:
    wrong = bad("gmm", Status.mismatch, "output is wrong", parity_worst=37.4)
    frame = to_frame([ok("loop", 3.0), wrong, ok("torch_mm", 2.0)])
    frame.loc[1, "time_ms"] = 0.1
    assert fastest_rows(frame).tolist() == [False, False, True]


def test_an_infinite_mismatch_is_shown() -> None:
    wrong = bad("gmm", Status.mismatch, "NaN", parity_worst=math.inf, parity_worst_tensor="gate_and_up_projs")
    assert "MISMATCH inf " in printed([wrong])
    assert "gate_and_up_projs" in printed([wrong])


def test_a_backend_alone_is_not_the_fastest() -> None:
    assert fastest([ok("loop", 3.0)]) == []
    assert "*" not in printed([ok("loop", 3.0)])


def test_runs_are_not_compared_with_each_other() -> None:
    import pandas as pd

    first, second = to_frame([ok("loop", 3.0)]), to_frame([ok("torch_mm", 2.0)])
    second["run_id"] = "20261124-run"
    assert not fastest_rows(pd.concat([first, second], ignore_index=True)).any()


def test_a_tilde_marks_what_is_too_close_to_call_and_nothing_else() -> None:
    wide = {"time_ms_low": 1.9, "time_ms_high": 9.0, "converged": False}
    text = printed([ok("loop", 2.0), ok("gmm", 2.03, **wide), ok("te", 4.0, converged=False)])
    marks = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith(("loop", "gmm", "te"))}
    assert marks == {"loop": "~", "gmm": "~", "te": "4.000"}, "an interval that changes no place is not marked"
    assert "~ too close to call: " in text
    assert "*" not in text
    alone = printed([ok("loop", 3.0, converged=False)])
    assert not any(mark in alone for mark in ("*", "~", "!"))


def test_a_flag_is_marked_and_explained_where_it_is_shown() -> None:
    rows = [ok("loop", 3.0), ok("torch_mm", 2.0, flags=("clock_changed",)), ok("te", 4.0, flags=("own_flag",))]
    text = printed(rows, 120)
    assert "0.31!" in text
    assert "! clock_changed: some samples ran at another GPU clock; the times leave them out (torch_mm)" in text
    assert "! own_flag (te)" in text, "a flag that is not known is shown as it is"
    assert "! flagged, see below" in text


def test_a_flag_that_all_rows_share_is_said_once_and_marks_no_row() -> None:
    cases = [case(n) for n in (8, 16, 32)]
    rows = [ok(name, 1.0, of, flags=("synchronises",)) for of in cases for name in ("loop", "gmm")]
    rows[3] = ok("gmm", 1.0, cases[1], flags=("synchronises", "clock_changed"))
    rows.append(bad("te", Status.unsupported, "needs CUDA"))
    text = printed(rows, 120)
    assert text.count("synchronises") == 1
    assert "all 6 rows: synchronises: the call waits for the GPU, so its time includes host time" in text
    assert text.count("0.31!") == 1, "only the row with a flag of its own is marked"


def test_every_flag_of_the_documents_has_an_explanation() -> None:
    table = (ROOT / "docs" / "results.md").read_text().partition("| flag | meaning |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(FLAGS)


def test_reasons_are_listed_once_with_their_count_failures_first() -> None:
    cases = [case(128), case(256)]
    rows = [bad("te", Status.unsupported, "needs CUDA [install moebench\\[te]]", of) for of in cases]
    rows += [bad("gmm", Status.error, "RuntimeError: boom\nTraceback", of) for of in cases]
    rows += [bad("gmm", Status.oom, "12 GiB wanted", case(512))]
    rows += [bad("te_fp8_block", Status.unsupported, "needs CUDA [install moebench\\[te]]", case(512))]
    lines = [line.rstrip() for line in printed(rows).splitlines()]
    details = lines[len(lines) - lines[::-1].index("") :]
    assert details == [
        "gmm: error x2: RuntimeError: boom",
        "te, te_fp8_block: unsupported x3: needs CUDA [install moebench\\[te]]",
        "gmm: oom: 12 GiB wanted",
    ]
    assert "ERROR" in "\n".join(lines)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("backends", [["loop"], ["loop", "torch_mm", "gmm"], ["loop", LONG, "te", "gmm", "torch_mm"]])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int, backends: list[str]) -> None:
    cases = [case(n, expert_activation=a, expert_bias=True) for n in (128, 16384) for a in ("quick_geglu", "swiglu")]
    rows = [ok(name, 10.0 + at, of, roofline_fraction=0.5) for of in cases for at, name in enumerate(backends)]
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count(" 1.0%") == len(rows)
    assert [name for name in backends if name not in text] in ([], [LONG])
    assert "quick_geglu+bias" in text, "words stay whole"


def test_a_wider_terminal_shows_more_columns() -> None:
    measured = {"roofline_fraction": 0.5, "host_time_ms": 3.0, "backward_ms": 1.0, "saved_memory_bytes": 5 << 20}
    rows = [ok(name, 2.0, case(mode="train"), **measured) for name in ("loop", "te_fp8_block_cached")]
    titles = {
        width: next(line for line in printed(rows, width).splitlines() if " ms " in line).split()[1:]
        for width in (60, 80, 120)
    }
    assert titles[60] == ["±", "×fastest", "memory", "err"]
    assert titles[80] == ["±", "×fastest", "memory", "err", "tok/s", "TF/s", "bwd"]
    assert titles[120] == ["±", "×fastest", "memory", "err", "tok/s", "TF/s", "bwd", "saved", "roof", "host"]
    for width in (60, 80, 120):
        legend_lines = printed(rows, width)
        assert ("bwd: " in legend_lines) == (width > 60), "the legend explains the columns that are there"


def test_a_long_name_is_folded_whole() -> None:
    lines = lines_of([ok(LONG, 1.0), ok("loop", 2.0)], 60)
    start = next(at for at, line in enumerate(lines) if line.startswith("acme_"))
    end = next(at for at, line in enumerate(lines) if line.startswith("loop"))
    assert "".join(line.split()[0] for line in lines[start:end]) == LONG
    assert "1.000" in lines[start]


def test_a_narrow_encoding_gets_only_its_characters() -> None:
    text = printed([ok("loop", 3.0), ok("torch_mm", 2.0), ok("te", 1.0, case(256))], encoding="ascii")
    assert "* 2.000" in text
    assert "+/-" in text
    assert "xfastest" in text


def test_dispatchers_are_columns() -> None:
    of = case(ep_size=2)
    text = printed([ok("te", 2.0, of, dispatcher="alltoall"), ok("te", 1.0, of, dispatcher="allgather")])
    assert "te+allgather" in text
    assert "te+alltoall" in text
    assert text.index("* 1.000") < text.index("2.000")


def test_each_ep_size_has_a_table_of_the_backends_that_it_has() -> None:
    rows = [ok("loop", 3.0, case(n)) for n in (128, 256)]
    rows += [ok("te", 2.0, case(n, ep_size=2), dispatcher="alltoall") for n in (128, 256)]
    rows += [ok("gmm", 1.0, case(n, ep_size=8), dispatcher="deepep") for n in (128, 256)]
    lines = [line.rstrip() for line in printed(rows).splitlines()]
    starts = [at for at, line in enumerate(lines) if line.startswith("e8k2d256i512")]
    assert [lines[at] for at in starts] == [
        f"e8k2d256i512, bfloat16, forward, uniform routing, swiglu, EP {size}" for size in (1, 2, 8)
    ]
    tables = ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    for table, label in zip(tables, ("loop", "te+alltoall", "gmm+deepep"), strict=True):
        assert [name for name in ("loop", "te+alltoall", "gmm+deepep") if name in table] == [label]
        assert table.count(" 1.0%") == 2
    assert printed(rows).count("ms: median time") == 1, "one legend"


def test_the_load_of_the_ranks_tells_cases_apart() -> None:
    loads = ("even", "one-empty", "uneven")
    rows = [ok("te", 1.0, case(ep_size=2, rank_load=load), dispatcher="deepep") for load in loads]
    text = printed(rows)
    assert [words in text for words in ("one empty rank", "uneven ranks")] == [True, True]
    titles = [printed(some, 100).splitlines()[0] for some in (rows[2:], rows[:1])]
    assert ["uneven ranks" in title for title in titles] == [True, False], "what all rows share is in the title"


def test_the_legend_explains_the_columns_of_ranks_where_there_are_ranks() -> None:
    assert "skew" not in printed([ok("loop", 3.0)])
    parts = dict.fromkeys(("dispatch_ms", "compute_ms", "combine_ms", "skew_ms"), 0.5)
    text = printed([ok("loop", 3.0, case(ep_size=2), dispatcher="alltoall", **parts)])
    assert all(word in text for word in ("per rank", "slowest rank", "disp,", "comp,", "comb:", "skew:"))


def test_what_was_not_measured_is_a_dash() -> None:
    missing = dict.fromkeys(("time_ms_low", "time_ms_high", "tokens_per_s", "tflops", "converged"))
    text = printed([ok("loop", 3.0, **missing), ok("torch_mm", 2.0, case(256))])
    (line,) = (line for line in text.splitlines() if " loop" in line and "3.000" in line)
    assert line.split()[1:] == ["loop", "3.000", "-", "1.00x", "-", "0.31", "-", "-"]
    assert "nan" not in text.lower()
    assert "<na>" not in text.lower()


def test_no_rows_are_said() -> None:
    assert printed([]).strip() == "No rows of results yet."


@pytest.mark.parametrize(("share", "text"), [(0.004, "0.4%"), (0.0996, " 10%"), (1.2, "120%")])
def test_an_interval_keeps_its_column(share: float, text: str) -> None:
    row = ok("loop", 1.0, time_ms_low=1 - share, time_ms_high=1 + share)
    assert f"1.000 {text}    1.00x" in printed([row])


@pytest.mark.parametrize("time_ms", [0.00123, 0.0999, 9.9996, 99.996, 999.96, 12345.6])
def test_a_time_keeps_its_column(time_ms: float) -> None:
    lines = printed([ok("loop", time_ms), ok("torch_mm", 5000.0)]).splitlines()
    ends = {line.index("1.0%") for line in lines if " 1.0% " in line}
    assert len(ends) == 1


def test_the_time_of_a_cuda_graph_is_shown_where_decoding_is_meant() -> None:
    decode, prefill = case(8), case(4096)
    rows = [ok("loop", 2.0, of, graph_time_ms=0.125) for of in (decode, prefill, case(8, mode="train"))]
    text = printed(rows, 120)
    assert text.count("0.125") == 1, "not for many tokens, and not for a train step"
    assert "graph: ms when a CUDA graph replays the call" in text
    assert "graph" not in printed(rows[1:], 120)


def test_the_time_of_a_cuda_graph_is_shown_for_several_ranks() -> None:
    times = {("symm_mem", "forward"): 0.25, ("symm_mem", "train"): 0.125, ("alltoall", "train"): None}
    rows = [
        ok("triton", 2.0, case(4096, mode=mode, ep_size=2), dispatcher, graph_time_ms=time_ms)
        for (dispatcher, mode), time_ms in times.items()
    ]
    lines = [line.split() for line in printed(rows, 120).splitlines()]
    (titles,) = (line for line in lines if "×fastest" in line)
    place = titles.index("graph") - len(titles)
    found = [line[place] for line in lines if any(word.startswith("triton+") for word in line)]
    assert found == ["0.250", "0.125", "-"]


def test_the_order_of_the_backends_of_a_case_can_be_chosen() -> None:
    rows = [
        ok("te", 1.0, peak_memory_bytes=3000),
        ok("loop", 3.0, peak_memory_bytes=1000),
        bad("gmm", Status.oom, "12 GiB wanted"),
        ok("torch_mm", 2.0, peak_memory_bytes=None),
    ]
    orders = {}
    for sort in SORTS:
        console = Console(file=io.StringIO(), width=80)
        console.print(summary(to_frame(rows), sort))
        found = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        orders[sort] = [line.split()[0] for line in found if line.startswith(("te ", "loop ", "gmm ", "torch_mm "))]
    assert orders == {
        "time": ["te", "torch_mm", "loop", "gmm"],
        "memory": ["loop", "te", "gmm", "torch_mm"],
        "backend": ["loop", "gmm", "te", "torch_mm"],
    }
    with pytest.raises(UsageError, match="--sort speed: it must be one of time, memory, backend"):
        summary(to_frame(rows), "speed")
