"""The request for a run: its jobs, its GPUs, the jobs that are left, and what is refused before anything runs."""

import importlib.util
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.machine.gpus import ANYWHERE, Slot
from moebench.run.plan import shuffled
from moebench.run.request import check_device, in_own_folder, on_cluster, on_gpus, plan_rest
from moebench.run.request import plan as request_plan
from moebench.run.runfile import Asked
from moebench.workload.modelconfig import read_model
from tests.moebench.families import FAMILIES
from tests.moebench.planned import SWEEP, plan_, write_sweep


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_sweep()


def test_a_plan_has_the_sweeps_jobs_and_policy():
    planned = plan_(device="cpu", time_budget_min=1.5)
    assert [(job.case.num_tokens, job.backend) for job in planned.jobs] == [
        (8, "loop"),
        (8, "torch_mm"),
        (24, "loop"),
        (24, "torch_mm"),
    ]
    assert planned.rounds[0].policy.timeout_s == 7.0
    assert planned.time_budget_s == 90.0
    assert planned.rounds[0].device == "cpu"
    assert plan_().time_budget_s is None
    assert planned.folder.parent == Path("results/runs")
    assert planned.folder.name == planned.run_id
    assert [path.name for path in Path().iterdir()] == ["two.toml"], "planning writes nothing"


def test_rounds_are_plans_of_the_same_jobs_in_other_orders():
    planned = plan_(rounds=3)
    assert [one.round for one in planned.rounds] == [0, 1, 2]
    assert planned.num_jobs == 12
    assert {frozenset(one.jobs) for one in planned.rounds} == {frozenset(planned.jobs)}
    assert [one.jobs for one in planned.rounds] == [shuffled(planned.jobs, planned.run_id, n) for n in range(3)]


def test_a_plan_is_spread_over_the_gpus_that_are_free(fake_nvml, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, pids in (("GPU-a", []), ("GPU-b", [7]), ("GPU-c", [])):
        fake_nvml.add_gpu(name, pids=pids)
    spread, notes = on_gpus(plan_(rounds=2), None, share=False)
    assert {one.slots for one in spread.rounds} == {(Slot("GPU-a"), Slot("GPU-c"))}
    assert [one.device for one in spread.rounds] == [None, None]
    assert [note.partition(",")[0] for note in notes] == ["GPU 1 is in use by process 7"]
    one, notes = on_gpus(plan_(device="cuda:2"), None, share=False)
    assert (one.rounds[0].slots, one.rounds[0].device, notes) == ((Slot("GPU-c"),), "cuda", [])
    with pytest.raises(UsageError, match="GPU 1 is in use by process 7"):
        on_gpus(plan_(), "1", share=False)
    on_cpu, _ = on_gpus(plan_(device="cpu"), None, share=False)
    assert (on_cpu.rounds[0].slots, on_cpu.rounds[0].device) == (ANYWHERE, "cpu")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12", None])
def test_devices_that_may_be(name):
    check_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:a", "cpu:0", "cuda:0:1", "CUDA"])
def test_devices_that_cannot_be(name):
    with pytest.raises(UsageError, match="it must be cpu, cuda or cuda:N"):
        check_device(name)


def test_two_runs_that_begin_in_the_same_second_have_folders_of_their_own():
    one = plan_(rounds=2)
    with in_own_folder(one) as first, in_own_folder(one) as second, in_own_folder(one) as third:
        assert first == one
        assert [some.run_id for some in (second, third)] == [f"{one.run_id}-2", f"{one.run_id}-3"]
        for some in (first, second, third):
            assert {plan.folder for plan in some.rounds} == {Path("results/runs") / some.run_id}
            assert {plan.run_id for plan in some.rounds} == {some.run.run_id}
            assert some.folder.is_dir()
        (second.folder / "journal.jsonl").touch()
    assert [path.name for path in Path("results/runs").iterdir()] == [second.run_id], "an empty folder does not stay"


def test_a_folder_that_the_user_names_is_not_made_before_the_run_begins():
    planned = plan_(out=Path("out"))
    with in_own_folder(planned) as same:
        assert same == planned
        assert not Path("out").exists()


def test_a_time_budget_that_is_not_a_number():
    with pytest.raises(UsageError, match="--time-budget nan"):
        plan_(time_budget_min=float("nan"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_is_measured_at_a_model_instead_of_its_own_shapes(family: str) -> None:
    """Of `quick`, every job has the model's fields, and the sweep keeps what a model does not fix."""
    model = read_model(FAMILIES[family].config)
    plan = request_plan("quick", Asked(model=model))
    assert all(getattr(job.case, name) == value for job in plan.jobs for name, value in model.fields.items())
    assert {job.case.dtype for job in plan.jobs} == {"float32", "bfloat16"}  # the sweep names them
    assert {job.case.num_tokens for job in plan.jobs} >= {16, 64, 256, 1024}
    assert plan.notes == tuple(f"{model.name}: {note}" for note in model.notes)


def test_a_sweep_without_a_dtype_takes_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {**FAMILIES["mixtral"].config, "torch_dtype": "float16"}
    write_sweep()
    assert {job.case.dtype for job in plan_(model=read_model(config)).jobs} == {"float16"}


def test_ep_sizes_that_do_not_divide_the_experts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep().write_text(f"{SWEEP}ep_size = [1, 2, 4]\n")
    model = read_model({**FAMILIES["qwen2-moe"].config, "num_experts": 62})
    plan = plan_(model=model)
    assert {job.case.ep_size for job in plan.jobs} == {1, 2}
    assert plan.notes[-1].endswith("EP size 4 is left out: it does not divide the experts")


def test_a_run_of_a_model_is_resumed_without_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep()
    plan = plan_(model=read_model(FAMILIES["gpt-oss"].config))
    plan.folder.mkdir(parents=True)
    plan.run.write(plan.folder)
    (plan.folder / "sweep.toml").write_bytes(plan.sweep_text)
    assert plan_rest(plan.folder, backends=[], time_budget_min=None).jobs == plan.jobs


@pytest.mark.parametrize(
    ("ray", "slurm", "gpus", "share", "device", "words"),
    [
        ("auto", True, None, False, None, "--ray and --slurm: both choose where to run; leave one of the two out"),
        ("head", False, None, False, None, "--ray head: it must be HOST:PORT of the cluster's head, or auto"),
        ("ray://h:1", False, None, False, None, "--ray ray://h:1: it must be HOST:PORT"),
        ("auto", False, "0", False, None, "--gpus 0 with --ray: the cluster chooses the GPUs; leave --gpus out"),
        (None, True, None, True, None, "--share-gpus with --slurm: the cluster chooses the GPUs"),
        ("auto", False, None, False, "cuda:1", "--device cuda:1 with --ray: the cluster chooses the GPUs"),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(monkeypatch, ray, slurm, gpus, share, device, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError) as caught:
        on_cluster(plan_(device=device), ray, slurm, gpus, share)
    (line,) = caught.value.lines
    assert line.startswith(words)


def test_a_plan_names_its_cluster(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    planned = on_cluster(plan_(device="cpu"), "10.0.0.1:6379", False, None, False)
    assert (planned.ray, planned.slurm, planned.rounds[0].device) == ("10.0.0.1:6379", False, "cpu")


def test_without_ray_a_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--ray: Ray is not installed; install it with pip install 'moebench\[ray\]'"):
        on_cluster(plan_(), "auto", False, None, False)
