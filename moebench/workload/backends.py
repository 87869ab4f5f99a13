"""What `experts.catalog` says of backends and dispatchers, and the groups that sweeps name them by. No torch here.

The workers of `moebench ab` import older revisions of `experts`, which may have no catalog. Then no backend is
described, there are no groups of backends, and the dispatchers are those of that time.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experts import catalog
else:
    try:
        from experts import catalog
    except ImportError:
        catalog = None
    else:  # an editable install finds the checkout's catalog for a package of another folder that has none
        if str(Path(catalog.__file__).parent) not in sys.modules["experts"].__path__:
            catalog = None

#: The dispatchers of the revisions without a catalog, and the raw collective that bounds each.
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

#: The dispatchers between ranks. The first is what a sweep takes that names none.
DISPATCHERS = tuple(_COLLECTIVES)
#: The backend that others are compared with; "" without a catalog.
REFERENCE = "" if catalog is None else catalog.REFERENCE


def described(backend: str) -> "catalog.Backend | None":
    """What the catalog says of a backend; None for one that is somebody else's."""
    return _BACKENDS.get(backend)


def engine_of(backend: str) -> "catalog.Engine | None":
    """The engine of a backend; None for a peer and for somebody else's."""
    known = _BACKENDS.get(backend)
    return None if known is None else known.engine


def collective_of(dispatcher: str) -> "catalog.Collective | None":
    """The raw collective that bounds a dispatcher; None for "local"."""
    return _COLLECTIVES.get(dispatcher)


# Groups

#: Axis -> group, as a sweep writes it -> its members, in the catalog's order.
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "backend": {
        f"@{group}": tuple(backend.name for backend in _BACKENDS.values() if group in backend.groups)
        for group in dict.fromkeys(group for backend in _BACKENDS.values() for group in backend.groups)
    },
    "dispatcher": {"@dispatchers": DISPATCHERS},
}


def is_group(axis: str, value: object) -> bool:
    """Whether a value of an axis names a group, one that there is or not."""
    return axis in GROUPS and isinstance(value, str) and value.startswith("@")


def expanded(axis: str, values: Sequence[object]) -> list[tuple[int, object]]:
    """The values of an axis, each with its place in the list, and in place of a group its members.

    A member that the list has already, or names elsewhere by itself, is not there again. An unknown group stays as it
    is, for the axis to refuse.
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
    """The words of a command line, groups expanded, each once."""
    return list(dict.fromkeys(str(name) for _, name in expanded(axis, list(words))))
