"""Define the configurations of an expert layer (`MoEConfig`) and of the backend that computes it (`BackendConfig`).

The fields have the names that NeMo AutoModel uses, so that AutoModel's users can swap modules.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from experts import catalog
from experts.errors import ConfigError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Activation = Literal["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"]
Save = catalog.Save
Fp8Recipe = catalog.Fp8Recipe
if TYPE_CHECKING:
    Engine = str
    Dispatcher = str
else:
    Engine = Literal[tuple(engine.name for engine in catalog.ENGINES)]
    Dispatcher = Literal[tuple(dispatcher.name for dispatcher in catalog.DISPATCHERS)]

_C = TypeVar("_C", bound=type)
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="forbid")


def _one_line_errors(cls: _C) -> _C:
    """Make a validated dataclass raise ConfigError with one line per mistake: field, value, rule and remedy."""
    validated_init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(validated_init)
    def __init__(self: Any, /, **fields: Any) -> None:  # pydantic's takes positional arguments despite kw_only
        try:
            validated_init(self, **fields)
        except ValidationError as error:
            lines = [_mistake(cls, mistake) for mistake in error.errors()]
            raise ConfigError("\n".join(lines)) from None

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _mistake(cls: type, mistake: Any) -> str:
    known = cls.__pydantic_fields__  # type: ignore[attr-defined]
    name = str(mistake["loc"][0]) if mistake["loc"] else ""
    if mistake["type"] == "value_error":
        return f"{cls.__name__}{'.' + name if name else ''}: {mistake['ctx']['error']}"
    if name not in known:
        return f"{cls.__name__}: there is no field {name!r}; the fields are {', '.join(known)}"
    field = known[name]
    remedy = f"{field.description}, e.g. {field.examples[0]!r}"
    if mistake["type"] in ("missing", "missing_argument"):
        return f"{cls.__name__}.{name} is missing: give {remedy}"
    return f"{cls.__name__}.{name} = {mistake['input']!r}: {mistake['msg']}; give {remedy}"


def _field(description: str, example: object, **rules: Any) -> Any:
    return Field(description=description, examples=[example], **rules)


_Size = Annotated[int, Field(gt=0)]


@_one_line_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MoEConfig:
    """The sizes, the activation and the dtype of the routed experts of one layer.

    Raises ConfigError, with one line per mistake, for an invalid value. `dtype` accepts a name or a torch.dtype. The
    field always holds a torch.dtype.
    """

    n_routed_experts: _Size = _field("the number of experts, a positive integer", 128)
    n_activated_experts: _Size = _field("the number of experts per token, at most n_routed_experts", 8)
    dim: _Size = _field("the hidden size of a token, a positive integer", 2048)
    moe_inter_dim: _Size = _field("the inner size of one expert, a positive integer", 768)
    expert_bias: bool = _field("whether the projections have a bias, True or False", False, default=False)
    expert_activation: Activation = _field("the name of an activation", "swiglu", default="swiglu")
    activation_alpha: Annotated[float, Field(allow_inf_nan=False)] = _field(
        "the slope inside the sigmoid of quick_geglu and swigluoai", 1.702, default=1.702
    )
    activation_limit: Annotated[float, Field(gt=0)] = _field(
        "the clamp of quick_geglu and swigluoai, a positive number", 7.0, default=7.0
    )
    swiglu_limit: Annotated[float, Field(ge=0)] = _field(
        "the clamp of swiglu, a positive number, or 0 for no clamp", 10.0, default=0.0
    )
    apply_router_weight_after_down: bool = _field(
        "whether the routing weight is applied after the down projection, True or False", False, default=False
    )
    dtype: torch.dtype = _field(f"one of {', '.join(DTYPES)}", "bfloat16", default="bfloat16", validate_default=True)

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_by_name(cls, value: object) -> object:
        dtype = DTYPES.get(value, value) if isinstance(value, str) else value
        if dtype not in DTYPES.values():
            raise ValueError(f"{value!r} is not a dtype of an expert layer; give one of {', '.join(DTYPES)}")
        return dtype

    @model_validator(mode="after")
    def _no_more_chosen_than_there_are(self) -> "MoEConfig":
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                f"n_activated_experts = {self.n_activated_experts} exceeds n_routed_experts = {self.n_routed_experts}; "
                "a token cannot choose more experts than the layer has; lower n_activated_experts"
            )
        return self

    def with_dtype(self, dtype: torch.dtype) -> "MoEConfig":
        """Return the same configuration in another dtype."""
        return self if dtype is self.dtype else dataclasses.replace(self, dtype=dtype)


@_one_line_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackendConfig:
    """The engine that computes the experts and the dispatcher that carries tokens between ranks.

    In `experts` and `dispatcher`, None means the default of the layer's class. "torch" is another name of the engine
    "loop" and of the dispatcher "allgather". `max_tokens_per_rank` and `capacity_factor` are options of the dispatcher
    "symm_mem", `equal_tokens` of "allgather" and `num_sms` of "deepep". `fp8_gradients` and
    `fp8_weight_gradients` are options of the engine "triton_fp8", and `fp8_rows` of this engine with the dispatcher
    "symm_mem" or "deepep". `gradient_accumulation_fusion` is an option of "triton". Raises ConfigError, with one line
    per mistake, for an invalid value.
    """

    experts: Engine | None = _field("the name of an engine, or None for the module's default", "loop", default=None)
    dispatcher: Dispatcher | None = _field(
        "the name of a dispatcher, or None for the module's default", "allgather", default=None
    )
    te_fp8: Fp8Recipe | None = _field("the name of an FP8 recipe, or None for no FP8", "block", default=None)
    save: Save | None = _field(
        "'memory' (backward needs less memory), 'time' (backward takes less time), or None for the default 'memory'",
        "time",
        default=None,
    )
    fp8_gradients: catalog.Fp8Gradients | None = _field(
        "the FP8 format of gradients of rows, 'e4m3' or 'e5m2', or None for the default 'e4m3'", "e5m2", default=None
    )
    fp8_weight_gradients: bool | None = _field(
        "whether the products for the gradients of the weights are in FP8, True or False, or None for the default True",
        False,
        default=None,
    )
    fp8_rows: bool | None = _field(
        "whether rows travel to the ranks of their experts in FP8, True or False, or None for the default False",
        True,
        default=None,
    )
    gradient_accumulation_fusion: bool = _field(
        "whether backward adds the gradients of the weights to `main_grad` of the parameters, True or False",
        True,
        default=False,
    )
    max_tokens_per_rank: _Size | None = _field(
        "the largest number of tokens of any rank, a positive integer, or None to take it from the first forward",
        4096,
        default=None,
    )
    capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = _field(
        "the room for rows between two ranks, relative to an even routing, a positive number, or None for all tokens",
        1.25,
        default=None,
    )
    equal_tokens: bool | None = _field(
        "True if every rank passes the same number of tokens in every call, or None if the ranks must compare them",
        True,
        default=None,
    )
    num_sms: Annotated[int, Field(gt=0, multiple_of=2)] | None = _field(
        "the number of multiprocessors that move rows, a positive even integer, or None for the default 20",
        24,
        default=None,
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _alias(cls, value: object) -> object:
        return "loop" if value == "torch" else value

    @field_validator("dispatcher", mode="before")
    @classmethod
    def _dispatcher_alias(cls, value: object) -> object:
        return "allgather" if value == "torch" else value

    @model_validator(mode="after")
    def _rows_travel_in_one_format(self) -> "BackendConfig":
        if self.fp8_rows and self.fp8_gradients == "e5m2":
            raise ValueError("fp8_rows = True sends gradients of rows in E4M3, not in 'e5m2'; leave one of both out")
        return self


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that configurations use for a dtype, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def is_gated_activation(name: str) -> bool:
    """Return whether the activation has a gate. With a gate, the first projection is 2·moe_inter_dim wide."""
    return name != "relu2"
