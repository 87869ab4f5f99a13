"""Read the routed experts of a model from its Hugging Face configuration, and find the model that a text names.

Configurations name the same value by different keys. `KEYS` lists them, from the `configuration_*.py` of transformers
and from published config.json files. The tests name the source of each configuration that they read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moebench.errors import UsageError
from moebench.names import NAME_PATTERN, is_file
from moebench.workload.axes import cut, did_you_mean, listed, shown
from moebench.workload.case import DTYPES, LARGEST
from moebench.workload.models import MODEL_TYPES, MODELS, SHAPE_AXES, Model, shape_fields, shape_name

CONFIG_NAME = "config.json"

#: The keys of each value, in the order in which they are tried. A routed expert's own width comes before
#: `intermediate_size`, which is the width of dense layers where a configuration has both. Experts that work on a latent
#: vector have the latent vector's size as `dim`.
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "n_routed_experts": (
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"),
            *("num_moe_experts", "moe_num_primary_experts"),
        ),
        "n_activated_experts": (
            *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
            *("top_k_experts", "moe_router_topk", "num_selected_experts", "moe_num_active_primary_experts"),
        ),
        "dim": ("moe_latent_size", "hidden_size", "d_model", "n_embd"),
        "moe_inter_dim": (
            *("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size"),
            *("expert_hidden_dim", "ffn_hidden_size", "intermediate_size", "d_ff", "n_inner"),
        ),
        "expert_activation": (
            *("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "ffn_act_fn"),
        ),
        "expert_bias": ("use_bias", "mlp_bias"),
        "swiglu_limit": ("swiglu_limit",),
        "activation_alpha": ("swiglu_alpha",),
        "dtype": ("dtype", "torch_dtype"),
    }
)

#: Our name of each activation. All but relu2 have a gate.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("silu", "swish", "swiglu"), "swiglu"),
        **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "geglu", "gelu"), "geglu"),
        **dict.fromkeys(("relu2", "relu_squared", "squared_relu"), "relu2"),
        "swigluoai": "swigluoai",
    }
)

#: Keys that say how many shared experts there are, or how wide they are.
SHARED = (
    *("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    *("share_expert_dim", "share_expert_dims"),
)

#: Tables of a configuration that are searched before its other tables.
SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "moe_config")


@dataclass(frozen=True)
class _Family:
    """What the code of an architecture fixes and its configuration does not say."""

    fields: Mapping[str, Any]
    activation: str = "silu"  # where the configuration names none
    notes: tuple[str, ...] = ()


_LLAMA4 = (
    "the layer also has one shared expert: left out",
    "the router's weight multiplies an expert's input; moebench multiplies its inner values: same work, other values",
)
#: By the beginning of `model_type`.
FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "gpt_oss": _Family({"expert_activation": "quick_geglu", "expert_bias": True}),
        "nemotron_h": _Family({}, activation="relu2"),
        "llama4": _Family({}, notes=_LLAMA4),
    }
)


def read_model(text: str | Path | Mapping[str, Any] | Model, folder: Path | None = None) -> Model:
    """Return the model that `text` names. Nothing is downloaded.

    `text` is the name of a model in `MODELS`; a shape such as e64k6d1024i512; a config.json of Hugging Face, or its
    folder; the id of a model in the local cache of the Hugging Face hub, such as Qwen/Qwen3-30B-A3B; or a configuration
    that is already a mapping. Relative paths start at `folder` (default: the working folder). Raises UsageError, in one
    line, if there is no such model or its configuration has not what a case needs.
    """
    if isinstance(text, Model):
        return text
    if isinstance(text, Mapping):
        return config_model(text, "the configuration")
    if isinstance(text, str):
        if text in MODELS:
            return Model(text, dict(MODELS[text]))
        if (shape := shape_fields(text)) is not None:
            return Model(None, shape)
    elif not isinstance(text, Path):
        raise UsageError(f"model {shown(text)}: must be text, a path, or the mapping of a config.json")
    return config_model(_read(_config_file(text, folder or Path()), text), str(text))


def _config_file(text: str | Path, folder: Path) -> Path:
    path = folder / Path(text).expanduser()
    for file in (path, path / CONFIG_NAME):
        if is_file(file):
            return file
    if isinstance(text, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and (cached := _in_cache(text)) is not None:
        return cached
    hint = did_you_mean(text, MODELS) or f"there are {listed(MODELS)}"
    raise UsageError(
        f"model {cut(str(text))}: must be a model of moebench, or a shape such as e64k6d1024i512, a {CONFIG_NAME} of "
        f"Hugging Face or its folder, or the id of a model in the hub's local cache (nothing is downloaded); {hint}"
    )


def _in_cache(repo: str) -> Path | None:
    """Return the config.json of the model `repo` in the hub's cache: of its revision `main`, or else of any revision.

    The layout of the cache is documented at https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    there = hub / f"models--{repo.replace('/', '--')}"
    main = there / "refs" / "main"
    revisions = [main.read_text(errors="replace").strip()] if is_file(main) else []
    files = [there / "snapshots" / revision / CONFIG_NAME for revision in revisions]
    return next(filter(is_file, [*files, *sorted(there.glob(f"snapshots/*/{CONFIG_NAME}"))]), None)


