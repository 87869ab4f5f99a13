"""moebench finds its sweeps and published results in a wheel, a checkout, an editable install and the working folder.

Each test uses a fresh environment. It sees the libraries of the current environment, except editable installs.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from moebench.results.frame import load

ROOT = Path(__file__).parents[1]
SWEEPS = {path.stem for path in (ROOT / "suites").glob("*.toml")}
#: The files and folders that a build reads.
PROJECT = (
    *("LICENSE", "MANIFEST.in", "README.md", "experts", "moebench", "pyproject.toml", "setup.py", "suites"),
    "results/published",
)
#: The published results that `advise` reads, by the names of their folders.
PUBLISHED = {path.parent.name for path in (ROOT / "results" / "published").glob("*/results.parquet")}
WHERE = """
import moebench
from moebench.results.published import default_folders
from moebench.workload.spec import find_sweep
print(moebench.__file__)
print(find_sweep("quick"))
print({folder.parent for folder in default_folders()}.pop())
"""
#: A file of measured tiles, which tests add to the copy that they build.
TILES = "experts/gemm/measured/some_gpu.json"
#: The most bytes of a wheel.
MOST_BYTES = 3 * 2**20

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip, to install the wheel"),
    pytest.mark.timeout(400),  # the fresh processes take half a minute on an idle machine
]


@dataclass(frozen=True)
class Installed:
    """An environment with moebench, and the environment variables of its programs."""

    folder: Path
    variables: dict[str, str]

    def call(self, program: str, *arguments: object, cwd: Path, code: int = 0) -> str:
        """Run a program of the environment in `cwd`. Return its standard output; with a `code`, its standard error."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables = {**outside, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **self.variables}
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def moebench(self, *arguments: object, cwd: Path, code: int = 0) -> str:
        return self.call("moebench", *arguments, cwd=cwd, code=code)

    def places(self, cwd: Path) -> tuple[Path, Path, Path]:
        """Return the paths of the package moebench, of the sweep `quick` and of the published results."""
        package, sweep, published = self.call("python", "-c", WHERE, cwd=cwd).splitlines()
        return Path(package).parent, cwd / sweep, cwd / published


