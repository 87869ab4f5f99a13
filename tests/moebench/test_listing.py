import pytest

from experts.registry import PEERS, Backend, backend_names
from moebench.listing import available_backends


def test_other_libraries_layers_are_examined_when_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "unsupported", lambda *_: None)
    assert available_backends("cpu") == [name for name in backend_names() if name not in PEERS]
