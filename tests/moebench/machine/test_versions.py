import sys

import pytest
import torch

from moebench.machine.versions import TorchBuild, library_versions, module_version, torch_build


def install(folder, distribution, version):
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize("distribution", ["deep-ep", "deep_ep", "tokenspeed-deepep", "sgl-deep-ep"])
def test_deep_ep_is_found_under_every_name_it_is_distributed_by(tmp_path, monkeypatch, distribution):
    install(tmp_path, distribution, "0.0.99")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert module_version("deep_ep") == "0.0.99"


def test_a_module_without_metadata_is_there_with_a_version_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert module_version("grouped_gemm") is None
    (tmp_path / "grouped_gemm.py").touch()
    assert module_version("grouped_gemm") == "unknown"


def test_torch_is_named_with_its_build():
    assert library_versions()["torch"] == torch.__version__


def test_the_build_of_torch_is_read_from_its_files(tmp_path, monkeypatch):
    assert torch_build() == TorchBuild(torch.__version__, torch.version.cuda)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch")
    assert torch_build() is None
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('it must not be imported')")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: str = '13.0'\nhip = None\n")
    assert torch_build() == TorchBuild("2.11.0+cu130", "13.0")


@pytest.mark.parametrize(("number", "text"), [(None, None), (91900, "9.19.0"), (90805, "9.8.5"), (100203, "10.2.3")])
def test_cudnn_number_is_read_as_a_version(monkeypatch, number, text):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert library_versions()["cudnn"] == text


def test_a_cudnn_that_does_not_load_is_said_and_stops_nothing(monkeypatch):
    def mixed():
        raise RuntimeError("cuDNN version incompatibility: compiled against 9.19\nsecond line")

    monkeypatch.setattr(torch.backends.cudnn, "version", mixed)
    assert library_versions()["cudnn"] == "unusable: cuDNN version incompatibility: compiled against 9.19"
