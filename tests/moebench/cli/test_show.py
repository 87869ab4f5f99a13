"""`moebench show`, `plots` and `report` read an existing results folder."""

import json
from pathlib import Path

import pytest

from moebench.report.plots import lines
from moebench.report.tables.longtable import SORTS
from moebench.results.journal import Journal
from tests.moebench.gated import job_of, ok
from tests.moebench.typed import is_refused


def test_the_results_can_be_shown_again(good_run, moebench):
    folder = good_run.cwd / json.loads(good_run.out)["results"]
    shown = moebench("show", folder)
    assert (shown.code, shown.err) == (0, "")
    for word in ("loop", "torch_mm", "8 tokens", "oom", "runs on paper, not on cpu"):
        assert word in shown.out
    as_json = json.loads(moebench("show", folder, "--json").out)
    assert [row["backend"] for row in as_json] == good_run.backends
    assert as_json[0]["time_ms"] == pytest.approx(json.loads(good_run.out)["records"][0]["time_ms"])


def best_of(tmp_path):
    """Write results of two cases. `torch_mm` is the fastest of the first, and the second is too close to call."""
    times = {64: {"loop": 3.0, "torch_mm": 1.0}, 8: {"loop": 1.01, "torch_mm": 1.0}}
    rows = [ok(job_of(count, name), [time_ms]) for count, some in times.items() for name, time_ms in some.items()]
    for row in rows:
        Journal(tmp_path / "best" / "journal.jsonl").append(row)
    return tmp_path / "best"


def test_the_best_backend_of_each_case_can_be_shown_alone(moebench, tmp_path):
    (tmp_path / "best").mkdir()
    folder = best_of(tmp_path)
    lines = [line.split() for line in moebench("show", folder, "--best").out.splitlines()]
    assert ["64", "torch_mm", "1.000", "95.4", "MiB", "3.00x", "loop"] in lines
    assert ["8", "torch_mm", "~", "loop", "1.000", "95.4", "MiB", "-"] in lines
    assert lines.index(next(line for line in lines if line[:1] == ["8"])) < lines.index(
        next(line for line in lines if line[:1] == ["64"])
    ), "tokens in numeric order"
    found = json.loads(moebench("show", folder, "--best", "--json").out)
    assert [(row["num_tokens"], row["label"], row["close_to"], row["lead"]) for row in found] == [
        (8, "torch_mm", "loop", None),
        (64, "torch_mm", "", 3.0),
    ]


def test_rows_can_be_filtered_and_sorted(moebench, tmp_path):
    (tmp_path / "best").mkdir()
    folder = best_of(tmp_path)
    one = moebench("show", folder, "--filter", "num_tokens=64", "--sort", "backend")
    assert [line.split()[0] for line in one.out.splitlines() if line.startswith(("loop", "torch_mm"))] == [
        "loop",
        "torch_mm",
    ]
    assert len(json.loads(moebench("show", folder, "--json", "--filter", "backend=loop").out)) == 2
    is_refused(moebench("show", folder, "--filter", "num_tokens=9"), "no row is left by --filter num_tokens=9")
    is_refused(moebench("show", folder, "--filter", "tokens=9"), "there is no key 'tokens'")
    is_refused(moebench("show", folder, "--sort", "speed"), "--sort speed: it must be one of time, memory, backend")
    assert f"of a case: {', '.join(SORTS)};" in " ".join(moebench("show", "--help").out.replace("│", "").split())
    is_refused(moebench("show", folder, "--sort", "time", "--best"), "leave one of the two out")
    is_refused(moebench("show", folder, "--sort", "time", "--json"), "leave one of the two out")


def test_the_plots_can_be_drawn_again(good_run, moebench):
    folder = good_run.cwd / json.loads(good_run.out)["results"]
    before = {path.name for path in (folder / "plots").iterdir()}
    for path in (folder / "plots").iterdir():
        path.unlink()
    drawn = moebench("plots", folder)
    assert drawn.code == 0
    assert {path.name for path in (folder / "plots").iterdir()} == before != set()
    assert drawn.out == f"wrote {len(before)} files in {folder / 'plots'}\n"


def test_what_cannot_be_written_is_said_in_one_line(good_run, moebench):
    """`plots` finds a file in place of its folder. `report` finds a folder in place of its file."""
    Path("results.parquet").write_bytes(next(good_run.cwd.glob("results/runs/*/results.parquet")).read_bytes())
    Path("plots").touch()
    Path("page.html").mkdir()
    for arguments, place in (
        (("plots", "results.parquet"), "plots"),
        (("report", ".", "--out", "page.html"), "page.html"),
    ):
        is_refused(moebench(*arguments), f"{place}: cannot be written: ")


@pytest.mark.parametrize("command", ["plots", "report"])
def test_a_plot_that_cannot_be_drawn_is_one_line_and_all_else_is_written(folders, moebench, monkeypatch, command):
    page_figure = lines.page_figure

    def figure(rows, metric):
        if metric.name == "memory":
            raise RuntimeError("no \x1b[31mlatex")
        return page_figure(rows, metric)

    monkeypatch.setattr(lines, "page_figure", figure)
    shown = moebench(command, "same")
    why = r"plot memory-overview: cannot be drawn: RuntimeError: no \x1b[31mlatex; everything else is written"
    assert (shown.code, shown.err) == (1, f"{why}\n")
    assert shown.out == {"plots": "wrote 2 files in same/plots\n", "report": "wrote same/report.html\n"}[command]
    assert (
        len([path for path in Path("same").rglob("*.*") if path.suffix in (".png", ".svg", ".html")])
        == ({"plots": 2, "report": 1}[command])
    )


@pytest.mark.parametrize("command", [("show",), ("show", "--json"), ("plots",)])
def test_a_folder_without_results(moebench, command):
    Path("empty").mkdir()
    (Path("empty") / "text.parquet").write_text("no parquet")
    for path in ("empty", "missing", "empty/text.parquet"):
        is_refused(moebench(*command, path), path)
    assert {path.name for path in Path("empty").iterdir()} == {"text.parquet"}
