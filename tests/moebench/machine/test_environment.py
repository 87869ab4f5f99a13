import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from moebench.errors import ResultsError
from moebench.machine import environment, versions
from moebench.machine.environment import Environment, GitState, collect, git_state

ROOT = Path(__file__).parents[3]
FIRST, SECOND = "11111111-aaaa-0000-0000-000000000000", "22222222-bbbb-0000-0000-000000000000"


@pytest.fixture
def h200s(fake_nvml, monkeypatch):
    """Add two H200s that torch numbers in the reverse of NVML's order, as CUDA_VISIBLE_DEVICES=1,0 makes it."""
    fake_nvml.add_gpu(f"GPU-{SECOND}", temperature_c=22)
    fake_nvml.add_gpu(f"GPU-{FIRST}", temperature_c=11)
    gpus = [
        SimpleNamespace(
            uuid=uuid,
            name="NVIDIA H200",
            total_memory=150_000_000_000,
            major=9,
            minor=0,
            multi_processor_count=132,
            L2_cache_size=62_914_560,
        )
        for uuid in (FIRST, SECOND)
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    return gpus


def test_cpu_environment_says_what_ran_where():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = collect("cpu")
    finally:
        torch.set_num_threads(before)
    assert found.num_threads == 3
    assert found.memory_bytes == psutil.virtual_memory().total
    assert 1 <= found.cpu_cores_usable <= found.cpu_cores
    assert found.cpu_model
    assert found.versions["torch"] == torch.__version__
    assert found.python == ".".join(str(part) for part in sys.version_info[:3])
    assert found.gpus == ()


def test_every_gpu_is_described_by_torch_and_by_its_own_nvml_reading(h200s):
    first, second = collect("cuda").gpus
    assert (first.index, first.temperature_c) == (0, 11)
    assert (second.index, second.temperature_c) == (1, 22)
    assert first.name == "NVIDIA H200"
    assert (first.memory_bytes, first.sm_count, first.l2_bytes) == (150_000_000_000, 132, 62_914_560)
    assert first.compute_capability == "9.0"
    assert (first.driver_version, first.power_limit_w, first.max_sm_clock_mhz) == ("580.159.03", 700.0, 1980)
    assert (first.sm_clock_mhz, first.throttle_reasons, first.nvml_error) == (345, ("gpu_idle",), None)


def test_a_numbered_device_describes_that_gpu_alone(h200s):
    (gpu,) = collect("cuda:1").gpus
    assert (gpu.index, gpu.temperature_c) == (1, 22)


def test_a_gpu_without_nvml_is_described_by_torch_and_says_so(h200s, fake_nvml):
    fake_nvml.init_error = "Driver Not Loaded"
    gpu = collect("cuda").gpus[0]
    assert (gpu.name, gpu.sm_count) == ("NVIDIA H200", 132)
    assert (gpu.nvml_error, gpu.driver_version, gpu.throttle_reasons) == ("NVML: Driver Not Loaded", None, None)


@pytest.mark.parametrize("device", ["cuda:2", "mps", "cpu:0", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_not_here_is_refused_in_one_line(h200s, device):
    with pytest.raises(ValueError, match=f"device = '{device}'") as error:
        collect(device)
    assert "\n" not in str(error.value)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees 0 CUDA GPUs"):
        collect("cuda")


def test_the_users_tiles_are_those_of_the_first_gpu(h200s, monkeypatch, tmp_path):
    choices = pytest.importorskip("experts.gemm.choices")
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path))
    assert collect("cuda").tiles is None
    key = choices.Key("product", (8, 64, 128), "bfloat16", 1024.0)
    tile = choices.KINDS["product"].candidates(1024.0)[0]
    choices.store(choices.place_of(torch.device("cuda", 0)), {key: choices.Choice(tile, 0.9, 1.0)})
    assert len(collect("cuda:1").tiles) == 12
    assert collect("cpu").tiles is None
    for gpu in h200s:
        gpu.name = "NVIDIA B200"
    assert collect("cuda").tiles is None, "the file is for another GPU"


def change_gpu(gpus, nvml, monkeypatch, field, value):
    for gpu in gpus:
        setattr(gpu, field, value)


def change_nvml(gpus, nvml, monkeypatch, field, value):
    for gpu in nvml.gpus.values():
        setattr(gpu, field, value)


def change_version(gpus, nvml, monkeypatch, library, version):
    found = versions.library_versions()
    monkeypatch.setattr(environment, "library_versions", lambda: found | {library: version})


def change_function(gpus, nvml, monkeypatch, name, value):
    monkeypatch.setattr(environment, name, lambda *arguments: value)


@pytest.mark.parametrize(
    ("change", "what", "value"),
    [
        (change_function, "_tiles", "0123456789ab"),
        (change_gpu, "name", "NVIDIA H100"),
        (change_gpu, "multi_processor_count", 114),
        (change_nvml, "power_limit_mw", 500_000),
        (change_nvml, "max_clocks_mhz", {1: 1700, 2: 3201}),
        (change_version, "torch", "9.9.9"),
        (change_version, "cudnn", "9.9.9"),
        (change_version, "deep_ep", "9.9.9"),
        (change_function, "cpu_model", "another processor"),
    ],
)
def test_env_id_changes_with_what_makes_timings_differ(h200s, fake_nvml, monkeypatch, change, what, value):
    before = collect("cuda")
    change(h200s, fake_nvml, monkeypatch, what, value)
    assert collect("cuda").env_id != before.env_id


@pytest.mark.parametrize(
    ("change", "what", "value"),
    [
        (change_nvml, "clocks_mhz", {1: 1980, 2: 3201}),
        (change_nvml, "reasons", 0x40),
        (change_nvml, "temperature_c", 80),
        (change_function, "git_state", GitState("0123abc", True)),
        (change_version, "numpy", "9.9.9"),
    ],
)
def test_env_id_stays_with_the_moment_and_the_revision(h200s, fake_nvml, monkeypatch, change, what, value):
    before = collect("cuda")
    change(h200s, fake_nvml, monkeypatch, what, value)
    after = collect("cuda")
    assert after != before
    assert after.env_id == before.env_id


def test_env_id_is_of_the_kind_of_gpu_not_of_how_many_there_are(h200s):
    both = collect("cuda")
    h200s.pop()
    assert collect("cuda").env_id == both.env_id
    assert collect("cuda:0").env_id == both.env_id
    assert collect("cpu").env_id != both.env_id
    assert len(both.env_id) == 12
    assert int(both.env_id, 16) >= 0


def test_ranks_on_several_nodes_have_the_gpus_of_all_in_order(h200s):
    first = environment.collect("cuda")
    gpus = [gpu.model_copy(update={"uuid": f"{gpu.uuid}-of-b"}) for gpu in first.gpus]
    other = first.model_copy(update={"gpus": tuple(gpus)})
    both = environment.together([first, other])
    uuids = [gpu.uuid for node in (first, other) for gpu in node.gpus]
    assert both.gpu_uuids(2 * len(first.gpus)) == ", ".join(uuids)
    assert both.env_id == first.env_id
    assert environment.together([first]) == first
    with pytest.raises(ValueError, match="node 1 of the group has environment other, node 0 has "):
        environment.together([first, first.model_copy(update={"env_id": "other"})])


def test_threads_matter_on_a_cpu_alone(h200s):
    def with_threads(device, number):
        return collect(device).model_copy(update={"num_threads": number}).comparable()

    assert with_threads("cpu", 1) != with_threads("cpu", 2)
    assert with_threads("cuda", 1) == with_threads("cuda", 2)


def test_file_round_trip_keeps_every_field(h200s, tmp_path):
    written = collect("cuda")
    path = tmp_path / "environment.json"
    path.write_text(written.to_json())
    assert Environment.from_file(path) == written
    assert json.loads(path.read_text())["env_id"] == written.env_id


def test_host_name_is_not_recorded(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "secret-host")
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    assert "secret-host" not in collect("cpu").to_json()
    assert not {"host", "hostname", "node"} & set(Environment.model_fields)


@pytest.mark.parametrize("content", [None, "", "{", '{"env_id": "0"}'])
def test_a_file_that_is_no_environment_is_one_line_with_its_path(tmp_path, content):
    path = tmp_path / "environment.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=r"environment\.json: ") as error:
        Environment.from_file(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make a git checkout with one commit of experts/a.py and docs/a.md."""
    monkeypatch.delenv("MOEBENCH_REVISION", raising=False)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("experts/a.py", "docs/a.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    return tmp_path


def test_revision_is_the_commit_and_dirty_is_what_would_run(checkout):
    head = (checkout / ".git" / "HEAD").read_text().split()[-1]
    revision = (checkout / ".git" / head).read_text().strip()
    assert git_state(checkout) == (revision, False, None)
    (checkout / "docs" / "a.md").write_text("prose")
    (checkout / "plot.png").touch()
    assert git_state(checkout) == (revision, False, None)
    (checkout / "experts" / "new.py").touch()
    assert git_state(checkout) == (revision, True, None)


def test_without_a_checkout_the_variable_speaks(checkout, monkeypatch):
    installed = checkout / "experts"  # this folder is inside a repository but is not itself a checkout
    assert git_state(installed) == (None, None, None)
    monkeypatch.setenv("MOEBENCH_REVISION", "0123abc")
    assert git_state(installed) == ("0123abc", None, None)
    assert git_state(checkout)[0] != "0123abc"


def test_without_git_the_revision_is_not_known(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = git_state(checkout)
    assert found[:2] == (None, None)
    assert str(found.problem).startswith("git does not run: ")


def test_the_reason_why_git_does_not_tell_the_revision_is_kept(checkout, monkeypatch, tmp_path_factory):
    """The path that git names is left out: environments are published."""
    folder = tmp_path_factory.mktemp("bin")
    fake = folder / "git"
    fake.write_text(
        f"#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '{checkout}'\" >&2\nexit 128\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    found = git_state(checkout)
    assert found[:2] == (None, None)
    assert found.problem == (
        "git: fatal: detected dubious ownership in repository; git config --global --add safe.directory FOLDER"
    )
    monkeypatch.setenv("MOEBENCH_REVISION", "0123abc")
    assert git_state(checkout) == ("0123abc", None, None)


@pytest.mark.parametrize("env_id", ["/tmp/x", "../../x", "a\0b", "", "a/b"])
def test_a_name_that_becomes_a_path_is_one_part_of_a_path(h200s, tmp_path, env_id):
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({**json.loads(collect("cuda").to_json()), "env_id": env_id}))
    with pytest.raises(ResultsError, match=r"environment\.json: env_id = ") as error:
        Environment.from_file(path)
    assert "\n" not in str(error.value)


def test_a_revision_is_a_part_of_a_files_name(h200s):
    found = collect("cuda").model_copy(update={"git_revision": "../Feature/x\n" + "y" * 300})
    assert found.code_name == "feature-x-" + "y" * 70


def test_importing_brings_no_torch():
    code = "import sys, moebench.machine.environment, moebench.machine.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.gpu
def test_this_gpu_answers():
    found = collect("cuda")
    assert len(found.gpus) == torch.cuda.device_count()
    for gpu in found.gpus:
        assert gpu.nvml_error is None
        assert gpu.driver_version
        assert gpu.throttle_reasons is not None
        assert gpu.l2_bytes > 0
    assert found.versions["cuda"]
    assert found.versions["cudnn"]
