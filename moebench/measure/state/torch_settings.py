"""Read the settings of torch that a backend may leave changed, and that change times and rounding of later jobs."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules import module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_cuda: Any = torch.backends.cuda
_cudnn: Any = torch.backends.cudnn
_mkldnn: Any = torch.backends.mkldnn
_C: Any = torch._C


def _float_arithmetic() -> tuple[object, ...]:
    """Return results that change if tiny numbers are flushed to zero, or if sums round in another direction."""
    tiny, half_ulp = sys.float_info.min, sys.float_info.epsilon / 2
    return tiny / 2 > 0, 1 + half_ulp, 1 + 1.5 * half_ulp, -1 - half_ulp


def _autocast() -> tuple[object, ...]:
    return tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    )  # in torch's own words, per kind of device


#: Name of a setting, as `detail` has it -> its value now.
SETTINGS: Mapping[str, Callable[[], object]] = {
    "threads": lambda: torch.get_num_threads(),
    "default dtype": lambda: torch.get_default_dtype(),
    "default device": lambda: torch.get_default_device(),
    "precision of float32 products": lambda: tuple(
        library.matmul.fp32_precision.replace("none", "ieee") for library in (_cuda, _mkldnn)
    ),
    "deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    ),
    "modes around operators": lambda: tuple(
        type(mode) for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    ),
    "denormal numbers or rounding": _float_arithmetic,
    "mkldnn": lambda: (_C._get_mkldnn_enabled(), _mkldnn.deterministic),
    "cudnn": lambda: (_cudnn.enabled, _cudnn.benchmark, _cudnn.deterministic),
    "reduced precision of 16-bit sums": lambda: (
        _cuda.matmul.allow_fp16_reduced_precision_reduction,
        _cuda.matmul.allow_bf16_reduced_precision_reduction,
        _cuda.matmul.allow_fp16_accumulation,
    ),
    "preferred BLAS": lambda: (str(_cuda.preferred_blas_library()), str(_cuda.preferred_linalg_library())),
    "gradients": lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "autocast": _autocast,
    "anomaly detection": lambda: torch.is_anomaly_enabled(),
    "hooks of all modules": lambda: tuple(
        tuple(hooks) for name, hooks in sorted(vars(module).items()) if name.startswith("_global_") and hooks
    ),
    "hooks of saved tensors": lambda: _C._autograd._top_saved_tensors_default_hooks(True) is not None,
    "current GPU": lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else 0,
}


def settings() -> dict[str, object]:
    """Return the value of each setting. A setting that this torch does not have is None."""
    return {name: _value(read) for name, read in SETTINGS.items()}


def _value(read: Callable[[], object]) -> object:
    try:
        return read()
    except (AttributeError, RuntimeError, TypeError):
        return None


def changed_settings(before: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of the settings that differ from `before`."""
    return tuple(name for name, value in settings().items() if value != before[name])
