import pytest
import torch

from experts.registry import PEERS, Backend, backend_names
from moebench.listing import available_backends, everything
from moebench.plan import UsageError


def test_other_libraries_layers_are_examined_when_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "unsupported", lambda *_: None)
    assert available_backends("cpu") == [name for name in backend_names() if name not in PEERS]


@pytest.mark.parametrize("ask", [available_backends, everything])
def test_backends_are_not_asked_about_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, ask) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device = 'cuda:1': torch .* sees 0 CUDA GPUs"):
        ask("cuda:1")
