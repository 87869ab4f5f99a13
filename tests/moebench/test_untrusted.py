"""Files and places that a user names: what is wrong with them is one line, and nothing is written elsewhere."""

import errno
import json
import math
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from moebench.errors import ResultsError, first_mistake
from moebench.results.frame import ARROW_SCHEMA, PARQUET_NAME, load, to_frame, write
from moebench.results.journal import Journal
from moebench.results.record import Record
from tests.moebench.fuzzed import files_in
from tests.moebench.gated import H200, job_of, ok, steady, waits

ROOT = Path(__file__).parents[2]
CASE = job_of(64).case.case_id
LONG = "x" * 300
DIGITS = "9" * 6000


@pytest.fixture
def results(folders):
    """The results folders of `folders`, with environments, and `flat` with a Parquet file alone."""
    environment = H200.model_copy(update={"env_id": "e"})
    for name in ("same", "again", "slow"):
        (folders / name / "environment.json").write_text(environment.to_json())
    (folders / "flat").mkdir()
    write(load(folders / "same"), folders / "flat")
    return folders


def one_line(found, *words, code=2):
    assert found.code == code, found
    (line,) = found.err.splitlines()
    for word in words:
        assert word in line, line
    return True


# Names that become paths


@pytest.mark.parametrize("env_id", ["/tmp/moebench-was-here", "../../../x", "a\0b", "x" * 300])
@pytest.mark.parametrize("command", ["merge same slow --newest --out merged", "baseline update same", "gate same slow"])
def test_an_env_id_leads_nowhere_else(results, moebench, env_id, command):
    environment = json.loads((results / "same" / "environment.json").read_text())
    (results / "same" / "environment.json").write_text(json.dumps({**environment, "env_id": env_id}))
    before = files_in(results)
    assert one_line(moebench(*command.split()), "same/environment.json: env_id = ")
    assert files_in(results) == before


def test_the_name_of_a_gpu_of_300_characters_still_makes_a_baseline(results, moebench):
    gpus = [gpu.model_copy(update={"name": "../" + LONG}) for gpu in H200.gpus]
    environment = H200.model_copy(update={"env_id": "e", "gpus": tuple(gpus)})
    (results / "same" / "environment.json").write_text(environment.to_json())
    assert moebench("baseline", "update", "same").code == 0
    assert [path.name for path in (results / "results/published/baselines").iterdir()] == ["x" * 80 + "-e"]


# Parquet is read as a journal is


def _column(name, *cells):
    def change(table):
        number = table.schema.get_field_index(name)
        return table.set_column(number, name, pa.array(cells, table.schema.field(number).type))

    return change


