"""Define what a model fixes of a case, and the shapes of the routed experts of published models.

Each preset fixes the fields of `Case` that the model's configuration fixes. Tokens, dtype, routing and mode stay free.
The shapes come from the models' own configuration files, read 2026-11.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

#: The fields of a shape, in the order of its written form.
SHAPE_AXES = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
#: moebench writes e64k6d1024i512. It also reads 64/6/1024/512, which older commands use. A case refuses more digits.
_NUMBER = "([0-9]{1,20})"
_SHAPES = (re.compile(f"e{_NUMBER}k{_NUMBER}d{_NUMBER}i{_NUMBER}"), re.compile("/".join([_NUMBER] * 4)))


def shape_name(fields: Mapping[Any, Any]) -> str:
    """Return the written form of the shape in these fields of a case, for example e64k6d1024i512."""
    return "".join(f"{letter}{fields[name]}" for letter, name in zip("ekdi", SHAPE_AXES, strict=True))


def shape_fields(text: str) -> dict[str, int] | None:
    """Return the fields of a shape written e64k6d1024i512 or 64/6/1024/512; None for any other text."""
    found = next(filter(None, (pattern.fullmatch(text) for pattern in _SHAPES)), None)
    return found and dict(zip(SHAPE_AXES, map(int, found.groups()), strict=True))


def _shape(
    n_routed_experts: int, n_activated_experts: int, dim: int, moe_inter_dim: int, **more: object
) -> Mapping[str, object]:
    return MappingProxyType(
        {
            "n_routed_experts": n_routed_experts,
            "n_activated_experts": n_activated_experts,
            "dim": dim,
            "moe_inter_dim": moe_inter_dim,
            "expert_activation": "swiglu",
            "expert_bias": False,
            "swiglu_limit": 0.0,
            **more,
        }
    )


_GPT_OSS = {"expert_activation": "quick_geglu", "expert_bias": True}

MODELS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "qwen3-30b-a3b": _shape(128, 8, 2048, 768),
        "qwen3-235b-a22b": _shape(128, 8, 4096, 1536),
        "qwen3-next-80b": _shape(512, 10, 2048, 512),
        "deepseek-v3": _shape(256, 8, 7168, 2048),
        "deepseek-v2-lite": _shape(64, 6, 2048, 1408),
        "deepseek-v4-flash": _shape(256, 6, 4096, 2048, swiglu_limit=10.0),
        "gpt-oss-20b": _shape(32, 4, 2880, 2880, **_GPT_OSS),
        "gpt-oss-120b": _shape(128, 4, 2880, 2880, **_GPT_OSS),
        "mixtral-8x7b": _shape(8, 2, 4096, 14336),
        "olmoe": _shape(64, 8, 2048, 1024),
        "kimi-k2": _shape(384, 8, 7168, 2048),
        "glm-4.5-air": _shape(128, 8, 4096, 1408),
        "nemotron-3-nano": _shape(128, 6, 2688, 1856, expert_activation="relu2"),
        "minimax-m2": _shape(256, 8, 3072, 1536),
    }
)

_RENORMALISED = {"norm_topk_prob": True}
_SIGMOID = {**_RENORMALISED, "score_func": "sigmoid", "correction_bias": True}

#: The router and the shared experts of a model's block, as its authors published them by 2026-11. The keys are fields
#: of `RouterConfig` in experts.router and of `BlockConfig` in experts.block; other fields have their defaults.
BLOCKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3-30b-a3b": _RENORMALISED,
        "qwen3-235b-a22b": _RENORMALISED,
        "qwen3-next-80b": {**_RENORMALISED, "n_shared_experts": 1, "shared_expert_gate": True},
        "deepseek-v3": {
            **_SIGMOID,
            "n_expert_groups": 8,
            "n_limited_groups": 4,
            "route_scale": 2.5,
            "n_shared_experts": 1,
        },
        "deepseek-v2-lite": {"n_shared_experts": 2},
        "mixtral-8x7b": _RENORMALISED,
        "olmoe": {},
        "kimi-k2": {**_SIGMOID, "route_scale": 2.827, "n_shared_experts": 1},
        "glm-4.5-air": {**_SIGMOID, "n_shared_experts": 1},
    }
)
EXPERTS = "experts"
#: The field `subject` of a case.
Subject = Annotated[
    str,
    Field(
        pattern=r"^(experts|block(:[A-Za-z0-9][A-Za-z0-9._-]{0,99})?)$",
        description="what is measured: the routed `experts`, or a whole `block` with its router and shared experts "
        "([sweeps.md](sweeps.md#blocks))",
    ),
]


def block_of(subject: str, model: str | None) -> Mapping[str, Any] | None:
    """Return the fields of the block that a case has; None with the subject `experts`, and for an unknown router.

    A block is that of the case's model, or of the model that the subject names: `block:deepseek-v3`.
    """
    kind, _, named = subject.partition(":")
    return BLOCKS.get(named or model or "") if kind == "block" else None


def block_mistakes(case: Mapping[str, Any]) -> list[str]:
    """Return why a case with these fields cannot have its subject, one line for each reason."""
    subject, model, routing = case["subject"], case["model"], case["routing"]
    if subject == EXPERTS:
        return []
    found = []
    block = block_of(subject, model)
    if block is None:
        of = f"subject = {subject}" if ":" in subject or not model else f"subject = block with model = {model}"
        found.append(
            f"{of}: its router is not known; take block:MODEL with the model whose router and shared experts the "
            f"block has, one of {', '.join(BLOCKS)}"
        )
    elif not _groups_fit(block, case["n_routed_experts"], case["n_activated_experts"]):
        found.append(
            f"subject = {subject} with n_routed_experts = {case['n_routed_experts']}: its router chooses from "
            f"{block['n_limited_groups']} of {block['n_expert_groups']} equal groups of two or more experts, which "
            "must hold the experts of a token; take more experts, or another block"
        )
    if routing != "uniform":
        found.append(
            f"subject = {subject} with routing = {routing[:80]}: a block routes its tokens itself; leave routing out"
        )
    return found


def _groups_fit(block: Mapping[str, Any], n_routed_experts: int, n_activated_experts: int) -> bool:
    groups, limited = block.get("n_expert_groups", 1), block.get("n_limited_groups", 1)
    size, rest = divmod(n_routed_experts, groups)
    return bool(groups == 1 or (rest == 0 and size > 1 and limited * size >= n_activated_experts))


#: The `model_type` in the configuration file of each preset's model.
MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "qwen3-30b-a3b": "qwen3_moe",
        "qwen3-235b-a22b": "qwen3_moe",
        "qwen3-next-80b": "qwen3_next",
        "deepseek-v3": "deepseek_v3",
        "deepseek-v2-lite": "deepseek_v2",
        "deepseek-v4-flash": "deepseek_v4",
        "gpt-oss-20b": "gpt_oss",
        "gpt-oss-120b": "gpt_oss",
        "mixtral-8x7b": "mixtral",
        "olmoe": "olmoe",
        "kimi-k2": "kimi_k2",
        "glm-4.5-air": "glm4_moe",
        "nemotron-3-nano": "nemotron_h",
        "minimax-m2": "minimax_m2",
    }
)


@dataclass(frozen=True)
class Model:
    """The routed experts of a model: the fields of `Case` that the model fixes, and what its layer has besides.

    `name` names the fields, so it does not depend on where the model was read from. It is None for a shape that the
    user wrote out. `dtype` is the dtype that the model's configuration gives; a caller may measure another one. It is
    None if the configuration gives none. `notes` are sentences on what the case leaves out or cannot represent.
    """

    name: str | None
    fields: Mapping[str, Any]
    dtype: str | None = None
    notes: tuple[str, ...] = ()

    def values(self, **more: object) -> dict[str, Any]:
        """Return the fields of a case of this model: its name, its fields and its dtype, and then `more`."""
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        return {"model": self.name, **self.fields, **dtype, **more}

    def __str__(self) -> str:
        return self.name or shape_name(self.fields)
