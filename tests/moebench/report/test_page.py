"""The page needs no other file, escapes what it shows, and agrees with the frame about every row."""

import json
import re
import shlex
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from moebench.cli.app import app
from moebench.errors import ResultsError, UsageError
from moebench.report.folder import write_report
from moebench.report.page import page
from moebench.report.plots.figures import draw
from moebench.results.frame import load, to_frame, write
from moebench.results.record import Record, Status
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.document import GateDocument
from moebench.verdicts.gate import gate
from moebench.workload.selection import filter_jobs, select
from tests.moebench.drawn import bad, case, family, ok
from tests.moebench.gated import gated, job_of, one_of_each, steady, waits

PUBLISHED = sorted(path.parent for path in Path("results/published").glob("*/environment.json"))
PICTURES = sorted(Path("results/published").glob("h200-2026-11-23/plots/throughput-qwen3-*.svg"))
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=y>\"&"


def page_of(rows: list[Record], folder: Path = Path("nowhere")) -> str:
    return page(to_frame(rows), {}, folder)


@cache
def published(folder: Path) -> tuple[pd.DataFrame, str]:
    """Return the published results of a folder, and their page with some pictures."""
    frame = load(folder)
    return frame, page(frame, {path.stem: path.read_bytes() for path in PICTURES}, folder)


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}">') :].partition("</section>")[0]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_the_page_of_published_results_stands_alone_and_is_small(folder: Path) -> None:
    frame, html = published(folder)
    assert len(html) < 300_000 + 4 / 3 * sum(path.stat().st_size for path in PICTURES), (
        "base64 takes four bytes for three"
    )
    sources = re.findall(r'\b(?:src|href)="([^"]{0,30})', html)
    assert sources
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert section(html, "results").count("<tr data-backend") == len(frame)
    assert "torch 2." in section(html, "environment").replace("</dt><dd>", " ")


def test_nothing_that_a_result_says_becomes_markup() -> None:
    rows = [
        *family("loop"),
        bad(case(512), Status.crash, backend=HOSTILE, detail=HOSTILE),
        bad(case(512, routing=f"trace:{HOSTILE}"), Status.mismatch, parity_worst=7.0, parity_worst_tensor=HOSTILE),
    ]
    html = page_of(rows)
    assert "<script>alert" not in html
    assert "<img src=http" not in html
    assert html.count("<script>") == 1
    assert text_of(section(html, "extremes")).count("<script>alert('x')</script>") == 4, "shown, as text"
    backends = re.findall(r'data-backend="([^"]*)"', html)
    assert HOSTILE in map(unescape, backends), "no quote ends the attribute early"


def test_a_row_shows_its_figures_and_a_failure_none() -> None:
    wrong = bad(case(256), Status.mismatch, parity_worst=37.0, parity_worst_tensor="output")
    rows = [ok(case(256), "loop", 4.0, peak_memory_bytes=3 * 2**29), ok(case(256), "gmm", 2.0), wrong]
    html = page_of(rows)
    lines = table_of(html, "results")
    loop, gmm, torch_mm = (
        next(line for line in lines if line["backend"] == name) for name in ("loop", "gmm", "torch_mm")
    )
    assert (loop["ms"], gmm["ms"]) == ("4.000", "* 2.000")
    assert (loop["× fastest"], gmm["× fastest"]) == ("2.00", "1.00")
    assert loop["±"] == "15%"
    assert loop["peak memory"] == "1.50 GiB"
    assert loop["tokens/s"] == "64.0K"
    assert (torch_mm["status"], torch_mm["ms"], torch_mm["tokens/s"], torch_mm["error"]) == ("mismatch", "", "", "37")
    verdict = text_of(section(html, "verdict"))
    assert "2 ok" in verdict
    assert "1 mismatch" in verdict
    assert "Some jobs failed." in verdict
    assert "were timed in 1 cases. The fastest backend, where noise does not blur it: gmm in 1" in verdict


def titles_of(html: str, name: str) -> list[str]:
    return re.findall(r'<th scope="col">([^<]*)</th>', section(html, name))


