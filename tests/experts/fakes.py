"""Block the vendor libraries in the tests of experts, or replace them by fakes on a machine without a GPU.

A fake implements the functions that the package uses, and has the library's assertions. The package's checks that a
library needs a GPU, and that grouped_gemm needs bfloat16, are bypassed. Its other checks stay.
"""

import sys
from typing import Any

import pytest
import torch

from experts import Unsupported
from experts.compute import Engine, gmm
from experts.config import MoEConfig
from experts.dispatch import deepep
from experts.te import library
from tests.experts import fake_deep_ep, fake_grouped_gemm, fake_transformer_engine

LIBRARIES = (
    "transformer_engine",
    "grouped_gemm",
    "deep_ep",
    "deep_gemm",
    "torchao",
    "transformers",
    "nemo_automodel",
    "sonicmoe",
)
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def remove(patch: pytest.MonkeyPatch) -> None:
    """Make the import of every vendor library fail."""
    for name in {*LIBRARIES, *sys.modules}:
        if name.partition(".")[0] in LIBRARIES:
            patch.setitem(sys.modules, name, None)
    library.not_installed.cache_clear()
    library.takes_sizes_on_device.cache_clear()


def install(patch: pytest.MonkeyPatch) -> None:
    """Install fakes of Transformer Engine, grouped_gemm and deep_ep, and report an SM90 as the GPU."""
    remove(patch)
    for fake in (fake_transformer_engine, fake_grouped_gemm, fake_deep_ep):
        for name, module in fake.modules().items():
            patch.setitem(sys.modules, name, module)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    _on_a_gpu(patch, library, library.unsupported)
    _on_a_gpu(patch, deepep, deepep.unsupported)
    patch.setattr(gmm, "ENGINE", Engine(gmm.compute, _gmm_unsupported, saves=True))


def _gmm_unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    return gmm.unsupported(CUDA, None if config is None else config.with_dtype(BF16))


def _on_a_gpu(patch: pytest.MonkeyPatch, module: Any, unsupported: Any) -> None:
    patch.setattr(module, "unsupported", lambda device, *rest: unsupported(CUDA, *rest))
