"""The engines on stacked parameters by name, in the order in which users meet them."""

import importlib

from experts import catalog
from experts.compute import Engine
from experts.errors import RegistryError

_MODULES = {engine.name: engine.module for engine in catalog.ENGINES if engine.stacked}


def engine_names() -> tuple[str, ...]:
    """Every engine there is."""
    return tuple(_MODULES)


def get_engine(name: str) -> Engine:
    """The engine of that name, imported now. Raises RegistryError with the names there are."""
    if name not in _MODULES:
        raise RegistryError(f"there is no engine {name!r} here; the engines are {', '.join(_MODULES)}")
    engine: Engine = importlib.import_module(_MODULES[name]).ENGINE
    return engine