def table_of(html: str, name: str) -> list[dict[str, str]]:
    """Return the rows of a section's table, with the text of each cell by the title of its column."""
    rows = re.findall(r"<tr data-backend.*?</tr>", section(html, name), re.DOTALL)
    cells = [[unescape(cell) for cell in re.findall(r"<td [^>]*>([^<]*)</td>", row)] for row in rows]
    return [dict(zip(titles_of(html, name), some, strict=True)) for some in cells]


def test_the_best_backend_of_each_case_has_its_lead_and_its_memory() -> None:
    exact = {"time_ms_low": 1.0, "time_ms_high": 1.0}
    rows = [
        ok(case(64), "gmm", 1.0, **exact, peak_memory_bytes=2**20, graph_time_ms=0.9),
        ok(case(64), "te", 1.02, time_ms_low=1.02, time_ms_high=1.02, peak_memory_bytes=2**30),
        ok(case(64), "loop", 3.0, time_ms_low=3.0, time_ms_high=3.0, graph_time_ms=0.5),
        *(ok(case(1024, mode="train"), name, ms) for name, ms in (("te", 2.0), ("gmm", 9.0))),
        bad(case(1024, mode="train"), Status.mismatch, "loop", parity_worst=9.0),
        ok(case(128), "alone", 1.0),
    ]
    few, many = table_of(page_of(rows), "best")
    assert (few["tokens"], few["mode"], few["fastest"], few["ms"]) == ("64", "forward", "gmm or te", "1.000")
    assert (few["next"], few["× fastest"], few["peak memory"]) == ("loop", "3.00×", "1.00 MiB")
    assert (few["fastest as CUDA graph"], few["graph ms"]) == ("loop", "0.500")
    assert (many["tokens"], many["fastest"], many["next"], many["× fastest"]) == ("1024", "te", "gmm", "4.50×")
    assert many["graph ms"] == ""
    assert "graph ms" not in titles_of(page_of(rows[3:]), "best"), "no step of decoding was captured"
    assert "No case was timed with two or more backends." in page_of(rows[-1:])


def test_a_noisy_backend_behind_a_clear_second_is_no_tie() -> None:
    rows = [ok(case(64), name, ms, time_ms_low=ms, time_ms_high=ms) for name, ms in (("a", 1.0), ("b", 1.2))]
    (best,) = table_of(page_of([*rows, ok(case(64), "c", 2.5, time_ms_low=0.9, time_ms_high=9.0)]), "best")
    assert (best["fastest"], best["next"]) == ("a", "b")


def test_each_context_of_training_is_beside_plain() -> None:
    memory = {"peak_memory_bytes": 2**30, "saved_memory_bytes": 2**20}
    plain = ok(case(64, mode="train"), "te", 2.0, **memory)
    other = ok(case(64, mode="train", context="checkpoint"), "te", 3.0, peak_memory_bytes=2**29, saved_memory_bytes=0)
    first, second = table_of(page_of([other, plain]), "contexts")
    assert [first[name] for name in ("backend", "context", "ms", "× plain")] == ["te", "plain", "2.000", "1.00×"]
    assert [second[name] for name in ("context", "ms", "× plain")] == ["checkpoint", "3.000", "1.50×"]
    assert (second["peak memory"], second["peak × plain"], second["saved × plain"]) == ("512 MiB", "0.50×", "0.00×")
    assert 'id="contexts"' not in page_of([plain])


def test_both_tables_have_what_the_filters_read() -> None:
    html = page_of([ok(case(count, routing=routing), name) for count, routing, name in TWO_AND_TWO])
    for name, most in (("best", 2), ("results", 4)):
        found = re.findall(r'data-tokens="(\d+)" data-mode="\w+" data-routing="(\w+)"', section(html, name))
        assert len(found) == most
        assert set(found) == {("64", "uniform"), ("1024", "zipf")}
    chosen = re.findall(r'<option value="(\w+)">', html.partition('data-filter="tokens"')[2].partition("</select>")[0])
    assert chosen == ["64", "1024"], "in numeric order"


TWO_AND_TWO = [(count, routing, name) for count, routing in ((64, "uniform"), (1024, "zipf")) for name in "ab"]


def test_a_step_of_decoding_has_its_time_as_a_graph() -> None:
    rows = [ok(case(count), "a", 2.0, graph_time_ms=1.5) for count in (64, 1024)]
    few, many = table_of(page_of(rows), "results")
    assert (few["graph ms"], many["graph ms"]) == ("1.500", "")


