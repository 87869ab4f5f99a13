"""The notebooks run in a fresh kernel without torch, and print the output that is committed."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

#: As sitecustomize.py, Python runs this in every process that finds it on its path.
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "experts"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def test_both_notebooks_exist() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_backends", "gate_a_change"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete_and_small_and_name_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in notebook.cells))
    ), "the cells were not run once from top to bottom; run `python notebooks/execute.py`"
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert pictures(notebook) >= 1
    assert path.stat().st_size < 400_000
    text = path.read_text()
    assert not [word for word in ("site-packages", "/home/", "/root/", "/tmp/", str(ROOT)) if word in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_fresh_kernel_without_torch_prints_the_committed_output(path: Path, execute, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    committed = nbformat.read(path, as_version=4)
    again = execute(nbformat.read(path, as_version=4), first_on_path=tmp_path)
    assert not [output for output in outputs(again) if output.output_type == "error"]
    assert printed(again) == printed(committed), "stale; run `python notebooks/execute.py` and check the diff"
    assert pictures(again) == pictures(committed)
