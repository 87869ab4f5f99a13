"""A trace is known by its content: a case is the same from every folder, and other content makes another case."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from moebench.results.record import Status, record
from moebench.workload.case import Case, Job
from moebench.workload.selection import select, select_of
from moebench.workload.spec import load_sweep
from moebench.workload.traces import digest, find_trace
from tests.moebench.captured import FORMATS, ROUTING

GRID = """
name = "x"
[[grid]]
num_tokens = 4
n_routed_experts = 8
n_activated_experts = 2
dim = 8
moe_inter_dim = 8
backend = ["loop", "torch_mm"]
"""


def sweep(folder: Path, routing: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.toml").write_text(f"{GRID}routing = {routing}\n")
    return folder / "x.toml"


def ids(file: Path) -> list[str]:
    return [job.case.case_id for job in load_sweep(file).jobs()]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sweep_from_another_folder_has_the_same_case_ids(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep(tmp_path / "one", "[]")
    name = FORMATS[kind](file.parent).name
    sweep(tmp_path / "one", f'["trace:{name}", "trace:{name}#layer=1"]')
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    here = ids(file)
    assert len(set(here)) == 2
    monkeypatch.chdir(tmp_path / "two")
    assert ids(Path("x.toml")) == ids(tmp_path / "two" / "x.toml") == here


def test_other_content_at_the_same_path_has_other_case_ids(tmp_path: Path) -> None:
    file = sweep(tmp_path, '"trace:t.npy"')
    np.save(tmp_path / "t.npy", ROUTING[0, :, 0])
    before = ids(file)
    np.save(tmp_path / "t.npy", ROUTING[0, :, 1])
    assert not {*before} & {*ids(file)}


def test_in_a_folder_the_names_count_because_they_name_the_ranks(tmp_path: Path) -> None:
    folder = FORMATS["vllm"](tmp_path)
    before = digest(folder)
    (folder / "notes.txt").write_text("not a part of the trace")
    assert digest(folder) == before
    (folder / "rank1.jsonl").rename(folder / "rank3.jsonl")
    assert digest(folder) != before


def test_the_job_has_the_path_with_every_backend(tmp_path: Path) -> None:
    file = sweep(tmp_path, '"trace:t.npy"')
    np.save(tmp_path / "t.npy", ROUTING[0, :, 0])
    jobs = select(str(file), [], [], [], ["loop", "gmm"])
    assert [(job.backend, Path(str(job.routing_file))) for job in jobs] == [
        (name, tmp_path / "t.npy") for name in ("loop", "gmm")
    ]


def test_one_content_at_two_paths_is_one_job(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, ROUTING[0, :, 0])
    file = sweep(tmp_path, '"trace:a.npy"')
    file.write_text(file.read_text() + file.read_text().partition('"x"')[2].replace("a.npy", "b.npy"))
    assert len(load_sweep(file).jobs()) == 2


def test_a_filter_takes_the_path_or_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "t.npy", ROUTING[0, :, 0])
    spec = load_sweep(sweep(tmp_path, '["trace:t.npy", "uniform"]'))
    for text in ("trace:t.npy", f"trace:{digest(tmp_path / 't.npy')}"):
        chosen = select_of(spec, "x", [], [f"routing={text}"], [], ["loop"])
        assert [job.case.routing for job in chosen] == [f"trace:{digest(tmp_path / 't.npy')}"]


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    for name in ("missing", "a\0b", "x" * 5000, "missing#layer=1"):
        assert find_trace(f"trace:{name}", tmp_path) is None


def test_older_results_that_name_a_path_still_open() -> None:
    case = Case(
        num_tokens=4, n_routed_experts=8, n_activated_experts=2, dim=8, moe_inter_dim=8, routing="trace:a/t.npy"
    )
    row = record(Job(case=case, backend="loop"), Status.oom, run_id="r", env_id="e", detail="d")
    assert type(row).model_validate_json(row.to_json()).routing == "trace:a/t.npy"