BROKEN = {
    "status = None": _column("status", None),
    "backend = None": _column("backend", None),
    "flags = None": _column("flags", None),
    "run_id = None": _column("run_id", None),
    "case_id = None": _column("case_id", None),
    "status = 'fine'": _column("status", "fine"),
    "status ok needs a time": _column("time_ms", None),
    "time_ms = 0.0": _column("time_ms", 0.0),
    "time_ms = -1.0": _column("time_ms", -1.0),
    "time_ms = inf": _column("time_ms", float("inf")),
    "time_ms = 1e+308": _column("time_ms", 1e308),
    "samples_ms.0 = 5e-324": _column("samples_ms", [5e-324] * 30),
    "one entry for each sample": _column("sample_rounds", [0]),
    "run_id = '../../x'": _column("run_id", "../../x"),
    "parity_errors = '[1'": _column("parity_errors", "[1"),
    "schema None": _column("schema", None),
    "'backend' is there twice": lambda table: table.append_column("backend", table.column("backend")),
    "of the same job": lambda table: pa.concat_tables([table, table]),
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_row_of_parquet_is_a_record(results, says, moebench):
    path = results / "flat" / PARQUET_NAME
    pq.write_table(BROKEN[says](pq.ParquetFile(path).read()), path)
    assert one_line(moebench("show", "flat"), "flat/results.parquet: ", says)


@pytest.mark.parametrize(
    "command",
    [
        *("plots flat", "report flat", "gate flat same", "gate same flat", f"history {CASE} same flat"),
        *("merge same flat --out merged", "baseline update flat", "compare flat same", "show flat/results.parquet"),
    ],
)
def test_every_command_refuses_a_row_that_is_no_record(results, command, moebench):
    path = results / "flat" / PARQUET_NAME
    pq.write_table(_column("status", None)(pq.ParquetFile(path).read()), path)
    before = files_in(results)
    assert one_line(moebench(*command.split()), "flat/results.parquet: row 1: status = None: ")
    assert files_in(results) == before


@pytest.mark.parametrize("time_ms", [1e308, 5e-324])
def test_a_time_of_two_rounds_that_no_clock_shows_is_refused(results, moebench, time_ms):
    journal = results / "same" / "journal.jsonl"
    row = json.loads(journal.read_text())
    rows = [{**row, "time_ms": time, "round": number} for number, time in enumerate((1.0, time_ms))]
    journal.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert one_line(moebench("show", "same"), "same/journal.jsonl:2: time_ms = ")


def test_the_longest_and_the_shortest_time_over_two_rounds_are_shown(results, moebench):
    journal = results / "same" / "journal.jsonl"
    journal.unlink()
    for number, time_ms in enumerate((1e-12, 1e12)):
        Journal(journal).append(
            ok(job_of(64), [time_ms], round=number, sample_rounds=(number,) * 3, samples_ms=(1.0,) * 3)
        )
    for command in ("show same", "gate same again", "compare same again", f"history {CASE} same again"):
        assert moebench(*command.split()).err == "", command


# Journals


@pytest.mark.parametrize("command", ["show", "plots", "report", "baseline update"])
def test_a_journal_of_garbage_fails(results, moebench, command):
    (results / "same" / "journal.jsonl").write_bytes(b"garbage\n\xff\xfe\n{\n")
    assert one_line(moebench(*command.split(), "same"), "same/journal.jsonl: 3 of 3 lines cannot be read", code=1)


def test_a_torn_line_in_the_middle_is_told_once(results, moebench):
    journal = results / "same" / "journal.jsonl"
    journal.write_text('{"case_id": "to\n' + journal.read_text() + "[" * 100_000 + "\n")
    found = moebench("merge", "same", "--out", "merged")
    assert found.err == (
        "same/journal.jsonl: 2 of 3 lines cannot be read and are left out; "
        "`moebench run --resume same` measures again what is missing\n"
    )
    assert len(load(results / "merged")) == 1


# Places to write


def test_a_link_and_a_pipe_are_written_through(results, moebench):
    Path("target.xml").write_text("old")
    Path("link.xml").symlink_to("target.xml")
    assert moebench("gate", "same", "again", "--junit", "link.xml").code == 0
    assert Path("link.xml").is_symlink()
    assert "testsuite" in Path("target.xml").read_text()
    os.mkfifo("pipe")
    heard = []
    reader = threading.Thread(target=lambda: heard.append(Path("pipe").read_bytes()))
    reader.start()
    assert moebench("gate", "same", "again", "--junit", "pipe").code == 0
    reader.join(timeout=60)
    assert heard == [Path("target.xml").read_bytes()]
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_a_link_to_nothing_makes_its_target(results, moebench):
    Path("link.xml").symlink_to("made.xml")
    assert moebench("gate", "same", "again", "--junit", "link.xml").code == 0
    assert Path("made.xml").is_file()


WRITES = {
    "merge same again --newest --out merged": ("merged",),
    "baseline update same": ("results/published/baselines/nvidia-h200-e",),
    "gate same again --junit gate.xml": ("gate.xml",),
    "gate same again --github": ("summary.md",),
    f"history {CASE} same again --plot history.svg": ("history.svg",),
}


@pytest.mark.parametrize("command", WRITES)
def test_a_read_only_place_is_one_line(results, moebench, monkeypatch, command):
    """Root may write everywhere, so the file system refuses by these functions."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    whole = Path.open

    def refuse(path, *more, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path, mode="r", *more, **options):
        return whole(path, mode, *more, **options) if mode in ("r", "rb") else refuse(path)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert one_line(moebench(*command.split()), WRITES[command][0], "cannot be written: Read-only file system")


@pytest.mark.parametrize("command", [command for command in WRITES if "--github" not in command])
def test_a_disk_that_is_full_at_any_write_is_one_line_and_no_half_of_a_file(results, moebench, monkeypatch, command):
    flush, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    fails_at, ends = 1, []
    monkeypatch.setattr(os, "fsync", full)
    while not ends or ends[-1] != 0:
        calls.clear()
        shutil.rmtree("merged", ignore_errors=True)
        found = moebench(*command.split())
        assert found.code == 0 or one_line(found, WRITES[command][0], "No space left on device")
        assert not list(Path().rglob("*.tmp"))
        ends.append(found.code)
        fails_at += 1
    assert len(ends) == fails_at - 1 > 1


def test_a_file_that_may_not_grow_is_one_line(results, monkeypatch):
    """A child process has a limit on the size of files, as a full disk would."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))}
    monkeypatch.chdir(results)
    command = [sys.executable, "-m", "moebench", "merge", "same", "--out", "merged"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=100, **limit)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "merged: cannot be written: File too large; name another place\n"
    assert not Path("merged").exists()


def test_the_verdict_is_told_although_a_file_cannot_be_written(results, moebench, monkeypatch):
    for place in (".", LONG, "same/journal.jsonl/x"):
        found = moebench("gate", "same", "slow", "--junit", place)
        assert one_line(found, f"{place}: cannot be written: ")
        assert "1 REGRESSED" in found.out
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/nope/x")
    found = moebench("gate", "same", "slow", "--github")
    assert one_line(found, "/nope/x: cannot be written: No such file or directory")
    assert "1 REGRESSED" in found.out


# Names and numbers of a command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", LONG), "File name too long"),
        (("report", "same", "--out", "."), ".: cannot be written: Is a directory"),
        (("merge", "same", "--out", "."), "--out .: it exists and is not an empty folder"),
        (("merge", "same", "--out", LONG), "File name too long"),
        (("gate", "same", "again", "--threshold", DIGITS), "must be a share"),
        (("gate", f"baseline:{LONG}", "same"), "no such baseline"),
        (("history", LONG, "same"), "none of 1 results has this case"),
        (("advise", "--model", f"e{DIGITS}k1d1i1", "--num-tokens", "4"), "must be a model of moebench, or a shape"),
        (("advise", "--model", "e0k1d8i8", "--num-tokens", "4"), "--model e0k1d8i8: n_routed_experts = 0: "),
        (("advise", "--model", "e1k2d8i8", "--num-tokens", "4"), "--model e1k2d8i8"),
        (("advise", "--model", "olmoe", "--num-tokens", "-4"), "--num-tokens -4: Input should be"),
        (("run", LONG, "--dry-run"), "no such file, and no sweep has that name"),
        (("run", "quick", "--dry-run", "--device", f"cuda:{DIGITS}"), "it must be cpu, cuda or cuda:N"),
        (("run", "quick", "--dry-run", "--backend", LONG), "at most 100 characters"),
        (("run", "quick", "--dry-run", "--filter", f"num_tokens={DIGITS}"), "exceeded maximum size"),
        (("run", "quick", "--dry-run", "--filter", LONG), "must be KEY=V1,V2"),
        (("run", "--resume", LONG), "File name too long"),
        (("ab", "", "b", "quick"), "one is empty"),
        (("ab", "\0", "b", "quick"), "an argument cannot have the character NUL"),
        (("show", "caf\udce9"), r"caf\xe9: it must be UTF-8"),
    ],
)
def test_what_no_file_and_no_number_can_be(results, moebench, arguments, words):
    found = moebench(*arguments)
    assert one_line(found, words)
    assert len(found.err) < 700


