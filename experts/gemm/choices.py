"""Choose the tile of a matrix product: one that was measured to be faster on this GPU, or else the tile of a rule.

A file of measured choices holds for one GPU model and one version of Triton. The folder `measured` of this package has
files that ship with it. The user's own file, which `moebench tune` writes, goes first. A file for another GPU, another
version of Triton or another version of the format is ignored. A choice is for one kind of product, one shape of
matrices, one dtype, and a number of rows per expert, rounded to a power of two. Files are read once in a process, and
nothing is measured while a layer runs.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from experts.gemm.kinds import KINDS, Kind

#: Increase it if the same tile means something else to the kernels than before. Then measured choices are ignored.
VERSION = 1
#: The user may name the folder of the files in the environment.
VARIABLE = "EXPERTS_TILES"
SHIPPED = Path(__file__).parent / "measured"


class Key(NamedTuple):
    """What a choice is for."""

    kind: str
    matrices: tuple[int, ...]  # the shape of all matrices together, [L, P, Q]
    dtype: str
    rows_per_expert: float  # a power of two


@dataclasses.dataclass(frozen=True)
class Choice:
    """A tile that was measured to be faster than the one that `default` returns."""

    tile: Any
    time_ms: float
    default_time_ms: float


class Place(NamedTuple):
    """What a file of choices holds for."""

    gpu: str
    triton: str

    @property
    def file_name(self) -> str:
        """The name of the file, without the characters that only some file systems allow."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{self.gpu}-triton-{self.triton}") + ".json"


def choose(kind: Kind, matrices: Tensor, rows_per_expert: float) -> Any:
    """Return the tile for a product with these matrices [L, P, Q], a `kind.tile`."""
    if _asked is not None:
        _asked[key_of(kind, matrices, rows_per_expert)] = Asked(kind, matrices, rows_per_expert)
    if kind.name in _forced:
        return _forced[kind.name]
    choice = _measured(matrices.device).get(key_of(kind, matrices, rows_per_expert))
    return kind.rule(rows_per_expert) if choice is None else choice.tile


def default(kind: Kind, matrices: Tensor, rows_per_expert: float) -> Any:
    """Return the tile that `choose` would return without the user's own file."""
    choice = _shipped(place_of(matrices.device)).get(key_of(kind, matrices, rows_per_expert))
    return kind.rule(rows_per_expert) if choice is None else choice.tile


def key_of(kind: Kind, matrices: Tensor, rows_per_expert: float) -> Key:
    """Return what a choice for this product is stored under."""
    rows = 2.0 ** round(math.log2(rows_per_expert))
    return Key(kind.name, tuple(matrices.shape), str(matrices.dtype).removeprefix("torch."), rows)


class Asked(NamedTuple):
    """The arguments of a call of `choose`."""

    kind: Kind
    matrices: Tensor
    rows_per_expert: float


_asked: dict[Key, Asked] | None = None
_forced: dict[str, Any] = {}


@contextmanager
def asked() -> Iterator[dict[Key, Asked]]:
    """Yield a dictionary that gets what `choose` is asked in the block."""
    global _asked
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None


@contextmanager
def forced(kind: Kind, tile: Any) -> Iterator[None]:
    """Let `choose` return `tile` for a kind in the block, to measure the tile."""
    _forced[kind.name] = tile
    try:
        yield
    finally:
        del _forced[kind.name]


def place_of(device: torch.device) -> Place:
    """Return the GPU's name, or "cpu", and the version of Triton."""
    name = torch.cuda.get_device_properties(device.index).name if device.type == "cuda" else device.type
    return Place(name, triton.__version__)


def folder() -> Path:
    """Return the folder of the user's own files: EXPERTS_TILES, or else one in the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~"), ".cache")  # noqa: PTH111 - Path.home raises if nobody knows the home
    return cache / "moebench" / "tiles"


def own_file(place: Place) -> Path:
    """Return the user's file for a place, which need not exist."""
    return folder() / place.file_name


@functools.cache
def _shipped(place: Place) -> Mapping[Key, Choice]:
    return read(SHIPPED / place.file_name, place)


@functools.cache
def _measured(device: torch.device) -> Mapping[Key, Choice]:
    place = place_of(device)
    return {**_shipped(place), **read(own_file(place), place)}


def fingerprint(device: torch.device) -> str | None:
    """Return a hash of the choices in the user's own file, without their times; None if it has none for this device."""
    own = read(own_file(place_of(device)), place_of(device))
    tiles = sorted((key, dataclasses.astuple(choice.tile)) for key, choice in own.items())
    return hashlib.sha256(json.dumps(tiles).encode()).hexdigest()[:12] if tiles else None


def forget() -> None:
    """Let the next `choose` read the files again."""
    _measured.cache_clear()
    _shipped.cache_clear()


def read(path: Path, place: Place) -> dict[Key, Choice]:
    """Return the choices of a file; none if the file is missing, or holds for another place or version.

    Choices of unknown kinds, and of tiles that are not candidates, are left out. If the file is not one of choices,
    warn and return none.
    """
    try:
        stored = json.loads(path.read_bytes())
        if [stored["version"], stored["gpu"], stored["triton"]] != [VERSION, *place]:
            return {}
        found = dict(_choice(entry) for entry in stored["choices"] if entry["kind"] in KINDS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it holds no choices of tiles ({error!r})"
        warnings.warn(f"{path}: {reason}; this run ignores it. Delete it or correct it", stacklevel=1)
        return {}
    return {key: choice for key, choice in found.items() if choice.tile is not None}


def _choice(entry: dict[str, Any]) -> tuple[Key, Choice]:
    key = Key(entry["kind"], tuple(entry["matrices"]), entry["dtype"], float(entry["rows_per_expert"]))
    candidates = KINDS[key.kind].candidates(key.rows_per_expert)
    tile = next((tile for tile in candidates if dataclasses.asdict(tile) == entry["tile"]), None)
    return key, Choice(tile, float(entry["time_ms"]), float(entry["default_time_ms"]))


def store(place: Place, found: Mapping[Key, Choice | None]) -> Path:
    """Add choices to the user's file and return its path. None removes the choice of a key.

    The file is replaced as a whole, so that no reader sees a part of it. Raises OSError if it cannot be written.
    """
    path = own_file(place)
    merged = {**read(path, place), **found}
    entries = [
        {**key._asdict(), **dataclasses.asdict(choice)} for key, choice in sorted(merged.items()) if choice is not None
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, {"version": VERSION, **place._asdict(), "choices": entries})
    forget()
    return path


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    lines: Iterable[str] = (json.dumps(entry) for entry in document["choices"])
    head = json.dumps({**document, "choices": []})[: -len("]}")]
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(head + "\n" + ",\n".join(lines) + "\n]}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink()
        raise
