"""Find a backend by name, build its layer, and return why it cannot run here.

A backend is a callable `(config: MoEConfig) -> nn.Module`. The module has the interface of `experts.GroupedExperts`:
the same forward, and parameters in the stacked layout. A backend may have four attributes:

- `unsupported(device, config) -> str | Unsupported | None` returns why the backend cannot run the config on the device.
  With config None, it returns why the backend cannot run any config on the device.
- `fp8` is the name of the FP8 recipe that the backend computes in.
- `lora` has the rank and alpha of the layer's adapters, whose names and shapes are those of
  `experts.GroupedExpertsLoRA`. The other parameters of such a layer are frozen.
- `dispatchers` has the names of the dispatchers that the backend runs with, and "local" if it runs on one process. A
  backend without this attribute runs with every dispatcher.

Under expert parallelism the registry calls the backend with `dispatcher=`, and the module that the backend returns must
have `init_token_dispatcher`.
Third-party backends are found by entry point (group "experts.backends") or by `module:attribute`. The registry imports
a third-party backend only when it is named.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from experts import catalog
from experts.config import BackendConfig, Dispatcher, Fp8Recipe, MoEConfig, Save
from experts.dispatchers import dispatcher_unsupported
from experts.engines import get_engine
from experts.errors import RegistryError, Unsupported
from experts.lora.layer import GroupedExpertsLoRA
from experts.modules import GroupedExperts
from experts.te import library
from experts.te.layer import CachedWeightsTE, GroupedExpertsTE

ENTRY_POINT_GROUP = catalog.ENTRY_POINT_GROUP

#: Name of each Transformer Engine backend -> its FP8 recipe, and whether it keeps quantised weights from call to call.
TE_BACKENDS: dict[str, tuple[Fp8Recipe | None, bool]] = {
    backend.name: (backend.te_fp8, backend.cached)
    for backend in catalog.BACKENDS
    if backend.engine is not None and not backend.engine.stacked
}

#: Name of each backend with BackendConfig.save = "time" -> its engine. The engine keeps more tensors for backward, so
#: that backward takes less time.
SAVE_TIME_BACKENDS = {
    backend.name: backend.engine.name for backend in catalog.BACKENDS if backend.engine is not None and backend.save
}

#: Name of each peer, the expert layer of another library -> its `module:attribute`.
PEERS = {backend.name: backend.target for backend in catalog.BACKENDS if backend.target is not None}

#: The fields of `BackendConfig` that an entry of the catalog also has.
_OPTIONS = ("save", "fp8_gradients", "fp8_weight_gradients", "fp8_rows", "gradient_accumulation_fusion")
_BUILT_IN = {backend.name: backend for backend in catalog.BACKENDS}


@dataclass(frozen=True)
class Backend:
    """A named backend, which builds an expert layer and returns why it cannot run a config.

    `fp8` is the name of the FP8 recipe that the backend computes in, or None if it does not compute in FP8.
    `dispatchers` has the names of the dispatchers that the backend runs with, or None if it runs with every dispatcher.
    `lora` has the rank and alpha of the layer's adapters, or None if the layer has no adapters.
    """

    name: str
    _build: Callable[..., nn.Module]
    _unsupported: Callable[[torch.device, MoEConfig | None], str | Unsupported | None]
    fp8: str | None = None
    dispatchers: tuple[str, ...] | None = None
    lora: catalog.Lora | None = None

    def build(self, config: MoEConfig, dispatcher: str | None = None, **options: Any) -> nn.Module:
        """Return an expert layer of the config. `dispatcher` is the dispatcher's name, or None for one process.

        `options` are options of the dispatcher, which are fields of `BackendConfig`. A third-party backend gets those
        of them that it has as arguments. Raises Unsupported if the backend does not run with the dispatcher.
        """
        if (reason := self._without_dispatcher(dispatcher)) is not None:
            raise Unsupported(reason)
        if dispatcher is None:
            return self._build(config)
        taken = {name: value for name, value in options.items() if self._takes(name)}
        return self._build(config, dispatcher=dispatcher, **taken)

    def unsupported(
        self, device: torch.device, config: MoEConfig | None = None, dispatcher: str | None = None
    ) -> Unsupported | None:
        """Return why this backend cannot run `config` on `device` with the dispatcher, or None where it can.

        `dispatcher` is None for one process. If `config` is None, return why the backend cannot run any config on the
        device.
        """
        reason = self._unsupported(device, config)
        if reason is None and config is not None:
            reason = self._without_dispatcher(dispatcher)
        if reason is None and dispatcher is not None and config is not None:
            reason = dispatcher_unsupported(dispatcher, device, config)
        if reason is not None and not isinstance(reason, str | Unsupported):
            kind = type(reason).__name__
            raise TypeError(
                f"unsupported() of {self.name} returned a {kind}: it must return None, a text or Unsupported"
            )
        return Unsupported(reason) if isinstance(reason, str) else reason

    def _without_dispatcher(self, dispatcher: str | None) -> str | None:
        """Return why the backend does not run with the dispatcher, or None where it does."""
        if dispatcher is not None and not self._takes("dispatcher"):
            return "takes no argument `dispatcher`, so it runs on one process only; use ep_size = 1"
        if self.dispatchers is None or (dispatcher or "local") in self.dispatchers:
            return None
        between = " or ".join(name for name in self.dispatchers if name != "local")
        if dispatcher is None:
            return f"runs on two or more ranks only; use ep_size = 2 or more, with the dispatcher {between}"
        return f"brings its own way to send tokens, which is not {dispatcher}; use the dispatcher {between}"

    def _takes(self, argument: str) -> bool:
        parameters = inspect.signature(self._build).parameters
        return argument in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def backend_names() -> tuple[str, ...]:
    """Return the names of the built-in backends, then of the installed third-party backends. Imports no backend."""
    return catalog.backend_names()


def get_backend(name: str) -> Backend:
    """Return the named backend. A name is a built-in backend, an installed entry point, or `module:attribute`.

    Raises RegistryError, which lists the known names, for an unknown name. Raises RegistryError for a backend that
    cannot be imported.
    """
    if name in _BUILT_IN:
        return _built_in(_BUILT_IN[name])
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return _third_party(name, point.value)
    if ":" in name:
        return _third_party(name, name)
    raise _nowhere(name)


def _built_in(described: catalog.BackendEntry) -> Backend:
    name, engine, fp8 = described.name, described.engine, described.fp8
    if engine is None:
        return _third_party(name, str(described.target))
    if engine.stacked:
        options = {name: getattr(described, name) for name in _OPTIONS}
        build = functools.partial(_build_grouped, engine.name, described.lora, **options)
        takers = tuple(one.name for one in catalog.DISPATCHERS if "fp8_rows" in one.options)
        return Backend(
            *(name, build, get_engine(engine.name).unsupported, fp8),
            dispatchers=takers if described.fp8_rows else None,
            lora=described.lora,
        )
    build = functools.partial(_build_te, described.te_fp8, described.cached)
    return Backend(name, build, functools.partial(_te_unsupported, te_fp8=described.te_fp8), fp8)


def _te_unsupported(device: torch.device, config: MoEConfig | None, te_fp8: Fp8Recipe | None) -> Unsupported | None:
    """Return why a backend of Transformer Engine cannot run the config, or None where it can."""
    reason = library.unsupported(device, config, te_fp8)
    if reason is None and config is not None and config.dtype is torch.float32:
        return Unsupported("Transformer Engine lets cuBLAS round float32 to TF32, which has ten bits; use bfloat16")
    return reason


def _build_grouped(
    name: str,
    lora: catalog.Lora | None,
    config: MoEConfig,
    dispatcher: Dispatcher | None = None,
    save: Save | None = None,
    **options: Any,
) -> nn.Module:
    backend = BackendConfig(experts=name, dispatcher=dispatcher, save=save, **options)
    return GroupedExperts(config, backend) if lora is None else GroupedExpertsLoRA(config, backend, **vars(lora))


def _build_te(
    recipe: Fp8Recipe | None, cached: bool, config: MoEConfig, dispatcher: Dispatcher | None = None, **options: Any
) -> nn.Module:
    layer = CachedWeightsTE if cached else GroupedExpertsTE
    return layer(config, BackendConfig(experts="te", te_fp8=recipe, dispatcher=dispatcher, **options))


def check_name(name: str) -> None:
    """Raise RegistryError for an unknown name. The check does not import the backend, so some wrong names pass."""
    module_name, colon, _ = name.partition(":")
    top = module_name.partition(".")[0]
    if name not in backend_names() and not (colon and top and _is_importable(top)):
        raise _nowhere(name)


def _is_importable(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except ValueError:  # find_spec raises ValueError for a module without a spec, for example __main__
        return False


def _nowhere(name: str) -> RegistryError:
    module_name, _, _ = name.partition(":")
    return RegistryError(
        catalog.unknown(name) or f"backend {name!r}: there is no module {module_name!r}; is it on PYTHONPATH?"
    )


def _third_party(name: str, target: str) -> Backend:
    module_name, _, attribute = target.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError, ValueError: not a module's name
        raise RegistryError(f"backend {name!r}: cannot import {target!r}: {error}; is it on PYTHONPATH?") from error
    if not callable(build):
        raise RegistryError(
            f"backend {name!r}: {target!r} is not callable; it must take a MoEConfig and return a module"
        )
    own = {attribute: getattr(build, attribute, None) for attribute in ("fp8", "dispatchers", "lora")}
    return Backend(name, build, getattr(build, "unsupported", _runs_anywhere), **own)


def _runs_anywhere(device: torch.device, config: MoEConfig | None) -> None:
    return None
