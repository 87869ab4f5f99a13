"""Look at the installed Transformer Engine (TE): whether it imports, its FP8 recipes, and what it cannot run."""

import functools
from typing import Any

import torch

from experts import catalog
from experts.config import Fp8Recipe, MoEConfig, dtype_name
from experts.errors import Unsupported


def recipe(name: Fp8Recipe) -> Any:
    """Return a new recipe object of TE."""
    from transformer_engine.common import recipe as of_te

    recipes = {
        "current": of_te.Float8CurrentScaling,
        "delayed": of_te.DelayedScaling,
        "block": of_te.Float8BlockScaling,
        "mxfp8": of_te.MXFP8BlockScaling,
    }
    return recipes[name]()


def alignment(is_mxfp8: bool) -> int:
    """Return the alignment in FP8. The numbers of features and of rows per expert must be multiples of it."""
    return 32 if is_mxfp8 else 16


#: The most experts that one call of TE 2.20 takes with sizes on the device, if each expert's weights are a parameter.
MOST_EXPERTS = 64


@functools.cache
def takes_sizes_on_device(dtype: torch.dtype) -> bool:
    """Return whether TE can multiply groups whose sizes are on the device, in `dtype` without FP8.

    TE 2.20 takes bfloat16 and float16 on SM90 with cuBLASLt 13.4 or later, and on SM100 to SM110 with 13.3 or later.
    """
    try:
        from transformer_engine.pytorch.module.grouped_linear import is_module_grouped_tensor_path_supported
    except ImportError:
        return False
    supported: bool = is_module_grouped_tensor_path_supported(None, dtype)
    return supported


@functools.cache
def not_installed() -> Unsupported | None:
    """Return why Transformer Engine does not import, or None where it does."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("transformer_engine", error))
    return None


def unsupported(device: torch.device, config: MoEConfig | None, te_fp8: Fp8Recipe | None) -> Unsupported | None:
    """Return why TE cannot run the config with the FP8 recipe, or None where it can.

    TE needs CUDA and SM70 or later. FP8 needs SM89 or later, and MXFP8 needs SM100 or later. TE does not compute
    float64. `dim` and `moe_inter_dim` must be multiples of 16 with FP8, and of 32 with MXFP8.
    """
    missing = not_installed()
    if missing is not None:
        return missing
    if device.type != "cuda":
        return Unsupported(f"Transformer Engine needs a CUDA GPU, the device is {device.type}")
    needed = (10, 0) if te_fp8 == "mxfp8" else (8, 9) if te_fp8 else (7, 0)
    present = torch.cuda.get_device_capability(device)
    if present < needed:
        what = te_fp8 or "te"
        return Unsupported(f"{what} needs SM{needed[0]}{needed[1]}, this is SM{present[0]}{present[1]}")
    if config is None:
        return None
    if config.dtype is torch.float64:
        return Unsupported(f"Transformer Engine does not compute {dtype_name(config.dtype)}; use the loop")
    multiple = alignment(te_fp8 == "mxfp8")
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if te_fp8 and size % multiple:
            return Unsupported(f"FP8 takes multiples of {multiple}, but {name} = {size}; use te without FP8")
    return None
