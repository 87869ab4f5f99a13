"""pyproject.toml, constraints.txt and the Makefile agree with each other and with the code."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import pythons
from tests.lowest import lowest, pinned

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = ("experts", "moebench")

#: Imported name -> name of the distribution, where the two differ.
DISTRIBUTION_OF = {
    "deep_ep": "tokenspeed-deepep",
    "deep_gemm": "sgl-deep-gemm",
    "pydantic_core": "pydantic",  # pydantic requires one exact version
    "pynvml": "nvidia-ml-py",
    "triton": "torch",  # the CUDA builds of torch depend on triton
}
#: Packages of backends that no extra installs. They are imported only inside functions.
UNDECLARED = {"torchao", "nemo_automodel", "sonicmoe"}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements(*groups):
    return [Requirement(text) for group in groups for text in group]


ALL = requirements(PROJECT["dependencies"], *EXTRAS.values())


def pinned_version(pin):
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return Version(specifier.version)


def test_every_package_is_pinned_once_to_one_public_version():
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert sorted(set(names)) == sorted(names)
    for pin in pins():
        assert pinned_version(pin).local is None, f"{pin} refuses other builds; leave the local part out"


def test_every_pin_satisfies_the_requirements():
    versions = {canonicalize_name(pin.name): pinned_version(pin) for pin in pins()}
    for requirement in ALL:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement} refuses the pin {version}"


def test_every_package_that_make_installs_is_pinned():
    named = {
        canonicalize_name(requirement.name)
        for requirement in requirements(PROJECT["dependencies"], EXTRAS["dev"], EXTRAS["docs"], EXTRAS["ray"])
    }
    assert named <= {canonicalize_name(pin.name) for pin in pins()}


@pytest.mark.parametrize("requirement", [r for r in ALL if r.name != "moebench"], ids=lambda r: r.name)
def test_every_requirement_has_a_lower_bound(requirement):
    assert any(specifier.operator in (">=", "==", "~=") for specifier in requirement.specifier)


def test_the_gpu_extra_names_every_extra_of_a_backend():
    (every,) = requirements(EXTRAS["gpu"])
    assert every.name == "moebench"
    assert every.extras == set(EXTRAS) - {"gpu", "ray", "dev", "docs"}


def test_mypy_and_ruff_target_the_oldest_supported_python():
    oldest = PYPROJECT["tool"]["mypy"]["python_version"]
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={oldest}")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_the_moebench_command_exists():
    module, _, function = PROJECT["scripts"]["moebench"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def imported_names(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", OURS)
def test_every_import_is_declared(package):
    declared = {canonicalize_name(requirement.name) for requirement in ALL}
    declared -= {canonicalize_name(requirement.name) for requirement in requirements(EXTRAS["dev"])}
    known = {*OURS, *sys.stdlib_module_names, *UNDECLARED}
    for file in (ROOT / package).rglob("*.py"):
        for name in set(imported_names(file)) - known:
            distribution = canonicalize_name(DISTRIBUTION_OF.get(name, name))
            assert distribution in declared, f"{file.relative_to(ROOT)} imports {name}; declare it in pyproject.toml"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_make_and_make_help_list_every_target(arguments):
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")]
    named = ["bench", "test", "test-lowest", "test-pythons", "certify", "lint", "results", "docs", "clean", "help"]
    assert listed == named


def test_the_oldest_libraries_are_those_of_pyproject():
    """`make test-lowest` installs each declared package at its bound, and torch as pinned."""
    lines = [Requirement(line) for line in lowest()]
    declared = requirements(PROJECT["dependencies"], EXTRAS["dev"])
    assert [line.name for line in lines] == [some.name for some in declared if some.name != "triton"]
    bounds = {some.name: some for some in declared}
    for line in lines:
        version = pinned_version(line)
        assert bounds[line.name].specifier.contains(version)
        if line.name != "torch":
            assert str(bounds[line.name].specifier) == f">={line.specifier}".replace("==", ""), "it is the bound itself"
    assert "torch==" in pinned("torch")


def test_every_named_version_of_python_is_tested():
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if " :: 3." in text]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert workflow["test"]["strategy"]["matrix"]["python"] == named
    assert pythons.versions() == [text for text in named if text != f"3.{sys.version_info.minor}"]


def test_a_python_that_is_not_there_is_reported_as_skipped(monkeypatch, capfd, tmp_path):
    """A shim of pyenv is on PATH, but does not run."""
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    monkeypatch.setattr(pythons, "versions", lambda: ["3.12", "3.99"])
    monkeypatch.setattr(pythons, "prepared", lambda *arguments: pytest.fail("nothing is installed"))
    assert pythons.main([]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"Python {v}: skipped, this machine has no interpreter python{v}" for v in ("3.12", "3.99")]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_tests_that_the_makefile_names_exist():
    command = ["make", "--no-print-directory", "--eval=list: ; @echo $(LIBRARY_TESTS) $(TORCH_TESTS)", "list"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


#: The most lines that a file may have, by top-level folder.
MOST_LINES = {"experts": 300, "moebench": 300, "tests": 400}
#: The most bytes that all tracked files may have together.
MOST_BYTES = 8 * 2**20
#: Test files that cover more than one module, or that are separate from the test file of their module.
CROSS_CUTTING = {
    "test_fuzz.py",  # spoiled files of every kind, each given to a command
    "test_untrusted.py",  # what files, places and arguments may be: every module that reads or writes for a command
    "test_imports.py",  # which module imports which, for all modules
    "test_new_axis.py",  # a new field of a case appears in tables, pages, files, filters and gates
    "test_older_run.py",  # every reader of a results folder opens one of an older revision
    "measure/test_contexts.py",  # the matrix of contexts in real groups: context, subject, job, ranks and worker
    "measure/test_cheats.py",  # backends that look faster than they are: job, call, samplers, clock, canary and worker
    "measure/test_expert_parallel.py",  # groups of real processes: worker, samplers, judge and runner
    "measure/test_gpu.py",  # facts of timing, memory, poison and a run that only a CUDA GPU can show
    "measure/test_graphs_gpu.py",  # CUDA graphs of two ranks in a run: job, samplers, worker and runner
    "measure/test_profiling_gpu.py",  # facts of a profile that only a CUDA GPU can show
    "measure/test_trials_gpu.py",  # faults of trials that only a CUDA GPU can show
    "parity/test_faults.py",  # trials, checks and judge find the planted faults
    "parity/test_fp8_parity.py",  # the judge of FP8 recipes, with quantization and reference
    "parity/test_never_accused.py",  # no check accuses a right backend
    "run/test_belief.py",  # what the supervisor believes of a worker: runner, supervisor and worker
    "run/test_neighbours.py",  # backends that spoil their process and files, between honest ones
    "run/test_schedule.py",  # several workers at once: runner, turns and supervisor
    "run/test_signals.py",  # signals at any moment of a run: the command line, runner and resume
    "verdicts/test_older_revision.py",  # `ab` with the experts of an older revision: revisions, ab, worker and gate
    "workload/test_inputs_of_ranks.py",  # inputs, case and models of a case with ranks; test_inputs.py is long
}


@pytest.mark.parametrize("folder", MOST_LINES)
def test_no_file_is_too_long(folder):
    lines = {path: path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert len(lines) > 20
    most = MOST_LINES[folder]
    too_long = [f"{path.relative_to(ROOT)}: {count} lines" for path, count in lines.items() if count > most]
    assert not too_long, f"{too_long} exceed {most} lines; split them by topic"


def test_every_test_file_is_named_after_its_module():
    """tests/moebench/<folder>/test_<module>.py tests moebench/<folder>/<module>.py."""
    tests, package = ROOT / "tests" / "moebench", ROOT / "moebench"
    files = {path.relative_to(tests) for path in tests.rglob("test_*.py")}
    strangers = {
        str(file) for file in files if not (package / file.with_name(file.name.removeprefix("test_"))).is_file()
    }
    assert strangers == CROSS_CUTTING


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a checkout and git")
def test_tracked_files_are_small_together():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if name and (ROOT / name).exists()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    total = sum(sizes.values())
    assert total <= MOST_BYTES, f"tracked files have {total / 2**20:.1f} MiB; the largest are {', '.join(largest)}"
