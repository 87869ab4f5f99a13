"""Provide the backends of a Mixture-of-Experts (MoE) expert layer as drop-in modules with the same parameter layout.

The names of tensors end in dimension letters: T tokens, K experts per token, E experts, L local experts, D dim,
I inter, N permuted rows.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__all__ = [
    "BackendConfig",
    "ConfigError",
    "ExpertsError",
    "GroupedExperts",
    "GroupedExpertsDeepEP",
    "GroupedExpertsTE",
    "InputError",
    "MoEConfig",
    "RegistryError",
    "Unsupported",
    "get_expert_activation_for_deepep",
    "is_gated_activation",
    "quick_geglu_deepep",
    "relu2_deepep",
]

if TYPE_CHECKING:
    from experts.activations import get_expert_activation_for_deepep, quick_geglu_deepep, relu2_deepep
    from experts.config import BackendConfig, MoEConfig, is_gated_activation
    from experts.errors import ConfigError, ExpertsError, InputError, RegistryError, Unsupported
    from experts.modules import GroupedExperts, GroupedExpertsDeepEP
    from experts.te.layer import GroupedExpertsTE

#: Public name -> the module that defines it. The module is imported at the name's first use, so that a process can
#: import `experts.catalog` without torch.
_HOMES = {
    "BackendConfig": "experts.config",
    "ConfigError": "experts.errors",
    "ExpertsError": "experts.errors",
    "GroupedExperts": "experts.modules",
    "GroupedExpertsDeepEP": "experts.modules",
    "GroupedExpertsTE": "experts.te.layer",
    "InputError": "experts.errors",
    "MoEConfig": "experts.config",
    "RegistryError": "experts.errors",
    "Unsupported": "experts.errors",
    "get_expert_activation_for_deepep": "experts.activations",
    "is_gated_activation": "experts.config",
    "quick_geglu_deepep": "experts.activations",
    "relu2_deepep": "experts.activations",
}


if not TYPE_CHECKING:  # a type checker then reports a name that does not exist

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        module = f"{__name__}.{name}"
        if not name.startswith("_") and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
