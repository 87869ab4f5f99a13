"""Print what `make test-lowest` installs: each direct dependency at the lowest version that pyproject.toml allows.

    python tests/lowest.py > requirements.txt

torch has the version of constraints.txt, because the oldest builds exist for few machines. triton is left out: its
version follows from torch's, and builds of torch for CUDA bring it.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def declared() -> list[Requirement]:
    """Return the requirements of the package and of its extra `dev`, without triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [some for some in map(Requirement, texts) if some.name != "triton"]


def pinned(name: str) -> str:
    """Return the line of constraints.txt that pins the package `name`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def lowest() -> Iterator[str]:
    """Yield one line for each requirement. Raises ValueError if a requirement has not exactly one lower bound."""
    for requirement in declared():
        if requirement.name == "torch":
            yield pinned("torch")
            continue
        (bound,) = (some.version for some in requirement.specifier if some.operator == ">=")
        yield f"{requirement.name}=={bound}"


if __name__ == "__main__":
    print("\n".join(lowest()))
