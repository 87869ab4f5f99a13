"""No text that somebody else wrote reaches a terminal, a log of GitHub or a CSV as anything but text."""

import json
import os
import re
import subprocess
import sys

import pytest

from moebench.cli import console
from moebench.results.journal import Journal
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, ok

ESC, BIDI = "\x1b[31mred\x1b]0;title\x07", "\u202egnp"
NAME = f"=mine:[red]{ESC}{BIDI}"
DETAIL = f"::stop-commands::x {ESC} [/] {BIDI}\nmore ##[add-mask]x"
TRACE = f"trace:$a_$^{{{BIDI}{ESC}"


@pytest.fixture
def folder(tmp_path):
    """A folder whose results hold nasty texts wherever results hold texts."""
    rows = [
        ok(case(64, routing=TRACE), NAME, flags=(DETAIL,)),
        ok(case(64, routing=TRACE), "loop", time_ms=1.0),
        bad(case(64), Status.crash, NAME, detail=DETAIL),
        bad(case(64), Status.mismatch, "loop", parity_worst=7.0, parity_worst_tensor=ESC),
    ]
    place = tmp_path / f"{NAME.replace('/', '')}"
    place.mkdir()
    for row in rows:
        Journal(place / "journal.jsonl").append(row)
    return place


def assert_clean(text):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text), text
    assert not re.search(r"^\s*::(?!error|warning)|##\[", text, re.MULTILINE), text


@pytest.mark.parametrize("columns", [40, 80, 400])
@pytest.mark.parametrize(
    "command",
    [
        ("show", "FOLDER"),
        ("show", "FOLDER", "--json"),
        ("gate", "FOLDER", "FOLDER", "--github"),
        ("compare", "FOLDER", "OTHER"),
        ("compare", "FOLDER", "OTHER", "--csv"),
        ("history", "CASE", "FOLDER", "OTHER"),
        ("show", f"no such folder {ESC}{BIDI}"),
        ("show", "FOLDER", ESC),
        ("run", "SWEEP"),
    ],
)
def test_no_command_prints_a_control_or_a_command_of_github(moebench, folder, monkeypatch, command, columns):
    for its_console in (console.out, console.err):
        monkeypatch.setattr(its_console, "width", columns)
    other = folder.with_name("::other")
    other.mkdir()
    (other / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes())
    sweep = folder.with_name("sweep.toml")
    sweep.write_text('"x\\u001b[31m\\u202e" = 1\n')
    names = {"FOLDER": folder, "OTHER": other, "CASE": case(64, routing=TRACE).case_id, "SWEEP": sweep}
    found = moebench(*(names.get(word, word) for word in command))
    assert_clean(found.out)
    assert_clean(found.err)
    if columns > 40:
        assert r"\x1b" in found.out + found.err or r"\u001b" in found.out, "the text is shown, as text"
    if "--json" in command:
        assert json.loads(found.out)[0]["backend"] == NAME, "JSON keeps the text"
    if "--csv" in command:
        assert not re.search(r'(^|,)"?[=+@]', found.out, re.MULTILINE)


def test_markup_in_a_text_is_text(capsys):
    with console.progress_bar() as progress:
        progress.add_task("[red]x[/nothing]")
        progress.print("[bold]y")
        assert str(progress.columns[-1].render(progress.tasks[0])) == "[red]x[/nothing]"
    console.out.print("[bold]z")
    printed = capsys.readouterr()
    assert ("[bold]y" in printed.err, printed.out) == (True, "[bold]z\n")


def test_each_message_is_one_line_and_results_keep_their_lines(capsys):
    console.err.print("a\nb\tc")
    console.out.print("a\nb")
    printed = capsys.readouterr()
    assert (printed.err, printed.out) == ("a\\nb\\tc\n", "a\nb\n")


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_terminal_a_progress_bar_prints_nothing(capsys, monkeypatch, dumb):
    if dumb:  # a terminal on which no line can be drawn again
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(console, "err", console._Messages(stderr=True, force_terminal=True, soft_wrap=True))
    with console.progress_bar() as progress:
        progress.update(progress.add_task("x", total=2), advance=1)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_progress_bar_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "err", console._Messages(stderr=True, force_terminal=True, force_interactive=True))
    with console.progress_bar() as progress:
        progress.update(progress.add_task("job", total=2), advance=1)
    assert "job" in capsys.readouterr().err


def test_our_own_colours_reach_a_terminal(monkeypatch, capsys):
    terminal = console._Console(force_terminal=True, color_system="standard", markup=False, highlight=False)
    terminal.print(ESC, style="red")
    assert capsys.readouterr().out.startswith("\x1b[31m\\x1b[31mred\\x1b]0;title")


def test_no_command_depends_on_settings_of_matplotlib(folder, tmp_path):
    """matplotlib reads the file in the working folder first. Either of the two settings would end its import."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe broken")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "nosuch"}
    command = [sys.executable, "-m", "moebench", "history", case(64).case_id, folder, "--plot", "a.svg"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "wrote a.svg\n")
