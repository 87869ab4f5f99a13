"""Layers of GroupedExpertsTE with the fake of Transformer Engine, and functions that check them."""

from typing import Any

from experts import BackendConfig, GroupedExpertsTE
from tests.experts import fake_transformer_engine
from tests.experts.layers import Batch, Named, assert_near, expected, moe_config, random_parameters, run_stacked


def config(**fields: Any) -> Any:
    """Return a config with sizes that FP8 supports and more than ten experts: some numbers have two digits."""
    return moe_config(**{"n_routed_experts": 12, "moe_inter_dim": 16, "expert_bias": True, **fields})


def layer(parameters: Named | None = None, te_fp8: Any = None, **fields: Any) -> GroupedExpertsTE:
    made = GroupedExpertsTE(config(**fields), BackendConfig(te_fp8=te_fp8))
    made.load_state_dict(random_parameters(made.config) if parameters is None else parameters)
    return made


def check(made: GroupedExpertsTE, batch: Batch, parameters: Named | None = None) -> Named:
    parameters = random_parameters(made.config) if parameters is None else parameters
    found = run_stacked(made, batch)
    assert_near(found, expected(made.config, parameters, batch), batch.x.dtype)
    return found


def calls(made: GroupedExpertsTE) -> list[fake_transformer_engine.Call]:
    """Return the calls of the two projections, which must be equal."""
    assert made.gate_up_linear.calls == made.down_linear.calls
    return made.gate_up_linear.calls
