"""What no result answers is measured on this machine, within a time, and answers the next question."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experts import catalog
from moebench.cli.app import app
from moebench.errors import UsageError
from moebench.results.advise import advise, question
from moebench.results.frame import load, to_frame
from moebench.results.published import KEPT, kept_folders
from moebench.results.record import Status
from moebench.run.ondemand import missing, plan_missing, sweep_text
from moebench.workload.case import Case
from moebench.workload.spec import parse_sweep
from tests.moebench.drawn import SHAPE, bad, case, ok

H200 = "NVIDIA H200"


def test_missing_are_the_backends_without_an_answer_on_this_machine() -> None:
    rows = [
        ok(case(256), "triton"),
        ok(case(64), "torch_mm"),
        bad(case(256), Status.unsupported, "te"),
        bad(case(256), Status.timeout, "gmm"),
        ok(case(256), "loop", device="cpu", gpu=None),
    ]
    answer = advise(to_frame(rows), question("e8k2d256i512", 256))
    found = missing(answer, H200)
    assert found[:2] == ["torch_mm", "gmm"], "those first that tend to be fast"
    of_this_step = {one.name for one in catalog.BACKENDS if one.save is None and one.lora is None}
    assert set(found) == of_this_step - {"triton", "te", "triton_main_grad"}
    assert "loop" not in missing(answer, None)
    assert "triton" in missing(answer, None)


def test_a_train_step_also_asks_who_saves_for_backward() -> None:
    answer = advise(to_frame([]), question("e8k2d256i512", 256, mode="train"))
    assert {"torch_mm_save_time", "gmm_save_time"} <= set(missing(answer, None))
    assert "triton_main_grad" not in missing(answer, None)
    answer = advise(to_frame([]), question("e8k2d256i512", 256, mode="train", context="accumulate:2"))
    assert "triton_main_grad" in missing(answer, None)


def test_the_sweep_measures_the_case_with_each_dispatcher() -> None:
    asked = Case(num_tokens=32, ep_size=2, dtype="float32", routing="zipf:1.5", **SHAPE)
    spec = parse_sweep(sweep_text(asked, ["loop", "torch_mm"], 3.0), "here")
    jobs = spec.jobs()
    assert {job.case for job in jobs} == {asked}
    assert {job.backend for job in jobs} == {"loop", "torch_mm"}
    assert {job.dispatcher for job in jobs} == {one.name for one in catalog.DISPATCHERS}


def test_the_last_job_that_may_start_ends_within_the_time() -> None:
    plan = plan_missing(advise(to_frame([]), question("e8k2d256i512", 256)), 3.0, None)
    assert plan is not None
    assert plan.time_budget_s + plan.rounds[0].policy.timeout_s == pytest.approx(180.0)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_the_time_must_be_a_number_of_minutes(minutes: float) -> None:
    with pytest.raises(UsageError, match=r"--measure .*: it must be a number of minutes"):
        plan_missing(advise(to_frame([]), question("e8k2d256i512", 256)), minutes, None)


def test_what_was_measured_answers_the_next_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command has no result, measures on the CPU and answers. The second one only reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moebench.run.ondemand.gpu_here", lambda: None)
    monkeypatch.setattr("moebench.results.published.checkout", lambda: None)
    ask = ["advise", "--model", "e8k2d64i96", "--num-tokens", "32", "--dtype", "float32", "--json"]
    first = CliRunner().invoke(app, [*ask, "--measure", "2"])
    assert first.exit_code == 0, first.output
    (advice,) = json.loads(first.stdout)["advice"]
    assert {one["backend"] for one in advice["candidates"]} == {"loop", "torch_mm"}
    assert advice["left_out"]["triton"].startswith("not supported: ")
    (folder,) = kept_folders()
    assert folder.parent == KEPT
    assert set(load(folder)["backend"]) >= {"loop", "torch_mm", "triton"}
    second = CliRunner().invoke(app, ask)
    assert json.loads(second.stdout)["advice"] == [advice]
    third = CliRunner().invoke(app, [*ask, "--measure", "2"])
    assert "nothing was measured" in third.stderr
    assert kept_folders() == [folder]
