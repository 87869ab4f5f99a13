"""Records stay the same when they go from a journal to a frame, to files, and back."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from moebench.errors import ResultsError
from moebench.results import frame as frames
from moebench.results.frame import (
    COLUMNS,
    CSV_NAME,
    PARQUET_NAME,
    SAMPLE_COLUMNS,
    load,
    parity_errors,
    to_frame,
    to_json,
    write,
)
from moebench.results.journal import Journal
from moebench.results.record import Record, Status, record
from moebench.verdicts.findings import job_of
from moebench.workload.case import Case, Job

PUBLISHED = Path(__file__).parents[3] / "results" / "published"
FOLDERS = sorted(path.parent for path in PUBLISHED.rglob("results.parquet"))
SHAPE: dict[str, Any] = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}
ALL = {
    "flags": ("clocks", "a;b"),
    "executed": "grouped_mm > cutlass",
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "gpu_uuid": "GPU-1",
    "node": "n1",
    "l2": "cold",
    "time_ms_low": 1.4,
    "time_ms_high": 1.6,
    "converged": False,
    "host_time_ms": 1.7,
    "graph_time_ms": 1.375,
    "busy_ms": 1.125,
    "busy_ms_low": 1.0,
    "busy_ms_high": 1.25,
    "backward_ms": 0.9,
    "dispatch_ms": 0.125,
    "compute_ms": 0.25,
    "combine_ms": 0.375,
    "dispatch_bytes": 2**53 + 9,
    "skew_ms": 0.0625,
    "warmup_ms": 800.0,
    "num_samples": 3,
    "samples_ms": (1.5, 1.25, 1 / 3),
    "sample_rounds": (0, 0, 1),
    "sample_sessions": (0, 0, 1),
    "sample_marked": (False, True, False),
    "busy_samples_ms": (1.125, 1 / 7),
    "busy_sample_rounds": (0, 1),
    "sm_clock_mhz": 1980,
    "num_steps": 2,
    "step_p50_ms": 1.375,
    "step_p99_ms": 1.5,
    "expert_rows": (3, 0, 1, 4),
    "rank_rows": (3, 5),
    "expert_skew": 2.0,
    "rank_skew": 1.25,
    "tokens_per_s": 1e6,
    "tflops": 0.1,
    "roofline_fraction": 0.5,
    "roofline_ms": 0.75,
    "dense_ms": 0.7,
    "grouped_ms": 0.8,
    "collective_ms": 0.3,
    "copy_gb_per_s": 4200.0,
    "peak_memory_bytes": 2**53 + 1,
    "saved_memory_bytes": 0,
    "cached_weight_bytes": 2**53 + 7,
    "reserved_memory_bytes": 2**53 + 5,
    "outside_torch_bytes": 2**53 + 3,
    "untracked_memory_bytes": 2**53 + 7,
    "compiled_graphs": 9,
    "graph_breaks": 6,
    "recompiled_graphs": 4,
    "parity_worst_tensor": "output",
    "parity_errors": {"output": 0.25, "dX": 0.0},
    "deterministic": True,
    "job_s": 2.0,
    "setup_s": 0.25,
    "parity_s": 0.5,
    "timing_s": 0.75,
    "ceilings_s": 0.125,
}


def case() -> Case:
    return Case(num_tokens=8, dtype="float32", **SHAPE)


def ok(backend: str = "loop", **measured: Any) -> Record:
    measured = {"time_ms": 1.5, "parity_worst": 0.25, **measured}
    return record(Job(case=case(), backend=backend), Status.ok, run_id="r", env_id="e", **measured)


def bad(status: Status, backend: str = "gmm", **measured: Any) -> Record:
    measured = {"detail": 'says, "no"\nin two lines', **measured}
    return record(Job(case=case(), backend=backend), status, run_id="r", env_id="e", **measured)


def rows() -> list[Record]:
    return [
        ok(**ALL),
        ok("torch_mm"),
        bad(Status.mismatch, parity_worst=math.inf, parity_errors={"output": math.inf, "dX": 2.5}),
        bad(Status.unsupported, "te"),
    ]


def test_columns_are_the_fields_of_a_record_in_their_order_as_the_journal_names_them() -> None:
    assert tuple(json.loads(ok().to_json())) == COLUMNS
    assert list(to_frame(rows()).columns) == list(COLUMNS)


def test_values_come_through() -> None:
    frame = to_frame(rows())
    full = frame.iloc[0]
    lists = ("flags", "expert_rows", "rank_rows", *SAMPLE_COLUMNS)
    assert {name: tuple(full[name]) for name in lists} == {name: ALL[name] for name in lists}
    plain = [name for name in ALL if name not in (*lists, "parity_errors")]
    assert {name: full[name] for name in plain} == {name: ALL[name] for name in plain}
    assert parity_errors(full["parity_errors"]) == {"output": 0.25, "dX": 0.0}
    assert frame["status"].tolist() == ["ok", "ok", "mismatch", "unsupported"]
    assert frame["parity_worst"].iloc[2] == math.inf
    assert parity_errors(frame["parity_errors"].iloc[2]) == {"output": math.inf, "dX": 2.5}


def test_what_was_not_measured_is_null_and_never_zero() -> None:
    bare = to_frame(rows()).iloc[1]
    unmeasured = set(ALL) - {"flags"}
    assert {name for name in unmeasured if not pd.isna(bare[name])} == set()
    assert parity_errors(bare["parity_errors"]) == {}
    assert list(bare["flags"]) == []


@pytest.mark.parametrize("some", [[], rows()[1:2], rows()[3:], rows()], ids=["none", "nulls", "failed", "full"])
def test_a_column_has_one_dtype_whatever_it_holds(some: list[Record], tmp_path: Path) -> None:
    frame = to_frame(some)
    full = to_frame(rows())
    assert frame.dtypes.to_dict() == full.dtypes.to_dict()
    assert not [name for name, dtype in frame.dtypes.items() if dtype == "object"]
    write(frame, tmp_path)
    assert_frame_equal(load(tmp_path), frame)
    assert pd.concat([frame, full]).dtypes.to_dict() == full.dtypes.to_dict()


def test_parquet_files_of_different_runs_have_one_schema(tmp_path: Path) -> None:
    schemas = []
    for number, some in enumerate(([], rows()[3:], rows())):
        (tmp_path / str(number)).mkdir()
        write(to_frame(some), tmp_path / str(number))
        schemas.append(pq.read_schema(tmp_path / str(number) / PARQUET_NAME))
    assert schemas[0].equals(schemas[1], check_metadata=True)
    assert schemas[1].equals(schemas[2], check_metadata=True)
    assert pd.read_parquet(tmp_path / "2" / PARQUET_NAME)["backend"].tolist() == ["loop", "torch_mm", "gmm", "te"]


def test_csv_has_all_but_the_samples(tmp_path: Path) -> None:
    write(to_frame(rows()), tmp_path)
    table = pd.read_csv(tmp_path / CSV_NAME, dtype={"peak_memory_bytes": "Int64"})
    assert list(table.columns) == [name for name in COLUMNS if name not in SAMPLE_COLUMNS]
    assert table["flags"].iloc[0] == "clocks;a;b"
    assert table["expert_rows"].fillna("").tolist() == ["3;0;1;4", "", "", ""]
    assert table["detail"].iloc[2] == 'says, "no"\nin two lines'
    assert table["parity_worst"].iloc[2] == math.inf
    assert table["peak_memory_bytes"].iloc[0] == 2**53 + 1
    assert table["tflops"].isna().tolist() == [False, True, True, True]


def test_the_load_of_the_ranks_comes_through(tmp_path: Path) -> None:
    spread = Job(case=Case(num_tokens=8, ep_size=2, rank_load="one-empty", **SHAPE), backend="te", dispatcher="deepep")
    write(to_frame([ok(), record(spread, Status.oom, run_id="r", env_id="e", detail="12 GiB wanted")]), tmp_path)
    assert load(tmp_path)[["ep_size", "rank_load", "dispatcher"]].to_numpy().tolist() == [
        [1, "even", "local"],
        [2, "one-empty", "deepep"],
    ]


def test_every_field_that_may_be_null_is_tried_full() -> None:
    untried = {
        "status",
        "detail",
        "model",
        "time_ms",
        "parity_worst",
        "round",
        "num_rounds",
        "check",
        *Case.model_fields,
    }
    assert {name for name, field in Record.model_fields.items() if not field.is_required()} - untried <= {
        *ALL,
        "schema_version",
    }


def test_a_file_from_before_there_was_a_column_has_null_there(tmp_path: Path) -> None:
    pq.write_table(_arrow().drop_columns(["dense_ms", "sample_marked"]), tmp_path / "old.parquet")
    frame = load(tmp_path / "old.parquet")
    assert list(frame.columns) == list(COLUMNS)
    assert frame[["dense_ms", "sample_marked"]].isna().all(axis=None)
    assert frame["grouped_ms"].iloc[0] == 0.8


def test_of_a_job_measured_again_the_later_record_counts() -> None:
    first, other, again = ok(time_ms=1.0), ok("torch_mm"), ok(time_ms=2.0)
    frame = to_frame([first, other, again])
    assert frame["backend"].tolist() == ["loop", "torch_mm"]
    assert frame["time_ms"].iloc[0] == 2.0


def test_the_rounds_of_a_job_are_one_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    times = (1.0, 1.5, 1.25, 9.0)
    for number, time_ms in [(1, times[1]), (0, 9.0), (2, times[2]), (0, times[0])]:
        samples = {"samples_ms": (time_ms,) * 2, "sample_rounds": (number,) * 2, "num_samples": 2}
        journal.append(ok(time_ms=time_ms, round=number, **samples))
        journal.append(ok("torch_mm", round=number))
    frame = load(tmp_path)
    assert frame["backend"].tolist() == ["loop", "torch_mm"]
    assert frame["num_rounds"].tolist() == [3, 3]
    assert frame["round"].isna().all()
    assert frame["time_ms"].iloc[0] == 1.25
    assert list(frame["samples_ms"].iloc[0]) == [1.0, 1.0, 1.5, 1.5, 1.25, 1.25]
    assert list(frame["sample_rounds"].iloc[0]) == [0, 0, 1, 1, 2, 2]
    write(frame, tmp_path)
    assert_frame_equal(load(tmp_path / PARQUET_NAME), frame)


def test_a_parquet_file_from_before_a_column_opens_with_its_default(tmp_path: Path) -> None:
    _write_table(tmp_path / "old.parquet", _arrow().drop_columns(["round", "num_rounds", "host_time_ms", "flags"]))
    frame = load(tmp_path / "old.parquet")
    assert list(frame.columns) == list(COLUMNS)
    assert frame.dtypes.to_dict() == to_frame(rows()).dtypes.to_dict()
    assert (frame["round"].tolist(), frame["num_rounds"].tolist()) == ([0] * 4, [1] * 4)
    assert frame["host_time_ms"].isna().all()
    assert [list(flags) for flags in frame["flags"]] == [[]] * 4


def test_a_file_from_before_a_field_of_the_case_has_its_default(tmp_path: Path) -> None:
    _write_table(tmp_path / "old.parquet", _arrow().drop_columns(["rank_load", "masked_share"]))
    frame = load(tmp_path / "old.parquet")
    assert list(frame.columns) == list(COLUMNS)
    assert (frame["rank_load"].tolist(), frame["masked_share"].tolist()) == (["even"] * 4, [0.0] * 4)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PUBLISHED)))
def test_cases_that_were_published_keep_their_ids(folder: Path) -> None:
    rows = load(folder).to_dict("records")
    assert [job_of(row).case.case_id for row in rows] == [row["case_id"] for row in rows]


def test_load_prefers_the_journal_of_a_folder(tmp_path: Path) -> None:
    write(to_frame([ok(time_ms=1.0)]), tmp_path)
    assert load(tmp_path)["time_ms"].tolist() == [1.0]
    journal = Journal(tmp_path / "journal.jsonl")
    for row in rows():
        journal.append(row)
    assert_frame_equal(load(str(tmp_path)), to_frame(rows()))
    assert load(tmp_path / PARQUET_NAME)["time_ms"].tolist() == [1.0]


def test_a_run_without_rows_yet_is_an_empty_frame(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    assert_frame_equal(load(tmp_path), to_frame([]))


def _write_table(path: Path, table: Any) -> None:
    pq.write_table(table, path)


def _arrow() -> Any:
    return pa.Table.from_pandas(to_frame(rows()), schema=frames.ARROW_SCHEMA, preserve_index=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file or folder"),
        ("folder", "holds neither journal.jsonl nor results.parquet"),
        (b"a,b\n1,2\n", "not a Parquet file"),
        (b"", "not a Parquet file"),
        (pa.table({"a": [1]}), "no column case_id, backend, dispatcher …"),
        (_arrow().drop_columns(["status"]), "no column status, which"),
        (_arrow().set_column(4, "num_tokens", pa.array(["x"] * 4)), "another type"),
        (_arrow().set_column(len(COLUMNS) - 1, "schema", pa.array([99] * 4)), "schema 99, this moebench reads 1 and 2"),
    ],
)
def test_what_is_no_results_is_refused_in_one_line(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "thing"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        _write_table(path, content)
    with pytest.raises(ResultsError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (ok().to_json().replace('"schema":2', '"schema":7'), "schema 7"),
        (ok().to_json().replace('"num_tokens":8', '"num_tokens":"x"'), "num_tokens"),
    ],
)
def test_a_journal_of_others_is_refused_in_one_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(ResultsError, match=says) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_json_has_every_cell_to_the_bit_and_infinity_as_a_string() -> None:
    frame = to_frame([ok(**{**ALL, "roofline_fraction": 1e-12}), *rows()[2:]])
    full, wrong, cannot = json.loads(to_json(frame))
    assert list(full) == list(COLUMNS)
    assert (full["roofline_fraction"], full["samples_ms"]) == (1e-12, [1.5, 1.25, 1 / 3])
    assert (full["peak_memory_bytes"], full["converged"], full["flags"]) == (2**53 + 1, False, ["clocks", "a;b"])
    assert (wrong["parity_worst"], wrong["time_ms"], cannot["parity_worst"]) == ("inf", None, None)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(to_frame([ok(time_ms=1.0)]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(to_frame(rows()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


OPENS = """
import sys
for name in ("torch", "transformer_engine", "grouped_gemm", "deep_ep"):
    sys.modules[name] = None
from pathlib import Path
from rich.console import Console
from moebench.results import frame
from moebench.report.plots import figures
from moebench.report.tables import tables
results = frame.load(Path(sys.argv[1]))
frame.write(results, Path(sys.argv[1]))
figures.throughput(results)
Console().print(tables.summary(results))
assert "matplotlib.pyplot" not in sys.modules, "plots keep off pyplot's state"
"""


def test_results_open_where_torch_and_the_vendors_are_blocked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for row in rows():
        journal.append(row)
    subprocess.run([sys.executable, "-W", "error", "-c", OPENS, str(tmp_path)], check=True)


def test_every_column_and_status_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "results.md").read_text()
    documented = set(re.findall(r"`([a-z0-9_]+)`", text))
    assert {*COLUMNS, *Status} <= documented
