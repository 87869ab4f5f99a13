"""Functions about the installed Transformer Engine: whether it imports, its FP8 recipes, what it cannot run."""

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
    """Return the number that features, and rows per expert, must be a multiple of in FP8."""
    return 32 if is_mxfp8 else 16


@functools.cache
def not_installed() -> Unsupported | None:
    """Return why Transformer Engine does not import, or None where it does."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("transformer_engine", error))
    return None


def unsupported(device: torch.device, config: MoEConfig | None, te_fp8: Fp8Recipe | None) -> Unsupported | None:
    """Return why TE cannot run.

    It needs CUDA and SM70; FP8 needs SM89 and MXFP8 needs SM100. It does not compute float64. With FP8, dim and
    moe_inter_dim must be multiples of 16, with MXFP8 of 32.
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
