"""Take configurations of other classes that have the fields of `MoEConfig` and `BackendConfig`, as NeMo AutoModel's."""

import dataclasses
from typing import Any

from experts.config import BackendConfig, MoEConfig
from experts.errors import ConfigError


def moe_config(given: Any) -> MoEConfig:
    """Return a MoEConfig with the fields of an object. Returns a MoEConfig unchanged.

    Fields of the object that MoEConfig does not have are not read, except AutoModel's `expert_dim`: it is the width of
    the experts' rows, and replaces `dim`. Raises ConfigError if the object lacks a field that has no default, and for
    an invalid value.
    """
    if isinstance(given, MoEConfig):
        return given
    fields = dataclasses.fields(MoEConfig)
    values = {field.name: getattr(given, field.name) for field in fields if hasattr(given, field.name)}
    needed = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
    _check_has(given, [name for name in needed if name not in values], "MoEConfig")
    values["dim"] = getattr(given, "expert_dim", values["dim"])
    return MoEConfig(**values)


def backend_config(given: Any) -> BackendConfig:
    """Return a BackendConfig with the fields of an object, or the default for None. Returns a BackendConfig unchanged.

    AutoModel's `dispatcher_num_sms` is `num_sms` here. AutoModel's `te_fp8` is an object, which AutoModel's expert
    layers do not read: AutoModel's models open a `te.autocast`, which `GroupedExpertsTE` follows. So the object is not
    read here. Raises ConfigError if the object lacks `experts` or `dispatcher`, and for an invalid value.
    """
    if given is None or isinstance(given, BackendConfig):
        return given or BackendConfig()
    fields = dataclasses.fields(BackendConfig)
    values = {field.name: getattr(given, field.name) for field in fields if hasattr(given, field.name)}
    _check_has(given, [name for name in ("experts", "dispatcher") if name not in values], "BackendConfig")
    if not isinstance(values.get("te_fp8"), str):
        values.pop("te_fp8", None)
    if values["dispatcher"] == "deepep" and hasattr(given, "dispatcher_num_sms"):
        values.setdefault("num_sms", given.dispatcher_num_sms)
    return BackendConfig(**values)


def _check_has(given: Any, lacking: list[str], name: str) -> None:
    if lacking:
        raise ConfigError(
            f"a {type(given).__name__} is no {name}: it has no {', '.join(lacking)}; pass an experts.{name}, or an "
            "object with its fields, such as NeMo AutoModel's"
        )
