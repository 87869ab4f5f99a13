"""Read the versions of the libraries that backends run on. Importing this module does not import torch."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

#: Libraries that run code inside the timed region: importable name -> the distributions that ship it, by their names
#: in package metadata. This table is not in `experts.catalog`, because workers of `moebench ab` import older revisions
#: of `experts`, and moebench compares the versions of both sides.
TIMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "triton": ("triton", "pytorch-triton"),
        "transformer_engine": ("transformer-engine", "transformer-engine-torch"),
        "grouped_gemm": ("grouped-gemm", "nv-grouped-gemm"),
        "deep_ep": ("tokenspeed-deepep", "sgl-deep-ep", "deep-ep"),
        "deep_gemm": ("sgl-deep-gemm", "tokenspeed-deepgemm", "deep-gemm"),
        "torchao": ("torchao",),
    }
)

#: The timed libraries, and the other libraries that a backend may need.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **TIMED,
        "transformers": ("transformers",),
        "nemo_automodel": ("nemo-automodel",),
        "sonicmoe": ("sonic-moe",),
        "numpy": ("numpy",),
    }
)


@dataclass(frozen=True)
class TorchBuild:
    """The version of the installed torch, and the version of CUDA that it was built for; None for a build for CPUs."""

    version: str
    cuda: str | None


def torch_build() -> TorchBuild | None:
    """Return the build of torch without an import of torch; None if torch is not installed.

    Whoever builds torch writes both versions into its file version.py, which imports nothing of torch.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    described: dict[str, str | None] = {}
    exec(compile((Path(found.origin).parent / "version.py").read_bytes(), "version.py", "exec"), described)
    return TorchBuild(str(described["__version__"]), described.get("cuda"))


def library_versions() -> dict[str, str | None]:
    """Return the versions of torch, CUDA, cuDNN, NCCL and every library in DISTRIBUTIONS; None if absent."""
    import torch

    cuda = torch.version.cuda
    versions: dict[str, str | None] = {"torch": str(torch.__version__), "cuda": cuda, "cudnn": _cudnn(), "nccl": None}
    if cuda is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return versions | {module: module_version(module) for module in DISTRIBUTIONS}


def module_version(module: str) -> str | None:
    """Return the version of the distribution that ships `module`.

    The result is "unknown" for a module without metadata, and None for a module that is not installed.
    """
    for name in DISTRIBUTIONS[module]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        return None if importlib.util.find_spec(module) is None else "unknown"
    except ValueError:  # the module is imported already, but not from a file
        return "unknown"


def _cudnn() -> str | None:
    import torch

    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # a cuDNN that is not torch's was loaded: record it, and let the run go on
        return f"unusable: {str(error).splitlines()[0]}"
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