def _read(file: Path, text: object) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"model {cut(str(text))}: {file} cannot be read: {error}; give a {CONFIG_NAME}") from error
    if not isinstance(config, dict):
        raise UsageError(f"model {cut(str(text))}: {file} is not a JSON object; give a {CONFIG_NAME}")
    return config


def config_model(config: Mapping[str, Any], origin: str) -> Model:
    """Return the routed experts of a Hugging Face configuration. Messages name the configuration by `origin`.

    Raises UsageError, in one line, with the keys that were looked for and are missing, or a value that is not valid.
    """
    tables = next((tables for tables in _tables((config,)) if _find(tables, KEYS["n_routed_experts"])), (config,))
    model_type = next((kind for table in reversed(tables) if isinstance(kind := table.get("model_type"), str)), "")
    reader = _Reader(tables, f"model {cut(origin)}: {_architecture(config)}")
    family = next((family for begin, family in FAMILIES.items() if model_type.startswith(begin)), _Family({}))
    fields = reader.shape() | reader.activation(family)
    dtype = reader.dtype()
    notes = (*reader.notes, *_left_out(tables), *family.notes)
    return Model(_name(model_type, fields), fields, dtype, notes)


def _tables(path: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[Mapping[str, Any], ...]]:
    """Yield each table of a configuration, innermost first in a tuple with the tables around it."""
    yield path
    names = [*(name for name in SECTIONS if name in path[0]), *(name for name in path[0] if name not in SECTIONS)]
    for name in names:
        if isinstance(path[0][name], Mapping) and len(path) < 4:
            yield from _tables((path[0][name], *path))


