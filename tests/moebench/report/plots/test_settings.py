"""Plots do not depend on the user's settings of matplotlib, and any name can stand in a plot."""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

import moebench
from moebench.report.plots import figures, settings
from moebench.report.plots.figures import breakdown, draw, throughput
from moebench.report.plots.rendering import images
from moebench.results.frame import to_frame
from tests.moebench.drawn import case, family, legend, ok, only, texts

NASTY = ["$a^b", "$\\frac{1}$", "a_b^c\\x%#&~{}", "_hidden:Class", "[red]", "a\x1b[31m\u202eb", "漢字\U0001f600", "$$"]
WRONG: list[dict[str, Any]] = [
    {"text.usetex": True},
    {"figure.dpi": 1.0, "savefig.dpi": 1.0, "savefig.bbox": "tight", "font.size": 1.0},
    {"font.family": "Comic Sans MS", "axes.unicode_minus": False, "svg.fonttype": "none", "savefig.format": "pgf"},
]


def test_the_plots_are_the_same_whatever_the_users_settings_are() -> None:
    (picture,) = throughput(to_frame(family("loop")[:2]))
    expected = images(picture.draw, ("svg", "png"))
    for rc in WRONG:
        with matplotlib.rc_context(rc):
            assert images(picture.draw, ("svg", "png")) == expected
            assert all(matplotlib.rcParams[name] == value for name, value in rc.items() if name != "font.family")


def test_any_name_can_be_drawn() -> None:
    routings = dict(zip(NASTY, [f"trace:{name}" for name in NASTY[:3]] * 3, strict=False))
    rows = [row for name, routing in routings.items() for row in family(name, routing=routing)[:2]]
    lone = [ok(case(64, routing=f"trace:{name}", dtype="float32"), name) for name in NASTY]
    ranks = [ok(case(64, ep_size=2), name, dispatch_ms=1.0, compute_ms=1.0, combine_ms=1.0) for name in NASTY]
    pictures = [*throughput(to_frame([*rows, *lone])), *breakdown(to_frame(ranks))]
    assert [len(images(picture.draw, ("svg",))) for picture in pictures] == [1, 1, 1]
    figure = only(throughput(to_frame(family("_hidden:$a_") + family("$"))))
    assert [label.strip() for label in legend(figure)] == ["$", "_hidden:$a_"], "each has its entry, with its own name"
    assert any("$x_" in text for text in texts(only(throughput(to_frame(family("loop", routing="trace:$x_$"))))))


def test_a_long_name_fits_a_file_system_and_differs_from_its_neighbour() -> None:
    rows = [row for end in "ab" for row in family("loop", model="m" * 110 + end)]
    names = [picture.name for picture in throughput(to_frame(rows))]
    assert len(set(names)) == len(names) == 2
    assert max(map(len, names)) < 150


def test_a_picture_that_fails_is_one_line_and_the_others_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = to_frame(family("loop")[:2])
    whole = draw(frame, ("svg",))

    def fail(*arguments: Any) -> None:
        raise ValueError("no such\nthing")

    monkeypatch.setattr(figures.rooflines, "page_figure", fail)
    monkeypatch.setattr(figures, "memory", fail)
    drawn = draw(frame, ("svg",))
    assert drawn.images == {
        name: svg for name, svg in whole.images.items() if name.startswith(("throughput", "parity"))
    }
    assert drawn.failures == [
        "plot of fail: cannot be drawn: ValueError: no such; everything else is written",
        "plot roofline-overview: cannot be drawn: ValueError: no such; everything else is written",
    ]


def test_a_panel_in_a_notebook_takes_any_name() -> None:
    rows = [ok(case(64, ep_size=2), name, dispatch_ms=1.0, compute_ms=1.0, combine_ms=1.0) for name in ("$a^", "$b_")]
    axes = moebench.plot(to_frame(rows), "breakdown", ax=Figure().add_subplot())
    axes.get_figure(root=True).draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$a^", "$b_"]


def test_the_command_line_imports_matplotlib_without_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import it anew: the environment and the working folder are then as before."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(settings.importlib, "import_module", lambda name: seen.append((Path.cwd(), name)))
    seen: list[tuple[Path, str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "nosuch")
    monkeypatch.delenv("MATPLOTLIBRC", raising=False)
    settings.import_matplotlib()
    (tmp_path / "matplotlibrc").touch()
    settings.import_matplotlib()
    assert [where.name for where, _ in seen] == [tmp_path.name, "mpl-data"]
    assert (settings.os.environ["MPLBACKEND"], "MATPLOTLIBRC" in settings.os.environ) == ("nosuch", False)
    assert Path.cwd() == tmp_path
