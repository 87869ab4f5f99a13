"""moebench.measure.studies.kernels adds up the kernels of each call of a trace."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moebench.errors import UsageError
from moebench.measure.studies import kernels, run

PUBLISHED = Path(__file__).parents[4] / "results" / "published"


def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def call(number: int, start: float) -> list[dict[str, Any]]:
    """A call of 1000 µs: kernels from 40 to 60, from 100 to 400 and from 600 to 700 µs, two of which overlap."""
    at = [
        ("kernel", "_place", 40, 20),
        ("kernel", "grouped_gemm", 100, 200),
        ("kernel", "ncclDevKernel_SendRecv(…)", 250, 150),
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 600, 40),
        ("kernel", "_sum", 640, 60),
        ("cuda_runtime", "cudaStreamSynchronize", 500, 90),
        ("cuda_runtime", "cudaLaunchKernel", 90, 5),
        ("cuda_runtime", "cudaDeviceSynchronize", 710, 50),
        ("cpu_op", "aten::add", 50, 900),
    ]
    annotated = event("user_annotation", f"call {number}", start, 1000)
    return [annotated, *(event(cat, name, start + ts, dur) for cat, name, ts, dur in at)]


@pytest.fixture(params=[".json", ".json.gz"])
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    between = event("kernel", "flush", 1500, 100)
    marker = {"ph": "M", "name": "process_name", "args": {"name": "python"}}
    text = json.dumps({"traceEvents": [marker, *call(1, 2000), between, *call(0, 0)]}).encode()
    path = tmp_path / f"case--triton{request.param}"
    path.write_bytes(gzip.compress(text) if request.param.endswith("gz") else text)
    return path


def test_every_call_has_a_row(trace: Path) -> None:
    first, second = kernels.rows_of(trace)
    assert (first.pop("call"), second.pop("call")) == (0, 1)
    assert first == second
    assert (first["trace"], first["kernels"], first["copies"]) == ("case--triton", 4, 1)
    sums = {name: first[f"{name}_ms"] for name in ("products", "communication", "rows", "copies", "waiting", "other")}
    assert sums == {"products": 0.2, "communication": 0.15, "rows": 0.06, "copies": 0.04, "waiting": 0.0, "other": 0.0}


def test_the_gpu_is_idle_where_nothing_runs_within_the_span(trace: Path) -> None:
    row = next(kernels.rows_of(trace))
    assert (row["span_ms"], row["idle_ms"], row["idle_before_products_ms"]) == (0.66, 0.24, 0.04)


def test_without_products_nothing_is_before_them(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    events = [event("user_annotation", "call 0", 0, 9), event("kernel", "_sum", 1, 2), event("kernel", "_sum", 5, 2)]
    path.write_text(json.dumps({"traceEvents": events}))
    (row,) = kernels.rows_of(path)
    assert (row["span_ms"], row["idle_ms"], row["idle_before_products_ms"]) == (0.006, 0.002, None)
    kernels.main([path])


def test_the_wait_with_which_the_profile_ends_a_call_does_not_count(trace: Path) -> None:
    row = next(kernels.rows_of(trace))
    assert (row["waits"], row["copies_to_host"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_128x256", "products"),
        ("multiply_rows", "products"),
        ("add_outer_products", "products"),
        ("sum_outer_slabs", "products"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 2>(int)", "communication"),
        ("push_back", "communication"),
        ("void deep_ep::intranode::cached_notify_combine<2>(void**)", "waiting"),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**)", "waiting"),
        ("_place", "sort"),
        ("_activate_backward", "rows"),
        ("_gather", "rows"),
        ("Memset (Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_a_name_has_its_group(name: str, group: str) -> None:
    assert kernels.group_of(name) == group


@pytest.mark.parametrize("name", ["h200-ep2-2026-11-30", "h200-gmm-2026-12-01"])
def test_the_published_table_is_that_of_the_published_traces(name: str) -> None:
    paths = sorted((PUBLISHED / name / "traces").glob("*.json.gz"))
    rows = [row for path in paths for row in kernels.rows_of(path)]
    assert len(rows) == 12
    assert rows == json.loads((PUBLISHED / name / "kernels.json").read_text())["rows"]
    assert {row["other_ms"] for row in rows} == {0.0}, "every kernel has a group"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not a trace"),
        (b"[]", "is not a trace"),
        (b'{"traceEvents": []}', "has no calls"),
        (None, "No such file"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(
    content: bytes | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        list(kernels.rows_of(path))
    monkeypatch.setattr("sys.argv", ["kernels", str(path)])
    with pytest.raises(SystemExit) as ended:
        run(kernels.main, "kernels")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_program_prints_and_writes_the_rows(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels", str(trace), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        run(kernels.main, "kernels")
    assert not ended.value.code
    assert json.loads(out.read_text())["rows"] == list(kernels.rows_of(trace))
    assert "case--triton, call 0: 4 kernels, 1 copies; ms: " in capsys.readouterr().out
