"""`moebench show`, `plots` and `report` read an existing results folder."""

import json
from pathlib import Path

import pytest

from moebench.report.plots import lines
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
