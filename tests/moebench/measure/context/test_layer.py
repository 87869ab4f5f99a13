"""A layer that adds to main gradients: the contexts it has, and the main gradients that it gets there."""

from typing import Any

import pytest
import torch
from torch import nn

from experts import GroupedExperts, Unsupported
from moebench.measure.cache import Workload
from moebench.measure.context.layer import in_context
from moebench.measure.trials import examine
from moebench.parity.checks import case_job
from moebench.parity.space.trial import Trial
from moebench.workload.case import Case
from moebench.workload.ranks import ALONE

CPU = torch.device("cpu")


class Adds(nn.Module):
    """Adds 2 to the main gradient of its weight in backward."""

    gradient_accumulation_fusion = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.had: list[Any] = []

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        self.had.append(getattr(self.weight, "main_grad", None))
        output = x.clone()
        if output.requires_grad:
            output.register_hook(self._add)
        return output

    def _add(self, grad: torch.Tensor) -> None:
        self.weight.main_grad += 2.0

    def stacked_grads(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.main_grad}


class NotPlain(GroupedExperts):
    """Says that it adds to main gradients."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gradient_accumulation_fusion = True


def case(context: str, **fields: Any) -> Case:
    return Case(
        n_routed_experts=2,
        n_activated_experts=1,
        dim=8,
        moe_inter_dim=8,
        num_tokens=8,
        mode="train",
        context=context,
        **fields,
    )


@pytest.mark.parametrize(
    ("context", "fields"), [("plain", {}), ("checkpoint", {}), ("fsdp2+accumulate:2", {"dp_size": 2})]
)
def test_it_is_unsupported_without_main_gradients(context: str, fields: dict[str, int]) -> None:
    with pytest.raises(Unsupported, match="the context accumulate:N without fsdp2"):
        in_context(Adds(), case(context, **fields), CPU, ALONE)


def test_parity_says_that_it_has_no_main_gradients() -> None:
    job = case_job(f"{__name__}:NotPlain", Trial())
    with pytest.raises(Unsupported, match="the context accumulate:N without fsdp2"):
        examine(job, Workload(CPU))


def test_a_step_starts_with_main_gradients_of_zeros_and_keeps_those_of_the_step_before() -> None:
    layer = Adds()
    made = in_context(layer, case("accumulate:2"), CPU, ALONE)
    x = torch.zeros(4, 8, requires_grad=True)
    with torch.no_grad():
        made(x, x, x, x)
    assert layer.had == [None]
    for _ in range(2):
        made(x, x, x, x).sum().backward()
    first = made.stacked_grads()["weight"]
    assert (first.dtype, first.tolist()) == (torch.float32, [4.0] * 3)
    made.zero_grad()
    made(x, x, x, x).sum().backward()
    assert made.stacked_grads()["weight"].tolist() == [2.0] * 3
    assert first.tolist() == [4.0] * 3
