"""Every backend of a Mixture-of-Experts expert layer, as drop-in modules with one parameter layout.

Legend of the dimension letters that end a tensor's name: T tokens, K experts a token, E experts, L local experts,
D dim, I inter, N permuted rows.
"""

from experts.activations import get_expert_activation_for_deepep, quick_geglu_deepep, relu2_deepep
from experts.config import BackendConfig, MoEConfig, is_gated_activation
from experts.errors import ConfigError, ExpertsError, InputError, RegistryError, Unsupported
from experts.modules import GroupedExperts, GroupedExpertsDeepEP
from experts.te.layer import GroupedExpertsTE

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
