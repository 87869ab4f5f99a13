"""Define what `moebench parity` tries: a `Trial` is one point of a space of shapes, inputs and steps.

The supervisor plans with this module, so it does not import torch. moebench.parity.play draws the tensors of a trial
and takes its steps.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from moebench.errors import UsageError
from moebench.parity.space.programs import PROGRAMS, RANK_PROGRAMS, STEPS
from moebench.workload.axes import did_you_mean, listed
from moebench.workload.case import ACTIVATIONS, Case

#: More rows than a 16-bit number counts.
MANY_TOKENS = 65_537


@dataclass(frozen=True)
class Trial:
    """A layer, its inputs, and what is done with it. The default of each field is its simplest value.

    `AXES` lists the values of each field. Fields that are not described there have the meaning that they have in
    `moebench.workload.case.Case`.
    """

    steps: tuple[str, ...] = ("call", "backward")
    num_tokens: int = 1
    n_routed_experts: int = 1
    n_activated_experts: int = 1
    dim: int = 1
    moe_inter_dim: int = 1
    dtype: str = "float32"
    param_dtype: str = "same"  # "same" as dtype
    weights_dtype: str = "float32"
    index_dtype: str = "int64"
    expert_activation: str = "swiglu"
    limit: float = 0.0  # swiglu_limit or activation_limit; 0 for no limit
    alpha: float = 1.702
    expert_bias: bool = False
    apply_router_weight_after_down: bool = False
    x_scale: float = 1.0  # standard deviation of x, and so of the activation's argument
    routing: str = "uniform"
    choices: str = "distinct"
    mask: str = "all-kept"
    weights: str = "positive"
    unused_weights: str = "usual"  # routing weights where the index is -1 or the token is masked
    grad: str = "normal"
    x_layout: str = "contiguous"
    weights_layout: str = "contiguous"
    indices_layout: str = "contiguous"
    mask_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    parameter_layout: str = "contiguous"
    wanted: str = "all"  # tensors that require a gradient
    memory: str = "plain"  # what operators leave in memory that nobody wrote: what was there, or NaN
    ep_size: int = 1
    rank_load: str = "even"
    group: str = "world"  # the ranks that share the experts: all of the world, or each rank has all experts
    seed: int = 0

    @property
    def text(self) -> str:
        """The fields that differ from their defaults, as `moebench parity --case` takes them."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={','.join(value) if field.name == 'steps' else value}")
        return " ".join(words) or f"num_tokens={self.num_tokens}"

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """Return the trial of a text. Raises UsageError for an unknown field or value."""
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(
                    f"--case {text!r}: {word!r} is not a field with a value; {hint + ' ' if hint else ''}"
                    f"write NAME=VALUE, where NAME is one of {listed(known)}"
                )
            found[name] = _value(text, name, value, known[name])
        return cls(**found)

    @property
    def params(self) -> str:
        """The name of the parameters' dtype."""
        return self.dtype if self.param_dtype == "same" else self.param_dtype

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.n_activated_experts

    @property
    def case(self) -> Case:
        """The case with this trial's shape and dtype. Its mode is train."""
        return Case(
            mode="train",
            num_tokens=self.num_tokens,
            n_routed_experts=self.n_routed_experts,
            n_activated_experts=self.n_activated_experts,
            dim=self.dim,
            moe_inter_dim=self.moe_inter_dim,
            dtype=self.dtype,  # type: ignore[arg-type]
            expert_activation=self.expert_activation,  # type: ignore[arg-type]
            expert_bias=self.expert_bias,
            activation_alpha=self.alpha,
            activation_limit=self.limit or 7.0,
            swiglu_limit=self.limit if self.expert_activation == "swiglu" else 0.0,
            apply_router_weight_after_down=self.apply_router_weight_after_down,
            ep_size=self.ep_size,
            seed=self.seed,
        )


def _value(text: str, name: str, value: str, default: object) -> Any:
    if name == "steps":
        words = tuple(value.split(","))
        for word in words:
            if word not in STEPS:
                raise UsageError(f"--case {text!r}: {did_you_mean(word, STEPS)} the steps are {listed(STEPS)}")
        return words
    if isinstance(default, str):
        known = dict.fromkeys((*AXES[name], *RANK_AXES.get(name, ())))
        if value not in known:
            raise UsageError(f"--case {text!r}: {name} = {value} must be one of {listed(known)}")
        return value
    try:
        if isinstance(default, bool):
            return {"True": True, "False": False}[value]
        return float(value) if isinstance(default, float) else int(value)
    except (ValueError, KeyError):
        kind = {bool: "True or False", int: "an integer"}.get(type(default), "a number")
        raise UsageError(f"--case {text!r}: {name} = {value} must be {kind}") from None


