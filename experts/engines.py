"""Find the engines that compute on stacked parameters by name."""

import importlib

from experts import catalog
from experts.compute import Engine
from experts.errors import RegistryError

_MODULES = {engine.name: engine.module for engine in catalog.ENGINES if engine.stacked}


def engine_names() -> tuple[str, ...]:
    """Return the names of all engines on stacked parameters, in the catalog's order."""
    return tuple(_MODULES)


def get_engine(name: str) -> Engine:
    """Import and return the named engine. Raises RegistryError, which lists the known names, for an unknown name."""
    if name not in _MODULES:
        raise RegistryError(f"there is no engine {name!r} here; the engines are {', '.join(_MODULES)}")
    engine: Engine = importlib.import_module(_MODULES[name]).ENGINE
    return engine
