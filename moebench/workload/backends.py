"""Look up backends and dispatchers in `experts.catalog`, and the groups by which sweeps name them.

The workers of `moebench ab` import older revisions of `experts`, which may lack the catalog. Without the catalog, no
backend is described, no groups of backends exist, and the dispatchers are those of the revisions without a catalog.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.errors import SweepError

if TYPE_CHECKING:
    from experts import catalog
    from moebench.workload.case import Job
else:
    try:
        from experts import catalog
    except ImportError:
        catalog = None
    else:  # `experts` of another folder may lack a catalog; Python then finds the one of an editable install
        if str(Path(catalog.__file__).parent) not in sys.modules["experts"].__path__:
            catalog = None

#: The dispatchers of revisions without a catalog, and the raw collective that bounds the speed of each.
_BEFORE_THE_CATALOG: Mapping[str, "catalog.Collective"] = {
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "deepep": "all_to_all",
}
_BACKENDS = {} if catalog is None else {backend.name: backend for backend in catalog.BACKENDS}
_COLLECTIVES = (
    _BEFORE_THE_CATALOG
    if catalog is None
    else {dispatcher.name: dispatcher.collective for dispatcher in catalog.DISPATCHERS}
)
_RESERVE_ROWS = [] if catalog is None else [d.name for d in catalog.DISPATCHERS if getattr(d, "reserves_rows", False)]

#: The dispatchers between ranks. A sweep that names no dispatcher uses the first dispatcher.
DISPATCHERS = tuple(_COLLECTIVES)
#: The backend that all other backends are compared with; "" without a catalog.
REFERENCE = "" if catalog is None else catalog.REFERENCE


def described(backend: str) -> "catalog.BackendEntry | None":
    """Return the catalog's entry for a backend; None for a backend that the catalog lacks."""
    return _BACKENDS.get(backend)


def is_built_in(backend: str) -> bool:
    """Whether the catalog has the backend. A backend of an entry point, or `module:attribute`, is not built in."""
    return backend in _BACKENDS


def engine_of(backend: str) -> "catalog.EngineEntry | None":
    """Return the engine of a backend; None for another library's layer (a peer) and for a name not in the catalog."""
    known = _BACKENDS.get(backend)
    return None if known is None else known.engine


def adapters_of(backend: str) -> "catalog.Lora | None":
    """Return the rank and alpha of a backend that trains low-rank adapters; None for another backend.

    The catalog must have the backend.
    """
    return getattr(_BACKENDS.get(backend), "lora", None)  # older revisions have no such backends


def sends_fp8_rows(backend: str) -> bool:
    """Whether a backend of the catalog sends rows to the ranks of their experts in FP8."""
    return bool(getattr(_BACKENDS.get(backend), "fp8_rows", None))  # older revisions have no such backends


def reserves_rows(dispatcher: str) -> bool:
    """Whether a dispatcher keeps room for the tokens of all ranks, in memory of its own that layers share."""
    return dispatcher in _RESERVE_ROWS


def collective_of(dispatcher: str) -> "catalog.Collective | None":
    """Return the raw collective that bounds a dispatcher's speed; None for "local"."""
    return _COLLECTIVES.get(dispatcher)


# Groups

#: Axis -> group as a sweep writes it -> the group's members in the catalog's order.
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "backend": {
        f"@{group}": tuple(backend.name for backend in _BACKENDS.values() if group in backend.groups)
        for group in dict.fromkeys(group for backend in _BACKENDS.values() for group in backend.groups)
    },
    "dispatcher": {"@dispatchers": DISPATCHERS},
}


def is_group(axis: str, value: object) -> bool:
    """Whether a value of an axis names a group. The group may not exist."""
    return axis in GROUPS and isinstance(value, str) and value.startswith("@")


def expanded(axis: str, values: Sequence[object]) -> list[tuple[int, object]]:
    """Return the values of an axis with groups replaced by their members, each with its place in the list.

    A group adds only members that the list does not name itself and that no earlier group added. An unknown group stays
    as it is; the axis refuses it later.
    """
    found: list[tuple[int, object]] = []
    taken = [value for value in values if not is_group(axis, value)]
    for number, value in enumerate(values):
        if not is_group(axis, value):
            found.append((number, value))
            continue
        members = GROUPS[axis].get(str(value), (value,))
        new = [member for member in members if member not in taken]
        found += [(number, member) for member in new]
        taken += new
    return found


def names_of(axis: str, words: Iterable[str]) -> list[str]:
    """Return the names on a command line, each once, with groups replaced by their members."""
    return list(dict.fromkeys(str(name) for _, name in expanded(axis, list(words))))


def check_known(jobs: "Iterable[Job]") -> None:
    """Raise SweepError if a job names a backend that does not exist, one line for each such backend."""
    names = dict.fromkeys(job.backend for job in jobs)
    mistakes = [reason for name in names if (reason := catalog.unknown(name)) is not None]
    if mistakes:
        raise SweepError(mistakes)
