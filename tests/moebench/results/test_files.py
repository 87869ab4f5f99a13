"""A file is written completely or not at all."""

import os
from pathlib import Path

import pytest

from moebench.results import frame as frames
from moebench.results.files import write_again, write_atomically


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


@pytest.mark.parametrize("kind", ["fifo", "link", "nothing", "other content"])
def test_what_another_process_put_in_a_files_place_is_replaced(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "journal.jsonl", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"of another")
    match kind:
        case "fifo":
            os.mkfifo(path)  # whoever opened it would wait for ever
        case "link":
            path.symlink_to(elsewhere)
        case "other content":
            path.write_bytes(b"forged")
    write_again(path, b"rows")
    assert not path.is_symlink()
    assert path.read_bytes() == b"rows"
    assert elsewhere.read_bytes() == b"of another"