def test_several_ranks_have_their_time_as_a_graph() -> None:
    rows = [ok(case(1024, ep_size=2), "a", 2.0, "symm_mem", graph_time_ms=1.5), ok(case(1024, ep_size=2), "a", 3.0)]
    html = page_of(rows)
    (best,) = table_of(html, "best")
    assert (best["fastest as CUDA graph"], best["graph ms"]) == ("a+symm_mem", "1.500")
    assert [row["graph ms"] for row in table_of(html, "results")] == ["1.500", ""]


def test_every_reason_is_said_once_in_the_verdict() -> None:
    failures = [bad(case(count), Status.unsupported, "te", detail="needs SM100\nmore") for count in (8, 16)]
    rows = [*failures, ok(case(8), "loop", flags=("synchronises",))]
    verdict = text_of(section(page_of(rows), "verdict"))
    assert verdict.count("needs SM100") == 1
    assert "te: unsupported x2: needs SM100" in verdict
    assert "! synchronises: the call waits for the GPU, so its time includes host time (loop)" in verdict
    assert "The other jobs could not run; the reasons are below." in verdict
    verdict = text_of(section(page_of(failures), "verdict"))
    assert "No job could run; the reasons are below." in verdict
    assert "The ok jobs" not in verdict


def test_the_parts_that_vary_are_columns_and_filters() -> None:
    html = page_of(family("loop") + family("torch_mm", mode="train") + family("loop", routing="zipf"))
    assert titles_of(html, "results")[:4] == ["tokens", "mode", "setting", "backend"]
    filters = re.findall(r'data-filter="(\w+)"', html)
    assert filters == ["backend", "tokens", "mode", "routing"], "a filter of one value is none"


@pytest.mark.parametrize("measured", [False, True])
def test_the_page_says_whether_there_are_ceilings(measured: bool) -> None:
    html = page_of([ok(case(256), roofline_fraction=0.5 if measured else None)])
    assert ("measured no ceilings" in html) is not measured
    assert ("of roofline" in titles_of(html, "results")) is measured


def test_each_environment_of_merged_results_is_shown(tmp_path: Path) -> None:
    (tmp_path / "environments").mkdir()
    written = [json.loads((folder / "environment.json").read_text()) for folder in PUBLISHED[:2]]
    for at, facts in enumerate(written):
        (tmp_path / "environments" / f"{at}.json").write_text(json.dumps(facts))
    shown = text_of(section(page_of(family("te"), tmp_path), "environment"))
    assert all(facts["env_id"] in shown for facts in written)
    assert "no environment.json" in page_of(family("te"), tmp_path / "environments")
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"environment\.json"):
        page_of(family("te"), tmp_path)


def test_extremes_come_in_their_order() -> None:
    rows = [ok(case(count), "loop", count / 10, parity_worst=1 / count) for count in (16, 32, 64)]
    rows += [ok(case(16), "gmm", 0.4, parity_worst=0.01)]
    shown = section(page_of(rows), "extremes")
    slow, inaccurate = shown.partition("Least accurate")[::2]
    assert re.findall(r"(\d+) tokens", text_of(slow)) == ["64", "32", "16", "16"]
    assert re.findall(r"(\d+) tokens", text_of(inaccurate)) == ["16", "32", "64", "16"]
    assert "1.600 ms, 4 times as long as the fastest backend of its case" in text_of(slow)
    assert "no sweep on this machine has this case" in shown
    assert "Failed" not in shown


