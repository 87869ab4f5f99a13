"""Run the tests that need no torch with each other version of Python that pyproject.toml names: `make test-pythons`.

    python tests/pythons.py TEST...

A version is skipped, and a line says so, if this machine has no interpreter of it. The environments `.venv-3.12` and so
on have the versions of constraints.txt, without torch: for many versions of Python it exists only as a build for CUDA
with several GB. The workflow for GitHub runs all tests with all versions.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Packages that these tests do not need: torch, and tools that check the source.
_WITHOUT = ("torch", "triton", "mypy", "ruff", "pandas-stubs", "scipy-stubs", "types-psutil")


def versions() -> list[str]:
    """Return the versions of Python in the classifiers of pyproject.toml, such as `3.12`, without the running one."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    found = [re.search(r":: (3\.\d+)$", text) for text in classifiers]
    return [some[1] for some in found if some and some[1] != f"3.{sys.version_info.minor}"]


def interpreter(version: str) -> Path | None:
    """Return an interpreter of this version that runs: the one on PATH, or one that pyenv has."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*([Path(on_path)] if on_path else []), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    asks = [f"import sys, venv; sys.exit('3.%d' % sys.version_info.minor != {version!r})"]
    for path in candidates:
        if subprocess.run([path, "-c", *asks], capture_output=True).returncode == 0:
            return path
    return None


def requirements() -> Iterator[str]:
    """Yield the requirements of the package and of its extra `dev`, without those that these tests do not need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        if re.match(r"[\w-]+", text)[0] not in _WITHOUT:  # type: ignore[index]
            yield text


def prepared(version: str, python: Path) -> Path:
    """Return the interpreter of the environment for this version. Make the environment if there is none."""
    folder = ROOT / f".venv-{version}"
    ours, done = folder / "bin" / "python", folder / ".installed"
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    if not done.exists() or any(path.stat().st_mtime > done.stat().st_mtime for path in sources):
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install = [ours, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", *requirements()]
        subprocess.run(install, cwd=ROOT, check=True)
        done.touch()
    return ours


def main(tests: list[str]) -> int:
    """Run the tests with each version. Return 0 if all passed or were skipped."""
    code = 0
    for version in versions():
        python = interpreter(version)
        if python is None:
            print(f"Python {version}: skipped, this machine has no interpreter python{version}", flush=True)
            continue
        print(f"Python {version}: {python}", flush=True)
        ours = prepared(version, python)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        compiled = [ours, "-W", "error", "-m", "compileall", "-q", "-f", "experts", "moebench", "tests"]
        for command in (compiled, [ours, "-m", "pytest", "-n", "2", "--dist", "loadfile", *tests]):
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode or code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
