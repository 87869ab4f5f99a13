"""The journal stays readable when its writer is killed."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moebench.errors import ResultsError
from moebench.results import journal as journal_module
from moebench.results.journal import Journal
from moebench.results.record import READABLE, SCHEMA, Record, Status, record
from moebench.workload.case import Case, Job

CASE = Case(
    num_tokens=8,
    n_routed_experts=4,
    n_activated_experts=2,
    dim=16,
    moe_inter_dim=32,
    dtype="float32",
    routing="zipf:1.5",
    expert_bias=True,
    masked_share=0.25,
)


def ok(backend: str = "loop", **measured: Any) -> Record:
    measured = {"time_ms": 1.5, "parity_worst": 0.25, **measured}
    return record(Job(case=CASE, backend=backend), Status.ok, run_id="r", env_id="e", **measured)


def bad(status: Status, **measured: Any) -> Record:
    measured = {"detail": "why", "parity_worst": 3.0, **measured}
    return record(Job(case=CASE, backend="loop"), status, run_id="r", env_id="e", **measured)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def test_journal_gives_back_what_was_appended(journal: Journal) -> None:
    rows = [
        ok(samples_ms=(1.25, 1.5), sample_rounds=(0, 1), flags=("a", "b"), parity_errors={"output": 0.25}),
        bad(Status.mismatch, parity_worst=math.inf, detail="line\nbreak, ünïcode"),
        bad(Status.unsupported, parity_worst=None),
    ]
    for row in rows:
        journal.append(row)
    assert journal.read() == (rows, 0)
    assert list(Journal(journal.path)) == rows
    assert journal.path.read_bytes().count(b"\n") == len(rows)


def test_an_error_that_is_not_a_number_is_infinite(journal: Journal) -> None:
    """A null in a Parquet file would be an error that was not measured."""
    journal.append(bad(Status.mismatch, parity_worst=math.nan, parity_errors={"output": math.nan}))
    (row,) = journal
    assert (row.parity_worst, row.parity_errors) == (math.inf, {"output": math.inf})


def test_a_journal_not_yet_written_is_empty(journal: Journal) -> None:
    assert journal.read() == ([], 0)
    assert not journal.path.exists()


def test_every_row_is_on_disk_when_append_returns(journal: Journal) -> None:
    for number in range(1, 4):
        journal.append(ok())
        assert len(Journal(journal.path).read()[0]) == number


#: What another process may do between two steps of `append`.
CHANGES = {
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "no folder": lambda path: shutil.rmtree(path.parent),
    "another file": lambda path: (path.unlink(), path.write_bytes(b"x")),
    "a link": lambda path: (path.unlink(), path.symlink_to("/dev/full")),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("step", ["before it looks", "before it writes", "after it wrote"])
def test_no_row_is_lost_whenever_the_file_is_replaced(
    tmp_path: Path, change: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`append` neither waits for a reader of the pipe nor believes the file that is there after its writing."""
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.path.parent.mkdir()
    journal.append(ok("a"))
    journal.append(ok("b"))
    add = Journal._add

    def adding(self: Journal, line: bytes) -> None:
        monkeypatch.undo()
        if step == "before it writes":
            CHANGES[change](self.path)
        add(self, line)
        if step == "after it wrote":
            CHANGES[change](self.path)

    if step == "before it looks":
        CHANGES[change](journal.path)
    else:
        monkeypatch.setattr(Journal, "_add", adding)
    journal.append(ok("c"))
    journal.append(ok("d"))
    assert [row.backend for row in journal.read()[0]] == ["a", "b", "c", "d"]
    assert journal.num_restored == 1


