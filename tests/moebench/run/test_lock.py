"""One process at a time writes into a folder; which one is said, and its end frees the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.run.lock import check_new, locked

HOLDS_IT = "import sys\nfrom pathlib import Path\nfrom moebench.run.lock import locked\n"
HOLDS_IT += "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"


def test_a_process_that_is_killed_frees_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_IT, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=Path.cwd(), **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        for _ in range(2):  # who was refused has not taken the number away
            with pytest.raises(UsageError, match=f"^{tmp_path}: process {process.pid} is writing into it; wait"):
                locked(tmp_path).__enter__()
        process.kill()
    with locked(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()} is writing"):
        locked(tmp_path).__enter__()


def test_a_folder_is_free_after_the_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError) as error, locked(tmp_path):
        raise ZeroDivisionError
    assert error.tb  # holds whatever the block held
    with locked(tmp_path):
        check_new(tmp_path)
        (tmp_path / "logs" / "diary.txt").touch()
        with pytest.raises(UsageError, match="not an empty folder"):
            check_new(tmp_path)


def test_a_writer_without_a_number_is_on_another_machine(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "logs" / "lock.pid").unlink()
        with pytest.raises(UsageError, match="process of another machine is writing"):
            locked(tmp_path).__enter__()


@pytest.mark.parametrize("occupied", ["out", "out/logs/lock", "out/logs/lock.pid"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, occupied: str) -> None:
    """A file where the folder should be, or a folder where its files should be; root may write anywhere else."""
    if occupied == "out":
        (tmp_path / "out").touch()
    else:
        (tmp_path / occupied).mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/out: cannot be written: .*; name a place that can be$"):
        locked(tmp_path / "out").__enter__()
    if occupied.endswith("pid"):
        (tmp_path / occupied).rmdir()
        with locked(tmp_path / "out"):
            pass
