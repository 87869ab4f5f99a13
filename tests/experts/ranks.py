"""One rank of a group under torch.distributed's launcher: runs every case, and writes what came of each to a file.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/experts/ranks.py FOLDER

A case that raises on one rank leaves the others waiting for it in a collective: then the run ends, and the cases after
it have no file.
"""

import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, Unsupported
from experts.dispatch.deepep import destroy_buffers
from experts.layer import ExpertLayer
from tests.experts import fakes, parallel
from tests.experts.fake_deep_ep import Buffer
from tests.experts.layers import F64, Batch, Named, assert_same, random_batch, random_parameters, run_stacked
from tests.experts.parallel import Case

CPU = torch.device("cpu")
PATIENCE = timedelta(seconds=20)


def build(case: Case, engine: str | None = None) -> ExpertLayer:
    """The module whose engine it is; GroupedExpertsDeepEP has gmm by itself."""
    engine = engine or case.engine
    if engine == "te":
        return GroupedExpertsTE(case.config, BackendConfig(dispatcher=case.dispatcher))
    if engine == "gmm":
        return GroupedExpertsDeepEP(case.config, BackendConfig(dispatcher=case.dispatcher))
    return GroupedExperts(case.config, BackendConfig(experts=engine, dispatcher=case.dispatcher))


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def mesh_of(case: Case) -> DeviceMesh | None:
    """The expert-parallel mesh, or None where every rank has all experts."""
    size, world_size = case.ep_size(dist.get_world_size()), dist.get_world_size()
    if size == world_size:
        return all_ranks()
    return None if size == 1 else init_device_mesh("cpu", (world_size // size, size), mesh_dim_names=("dp", "ep"))["ep"]


def sharded(made: ExpertLayer, parameters: Named) -> ExpertLayer:
    """Loaded whole, then spread over all ranks."""
    made.load_state_dict(parameters)
    made.init_token_dispatcher(all_ranks())
    return made


def distribute(parameters: Named) -> Named:
    return {name: distribute_tensor(tensor, all_ranks(), [Shard(0)]) for name, tensor in parameters.items()}


# How a layer comes by its weights: (case, parameters of all experts, folder) -> layer.


def with_dtensors(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
    """Parameters that somebody else sharded; the first forward finds the mesh."""
    made = build(case)
    for name, tensor in distribute(parameters).items():
        setattr(made, name, nn.Parameter(tensor))
    return made


def with_dtensors_taken_as_they_are(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
    made = with_dtensors(case, parameters, folder)
    before = dict(made.named_parameters())
    made.init_token_dispatcher(mesh_of(case))
    assert all(parameter is before[name] for name, parameter in made.named_parameters())
    return made


def sharded_on_meta(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
    """Made and spread without memory, then made real, then loaded."""
    with torch.device("meta"):
        made = build(case)
    made.init_token_dispatcher(mesh_of(case))
    made.to_empty(device="cpu")
    made.load_state_dict(parameters)
    return made


def other_weights(case: Case) -> ExpertLayer:
    made = build(case)
    made.load_state_dict(random_parameters(case.config, seed=99))
    mesh = mesh_of(case)
    if mesh is not None:
        made.init_token_dispatcher(mesh)
    return made


def loaded(case: Case, parameters: Named, assign: bool = False) -> ExpertLayer:
    """Loaded after it was spread, inside a model."""
    made = other_weights(case)
    before = dict(made.named_parameters())
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": made})})
    state = {f"mlp.experts.{name}": tensor for name, tensor in parameters.items()}
    assert str(model.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert all((parameter is before[name]) is not assign for name, parameter in made.named_parameters())
    return made


def loaded_from_saved(source: Callable[[Case, Named], ExpertLayer]) -> Callable[[Case, Named, Path], ExpertLayer]:
    """Through torch.distributed.checkpoint, from another layer."""

    def make(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
        checkpoint = folder / f"{case.name}.checkpoint"
        dcp.save(source(case, parameters).state_dict(), checkpoint_id=checkpoint)
        made = other_weights(case)
        state = made.state_dict()
        dcp.load(state, checkpoint_id=checkpoint)
        made.load_state_dict(state)
        return made

    return make


def alone(case: Case, parameters: Named) -> ExpertLayer:
    made = build(case, "loop")
    made.load_state_dict(parameters)
    return made


MAKERS: dict[str, Callable[[Case, Named, Path], ExpertLayer]] = {
    "sharded": lambda case, parameters, _: sharded(build(case), parameters),
    "named-by-dtensors": with_dtensors,
    "dtensors": with_dtensors_taken_as_they_are,
    "from-meta": sharded_on_meta,
    "plain-checkpoint": lambda case, parameters, _: loaded(case, parameters),
    "assigned-checkpoint": lambda case, parameters, _: loaded(case, parameters, assign=True),
    "dtensor-checkpoint": lambda case, parameters, _: loaded(case, distribute(parameters)),
    "saved-by-loop": loaded_from_saved(lambda case, parameters: sharded(build(case, "loop"), parameters)),
    "saved-by-te": loaded_from_saved(lambda case, parameters: sharded(build(case, "te"), parameters)),
    "saved-by-one": loaded_from_saved(alone),
    "saved-for-one": loaded_from_saved(lambda case, parameters: sharded(build(case, "torch_mm"), parameters)),
    "saved-for-halves": loaded_from_saved(lambda case, parameters: sharded(build(case, "torch_mm"), parameters)),
}


def run_case(case: Case, folder: Path) -> Named:
    """This rank's output and gradients: after other tokens, and the same again in poisoned memory, for the second time."""
    parameters = random_parameters(case.config)
    made = MAKERS[case.made](case, parameters, folder)
    size = case.ep_size(dist.get_world_size())
    rank = dist.get_rank() % size
    batch = case.share(rank, size)
    with poisoned_memory():
        run_stacked(made, random_batch(case.config, num_tokens=(3 * rank + 1) % 5, seed=50 + rank))
    found = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
    with poisoned_memory():
        assert_same(run_stacked(made, batch), found)
    assert_dtypes(found, batch, case)
    assert_holds(made, parameters, rank, size)
    return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch.empty leaves as it was is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_dtypes(found: Named, batch: Batch, case: Case) -> None:
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    assert dtypes.pop("weights") is batch.weights.dtype
    assert set(dtypes.values()) == {case.dtype}


def assert_holds(made: ExpertLayer, parameters: Named, rank: int, size: int) -> None:
    """Its share of the experts, in order, as DTensors over the mesh where there is one; its gradients likewise."""
    count = made.n_routed_experts // size
    assert (made.n_local_experts, made.first_local_expert) == (count, rank * count)
    state = made.state_dict()
    assert list(state) == list(parameters)
    assert all(isinstance(tensor, DTensor) == (made.ep_mesh is not None) for tensor in state.values())
    for name, whole in parameters.items():
        assert state[name].shape == whole.shape
        assert torch.equal(local(state[name], made), whole[rank * count : (rank + 1) * count]), name
    if isinstance(made, GroupedExperts):
        for name, parameter in made.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.is_leaf
            assert parameter.grad.shape == parameter.shape == parameters[name].shape
            assert torch.equal(local(parameter.grad, made), made.stacked_grads()[name])


def local(tensor: torch.Tensor, made: ExpertLayer) -> torch.Tensor:
    if made.ep_mesh is None:
        return tensor
    assert isinstance(tensor, DTensor)
    assert tensor.placements == (Shard(0),)
    assert tensor.device_mesh == made.ep_mesh
    return tensor.to_local()


# Facts that ranks look at themselves


SOME = Case("uneven", "loop", "allgather")


def refusals(folder: Path) -> None:
    """Told on every rank alike, before anything is sent."""
    size = dist.get_world_size()
    if size > 1:
        made = GroupedExperts(parallel.moe_config(n_routed_experts=3))
        with pytest.raises(ConfigError) as caught:
            made.init_token_dispatcher(all_ranks())
        assert str(caught.value) == (
            f"n_routed_experts = 3 does not divide by the EP size {size}; every rank holds as many experts: choose a "
            "divisor"
        )
        assert made.ep_mesh is None
    with pytest.raises(ConfigError, match="ep_mesh has 2 dimensions, needs 1"):
        build(SOME).init_token_dispatcher(init_device_mesh("cpu", (1, size)))
    made = sharded(build(SOME, "torch_mm"), random_parameters(SOME.config))
    batch = random_batch(SOME.config.with_dtype(F64))
    with pytest.raises(Unsupported, match="^torch_mm: grouped_mm takes float32, bfloat16 and float16, not float64"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)


def fresh_weights(folder: Path) -> None:
    """What one process with the same seed has: no two experts alike. TE resets its own, with its own deviation."""
    whole = build(SOME)
    torch.manual_seed(4)
    whole.init_weights(CPU)
    made = sharded(build(SOME), random_parameters(SOME.config))
    torch.manual_seed(4)
    made.init_weights(CPU)
    assert_same(gathered(made), whole.state_dict())

    made = sharded(build(SOME, "te"), random_parameters(SOME.config))
    made.init_weights(CPU)
    assert made.down_projs.to_local().std().item() == pytest.approx(0.023, rel=0.1)
    assert not made.down_proj_bias.to_local().any()


def gathered(made: ExpertLayer) -> Named:
    return {name: tensor.full_tensor() for name, tensor in made.state_dict().items()}


def state_dict_tools(folder: Path) -> None:
    """torch's get_model_state_dict and set_model_state_dict speak the stacked layout too."""
    parameters = random_parameters(SOME.config)
    for engine in ("loop", "te"):
        model = nn.ModuleDict({"experts": sharded(build(SOME, engine), parameters)})
        state = get_model_state_dict(model)
        assert list(state) == [f"experts.{name}" for name in parameters]
        other = nn.ModuleDict({"experts": other_weights(Case("uneven", engine, "allgather"))})
        set_model_state_dict(other, state)
        assert_same(gathered(other["experts"]), parameters)


def frozen_parameters(folder: Path) -> None:
    """Stay so when they are spread."""
    for engine in ("loop", "te"):
        made = build(SOME, engine).requires_grad_(False)
        made.init_token_dispatcher(all_ranks())
        assert not any(parameter.requires_grad for parameter in made.parameters()), engine


def two_meshes(folder: Path) -> None:
    """The mesh that expert parallelism is a dimension of is remembered, whoever names it."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for engine in ("loop", "te"):
        made = build(SOME, engine)
        made.init_token_dispatcher(whole["ep"], moe_mesh=whole)
        assert (made.ep_mesh, made.moe_mesh) == (whole["ep"], whole)
        made.set_moe_mesh(None)
        assert made.moe_mesh is None


DEEPEP = Case("uneven", "loop", "deepep", torch.bfloat16)


def deepep_layer(dim: int = DEEPEP.config.dim) -> GroupedExperts:
    config = dataclasses.replace(DEEPEP.config, dim=dim)
    return sharded(GroupedExperts(config, BackendConfig(dispatcher="deepep")), random_parameters(config))


def buffers(folder: Path) -> None:
    """One for all layers of a group, as large as the largest needs, made anew after they were destroyed."""
    destroy_buffers()
    Buffer.made = Buffer.destroyed = 0
    small, _ = deepep_layer(), deepep_layer()
    assert (Buffer.made, Buffer.destroyed) == (1, 0)
    large = deepep_layer(dim=512)
    assert (Buffer.made, Buffer.destroyed) == (2, 1)
    deepep_layer()
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    run_stacked(large, random_batch(large.config))
    first = {name: tensor.clone() for name, tensor in run_stacked(small, batch).items()}
    assert (Buffer.made, Buffer.destroyed) == (2, 1)
    for _ in range(2):
        destroy_buffers()
        assert (Buffer.made, Buffer.destroyed) == (2, 2)
    assert_same(run_stacked(small, batch), first)
    destroy_buffers()


def replaced_buffer(folder: Path) -> None:
    """A forward's backward runs, though a larger layer replaced the buffer in between."""
    destroy_buffers()
    small = deepep_layer()
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    right = run_stacked(small, batch)["x"].clone()
    x = batch.x.clone().requires_grad_()
    output = small(x, batch.token_mask, batch.weights, batch.indices)
    deepep_layer(dim=512)
    output.backward(batch.grad)
    assert torch.equal(x.grad, right)


def num_sms(folder: Path) -> None:
    """Each layer has its own number, in its backward too, whatever another set in between: a handle fits one alone."""
    few, many = deepep_layer(), deepep_layer()
    few.dispatcher.num_sms = 8
    batch = DEEPEP.share(dist.get_rank(), dist.get_world_size())
    outputs = [made(batch.x, batch.token_mask, batch.weights, batch.indices) for made in (few, many)]
    assert Buffer.num_sms == 20
    outputs[0].backward(batch.grad)
    assert Buffer.num_sms == 8
    outputs[1].backward(batch.grad)
    assert Buffer.num_sms == 20


class Run:
    """Cases one after the other. One that fails on every rank ends there; else the run ends: the ranks are not in step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def attempt(self, name: str, function: Callable[[], Named | None]) -> None:
        """Write what the function gives, or why it gave nothing."""
        found, error = {}, ""
        try:
            found = function() or {}
        except Exception:  # whatever it is, it is the case's outcome
            error = traceback.format_exc()
        torch.save({"found": found, "error": error}, self.folder / f"{name}.rank{self.rank}.pt")
        self.store.set(f"{name}/{self.rank}", "done")
        self.store.wait([f"{name}/{rank}" for rank in range(self.size)], PATIENCE / 2)


def main(folder: Path) -> None:
    fakes.install(pytest.MonkeyPatch())
    run = Run(folder)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", run.store), rank=run.rank, world_size=run.size, timeout=PATIENCE
    )
    for case in parallel.cases(run.size):
        run.attempt(case.name, lambda case=case: run_case(case, folder))
    for name in parallel.FACTS[run.size]:
        run.attempt(name, lambda name=name: globals()[name](folder))
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]))
