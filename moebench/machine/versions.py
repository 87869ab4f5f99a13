"""Versions of the libraries that backends run on. No torch at import."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

#: Libraries whose code runs inside the timed region: importable name -> the distributions that ship it, by their names
#: in package metadata. They stand here and not in `experts.catalog`, because workers of `moebench ab` import older
#: revisions of `experts`, and the versions of both sides are compared.
TIMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "triton": ("triton", "pytorch-triton"),
        "transformer_engine": ("transformer-engine", "transformer-engine-torch"),
        "grouped_gemm": ("grouped-gemm", "nv-grouped-gemm"),
        "deep_ep": ("tokenspeed-deepep", "sgl-deep-ep", "deep-ep"),
        "torchao": ("torchao",),
    }
)

#: Those, and the others that a backend may need.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **TIMED,
        "transformers": ("transformers",),
        "nemo_automodel": ("nemo-automodel",),
        "sonicmoe": ("sonic-moe",),
        "numpy": ("numpy",),
    }
)


def library_versions() -> dict[str, str | None]:
    """Versions of torch, of what it was built with, and of every library that a backend may need; None where absent."""
    import torch

    cuda = torch.version.cuda
    versions: dict[str, str | None] = {"torch": str(torch.__version__), "cuda": cuda, "cudnn": _cudnn(), "nccl": None}
    if cuda is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return versions | {module: module_version(module) for module in DISTRIBUTIONS}


def module_version(module: str) -> str | None:
    """The version of the distribution that ships `module`; "unknown" for a module that is there without metadata."""
    for name in DISTRIBUTIONS[module]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        return None if importlib.util.find_spec(module) is None else "unknown"
    except ValueError:  # already imported, from no file
        return "unknown"


def _cudnn() -> str | None:
    import torch

    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another cuDNN than torch's was loaded: a fact about the machine, not a run's end
        return f"unusable: {str(error).splitlines()[0]}"
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