def test_no_row_is_lost_if_the_clock_of_files_stands_still(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process overwrites the file between two steps of the clock, and leaves its size as it is."""
    monkeypatch.setattr("moebench.results.journal.time.time_ns", lambda: 5 * 10**9)
    identity = journal_module._identity
    monkeypatch.setattr(journal_module, "_identity", lambda file: (*identity(file)[:-1], 4 * 10**9))
    rows = [ok(name) for name in ("a", "b", "c")]
    for row in rows:
        journal.append(row)
        journal.keep()  # which looks at the file in the same step, too
        journal.path.write_bytes(b"x" * journal.path.stat().st_size)
    journal.keep()
    assert journal.read() == (rows, 0)
    assert journal.num_restored == len(rows)


def test_the_first_row_is_not_lost_to_a_pipe(journal: Journal) -> None:
    os.mkfifo(journal.path)
    journal.append(ok("a"))
    assert [row.backend for row in journal.read()[0]] == ["a"]


@pytest.mark.parametrize("kept", [1, 40, -3, -2])
def test_torn_last_line_is_passed_over(journal: Journal, kept: int) -> None:
    journal.append(ok("loop"))
    with journal.path.open("ab") as file:
        file.write((ok("torch_mm").to_json() + "\n").encode()[:kept])
    rows, torn = journal.read()
    assert ([row.backend for row in rows], torn) == (["loop"], 1)


def test_line_torn_inside_a_character_is_passed_over(journal: Journal) -> None:
    journal.append(ok())
    with journal.path.open("ab") as file:
        file.write('{"detail": "ü'.encode()[:-1])
    assert journal.read() == ([ok()], 1)


def test_torn_line_stays_alone_when_a_restarted_writer_goes_on(journal: Journal) -> None:
    journal.append(ok("loop"))
    with journal.path.open("ab") as file:
        file.write(ok("torn").to_json().encode()[:50])
    restarted = Journal(journal.path)
    restarted.append(ok("torch_mm"))
    restarted.append(ok("gmm"))
    rows, torn = restarted.read()
    assert ([row.backend for row in rows], torn) == (["loop", "torch_mm", "gmm"], 1)


def test_whole_last_line_without_its_newline_is_kept(journal: Journal) -> None:
    journal.path.write_text(ok("loop").to_json())
    journal.append(ok("torch_mm"))
    rows, torn = journal.read()
    assert ([row.backend for row in rows], torn) == (["loop", "torch_mm"], 0)


@pytest.mark.parametrize("schema", [SCHEMA + 1, None])
def test_another_schema_is_refused_with_its_place(journal: Journal, schema: int | None) -> None:
    journal.append(ok())
    fields = {**json.loads(ok().to_json()), "schema": schema, "a_field_of_the_future": 1}
    with journal.path.open("a") as file:
        file.write(json.dumps(fields) + "\n")
    with pytest.raises(ResultsError, match=rf"journal\.jsonl:2: schema {schema}, this moebench reads 1 and 2"):
        journal.read()


@pytest.mark.parametrize("schema", READABLE)
def test_rows_of_every_schema_so_far_are_read_and_keep_it(journal: Journal, schema: int) -> None:
    journal.path.write_text(json.dumps({**json.loads(ok().to_json()), "schema": schema}) + "\n")
    assert [row.schema_version for row in journal] == [schema]


@pytest.mark.parametrize("line", ["[]", "3", "null", '"schema"', '[{"schema": 1}]'])
def test_a_line_that_is_no_object_is_refused_with_its_place(journal: Journal, line: str) -> None:
    journal.append(ok())
    with journal.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=r"journal\.jsonl:2: .*a line holds one record, a JSON object") as caught:
        journal.read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("schema", "says"), [('"2"', "schema '2'"), ("3", "schema 3"), ("null", "schema None")])
def test_a_schema_is_a_number_that_this_moebench_reads(journal: Journal, schema: str, says: str) -> None:
    journal.path.write_text(ok().to_json().replace('"schema":2}', f'"schema":{schema}}}') + "\n")
    with pytest.raises(ResultsError, match=says):
        journal.read()


def test_a_line_that_another_program_wrote_is_read_as_one_of_ours(journal: Journal) -> None:
    row = ok(samples_ms=(1 / 3, 1e-12, 12345678.9012345678), parity_errors={"output": 0.1 + 0.2})
    reordered = json.dumps(dict(reversed(json.loads(row.to_json()).items())))
    journal.path.write_text(f"{row.to_json()}\n{reordered}\n")
    assert journal.read() == ([row, row], 0)
