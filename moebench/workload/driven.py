"""Provide the names by which the harness drives a revision of `experts`.

`moebench ab` runs workers of this harness with the `experts` of another revision. The harness uses only public names
(`experts.__all__`), because the modules behind them move from revision to revision. Revisions before 2026-11-29 have
fewer public names; for them, this module knows where the names stood. The parts of a block are not public.
"""

import importlib
from typing import TYPE_CHECKING, Any

import experts

#: Name -> the module that has the name in revisions in which it is not public.
_BEFORE_IT_WAS_PUBLIC = {
    "Backend": "experts.registry",
    "check_name": "experts.registry",
    "destroy_buffers": "experts.dispatch.deepep",
    "get_backend": "experts.registry",
    "parameter_shapes": "experts.modules",
    "BlockConfig": "experts.block",
    "MoEBlock": "experts.block",
    "RouterConfig": "experts.router",
}

if TYPE_CHECKING:
    from experts import Backend, check_name, destroy_buffers, get_backend, parameter_shapes

    BlockConfig: Any
    MoEBlock: Any
    RouterConfig: Any
else:

    def __getattr__(name: str) -> Any:
        if name in experts.__all__:
            return getattr(experts, name)
        if name in _BEFORE_IT_WAS_PUBLIC:
            return getattr(importlib.import_module(_BEFORE_IT_WAS_PUBLIC[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Backend",
    "BlockConfig",
    "MoEBlock",
    "RouterConfig",
    "check_name",
    "destroy_buffers",
    "get_backend",
    "parameter_shapes",
]
