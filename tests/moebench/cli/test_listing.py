import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from experts import registry
from experts.errors import RegistryError
from experts.registry import PEERS, Backend, backend_names, get_backend
from moebench.cli.listing import available_backends, backends, everything
from moebench.errors import UsageError
from moebench.workload.spec import available_sweeps, load_sweep


def test_other_libraries_layers_are_examined_when_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "unsupported", lambda *_: None)
    assert available_backends("cpu") == [name for name in backend_names() if name not in PEERS]


@pytest.mark.parametrize("ask", [available_backends, everything])
def test_backends_are_not_asked_about_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device = 'cuda:1': torch .* sees 0 CUDA GPUs"):
        ask("cuda:1")


def test_a_sweep_has_as_many_jobs_as_are_listed() -> None:
    listed = {line.name: line.num_jobs for line in everything("cpu").sweeps}
    assert {"quick", "peers", "gpu-ep8"} <= listed.keys()
    for name, path in available_sweeps().items():
        assert listed[name] == len(load_sweep(path).jobs()), name


@pytest.mark.parametrize("error", [ZeroDivisionError("at import"), RegistryError("no such module")])
def test_a_backend_that_cannot_be_imported_is_unavailable_and_says_why(monkeypatch, error: Exception) -> None:
    def get(name: str) -> Backend:
        if name == "te":
            raise error
        return get_backend(name)

    monkeypatch.setattr(registry, "get_backend", get)
    table = Console(file=io.StringIO(), width=1000)
    table.print(backends(is_thorough=True))
    lines = dict(line.split(maxsplit=1) for line in table.file.getvalue().splitlines())
    assert (lines["te"].strip(), lines["loop"].strip()) == (
        f"unavailable: {type(error).__name__}: {error}",
        "available",
    )