def test_the_time_is_that_of_the_jobs_and_their_parts() -> None:
    rows = [ok(case(count), "a", job_s=seconds, timing_s=1.0) for count, seconds in ((8, 2.0), (16, 3.0))]
    html = section(page_of([*rows, ok(case(8), "b", job_s=15.0, parity_s=10.0)]), "time")
    shown = text_of(html)
    assert "20 s in 3 jobs: parity 50% , timing 10% , rest 40% ." in shown
    assert shown.index("b 15.0 s in 1 jobs") < shown.index("a 5.0 s in 2 jobs, the longest 3.0 s")
    assert re.findall(r'class="part timing" style="width: ([\d.]+)%', html) == ["0.00", "10.00"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_each_command_measures_just_the_job_it_stands_at(folder: Path) -> None:
    frame, html = published(folder)
    commands = [unescape(text) for text in re.findall(r'<code class="command">(.*?)</code>', html, re.DOTALL)]
    backends = re.findall(r"<li><b>(.*?)</b>", html)
    assert len(commands) == len(backends) >= min(12, len(frame))
    for command, backend in zip(commands, backends, strict=True):
        (job,) = _jobs(command)
        assert backend == job.backend + (f"+{job.dispatcher}" if job.case.ep_size > 1 else "")


def _jobs(command: str) -> Any:
    """Return the jobs that a command runs."""
    program, run, sweep, *options = shlex.split(command)
    assert (program, run) == ("moebench", "run")
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) <= {"--case", "--only", "--filter", "--device"}
    jobs = select(sweep, [], [], [given["--case"]], [given["--only"]])
    return filter_jobs(jobs, [given["--filter"]] if "--filter" in given else [])


def test_the_command_writes_the_page_beside_the_results(tmp_path: Path) -> None:
    frame = to_frame(family("loop"))
    write(frame, tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == len(draw(frame, ("svg",)).images)
    assert done.output.replace("\n", "") == f"wrote {tmp_path / 'report.html'}"
    other = tmp_path / "other.html"
    CliRunner().invoke(app, ["report", str(tmp_path / "results.parquet"), "--out", str(other)])
    assert other.is_file()
    with pytest.raises(UsageError, match="no folder"):
        write_report(tmp_path, tmp_path / "gone" / "page.html", gate=None)


@pytest.fixture
def gate_file(tmp_path: Path) -> Path:
    """The JSON file of a gate with one job that got slower, one that did not, and one that is missing."""
    slow, same, gone = (
        ok(
            case(count),
            "te",
            sample_rounds=tuple(range(12)),
            samples_ms=tuple(1 + 5 * at % 12 / 1e4 for at in range(12)),
        )
        for count in (8, 16, 32)
    )
    before = [slow, same, gone]
    again = tuple(1 + 7 * at % 12 / 1e4 for at in range(12))
    after = [slow.model_copy(update={"samples_ms": tuple(2 * time for time in again)})]
    after += [same.model_copy(update={"samples_ms": again})]
    result = gate(to_frame(before), to_frame(after), Comparability({}, {}))
    (tmp_path / "gate.json").write_text(GateDocument.of(result).to_json())
    return tmp_path / "gate.json"


def test_the_verdicts_of_a_gate_are_shown_the_worst_first(gate_file: Path) -> None:
    document = GateDocument.read(gate_file)
    assert [job.verdict.value for job in document.remarkable] == ["REGRESSED", "MISSING"]
    html = page(to_frame(family("te")), {}, Path("nowhere"), document)
    verdict = text_of(section(html, "verdict"))
    assert "1 REGRESSED" in verdict
    assert "1 PASS" in verdict
    assert "Exit code 1. A slowdown of 3% or more must not pass." in verdict
    assert verdict.index("+100.0%") < verdict.rindex("MISSING")
    assert case(8).case_id in verdict
    assert case(16).case_id not in verdict
    assert "Exit code" not in text_of(page_of(family("te")))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 99}', None])
def test_what_is_no_gate_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "gate.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ResultsError, match="give what `moebench gate --json` printed"):
        GateDocument.read(file)


def test_an_empty_frame_has_a_page() -> None:
    html = page_of([])
    assert "No row of results" in html
    assert "<tr data-backend" not in html


def test_the_gate_and_the_rows_have_the_gpus_own_time_where_it_was_measured() -> None:
    row = waits(job_of(), steady(), steady(time_ms=0.625))
    after = waits(job_of(), steady(seed=1), steady(time_ms=0.66, seed=2))
    html = page(to_frame([row]), {}, Path("nowhere"), gate=GateDocument.of(gated([row], [after])))
    assert '<td data-title="busy" class="number">+5.6% (' in html
    assert "busy: change of the GPU's own time" in text_of(html)
    assert "GPU busy, ms" in text_of(html)
    assert "0.625" in text_of(html)
    without = page(to_frame(family("loop")), {}, Path("nowhere"), gate=GateDocument.of(one_of_each()))
    assert 'data-title="busy"' not in without
    assert "GPU busy" not in without
