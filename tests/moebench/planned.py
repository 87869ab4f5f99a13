"""Write a sweep of four jobs into the working directory, and plan it."""

from pathlib import Path

from moebench.run.request import RunPlan, plan
from moebench.run.runfile import Asked

SWEEP = """
name = "two"
[policy]
timeout_s = 7.0
[defaults]
n_routed_experts = 4
n_activated_experts = 2
dim = 16
moe_inter_dim = 8
backend = ["loop", "torch_mm"]
[[grid]]
num_tokens = [8, 24]
"""


def write_sweep() -> Path:
    path = Path("two.toml")
    path.write_text(SWEEP)
    return path


def plan_(out: Path | None = None, time_budget_min: float | None = None, **asked: object) -> RunPlan:
    return plan("two.toml", Asked.model_validate(asked), out=out, time_budget_min=time_budget_min)
