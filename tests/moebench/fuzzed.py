"""Spoil files of results, sweeps, environments and runs, and give them to a command drawn at random."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from moebench.cli import app
from moebench.results.frame import load, write
from moebench.results.journal import Journal
from moebench.results.record import Status
from moebench.run.request import plan
from moebench.run.runfile import Asked
from tests.moebench.gated import H200, bad, job_of, ok

ROOT = Path(__file__).parents[2]
SWEEP = """
name = "tiny"
description = "two cases"
[policy]
timeout_s = 7.0
l2 = "cold"
[defaults]
n_routed_experts = 8
n_activated_experts = 2
dim = 256
moe_inter_dim = 512
backend = ["loop", "torch_mm"]
[[grid]]
num_tokens = [64, 128]
[[exclude]]
num_tokens = 64
backend = "torch_mm"
"""
CASE_ID = job_of(64).case.case_id
TORN = "lines cannot be read"

#: Commands, the file that each of them gets spoiled, and the places where each of them may write.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "show a": (("results", "environment"), ()),
    "show a --json": (("results",), ()),
    "plots a": (("results",), ("a/plots",)),
    "report a": (("results", "environment", "run", "sweep"), ("a/report.html",)),
    "report a --out page.html --gate gate.json": (("verdicts",), ("page.html",)),
    "gate a b": (("results", "environment"), ()),
    "gate b a --json": (("results", "environment"), ()),
    "gate b a --github --junit junit.xml": (("results", "environment"), ("junit.xml", "summary.md")),
    "compare a b": (("results", "environment"), ()),
    "compare b a --csv": (("results",), ()),
    "merge a b --newest --out merged": (("results", "environment"), ("merged",)),
    f"history {CASE_ID} a b --json": (("results",), ()),
    f"history {CASE_ID} b a --plot history.svg": (("results",), ("history.svg",)),
    "baseline update a": (("results", "environment"), ("results/published/baselines",)),
    "baseline show": (("baseline",), ()),
    "advise --model e8k2d256i512 --num-tokens 64 --results a": (("results",), ()),
    "list sweep.toml": (("sweep",), ()),
    "run sweep.toml --dry-run --json": (("sweep",), ()),
    "run --resume a --dry-run": (("results", "run", "sweep"), ()),
}
#: Commands that draw take a second or more each.
DRAWS = ("plots", "report", "history.svg")

NUMBERS = (-1, 0, 1e308, 5e-324, -0.0, 2**31, 2**63, 10**400, float("inf"), float("nan"), 1e15)
TEXTS = (
    *("", "x", "\0", "a\nb", "../../../x", "/nope/x", ".", "..", "\ud800", "\x1b[31m", "$x$", "=1+1", "::stop::x"),
    *("x" * 300, "y" * 100_000, "nan", "Infinity", "é", "zipf:9", "trace:../x\0", "cold", "mismatch", "ok", "a | b"),
)


#: Columns that commands compute with, or print. They are spoiled more often than others.
MATTER = (
    *("case_id", "backend", "dispatcher", "status", "detail", "flags", "env_id", "run_id", "schema", "gpu", "round"),
    *("time_ms", "time_ms_low", "time_ms_high", "samples_ms", "sample_rounds", "peak_memory_bytes", "parity_worst"),
)


def deep(depth: int = 3000) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from((None, True, [], {}, [None], {"a": None}, [[1.0]], [float("nan")])),
    st.integers(-3, 200),
    st.floats(),
    st.text(max_size=5),
)


def make(folder: Path) -> None:
    """Write what the commands read: the results `a` with a journal, `b` in Parquet, a sweep, and a baseline."""
    rows = []
    for number, tokens, backend in product(range(3), (64, 128), ("loop", "torch_mm")):
        job = job_of(tokens, backend)
        about = {"env_id": H200.env_id, "run_id": "20261123-000000-tiny", "round": number}
        if (tokens, backend) == (64, "torch_mm"):
            rows.append(bad(job, (Status.mismatch, Status.oom, Status.crash)[number], **about))
            continue
        time = (2.0 if backend == "loop" else 1.0) * (1 + number / 100)
        speed = {"tokens_per_s": 1e6, "tflops": 2.0, "roofline_ms": 0.5, "roofline_fraction": 0.25}
        ends = {"time_ms_low": time * 0.9, "time_ms_high": time * 1.1, "converged": True}
        samples = {"sample_rounds": (number,) * 3, "parity_errors": {"output": 0.25}}
        rows.append(ok(job, [time], **samples, **speed, **ends, **about))
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "environment.json").write_text(H200.to_json())
        for row in rows:
            Journal(folder / name / "journal.jsonl").append(row)
    write(load(folder / "b"), folder / "b")
    (folder / "b" / "journal.jsonl").unlink()
    (folder / "sweep.toml").write_text(SWEEP)
    shutil.copy(folder / "sweep.toml", folder / "a" / "sweep.toml")
    with contextlib.chdir(folder):
        plan("sweep.toml", Asked(), out=None).run.write(folder / "a")
        shutil.copytree("b", "results/published/baselines/nvidia-h200-x")
        found = call(["gate", "b", "a", "--json"])
        Path("gate.json").write_text(found.out)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def call(arguments: list[str]) -> Ended:
    """Run the command line in this process. An exception that it does not turn into an exit code is raised."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "backslashreplace")
    ]
    with (
        mock.patch.object(sys, "argv", ["moebench", *arguments]),
        mock.patch.dict(os.environ, {"GITHUB_STEP_SUMMARY": "summary.md"}),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        code: Any = 0
        try:
            app.main()
        except SystemExit as end:
            code = end.code or 0
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Ended(code, *texts)


def call_afresh(arguments: list[str]) -> Ended:
    """Run the command line in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": "summary.md"}
    command = [sys.executable, "-m", "moebench", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env=variables, timeout=100)
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


# How files are spoiled


def spoil(draw: Callable[[Any], Any], kind: str, folder: Path) -> None:
    """Spoil one file of that kind in `folder`."""
    if kind == "results" and draw(st.booleans()):
        _journal(draw, folder / "a" / "journal.jsonl")
    elif kind in ("results", "baseline"):
        if kind == "results":
            (folder / "a" / "journal.jsonl").unlink()
            shutil.copy(folder / "b" / "results.parquet", folder / "a")
        baseline = folder / "results" / "published" / "baselines" / "nvidia-h200-x"
        if kind == "baseline" and draw(st.booleans()):
            _json(draw, baseline / "environment.json")
        else:
            _parquet(draw, (folder / "a" if kind == "results" else baseline) / "results.parquet")
    elif kind == "sweep":
        for name in ("sweep.toml", "a/sweep.toml"):
            (folder / name).write_bytes(_toml(draw) if name == "sweep.toml" else (folder / "sweep.toml").read_bytes())
    else:
        names = {"environment": "a/environment.json", "run": "a/run.json", "verdicts": "gate.json"}
        _json(draw, folder / names[kind])


def _bytes(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """Change, remove or insert some bytes, or cut the end off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        new = draw(
            st.sampled_from((b"", b"\0", b"\n", b"\xff", b"[", b"{", b'"', b"9" * 6000, b"\xef\xbb\xbf", b"]", b","))
        )
        content = content[:at] + new + content[at + draw(st.integers(0, 3)) :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 5)) == 0 else content


