"""The catalog: everything that it names exists, and every backend does what the catalog says."""

import importlib
import re
import sys

import pytest
import torch

from experts import catalog
from experts.config import BackendConfig
from experts.dispatchers import dispatcher_names, dispatcher_unsupported
from experts.engines import engine_names
from experts.registry import PEERS, SAVE_TIME_BACKENDS, TE_BACKENDS, backend_names, get_backend
from tests.experts.layers import moe_config

DESCRIBED = [*catalog.ENGINES, *catalog.BACKENDS, *catalog.DISPATCHERS]


@pytest.mark.parametrize("described", [catalog.ENGINES, catalog.BACKENDS, catalog.DISPATCHERS])
def test_every_name_occurs_once(described: tuple[catalog.EngineEntry, ...]) -> None:
    names = [one.name for one in described]
    assert len(set(names)) == len(names)


def test_every_library_has_an_install_command() -> None:
    needed = {one.library for one in DESCRIBED} - {None}
    assert needed == catalog.LIBRARIES.keys()
    assert all(catalog.LIBRARIES.values())


def library_of(described: catalog.BackendEntry | catalog.DispatcherEntry) -> str | None:
    engine = getattr(described, "engine", None)
    return described.library or (engine.library if engine else None)


@pytest.mark.parametrize(
    "described",
    [one for one in (*catalog.BACKENDS, *catalog.DISPATCHERS) if library_of(one)],
    ids=lambda one: one.name,
)
@pytest.mark.usefixtures("no_libraries")
def test_a_missing_library_is_reported_in_the_words_of_the_catalog(
    described: catalog.BackendEntry | catalog.DispatcherEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    cuda, library = torch.device("cuda"), str(library_of(described))
    if isinstance(described, catalog.DispatcherEntry):
        reason = dispatcher_unsupported(described.name, cuda, moe_config())
    else:
        reason = get_backend(described.name).unsupported(cuda)
    assert reason is not None
    why = reason.reason.removeprefix(f"{library} ").removesuffix(f"; {catalog.LIBRARIES[library]}")
    assert why == "is not installed" or re.fullmatch(r"does not import \([^()]*\)", why)


def test_every_module_has_the_functions_of_its_kind() -> None:
    for engine in catalog.ENGINES:
        assert hasattr(importlib.import_module(engine.module), "ENGINE") == engine.stacked
    for dispatcher in catalog.DISPATCHERS:
        module = importlib.import_module(dispatcher.module)
        assert callable(module.make)
        assert callable(module.unsupported)


def test_a_backend_config_accepts_every_engine_and_dispatcher() -> None:
    for engine in catalog.ENGINES:
        assert BackendConfig(experts=engine.name).experts == engine.name
    for dispatcher in catalog.DISPATCHERS:
        assert BackendConfig(dispatcher=dispatcher.name).dispatcher == dispatcher.name


def test_a_backend_is_an_engine_or_a_peer() -> None:
    for backend in catalog.BACKENDS:
        is_peer = not {"peers", "ep_peers"}.isdisjoint(backend.groups)
        assert (backend.engine is None) == (backend.target is not None) == is_peer
        assert backend.engine is None or backend.engine in catalog.ENGINES
        assert (backend.save == "time") == ("save_time" in backend.groups)
        assert (backend.lora is not None) == (backend.groups == ("lora",)) == backend.name.endswith("_lora")


def test_the_registry_has_the_backends_of_the_catalog_in_its_order() -> None:
    assert backend_names()[: len(catalog.BACKENDS)] == tuple(backend.name for backend in catalog.BACKENDS)
    assert engine_names() == ("loop", "torch_mm", "torch_mm_mxfp8", "triton", "triton_fp8", "deep_gemm_fp8", "gmm")
    assert dispatcher_names() == ("allgather", "alltoall", "deepep", "symm_mem")
    assert SAVE_TIME_BACKENDS == {"torch_mm_save_time": "torch_mm", "gmm_save_time": "gmm"}
    assert {**TE_BACKENDS, "te": None}.keys() | PEERS.keys() == {
        backend.name for backend in catalog.BACKENDS if backend.engine is None or not backend.engine.stacked
    }
    assert TE_BACKENDS["te_fp8_block_cached"] == ("block", True)


@pytest.mark.parametrize("backend", catalog.BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_computes_in_the_recipe_that_the_catalog_says(backend: catalog.BackendEntry) -> None:
    assert get_backend(backend.name).fp8 == backend.fp8
