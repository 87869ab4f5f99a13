"""What Transformer Engine is here: whether it imports, its FP8 recipes, what it cannot run."""

import functools
from typing import Any

import torch

from experts import catalog
from experts.config import Fp8Recipe, MoEConfig, dtype_name
from experts.errors import Unsupported


def recipe(name: Fp8Recipe) -> Any:
    """TE's recipe of that name."""
    from transformer_engine.common import recipe as of_te

    recipes = {
        "current": of_te.Float8CurrentScaling,
        "delayed": of_te.DelayedScaling,
        "block": of_te.Float8BlockScaling,
        "mxfp8": of_te.MXFP8BlockScaling,
    }
    return recipes[name]()


def alignment(is_mxfp8: bool) -> int:
    """What FP8 takes multiples of, in features and in rows of an expert."""
    return 32 if is_mxfp8 else 16


@functools.cache
def not_installed() -> Unsupported | None:
    """Why Transformer Engine cannot be used on any device; None where it imports."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        remedy = catalog.LIBRARIES["transformer_engine"]
        return Unsupported(f"Transformer Engine does not import ({error}); {remedy}")
    return None


def unsupported(device: torch.device, config: MoEConfig | None, te_fp8: Fp8Recipe | None) -> Unsupported | None:
    """TE needs CUDA; FP8 needs SM89, MXFP8 SM100, and dim and moe_inter_dim that are multiples of 16 (32)."""
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
        return Unsupported(f"Transformer Engine has no {dtype_name(config.dtype)}; use the loop")
    multiple = alignment(te_fp8 == "mxfp8")
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if te_fp8 and size % multiple:
            return Unsupported(f"FP8 takes multiples of {multiple}, but {name} = {size}; use te without FP8")
    return None