def environment(folder: Path, *wheels: Path, **variables: str) -> Installed:
    """Make a fresh environment in `folder` with these wheels and access to the libraries of the current environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    if wheels:  # before the libraries are added, as pip must not see a moebench among them
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder)
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True, timeout=300)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Python does not read the .pth files in these folders
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return Installed(folder, variables)


def built(what: str, project: Path, into: Path) -> Path:
    """Build an sdist, a wheel or an editable wheel of the project with the hook that pip calls. Return its path."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    into.mkdir()
    done = subprocess.run([sys.executable, "-c", code, into], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = into.iterdir()
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that a build reads, so that the checkout stays free of build files."""
    folder = tmp_path_factory.mktemp("project")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.svg"))
        else:
            shutil.copy(ROOT / name, folder)
    (folder / TILES).parent.mkdir(exist_ok=True)
    (folder / TILES).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    with tarfile.open(built("sdist", project, folder / "sdist")) as sdist:
        sdist.extractall(folder, filter="data")
    (unpacked,) = folder.glob("moebench-*")
    return built("wheel", unpacked, folder / "wheel")


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return environment(tmp_path_factory.mktemp("from-wheel") / "venv", wheel)


def contents(wheel: Path) -> dict[str, int]:
    """Return the checksum of each file in a wheel."""
    return {entry.filename: entry.CRC for entry in zipfile.ZipFile(wheel).infolist()}


def test_a_wheel_holds_sweeps_results_and_templates_and_no_tests(wheel: Path) -> None:
    names = set(contents(wheel))
    beside = {Path(name) for name in names if name.startswith("moebench/suites/")}
    assert {path.stem for path in beside if path.suffix == ".toml"} == SWEEPS
    assert {path.name for path in beside if path.suffix != ".toml"} == {"sample-routing.npz"}
    files = ("results.parquet", "environment.json", "run.json", "sweep.toml")
    published = {f"moebench/published/{folder}/{file}" for folder in PUBLISHED for file in files}
    assert {name for name in names if name.startswith("moebench/published/")} == published
    assert TILES in names
    templates = {path.name for path in (ROOT / "moebench" / "report" / "templates").iterdir()}
    assert {f"moebench/report/templates/{name}" for name in templates} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"experts", "moebench"}
    assert wheel.stat().st_size < MOST_BYTES


def test_a_wheel_from_the_checkout_is_the_wheel_from_the_sdist(wheel: Path, project: Path, tmp_path: Path) -> None:
    """The fixture `wheel` comes from the sdist."""
    assert contents(built("wheel", project, tmp_path / "wheel")) == contents(wheel)
    shutil.rmtree(project / "build")


def test_everything_works_from_a_wheel_in_an_empty_folder(from_wheel: Installed, tmp_path: Path) -> None:
    package, quick, published = from_wheel.places(tmp_path)
    assert package.is_relative_to(from_wheel.folder)
    assert (quick, published) == (package / "suites" / "quick.toml", package / "published")
    listed = json.loads(from_wheel.moebench("list", "--json", "--device", "cpu", cwd=tmp_path))
    assert {line["name"] for line in listed["sweeps"]} == SWEEPS
    chosen = ("--filter", "num_tokens=16", "--filter", "mode=forward", "--only", "loop", "--device", "cpu")
    planned = from_wheel.moebench("run", "quick", *chosen, "--dry-run", "--json", cwd=tmp_path)
    assert "estimated from the nearest of" in from_wheel.moebench("run", "gpu", "--dry-run", cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "what measures nothing writes nothing"
    printed = from_wheel.moebench("run", "quick", *chosen, "--out", "out", cwd=tmp_path)
    assert printed.splitlines()[-1] == "results: out"
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    (row,) = json.loads(from_wheel.moebench("show", "out", "--json", cwd=tmp_path))
    assert (row["backend"], row["num_tokens"], row["status"]) == ("loop", 16, "ok")
    assert row["case_id"] in planned


def test_the_published_results_are_known_by_name_in_a_wheel(from_wheel: Installed, tmp_path: Path) -> None:
    """`advise` answers from them, and `show`, `compare` and `report` take their names."""
    asked = ("--model", "qwen3-30b-a3b", "--num-tokens", "4096", "--mode", "train", "--json")
    of_checkout, of_wheel = (json.loads(from_wheel.moebench("advise", *asked, cwd=cwd)) for cwd in (ROOT, tmp_path))
    assert of_checkout == of_wheel
    name = "h200-peers-2026-11-28"
    shown = json.loads(from_wheel.moebench("show", name, "--json", cwd=tmp_path))
    assert len(shown) == len(load(ROOT / "results" / "published" / name))
    from_wheel.moebench("compare", name, "h200-peers-2026-11-23", cwd=tmp_path)
    (packaged,) = from_wheel.folder.rglob(name)
    before = set(packaged.iterdir())
    from_wheel.moebench("report", name, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert set(packaged.iterdir()) == before, "nothing is written into the package"
    assert "copy" in from_wheel.moebench("plots", name, cwd=tmp_path, code=2)


def test_pip_takes_an_extra_from_the_installed_moebench(from_wheel: Installed) -> None:
    """The commands of `moebench doctor` install extras so, from a wheel and from a checkout alike."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(from_wheel.folder)]
    command = [*pip, "install", "--no-index", "--no-deps", "--dry-run", "moebench[te]"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "Requirement already satisfied: moebench[te]" in done.stdout


def in_checkout(project: Path) -> tuple[Path, Path, Path]:
    return project / "moebench", project / "suites" / "quick.toml", project / "results" / "published"


def test_an_editable_install_finds_the_data_of_its_checkout(project: Path, tmp_path: Path) -> None:
    editable = environment(tmp_path / "venv", built("editable", project, tmp_path / "wheel"))
    assert editable.places(tmp_path) == in_checkout(project)
    for copied in ("suites", "published"):
        assert not (project / "moebench" / copied).exists(), "a copy would go stale"


def test_a_checkout_on_the_path_finds_its_data(project: Path, tmp_path: Path) -> None:
    on_path = environment(tmp_path / "venv", PYTHONPATH=str(project))
    assert on_path.places(tmp_path) == in_checkout(project)


@pytest.mark.parametrize("is_from_wheel", [True, False], ids=["wheel", "checkout"])
def test_data_in_the_working_folder_come_first(
    from_wheel: Installed, project: Path, tmp_path: Path, is_from_wheel: bool
) -> None:
    chosen = from_wheel if is_from_wheel else Installed(from_wheel.folder, {"PYTHONPATH": str(project)})
    (tmp_path / "suites").mkdir()
    for name in ("quick", "mine"):
        shutil.copy(ROOT / "suites" / "torch-qwen3.toml", tmp_path / "suites" / f"{name}.toml")
    mine = tmp_path / "results" / "published" / "mine"
    mine.mkdir(parents=True)
    (mine / "results.parquet").touch()
    package, quick, published = chosen.places(tmp_path)
    assert package.is_relative_to(from_wheel.folder if is_from_wheel else project)
    assert (quick, published) == (tmp_path / "suites" / "quick.toml", mine.parent)
    (line,) = chosen.moebench("list", "mime", cwd=tmp_path, code=2).splitlines()
    assert line.startswith('mime: no such file, and no sweep has that name; did you mean "mine"? the sweeps are ')
    assert all(name in line for name in (*SWEEPS, "mine"))