def _spoiled(draw: Callable[[Any], Any], document: Any) -> Any:
    """Return a JSON document with one of its values, at any depth, replaced, removed or added."""
    if isinstance(document, dict | list) and document and draw(st.integers(0, 9)):
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 9)) == 0 and isinstance(document, dict):
            return {name: value for name, value in document.items() if name != key} | {draw(st.text()): 1}
        changed = dict(document) if isinstance(document, dict) else list(document)
        changed[key] = _spoiled(draw, document[key])
        return changed
    return deep() if draw(st.integers(0, 40)) == 0 else draw(values)


def _written(document: Any) -> bytes:
    """Return the document as JSON. A list that is nested too deeply for Python's json is written by hand."""
    try:
        return json.dumps(document).encode()
    except RecursionError:
        shallow = json.dumps(_replaced(document)).encode()
        return shallow.replace(b'"DEEP"', b"[" * 3000 + b"]" * 3000)


def _replaced(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _replaced(value) for name, value in document.items()}
    if isinstance(document, list):
        inner, depth = document, 0
        while isinstance(inner, list) and len(inner) == 1:
            inner, depth = inner[0], depth + 1
        return "DEEP" if depth > 100 else [_replaced(value) for value in document]
    return document


def _json(draw: Callable[[Any], Any], path: Path) -> None:
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(_bytes(draw, path.read_bytes()))
        return
    document = json.loads(path.read_bytes())
    for _ in range(draw(st.integers(1, 2))):
        document = _spoiled(draw, document)
    path.write_bytes(_written(document))


def _fields(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):  # it was spoiled before
        return {}


def _journal(draw: Callable[[Any], Any], path: Path) -> None:
    lines = path.read_bytes().splitlines()
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        how = draw(st.integers(0, 9))
        if how < 6:
            fields = _fields(lines[number])
            if fields:
                name = draw(st.sampled_from(sorted(fields) + [name for name in MATTER if name in fields] * 8))
                value = draw(values) if draw(st.integers(0, 3)) else fields[draw(st.sampled_from(sorted(fields)))]
                lines[number] = json.dumps({**fields, name: value}).encode()
        elif how == 6:
            lines[number] = _bytes(draw, lines[number])
        elif how == 7:
            lines[number] = lines[number][: draw(st.integers(0, len(lines[number])))]
        elif how == 8:
            lines.append(lines[number])
        else:
            lines = [b"garbage"] * len(lines) if draw(st.booleans()) else lines[:number]
        if not lines:
            break
    path.write_bytes(b"\n".join(lines) + b"\n" * draw(st.integers(0, 1)))


