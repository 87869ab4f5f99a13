"""The harness drives a revision of `experts` by its public names, so that a module of `experts` may move."""

import re
import shutil
from pathlib import Path

import pytest

import experts
from experts.dispatch import deepep
from moebench.verdicts.revisions import Revision, unknown_backends
from moebench.workload import driven
from tests.moebench.test_imports import MODULES, imports, is_within

ROOT = Path(__file__).parents[3]
#: What runs in the workers of `moebench ab`. The studies measure parts of the layers of this revision.
IN_WORKERS = ("measure", "parity", "workload")
STUDIES = ("measure.studies",)


def renamed_experts(into: Path) -> Path:
    """Copy the package `experts`, give every module and folder of it another name, and return the folder of the copy.

    The public names stay.
    """
    package = into / "experts"
    shutil.copytree(ROOT / "experts", package, ignore=shutil.ignore_patterns("__pycache__"))
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    folders = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    names = sorted({path.stem for path in (*files, *folders)}, key=len, reverse=True)
    within = "|".join(names)
    for path in package.rglob("*.py"):
        text = path.read_text()
        while True:  # every part of a dotted name
            moved = re.sub(rf"\bexperts((?:\.moved_\w+)*)\.({within})\b", r"experts\1.moved_\2", text)
            if moved == text:
                break
            text = moved
        text = re.sub(r"from (experts[\w.]*) import (.*)", lambda some: _moved(some, set(names), package), text)
        path.write_text(text)
    for path in sorted((*files, *folders), key=lambda some: len(some.parts), reverse=True):
        path.rename(path.with_name(f"moved_{path.name}"))
    return into


def _moved(line: re.Match[str], names: set[str], package: Path) -> str:
    """Return `from P import a, b` with the modules of P under their new names."""
    folder = package.parent.joinpath(*line[1].replace("moved_", "").split("."))
    if line[2].startswith("(") or not folder.is_dir():
        return line[0]
    parts = [part.strip() for part in line[2].split(",")]
    here = {path.stem for path in folder.iterdir()} & names
    return f"from {line[1]} import " + ", ".join(f"moved_{some} as {some}" if some in here else some for some in parts)


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, IN_WORKERS)])
def test_what_runs_in_workers_imports_public_names_alone(module):
    if is_within(module, STUDIES):
        pytest.skip("a study measures parts of the layers of this revision")
    public = {"experts", *(f"experts.{name}" for name in experts.__all__)}
    found = [name for name, _ in imports(MODULES[module].read_text()) if name.partition(".")[0] == "experts"]
    assert set(found) <= public


def test_a_name_that_is_not_public_yet_is_found_where_it_stood(monkeypatch):
    names = set(driven.__all__)
    found = {name: getattr(driven, name) for name in names - {"destroy_buffers"}}
    monkeypatch.setattr(experts, "__all__", [name for name in experts.__all__ if name not in names])
    assert {name: getattr(driven, name) for name in names - {"destroy_buffers"}} == found
    assert driven.destroy_buffers is deepep.destroy_buffers
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        _ = driven.anything


def test_a_revision_whose_modules_all_have_other_names_is_driven(tmp_path):
    """A fresh process imports the whole worker and asks the renamed revision for its backends."""
    folder = renamed_experts(tmp_path)
    assert not (folder / "experts" / "registry.py").exists()
    assert (folder / "experts" / "moved_dispatch" / "moved_collectives.py").exists()
    assert list(unknown_backends(Revision("renamed", None, folder), ["loop", "triton", "no_such"])) == ["no_such"]
