"""What `list` says without imports agrees with what the backends themselves say."""

import sys
from types import SimpleNamespace

import pytest
import torch

from experts import catalog
from experts.errors import Unsupported
from experts.peers import nemo_automodel, sonicmoe, transformers_experts
from experts.registry import backend_names, get_backend
from experts.te import library
from moebench.errors import UsageError
from moebench.machine import backends as module
from moebench.machine.backends import BackendLine, backends
from moebench.machine.versions import TorchBuild

CUDA = TorchBuild("2.11.0+cu130", "13.0")
CAPABILITIES = [(7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)]


@pytest.fixture
def installed(monkeypatch):
    """Every library is installed, and imports."""
    for name in (
        "grouped_gemm",
        "torchao",
        "torchao.prototype",
        "torchao.prototype.moe_training",
        "triton",
        "deep_gemm",
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "torchao.prototype.moe_training.mxfp8_grouped_mm", SimpleNamespace())
    monkeypatch.setattr(library, "not_installed", lambda: None)
    for peer in (nemo_automodel, sonicmoe, transformers_experts):
        monkeypatch.setattr(peer, "not_installed", lambda name: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "torch_build", lambda: CUDA)
    monkeypatch.setattr(module, "entry_points", lambda group: [])


def lines(device=None) -> dict[str, BackendLine]:
    return {line.name: line for line in backends(device)}


@pytest.mark.parametrize("here", CAPABILITIES)
def test_a_gpu_suffices_exactly_for_the_backends_that_take_it(installed, fake_nvml, monkeypatch, here):
    fake_nvml.add_gpu("GPU-1", capability=here)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: here)
    asked = {one.name: get_backend(one.name).unsupported(torch.device("cuda")) for one in catalog.BACKENDS}
    found = lines()
    assert {name: line.unavailable is None for name, line in found.items()} == {
        name: reason is None for name, reason in asked.items()
    }
    for name, reason in asked.items():
        if isinstance(reason, Unsupported):
            this, needed = (f"SM{major}{minor}" for major, minor in (here, needed_by(name)))
            assert found[name].unavailable == f"needs {needed}, this is {this}"
            assert this in reason.reason


def needed_by(name: str) -> tuple[int, int]:
    (capability,) = (one.capability for one in catalog.BACKENDS if one.name == name)
    assert capability is not None
    return capability


def test_on_a_cpu_the_same_backends_are_unavailable_as_they_say_themselves(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = {name: get_backend(name).unsupported(torch.device("cpu")) is None for name in backend_names()}
    assert {name: line.unavailable is None for name, line in lines("cpu").items()} == asked


def test_what_needs_a_library_is_called_installed_and_not_available(installed, fake_nvml, monkeypatch):
    fake_nvml.add_gpu("GPU-1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert {line.here for line in backends(None) if line.unavailable is None} == {"available", "installed, not tried"}
    assert [name for name, line in lines().items() if line.here == "available"] == [
        one.name for one in catalog.BACKENDS if one.engine is not None and one.engine.library is None
    ]


def test_a_library_that_is_not_there_comes_with_its_command(installed, fake_nvml, monkeypatch):
    fake_nvml.add_gpu("GPU-1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "grouped_gemm" else object())
    assert lines()["gmm"].unavailable == catalog.missing("grouped_gemm")
    assert lines()["te"].unavailable is None
    assert lines("cpu")["gmm"].unavailable == "needs a CUDA GPU, the device is cpu"


def test_only_the_gpus_that_torch_sees_count(installed, fake_nvml, monkeypatch):
    fake_nvml.add_gpu("GPU-1", capability=(8, 0))
    fake_nvml.add_gpu("GPU-2", capability=(9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert lines("cuda:0")["te_fp8_current"].unavailable is None
    with pytest.raises(UsageError, match=r"device = 'cuda:1': torch 2.11.0\+cu130 sees 1 CUDA GPUs"):
        backends("cuda:1")
    monkeypatch.setattr(module, "torch_build", lambda: TorchBuild("2.11.0+cpu", None))
    assert lines()["gmm"].unavailable == "needs a CUDA GPU, the device is cpu"
    with pytest.raises(UsageError, match="sees 0 CUDA GPUs"):
        backends("cuda")


def test_without_nvml_torch_is_asked_only_where_a_driver_is(installed, fake_nvml, monkeypatch, tmp_path):
    fake_nvml.init_error = "NVML Shared Library Not Found"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(module, "_DRIVERS", (tmp_path / "nvidiactl",))
    assert module.gpus_of_torch() == []
    (tmp_path / "nvidiactl").touch()
    assert module.gpus_of_torch() == [(9, 0)]
