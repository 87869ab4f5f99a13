"""Name backends for worker processes: a name, or a class or function that a module defines."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moebench.errors import ResultsError
from moebench.workload.axes import cut

_GIVE = 'give a name, such as "triton" or "my_module:MyExperts", or a class that a module defines'


def names_of(given: Any) -> list[str]:
    """Return the name of each backend by which a worker process finds it.

    `given` is a backend or a list of backends. Raises ResultsError for a backend that a worker process cannot import.
    """
    several = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    if not several:
        raise ResultsError(f"backends = []: there is no backend to run; {_GIVE}")
    names = [_name_of(one) for one in several]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ResultsError(f"backends: {twice} is given twice; give each backend once")
    return names


def _name_of(backend: Any) -> str:
    if isinstance(backend, str):
        return backend
    module, name = getattr(backend, "__module__", None), getattr(backend, "__qualname__", None)
    if not (callable(backend) and isinstance(module, str) and isinstance(name, str)):
        raise ResultsError(f"backend {cut(repr(backend))}: it must be a backend; {_GIVE}")
    if module == "__main__":
        last = name.rpartition(".")[2]
        raise ResultsError(
            f"backend {name}: it is defined in a notebook or in the script itself, and a worker process cannot import "
            f"it from there; write it into a file, for example my_experts.py (in a notebook: %%writefile my_experts.py "
            f'as the first line of its cell), and give "my_experts:{last if last.isidentifier() else "MyExperts"}"'
        )
    if getattr(sys.modules.get(module), name, None) is not backend:
        raise ResultsError(
            f"backend {module}.{name}: a worker process finds only what a module has under a name of its own; define "
            f"it at the top level of {module}, or give it there the name {name.rpartition('.')[2]}"
        )
    return f"{module}:{name}"


@contextmanager
def importable(names: Sequence[str]) -> Iterator[None]:
    """Let the worker processes that start in the block import the modules of these backends, as this process does."""
    before = os.environ.get("PYTHONPATH")
    folders = [str(folder) for name in names if (folder := _folder_of(name.partition(":")[0])) is not None]
    if folders:
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*filter(None, [before]), *folders]))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


def _folder_of(module: str) -> Path | None:
    """Return the folder from which this process imported a module; None if it did not import it from a file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return path.parents[module.count(".") + (path.name == "__init__.py")]
