import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch

from moebench.machine import backends
from moebench.machine import doctor as module
from moebench.machine.doctor import REMEDIES, Diagnosis, doctor
from moebench.machine.versions import DISTRIBUTIONS, TorchBuild

UUID = "GPU-00000000-0000-0000-0000-000000000001"
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def set_build(monkeypatch, version, cuda):
    """Let torch's files tell of this build."""
    for place in (module, backends):
        monkeypatch.setattr(place, "torch_build", lambda: TorchBuild(version, cuda))


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, tmp_path):
    """A machine without faults: idle cores at a fixed clock, and a CPU build of torch.

    The doctor reports only what a test changes.
    """
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr(module, "_GOVERNORS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    set_build(monkeypatch, "2.13.0+cpu", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def h200(fake_nvml, monkeypatch):
    """Add an idle H200 that torch sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    set_build(monkeypatch, "2.13.0", "13.0")
    return fake_nvml.add_gpu(UUID)


def problems(is_thorough=True):
    return {finding.name: finding for finding in doctor(is_thorough) if finding.level == "problem"}


def test_a_machine_without_gpu_has_no_problem(fake_nvml):
    fake_nvml.init_error = "NVML Shared Library Not Found"
    found = {finding.name: finding for finding in doctor()}
    assert problems() == problems(is_thorough=False) == {}
    assert found["gpu"].level == "missing"
    assert found["torch"].level == "ok"
    assert found["numpy"] == Diagnosis("ok", "numpy", version("numpy"))


def test_every_line_is_one_line_and_starts_with_its_level(h200):
    for finding in doctor():
        assert "\n" not in str(finding)
        assert str(finding).startswith(finding.level)


def test_what_is_missing_comes_with_a_command_that_exists(fake_nvml, monkeypatch):
    monkeypatch.setattr(module, "module_version", lambda name: None)
    missing = {finding.name: finding.remedy for finding in doctor() if finding.level == "missing"}
    assert {name: missing[name] for name in DISTRIBUTIONS} == dict(REMEDIES)
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for name, extra in {"transformer_engine": "te", "grouped_gemm": "gmm", "deep_ep": "deepep"}.items():
        assert extra in extras
        assert f"'moebench[{extra}]'" in REMEDIES[name]


def test_an_idle_gpu_is_no_problem(h200):
    assert problems() == {}
    (gpu,) = [finding for finding in doctor() if finding.name == "gpu 0"]
    assert gpu == Diagnosis("ok", "gpu 0", "NVIDIA H200, 140 GiB, driver 580.159.03")


def test_a_gpu_in_use_by_another_process(h200):
    h200.pids = [os.getpid()]
    assert problems() == {}
    h200.pids = [os.getpid(), 4242]
    assert "4242" in problems()["gpu 0 use"].detail


def test_a_gpu_kept_busy_by_nobody_to_be_seen(h200):
    h200.busy_percent = 87
    assert "87%" in problems()["gpu 0 use"].detail


@pytest.mark.parametrize(
    ("bits", "named"), [(0x004, None), (0x001, None), (0x020, "sw_thermal"), (0x080, "power_brake")]
)
def test_clocks_held_down(h200, bits, named):
    h200.reasons = bits
    found = problems()
    assert ("gpu 0 clock" in found) == (named is not None)
    assert named is None or named in found["gpu 0 clock"].detail


def test_a_cpu_build_of_torch_beside_a_gpu(h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    set_build(monkeypatch, "2.13.0+cpu", None)
    for is_thorough in (False, True):
        found = problems(is_thorough)["torch"]
        assert "CPU build" in found.detail
        assert found.remedy == "pip install --force-reinstall torch==2.13.0"


def test_a_cuda_build_that_sees_no_gpu(h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problems()["torch"].remedy == "update the driver"
    assert problems(is_thorough=False) == {}, "only an import shows it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for is_thorough in (False, True):
        assert "CUDA_VISIBLE_DEVICES is ''" in problems(is_thorough)["torch"].remedy


def test_a_gpu_that_nvml_cannot_read_is_not_called_missing(h200, fake_nvml, monkeypatch, tmp_path):
    fake_nvml.init_error = "Driver Not Loaded"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(backends, "_DRIVERS", (tmp_path / "nvidiactl",))
    assert "Driver Not Loaded" in problems()["gpu"].detail


def test_busy_cores(fake_nvml, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 96.0)
    assert "96%" in problems()["cpu load"].detail


@pytest.mark.parametrize(("governor", "is_problem"), [("powersave", True), ("schedutil", True), ("performance", False)])
def test_a_clock_that_follows_the_load(fake_nvml, quiet_machine, governor, is_problem):
    for core in ("cpu0", "cpu1"):
        file = quiet_machine / core / "cpufreq" / "scaling_governor"
        file.parent.mkdir(parents=True)
        file.write_text(governor + "\n")
    assert ("cpu clock" in problems()) == is_problem


def test_a_cudnn_that_does_not_load(h200, monkeypatch):
    def mixed():
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", mixed)
    assert "incompatibility" in problems()["cudnn"].detail


def test_a_torch_that_is_not_installed(h200, monkeypatch):
    for place in (module, backends):
        monkeypatch.setattr(place, "torch_build", lambda: None)
    assert problems(is_thorough=False)["torch"] == Diagnosis("problem", "torch", "not installed", "pip install torch")
