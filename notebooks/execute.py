"""Run the notebooks of this folder, each in a fresh kernel, and store their outputs: `python notebooks/execute.py`.

The stored notebooks do not name the Python that ran them, and have nothing that differs from run to run.
"""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def execute(notebook: nbformat.NotebookNode, first_on_path: Path | None = None) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a fresh kernel that imports this checkout. Raises CellExecutionError."""
    paths = [str(path) for path in (first_on_path, ROOT) if path is not None]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))}
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,  # a cell's prints may arrive in one piece or in several
    )
    executed: nbformat.NotebookNode = client.execute(env=variables)
    return _stripped(executed)


def _stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove the Python that ran the notebook, the metadata of cells, and the memory addresses of plots."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            if "data" in output and "image/png" in output["data"]:
                output["data"].pop("text/plain", None)
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(nbformat.read(path, as_version=4)), path)
        print(f"wrote {path}")
