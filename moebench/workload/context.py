"""Define the contexts in which a layer is called: what surrounds it in training, as a text and as its parts.

A context is `plain`, or parts joined with `+`. moebench.measure.context puts a layer into its context.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from pydantic_core import PydanticCustomError

PLAIN = "plain"


class Processes(NamedTuple):
    """The processes that run a case together: `dp_size` groups of ranks that share the experts."""

    num_ranks: int
    dp_size: int


#: Part -> what it does, in the order of a context's text.
PARTS = {
    "fsdp2": "`fully_shard` of torch.distributed.fsdp over `dp_size` ranks",
    "compile": "`torch.compile` around the layer",
    "checkpoint": "backward runs the layer's forward again (`torch.utils.checkpoint`, non-reentrant)",
    "checkpoint_reentrant": "the same, reentrant",
    "checkpoint_experts": "backward computes the experts again from the rows that dispatch brought, which are kept",
    "offload": "saved tensors wait in the host's memory (`torch.autograd.graph.save_on_cpu`)",
    "accumulate": "`accumulate:N` splits the tokens into N micro-batches and adds up their gradients in float32",
}
CHECKPOINTS = tuple(name for name in PARTS if name.startswith("checkpoint"))
#: More micro-batches than this are a typing mistake.
MOST_MICRO_BATCHES = 1024
RULE = (
    "must be plain, or parts joined with +: fsdp2, compile, one of checkpoint, checkpoint_reentrant and "
    f"checkpoint_experts, offload, and accumulate:N with N from 2 to {MOST_MICRO_BATCHES}"
)


@dataclass(frozen=True)
class Context:
    """The parts of a context. `checkpoint` is one of CHECKPOINTS, or None."""

    checkpoint: str | None = None
    compiled: bool = False
    fsdp2: bool = False
    offload: bool = False
    num_micro_batches: int = 1

    @classmethod
    def parse(cls, text: str) -> "Context":
        """Return the context of a text. Raises ValueError, which says what is wrong, for any other text."""
        return _parsed(text)

    @classmethod
    def _parse(cls, text: str) -> "Context":
        if text == PLAIN:
            return cls()
        names: list[str] = []
        num_micro_batches = 1
        for part in text.split("+"):
            name, colon, argument = part.partition(":")
            is_counted = name == "accumulate"
            if is_counted and re.fullmatch(r"\d{1,4}", argument, re.ASCII):
                num_micro_batches = int(argument)
            is_count = 2 <= num_micro_batches <= MOST_MICRO_BATCHES
            if name not in PARTS or is_counted != bool(colon) or (is_counted and not is_count):
                which = "" if part == text else f"{part[:80]!r} is no part of a context: "
                raise ValueError(f"{which}it {RULE}")
            names.append(name)
        if len(set(names)) < len(names):
            raise ValueError(f"{text[:80]!r} has a part twice; name each part once")
        kinds = [name for name in names if name in CHECKPOINTS]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} recompute the same layer; take one of them")
        is_in = {name: name in names for name in PARTS}
        return cls(kinds[0] if kinds else None, is_in["compile"], is_in["fsdp2"], is_in["offload"], num_micro_batches)

    @cached_property
    def text(self) -> str:
        """The text of the context, with its parts in the order of PARTS."""
        is_in = {
            "fsdp2": self.fsdp2,
            "compile": self.compiled,
            **{name: name == self.checkpoint for name in CHECKPOINTS},
            "offload": self.offload,
        }
        parts = [name for name in PARTS if is_in.get(name)]
        parts += [f"accumulate:{self.num_micro_batches}"] if self.num_micro_batches > 1 else []
        return "+".join(parts) or PLAIN

    def mistakes(self, mode: str, num_tokens: int, dp_size: int, routing: str) -> list[str]:
        """Return why a case cannot have the context, one line for each reason; an empty list if it can."""
        found = []
        trains = [part for part in self.text.split("+") if part not in (PLAIN, "fsdp2", "compile")]
        if mode == "forward" and trains:
            found.append(
                f"context = {self.text} in mode forward: it has no backward for {' and '.join(trains)}; take mode "
                "train, or exclude the pair"
            )
        if self.fsdp2 and dp_size == 1:
            found.append(f"context = {self.text} at dp_size = 1: fsdp2 shards over dp_size ranks; take dp_size = 2")
        if dp_size > 1 and not self.fsdp2:
            found.append(
                f"dp_size = {dp_size} with context = {self.text}: only fsdp2 spreads a layer over data-parallel ranks; "
                "add fsdp2 to the context, or take dp_size = 1"
            )
        if self.num_micro_batches > max(num_tokens, 1):
            found.append(
                f"context = {self.text} with num_tokens = {num_tokens}: a micro-batch has at least one token; take "
                "fewer micro-batches or more tokens"
            )
        if dp_size > 1 and routing.startswith("trace:"):
            found.append(
                f"dp_size = {dp_size} with captured routing: a trace has the tokens of one group of expert-parallel "
                "ranks; take drawn routing, or dp_size = 1"
            )
        return found


#: A sweep has few contexts and many cases.
_parsed = lru_cache(Context._parse)


def canonical(text: str) -> str:
    """Return the context's text with its parts in the order of PARTS. A validator of pydantic."""
    try:
        return Context.parse(text).text
    except ValueError as error:
        raise PydanticCustomError("context", "{reason}", {"reason": str(error)}) from error
