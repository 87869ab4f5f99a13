"""Facts of layers with low-rank adapters that the ranks of a group check: results, state dicts, merging, FSDP."""

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from experts import BackendConfig, GroupedExpertsLoRA, MoEConfig
from experts.lora.layer import ADAPTER_NAMES, adapter_shapes
from tests.experts.layers import F32, Named, assert_near, assert_same, random_parameters, run_stacked
from tests.experts.parallel import Case
from tests.experts.parallel_layers import all_ranks, gathered

CPU = torch.device("cpu")
RANK, ALPHA = 4, 7.0


def _drawn(config: MoEConfig) -> Named:
    """Return weights and adapters of all experts. B is not zero."""
    generator = torch.Generator().manual_seed(6)
    shapes = adapter_shapes(config, RANK)
    adapters = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    return random_parameters(config) | adapters


def _build(case: Case) -> GroupedExpertsLoRA:
    backend = BackendConfig(experts=case.engine, dispatcher=case.dispatcher)
    return GroupedExpertsLoRA(case.config, backend, RANK, ALPHA)


def _sharded(case: Case) -> GroupedExpertsLoRA:
    """Load all experts after they were spread over the ranks."""
    made = _build(case)
    made.init_token_dispatcher(all_ranks())
    made.load_state_dict(_drawn(case.config))
    return made


def _of_this_rank(case: Case) -> Named:
    """Return what the loop gives on one process with the tokens of all ranks: this rank's rows, and its experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    made = _build(Case(case.scenario, "loop", "allgather"))
    made.load_state_dict(_drawn(case.config))
    whole = run_stacked(made, case.batch())
    first = sum(case.share(before, size).x.shape[0] for before in range(rank))
    count, experts = case.share(rank, size).x.shape[0], case.config.n_routed_experts // size

    def own(name: str, tensor: Tensor) -> Tensor:
        is_adapter = name in ADAPTER_NAMES
        return tensor.narrow(0, rank * experts, experts) if is_adapter else tensor.narrow(0, first, count)

    return {name: own(name, tensor) for name, tensor in whole.items()}


def with_adapters() -> None:
    """Every engine and dispatcher gives what one process gives. Frozen weights get no gradient on any rank."""
    scenarios = ("uneven", "masked", "all-to-one-expert")
    for scenario, engine, way in itertools.product(
        scenarios, ("loop", "torch_mm"), ("allgather", "alltoall", "symm_mem")
    ):
        case = Case(scenario, engine, way)
        made = _sharded(case)
        found = run_stacked(made, case.share(dist.get_rank(), dist.get_world_size()))
        assert found.keys() == {"output", "x", "weights", *ADAPTER_NAMES}
        assert_near(found, _of_this_rank(case), F32)
        assert {name for name, p in made.named_parameters() if p.grad is not None} == set(ADAPTER_NAMES)
        assert all(isinstance(p, DTensor) for p in made.parameters())


def adapters_of_ranks() -> None:
    """State dicts hold DTensors of all experts, adapters load alone, and unmerging gives back the bits."""
    case = Case("uneven", "torch_mm", "alltoall")
    batch, drawn = case.share(dist.get_rank(), dist.get_world_size()), _drawn(case.config)
    made, right = _sharded(case), _of_this_rank(case)
    assert_same(gathered(made), drawn)
    adapters = made.lora_state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in adapters.values())
    made.init_lora_weights()
    assert made.lora_down_A.full_tensor().flatten(1).unique(dim=0).shape[0] == case.config.n_routed_experts
    assert not made.lora_down_B.full_tensor().any()
    made.load_lora_state_dict({name: drawn[name] for name in ADAPTER_NAMES})
    before = {name: p.detach().to_local().clone() for name, p in made.named_parameters()}
    made.merge()
    assert_same(gathered(made), drawn)
    with torch.no_grad():
        output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert_near({"output": output}, {"output": right["output"]}, F32)
    assert not torch.equal(made.down_projs.to_local(), before["down_projs"])
    made.unmerge()
    assert_same({name: p.detach().to_local() for name, p in made.named_parameters()}, before)
    assert_near(run_stacked(made, batch), right, F32)


def adapters_under_fsdp() -> None:
    """fully_shard splits frozen weights and adapters; the adapters' gradients are means over the ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case("uneven", "torch_mm", "allgather")
    batch = case.share(rank, size)
    alone = _build(case)
    alone.load_state_dict(_drawn(case.config))
    right = run_stacked(alone, batch)
    made = _build(case)
    made.load_state_dict(_drawn(case.config))
    fully_shard(made)
    x, weights = batch.x.detach().requires_grad_(), batch.weights.detach().requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    assert_near({"output": output, "x": x.grad}, {name: right[name] for name in ("output", "x")}, F32)
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == (name in ADAPTER_NAMES), name
        if parameter.grad is not None:
            mean = right[name].clone()
            dist.all_reduce(mean)
            assert_near({name: parameter.grad.full_tensor()}, {name: mean / size}, F32)
    assert_same(gathered(made), _drawn(case.config))


LORA: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (with_adapters, adapters_of_ranks, adapters_under_fsdp)
}
