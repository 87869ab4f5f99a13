"""What the additions of docs/architecture.md touch: each patch of tests/additions makes one, with a test of its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "additions"
#: The most files of the two packages that an addition may touch.
MOST_FILES = {"engine": 3, "dispatcher": 4, "column": 2, "command": 2, "axis": 3, "verdict": 2}
#: `make test` runs the tests of these additions, which takes seconds; `make certify` runs those of all.
QUICK = ("axis", "column", "command", "verdict")
#: Tests of the project that an addition must not break, besides its own.
ALWAYS = ("tests/moebench/test_imports.py", "tests/experts/test_imports.py")


def touched(name: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", (FOLDER / f"{name}.patch").read_text(), re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project, to be changed."""
    for name in ("experts", "moebench", "suites", "tests", "docs", "results"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", "runs", "*.csv", "*.png", "*.svg"),
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_every_addition_has_its_patch() -> None:
    assert {path.stem for path in FOLDER.glob("*.patch")} == MOST_FILES.keys()


@pytest.mark.parametrize("name", MOST_FILES)
def test_an_addition_touches_few_files_and_brings_a_test(name: str) -> None:
    in_packages = [path for path in touched(name) if path.startswith(("experts/", "moebench/"))]
    assert 0 < len(in_packages) <= MOST_FILES[name], in_packages
    assert [path for path in touched(name) if path.startswith("tests/")]


@pytest.mark.certify
@pytest.mark.parametrize("name", MOST_FILES)
@pytest.mark.timeout(600)
def test_an_addition_works_in_a_copy(name: str, copy: Path, certify: bool) -> None:
    patch = FOLDER / f"{name}.patch"
    subprocess.run(["git", "apply", "--verbose", str(patch)], cwd=copy, check=True, capture_output=True)
    if not (certify or name in QUICK):
        return
    tests = [path for path in touched(name) if path.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    command += ALWAYS if certify else []
    variables = {"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(copy)}
    done = subprocess.run(command, cwd=copy, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
