"""Checks and measurements from Python run in worker processes, with backends as names and as classes of modules."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moebench
from moebench.api.backends import importable, names_of
from moebench.api.runs import model_axes
from moebench.errors import MoebenchError, ResultsError, SweepError
from tests.moebench.executed import measure_shortly
from tests.moebench.typed import SWEEP

BACKENDS = Path(__file__).parents[2] / "backends"


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that this process can import, and that no worker finds by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(BACKENDS)
    measure_shortly(monkeypatch)
    import faulty

    return faulty


def test_a_class_is_measured_beside_a_name_and_a_wrong_one_has_no_speed(faulty: ModuleType) -> None:
    found = moebench.bench(
        ["loop", faulty.SwappedExperts], model="e4k2d16i8", num_tokens=[8, 16], dtype="float32", device="cpu"
    )
    assert found.frame["num_tokens"].tolist() == [8, 8, 16, 16]
    statuses = found.frame.groupby("backend")["status"].unique().map(list).to_dict()
    assert statuses == {"loop": ["ok"], "faulty:SwappedExperts": ["mismatch"]}
    assert found.best["label"].tolist() == ["loop", "loop"]
    assert (found.folder / "report.html").is_file()
    for text in (repr(found), found._repr_html_()):
        assert "MISMATCH" in text
        assert f"results: {found.folder}" in text
    assert moebench.pivot(found).shape == (2, 2), "what bench returns is results"


def test_a_wrong_class_does_not_pass_a_check(faulty: ModuleType) -> None:
    found = moebench.check(faulty.SwappedExperts, dtypes="float32", device="cpu")
    assert not found
    assert not found.passed
    assert "MISMATCH" in repr(found)
    assert "MISMATCH" in found._repr_html_()
    assert "mismatch" in set(found.frame["status"])


def test_a_sweep_is_measured_with_the_backends_that_are_added_or_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(SWEEP)
    asked: list[Any] = []

    def plan(sweep: str, options: Any, **more: Any) -> None:
        asked.append((sweep, options, more["out"]))
        raise SweepError(["enough"])

    monkeypatch.setattr("moebench.api.runs.request.plan", plan)
    for more in ({"backends": "triton"}, {"only": ["loop"], "filters": "num_tokens=8", "rounds": 3, "out": "here"}):
        with pytest.raises(SweepError):
            moebench.run_sweep("tiny.toml", **more)
    (_, added, none), (sweep, alone, out) = asked
    assert (added.backends, added.only, none) == (("triton",), (), None)
    assert (sweep, alone.backends, alone.only, out) == ("tiny.toml", (), ("loop",), Path("here"))
    assert (alone.filters, alone.rounds) == (("num_tokens=8",), 3)


class Here:
    """A class of a module. Its inner class has no name of its own in the module."""

    class Inner:
        pass


def test_the_name_of_a_class_is_where_a_worker_finds_it() -> None:
    assert names_of([Here, "loop"]) == [f"{__name__}:Here", "loop"]
    for backend in (Here.Inner, lambda config: None):
        with pytest.raises(ResultsError, match="a worker process finds only what a module has under a name of its own"):
            names_of(backend)


def test_a_class_of_a_notebook_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "__module__", "__main__")
    with pytest.raises(ResultsError) as refused:
        moebench.check(Here)
    (line,) = refused.value.lines
    assert "backend Here: it is defined in a notebook" in line
    assert "%%writefile my_experts.py" in line
    assert 'give "my_experts:Here"' in line


def test_workers_import_what_this_process_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    with importable([f"{__name__}:Here", "loop"]):
        before, folder = os.environ["PYTHONPATH"].split(os.pathsep)
        code = f"import sys; sys.path[:] = [{folder!r}, *sys.path]; import {__name__} as found; found.Here"
        assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=False).returncode == 0
        assert before == "before"
    assert os.environ["PYTHONPATH"] == "before"


def test_a_model_is_a_name_a_shape_or_a_file(tmp_path: Path) -> None:
    assert model_axes("olmoe") == {"model": "olmoe"}
    assert model_axes("e4k2d16i8")["n_activated_experts"] == 2
    (tmp_path / "config.json").touch()
    assert model_axes(str(tmp_path / "config.json")) == {"model": str(tmp_path / "config.json")}


BENCH = {"model": "e4k2d16i8", "num_tokens": 8}
MISTAKES: dict[str, tuple[Any, str]] = {
    "a number": (lambda: moebench.check(3), "backend 3: it must be a backend; give a name"),
    "no backend": (lambda: moebench.bench([], **BENCH), "there is no backend to run"),
    "a backend twice": (lambda: moebench.bench(["loop", "loop"], **BENCH), "loop is given twice"),
    "two to check": (lambda: moebench.check(["loop", "triton"]), "2 backends to check: give one"),
    "a wrong level": (lambda: moebench.check("loop", level="long"), "level = 'long': it must be quick or standard"),
    "a wrong name": (lambda: moebench.bench("a b", **BENCH), "'a b': must be a name|a b"),
    "no count": (lambda: moebench.bench("loop", model="olmoe", num_tokens=object()), "it must be a number or a text"),
    "a text as count": (lambda: moebench.bench("loop", model="olmoe", num_tokens="x"), "^num_tokens.* must be a valid"),
    "no such axis": (lambda: moebench.bench("loop", mood=1, **BENCH), '^mood.*did you mean "mode"'),
    "no such model": (
        lambda: moebench.bench("loop", model="qwen", num_tokens=8),
        '^model.* = "qwen": must be a model of moebench',
    ),
    "a frame as model": (lambda: moebench.bench("loop", model=3, num_tokens=8), "model = 3: it must be a text"),
    "no rounds": (lambda: moebench.bench("loop", rounds=0, **BENCH), "rounds = 0: it must be a whole number"),
    "no such sweep": (lambda: moebench.run_sweep("nothing"), "no such file, and no sweep has that name"),
    "a frame as sweep": (lambda: moebench.run_sweep(3), "sweep is a int: it must be a sweep file"),
    "both": (lambda: moebench.run_sweep("quick", backends="te", only="te"), "exclude each other"),
    "a wrong filter": (lambda: moebench.run_sweep("quick", filters=3), "filters = 3: it must be a text"),
    "a wrong device": (lambda: moebench.run_sweep("quick", device="tpu"), "--device tpu"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = MISTAKES[name]
    with pytest.raises(MoebenchError, match=message):
        call()
    assert not list(tmp_path.iterdir())