def test_a_case_that_a_filter_leaves_out_exists(moebench):
    chosen = moebench("list", "quick", "--json", "--filter", "num_tokens=16")
    case_id = json.loads(chosen.out)["jobs"][0]["case_id"]
    refused = moebench("run", "quick", "--dry-run", "--case", case_id, "--filter", "num_tokens=256")
    assert one_line(refused, f"no job is left by --filter 'num_tokens=256' --case {case_id}")
    assert one_line(moebench("run", "quick", "--dry-run", "--case", "x"), "case 'x': quick has no case with that id")


def test_the_report_of_a_run_file_with_wrong_values(results, moebench):
    (results / "same" / "run.json").write_text(json.dumps({"command": 5, "sweep": 5, "sweep_file": ["x"]}))
    found = moebench("report", "same", "--out", "page.html")
    assert (found.code, found.err) == (0, "")


def test_history_in_json_has_no_samples(results, moebench):
    rows = json.loads(moebench("history", CASE, "same", "slow", "--json").out)
    assert len(rows) == 2
    assert not {"samples_ms", "sample_rounds", "sample_marked"} & rows[0].keys()


def test_infinity_is_one_word_in_every_document(results, moebench):
    row = ok(job_of(64), steady(), time_ms_low=-float("inf"), time_ms_high=float("inf"))
    (results / "same" / "journal.jsonl").unlink()
    Journal(results / "same" / "journal.jsonl").append(row)
    (shown,) = json.loads(moebench("show", "same", "--json").out)
    (line,) = (results / "same" / "journal.jsonl").read_text().splitlines()
    assert [(some["time_ms_low"], some["time_ms_high"]) for some in (shown, json.loads(line))] == [("-inf", "inf")] * 2
    assert Journal(results / "same" / "journal.jsonl").read() == ([row], 0)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("samples_ms", [1.25, 0.0, 1.0]),
        ("samples_ms", [1.25, math.nan, 1.0]),
        ("samples_ms", [1.25, None, 1.0]),
        ("samples_ms", [1.25, math.inf, 1.0]),
        ("samples_ms", [1.25]),
        ("sample_rounds", [0, 0, -1]),
        ("sample_rounds", [0]),
        ("sample_marked", [False] * 2),
        ("sample_sessions", [-1, 0, 0]),
        ("busy_samples_ms", [1.0, 1.0, -1.0]),
        ("busy_sample_rounds", [0, 0, 2]),
        ("busy_sample_rounds", [0]),
    ],
)
def test_a_wrong_list_of_samples_is_refused_as_record_refuses_it(tmp_path, name, cell):
    """A Parquet file's lists are checked by columns. A wrong one has the message that Record has for its row."""
    rows = [ok(job_of(64), [1.0]), waits(job_of(128), [1.0], [0.5], sample_marked=(False, True, False))]
    table = pa.Table.from_pandas(to_frame(rows), schema=ARROW_SCHEMA, preserve_index=False)
    pq.write_table(table, tmp_path / "right.parquet")
    assert len(load(tmp_path / "right.parquet")) == 2
    lists = pa.array([table[name][0].as_py(), cell], ARROW_SCHEMA.field(name).type)
    wrong = table.set_column(table.column_names.index(name), ARROW_SCHEMA.field(name), lists)
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    with pytest.raises(ValidationError) as expected:
        Record.model_validate(wrong.to_pylist()[1])
    with pytest.raises(ResultsError) as caught:
        load(tmp_path / "wrong.parquet")
    assert str(caught.value).startswith(f"{tmp_path / 'wrong.parquet'}: row 2: {first_mistake(expected.value)}; ")
