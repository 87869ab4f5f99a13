"""The cache keeps parameters while the weights stay the same."""

import torch

from moebench.measure.cache import Workload
from moebench.workload.case import Case

CPU = torch.device("cpu")


def case(**fields):
    shape = {"num_tokens": 24, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 16}
    unkind = {"expert_bias": True, "masked_share": 0.25, "routing": "zipf"}
    return Case.model_validate({**shape, **unkind, "dtype": "float32", "ep_size": 2, **fields})


def test_parameters_kept_for_one_ep_size_are_not_another_ones():
    workload = Workload(CPU)
    kept = workload.parameters(case())
    assert workload.parameters(case(mode="train", routing="uniform")) is kept
    assert len(workload.parameters(case(ep_size=4))["down_projs"]) == 2
    assert workload.parameters(case())["down_projs"].shape == (4, 16, 32)
