"""A file is written completely or not at all."""

from pathlib import Path

import pytest

from moebench.results import frame as frames
from moebench.results.files import write_atomically


def test_a_file_appears_only_when_it_is_whole_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    monkeypatch.setattr(frames.os, "fsync", lambda descriptor: seen.append(path.read_bytes()))
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old", "who reads it now reads the old file to its end"
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