_DIMS = (1, 2, 3, 7, 8, 16, 24, 32, 33, 64, 100, 128, 1032)
_LAYOUTS = ("contiguous", "strided", "columns", "sliced", "misaligned", "expanded")
#: The values of each axis that the covering cases pair with each other, simplest first.
AXES: dict[str, tuple[Any, ...]] = {
    "steps": PROGRAMS,
    # a tile has 16, 32, 64 or 128 rows; 0 is not the simplest, because nothing is computed then
    "num_tokens": (1, 2, 3, 4, 0, 7, 15, 17, 31, 33, 63, 65, 127, 129, 257, 1000, MANY_TOKENS),
    "n_routed_experts": (1, 2, 3, 4, 8, 11, 16, 65, 200, 257, 1024),
    "n_activated_experts": (1, 2, 3, 4, 9, 16, "all"),
    "dim": _DIMS,
    "moe_inter_dim": _DIMS,
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "param_dtype": ("same", "float32", "bfloat16", "float16", "float64"),
    "weights_dtype": ("float32", "bfloat16", "float16", "float64"),
    "index_dtype": ("int64", "int32", "int16", "int8", "uint8"),
    "expert_activation": ACTIVATIONS,
    "limit": (0.0, 7.0, 0.75, 0.03, 300.0),
    "alpha": (1.702, 0.3),
    "expert_bias": (False, True),
    "apply_router_weight_after_down": (False, True),
    "x_scale": (1.0, 4.0, 60.0, 300.0, 1e5),
    "routing": ("uniform", "first", "last", "one-hot", "zipf", "half-empty", "blocks"),
    "choices": ("distinct", "some-dropped", "first-dropped", "token-dropped", "all-dropped", "duplicates", "both"),
    "mask": ("all-kept", "some", "none-kept", "first-masked", "last-masked", "only-first", "only-last"),
    "weights": ("positive", "sum-to-one", "some-zero", "all-zero", "negative", "to-eight", "small", "near-one"),
    "unused_weights": ("usual", "nan"),
    "grad": ("normal", "halves", "large", "tiny"),
    "x_layout": _LAYOUTS,
    "weights_layout": _LAYOUTS,
    "indices_layout": ("contiguous", "strided", "columns", "misaligned", "expanded"),
    "mask_layout": ("contiguous", "strided"),
    "grad_layout": _LAYOUTS,
    "parameter_layout": ("contiguous", "columns", "misaligned"),
    "wanted": (
        "all", "x", "weights", "x+weights", "parameters", "gate_and_up_projs", "down_projs", "biases", "all-but-x",
        "all-but-weights", "nothing",
    ),
    "memory": ("plain", "poisoned"),
    "ep_size": (1,),
    "rank_load": ("even",),
    "group": ("world",),
}  # fmt: skip
#: The values of the axes that are tried on two ranks. An axis that is not named there has its simplest value.
RANK_AXES: dict[str, tuple[Any, ...]] = {
    "steps": RANK_PROGRAMS,
    "num_tokens": (1, 2, 3, 17, 64, 129),
    "n_routed_experts": (2, 4, 16, 66, 256),
    "n_activated_experts": (1, 2, 3, 9, "all"),
    "dim": (8, 16, 33, 64),
    "moe_inter_dim": (8, 16, 7),
    "dtype": AXES["dtype"],
    "param_dtype": ("same", "bfloat16"),
    "weights_dtype": AXES["weights_dtype"],
    "index_dtype": ("int64", "int32", "int16"),
    "expert_activation": ("swiglu", "quick_geglu", "relu2"),
    "limit": (0.0, 7.0),
    "expert_bias": (False, True),
    "apply_router_weight_after_down": (False, True),
    "routing": ("uniform", "first", "last", "half-empty"),
    "choices": AXES["choices"],
    "mask": ("all-kept", "some", "none-kept"),
    "weights": ("positive", "some-zero", "negative"),
    "unused_weights": ("usual", "nan"),
    "x_layout": ("contiguous", "strided", "columns"),
    "grad_layout": ("contiguous", "strided", "expanded"),
    "wanted": ("all", "x", "weights", "parameters", "all-but-x", "nothing", "parameters-on-last"),
    "memory": AXES["memory"],
    "ep_size": (2,),
    "rank_load": ("even", "uneven", "last-empty", "first-empty"),
    "group": ("world", "alone"),
}


#: A value for some of the axes.
Row = dict[str, Any]


def of_row(row: Row) -> Trial:
    """Return the trial of a row of axes. `n_activated_experts` may be "all"."""
    fields = dict(row)
    if fields.get("n_activated_experts") == "all":
        fields["n_activated_experts"] = fields.get("n_routed_experts", 1)
    return Trial(**fields)
