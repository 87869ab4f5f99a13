"""Provide the backends of a Mixture-of-Experts (MoE) expert layer as drop-in modules with the same parameter layout.

The names of tensors end in dimension letters: T tokens, K experts per token, E experts, L local experts, D dim,
I inter, N permuted rows, R rows that a dispatcher brings, P ranks, C rows that one rank sends to one rank.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__all__ = [
    "Backend",
    "BackendConfig",
    "ConfigError",
    "ExpertsError",
    "GroupedExperts",
    "GroupedExpertsDeepEP",
    "GroupedExpertsLoRA",
    "GroupedExpertsTE",
    "InputError",
    "MoEConfig",
    "RegistryError",
    "Unsupported",
    "backend_names",
    "catalog",
    "check_name",
    "destroy_buffers",
    "get_backend",
    "get_expert_activation_for_deepep",
    "is_gated_activation",
    "parameter_shapes",
    "quick_geglu_deepep",
    "relu2_deepep",
]

if TYPE_CHECKING:
    from experts import catalog
    from experts.activations import get_expert_activation_for_deepep, quick_geglu_deepep, relu2_deepep
    from experts.config import BackendConfig, MoEConfig, is_gated_activation
    from experts.dispatchers import destroy_buffers
    from experts.errors import ConfigError, ExpertsError, InputError, RegistryError, Unsupported
    from experts.lora.layer import GroupedExpertsLoRA
    from experts.modules import GroupedExperts, GroupedExpertsDeepEP, parameter_shapes
    from experts.registry import Backend, backend_names, check_name, get_backend
    from experts.te.layer import GroupedExpertsTE

#: Public name -> the module that defines it. The module is imported at the name's first use, so that a process can
#: import `experts.catalog` without torch. moebench drives other revisions of this package by these names: a module may
#: move, but its public names stay.
_HOMES = {
    "Backend": "experts.registry",
    "BackendConfig": "experts.config",
    "ConfigError": "experts.errors",
    "ExpertsError": "experts.errors",
    "GroupedExperts": "experts.modules",
    "GroupedExpertsDeepEP": "experts.modules",
    "GroupedExpertsLoRA": "experts.lora.layer",
    "GroupedExpertsTE": "experts.te.layer",
    "InputError": "experts.errors",
    "MoEConfig": "experts.config",
    "RegistryError": "experts.errors",
    "Unsupported": "experts.errors",
    "backend_names": "experts.registry",
    "check_name": "experts.registry",
    "destroy_buffers": "experts.dispatchers",
    "get_backend": "experts.registry",
    "get_expert_activation_for_deepep": "experts.activations",
    "is_gated_activation": "experts.config",
    "parameter_shapes": "experts.modules",
    "quick_geglu_deepep": "experts.activations",
    "relu2_deepep": "experts.activations",
}
#: The public names that are modules, with the module of each.
_MODULES = {"catalog": "experts.catalog"}


if not TYPE_CHECKING:  # a type checker then reports a name that does not exist

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        module = _MODULES.get(name, f"{__name__}.{name}")
        if not name.startswith("_") and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_MODULES]
