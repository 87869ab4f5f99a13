"""The dashboard has every job of a series of results, needs no other file, and names each change."""

import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebench.cli.app import app
from moebench.report.dashboard import dashboard
from moebench.results.folder import Result
from moebench.results.frame import to_frame, write
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, ok

HOSTILE = "<script>alert('x')</script>"


def result(day: int, scale: float = 1.0, env_id: str = "e", backend: str = "te") -> Result:
    tight = {"time_ms_low": scale, "time_ms_high": scale}
    rows = [
        ok(case(64), backend, scale, **tight),
        ok(case(512, routing="zipf"), "gmm", 3.0),
        bad(case(64), Status.crash, "loop") if day == 2 else ok(case(64), "loop", 5.0),
    ]
    update = {"run_id": f"202611{day:02}-101500-a", "env_id": env_id}
    return Result(to_frame([row.model_copy(update=update) for row in rows]), {})


@pytest.fixture(scope="module")
def html() -> str:
    days = {f"day {day}": result(day, 2.0 if day > 3 else 1.0, "f" if day > 2 else "e") for day in range(1, 6)}
    return dashboard(days)


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}">') :].partition("</section>")[0]


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_every_job_has_a_curve_with_a_dot_for_each_result(html: str) -> None:
    jobs = section(html, "jobs")
    assert jobs.count("<tr data-backend") == jobs.count("<svg") == 3
    assert jobs.count("<circle") == 3 * 5
    assert re.findall(r'class="(slower|faster|failed)"><title>([^<]*)', jobs) == [
        ("failed", "2026-11-02 10:15, not known: crash"),
        ("slower", "2026-11-04 10:15, not known: 2.000 ms"),
    ]
    assert jobs.count("<line ") == 3, "the software changed once, and each curve says so"


def test_each_change_is_named_with_its_ratio(html: str) -> None:
    changes = text_of(section(html, "changes"))
    assert "2026-11-04 10:15 not known → not known 64 tokens, uniform routing te 2.00 times as long" in changes
    assert section(html, "changes").count("<tr data-backend") == 1
    assert "only the newest result has it" not in changes
    steady = dashboard({f"day {day}": result(day) for day in (1, 2, 3)})
    assert "No time has changed." in steady
    newest = dashboard({f"day {day}": result(day, 2.0 if day == 4 else 1.0) for day in (1, 2, 3, 4)})
    assert "only the newest result has it" in text_of(section(newest, "changes"))


def test_the_page_stands_alone_and_shows_no_markup_of_others(html: str) -> None:
    assert not re.findall(r'\b(?:src|href)="(?!#)', html)
    assert "default-src 'none'" in html
    page = dashboard({name: result(day, backend=HOSTILE) for day, name in enumerate((HOSTILE, "b"), 1)})
    assert "<script>alert" not in page
    assert HOSTILE in text_of(page) or "alert('x')" in text_of(page)


def test_a_curve_is_not_joined_across_schemas() -> None:
    days = {f"day {day}": result(day) for day in (1, 2, 3)}
    old = {name: Result(one.frame.assign(schema=1 if name == "day 1" else 2), {}) for name, one in days.items()}
    assert section(dashboard(old), "jobs").count("<polyline") == 2 * 3
    assert section(dashboard(days), "jobs").count("<polyline") == 3


def test_the_command_reads_a_folder_of_results(tmp_path: Path) -> None:
    for day in (1, 2, 3):
        (tmp_path / "series" / f"day{day}").mkdir(parents=True)
        write(result(day).frame, tmp_path / "series" / f"day{day}")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["history", str(tmp_path / "series"), "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert "<h1>3 results</h1>" in page.read_text()
    for wrong, says in (
        (["history", "a-case"], "there are no results"),
        (["history", str(tmp_path / "series"), "--page", str(tmp_path / "no" / "page.html")], "there is no folder"),
        (["history", str(tmp_path / "series"), "--page", str(page), "--json"], "leave the other option out"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code != 0
        assert says in str(refused.exception) + refused.output