def _find(tables: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first of the keys that has a value, with its value. A table comes before the tables around it."""
    return next(
        ((key, table[key]) for table in tables for key in keys if table.get(key) not in (None, 0, [], {}, "")), None
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return f"architecture {cut(str(name))}" if name else "a configuration without model_type"


def _name(model_type: str, fields: Mapping[str, Any]) -> str:
    """Return the name of the preset that has the same fields, or a name made of the model's type and its shape."""
    standard = {"activation_alpha": 1.702, "activation_limit": 7.0}
    for name, preset in MODELS.items():
        if MODEL_TYPES[name] == model_type and {**standard, **preset} == {**standard, **fields}:
            return name
    shape = shape_name(fields)
    return f"{model_type}-{shape}" if re.fullmatch(NAME_PATTERN, model_type) and len(model_type) < 60 else shape


class _Reader:
    """Reads the values of one configuration. `notes` collects what the reader has to say about them."""

    def __init__(self, tables: Sequence[Mapping[str, Any]], origin: str) -> None:
        self.tables = tables
        self.origin = origin
        self.notes: list[str] = []

    def wrong(self, message: str) -> UsageError:
        return UsageError(f"{self.origin}: {message}; give a shape such as e64k6d1024i512 instead")

    def shape(self) -> dict[str, Any]:
        found = {name: _find(self.tables, KEYS[name]) for name in SHAPE_AXES}
        missing = [f"{name} in {listed(KEYS[name])}" for name, entry in found.items() if entry is None]
        if missing:
            raise self.wrong(f"no routed experts that moebench can read; it looked for {'; for '.join(missing)}")
        shape = {name: self.size(*entry) for name, entry in found.items() if entry is not None}
        if shape["n_activated_experts"] > shape["n_routed_experts"]:
            raise self.wrong("a token chooses {n_activated_experts} experts of {n_routed_experts}".format_map(shape))
        return shape

    def size(self, key: str, value: object) -> int:
        """Return a size. A list has one value for each layer; the value that most layers have counts."""
        sizes = value if isinstance(value, list) else [value]
        whole = [int(one) for one in sizes if isinstance(one, int | float) and not isinstance(one, bool) and one == one]
        if len(whole) != len(sizes) or not all(0 <= one < LARGEST for one in whole) or not any(whole):
            raise self.wrong(f"{key} = {shown(value)} is no size of a layer")
        counted = [one for one in whole if one]
        usual = max(dict.fromkeys(counted), key=counted.count)
        if len(set(counted)) > 1:
            self.notes.append(f"{key} differs between layers ({listed(sorted(set(counted)))}): {usual} is taken")
        return usual

    def activation(self, family: _Family) -> dict[str, Any]:
        """Return the fields of the activation, its limits and the biases."""
        key, written = _find(self.tables, KEYS["expert_activation"]) or ("hidden_act", family.activation)
        name = written.get("name") if isinstance(written, Mapping) else written
        ours = family.fields.get("expert_activation") or ACTIVATIONS.get(str(name))
        if ours is None:
            raise self.wrong(f"{key} = {shown(name)} is no activation of moebench, which has {listed(ACTIVATIONS)}")
        if name == "gelu":
            self.notes.append("moebench computes gelu by its tanh approximation")
        bias = _find(self.tables, KEYS["expert_bias"])
        fields = {"expert_activation": ours, "expert_bias": bias is not None and bias[1] is True, "swiglu_limit": 0.0}
        limit, alpha = self.number("swiglu_limit"), self.number("activation_alpha")
        if ours in ("quick_geglu", "swigluoai"):
            fields |= {"activation_alpha": alpha or 1.702, "activation_limit": limit or 7.0}
        elif ours == "swiglu":
            fields["swiglu_limit"] = limit or 0.0
        return {**fields, **family.fields}

    def number(self, name: str) -> float | None:
        entry = _find(self.tables, KEYS[name])
        if entry is None:
            return None
        if isinstance(entry[1], bool) or not isinstance(entry[1], int | float) or not 0 < entry[1] < LARGEST:
            raise self.wrong(f"{entry[0]} = {shown(entry[1])} is no positive number")
        return float(entry[1])

    def dtype(self) -> str | None:
        key, written = _find(self.tables, KEYS["dtype"]) or ("dtype", None)
        name = str(written).removeprefix("torch.")
        if written is None or name == "auto":
            return None
        if name not in DTYPES:
            self.notes.append(f"{key} = {shown(written)} is no dtype of moebench, which has {listed(DTYPES)}")
            return None
        return name


def _left_out(tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what the layer has besides its routed experts, as sentences."""
    shared = [f"{key} = {shown(entry[1])}" for key in SHARED if (entry := _find(tables, [key])) is not None]
    if shared:
        yield f"shared experts are left out ({', '.join(shared)})"
    if entry := _find(tables, ["zero_expert_num"]):
        yield f"experts without work are left out (zero_expert_num = {shown(entry[1])}); a token may choose some"
    if entry := _find(tables, ["moe_latent_size"]):
        yield f"the projections to and from moe_latent_size = {shown(entry[1])} are left out; dim is that size"
    if entry := _find(tables, ["quantization_config"]):
        method = entry[1].get("quant_method") if isinstance(entry[1], Mapping) else entry[1]
        yield f"the checkpoint is quantized ({cut(str(method))}); FP8 is part of a backend's name in moebench"