def _parquet(draw: Callable[[Any], Any], path: Path) -> None:
    how = draw(st.integers(0, 9))
    if how == 0:
        path.write_bytes(_bytes(draw, path.read_bytes()))
        return
    table = pq.ParquetFile(path).read()
    number = table.column_names.index(draw(st.sampled_from([*table.column_names, *MATTER * 8])))
    field = table.schema.field(number)
    if how == 1:
        table = table.append_column(field.name, table.column(number))
    elif how == 2:
        table = table.remove_column(number)
    elif how == 3:
        table = pa.concat_tables([table, table.slice(0, draw(st.integers(0, 2)))]).slice(draw(st.integers(0, 3)))
    else:
        cells = table.column(number).to_pylist()
        for _ in range(draw(st.integers(1, 3))):
            where = draw(st.integers(0, len(cells) - 1))
            cells[where] = None if draw(st.integers(0, 3)) == 0 else draw(_cells(field.type))
        if how == 4:
            column = pa.array([None if cell is None else str(cell)[:100] for cell in cells], pa.string())
        else:
            column = pa.array(cells, field.type)
        table = table.set_column(number, field.name, column)
    pq.write_table(table, path)


def _cells(kind: Any) -> Any:
    if pa.types.is_list(kind):
        return st.lists(st.one_of(st.none(), _cells(kind.value_type)), max_size=4)
    if pa.types.is_integer(kind):
        return st.sampled_from((-1, 0, 1, 3, 2**31, 2**63 - 1, -(2**63)))
    if pa.types.is_floating(kind):
        return st.one_of(st.floats(), st.sampled_from([float(some) for some in NUMBERS if abs(some) < 10**308]))
    return st.booleans() if pa.types.is_boolean(kind) else st.sampled_from([some for some in TEXTS if some != "\ud800"])


_LITERALS = (
    *("0", "-1", "1e15", "1e308", "inf", "nan", "true", '""', "[]", "{}", "[[8]]", "9" * 6000, "0x" + "f" * 6000),
    *("[" * 1000 + "]" * 1000, '"../x"', '"\\u0000"', '"' + "x" * 300 + '"', '"trace:../x"', '"m:Thing"', "1979-05-27"),
    *("[1, 1]", '"@bf16"', '"@nothing"', "2147483648", '"a\\nb"', '["loop", 3]', "64", '"loop"', "[128]"),
)


def _toml(draw: Callable[[Any], Any]) -> bytes:
    lines = SWEEP.strip().splitlines()
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        how = draw(st.integers(0, 9))
        key = lines[number].partition(" = ")[0]
        if how < 6 and " = " in lines[number]:
            lines[number] = f"{key} = {draw(st.sampled_from(_LITERALS))}"
        elif how == 6:
            lines.insert(number, f"{draw(st.sampled_from(('x' * 300, 'dtype', 'mode', 'ep_size', 'seed')))} = 1")
        elif how == 7:
            lines.pop(number)
        elif how == 8:
            lines.append(lines[number])
        else:
            return _bytes(draw, "\n".join(lines).encode())
    return b"\xef\xbb\xbf" * draw(st.integers(0, 1)) + "\n".join(lines).encode()


# What must hold


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def exit_codes() -> dict[str, set[int]]:
    """Return the exit codes that docs/running.md names for each command."""
    text = (ROOT / "docs" / "running.md").read_text()
    rows = re.findall(r"^\| (`moebench [^|]*) \| ([\d, ]+) \|", text, re.MULTILINE)
    return {
        name: {int(code) for code in codes.split(",")}
        for names, codes in rows
        for name in re.findall(r"`moebench (\w+)", names)
    }


def mistakes(command: str, ended: Ended, changed: set[str]) -> Iterator[str]:
    """Yield what is wrong with how a command ended."""
    name = command.split()[0]
    if ended.code not in exit_codes()[name]:
        yield f"exit code {ended.code}, documented are {exit_codes()[name]}"
    lines = [line for line in ended.err.splitlines() if TORN not in line and not line.startswith("wrote ")]
    of_sweep = [line for line in lines if line.startswith(("sweep.toml:", "a/sweep.toml:"))]
    if len(lines) > 1 and lines != of_sweep:
        yield "several lines on standard error"
    if "Traceback" in ended.err:
        yield "a traceback"
    allowed = COMMANDS[command][1]
    yield from (f"{path} was written" for path in sorted(changed) if not path.startswith(allowed))
