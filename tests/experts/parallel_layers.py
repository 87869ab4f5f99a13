"""The ways in which a layer under expert parallelism gets its weights. Every way must give the same layer."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from experts import BackendConfig, GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE
from experts.layer import ExpertLayer
from tests.experts.layers import Named, random_parameters
from tests.experts.parallel import Case


def build(case: Case, engine: str | None = None) -> ExpertLayer:
    """Build the module of an engine. GroupedExpertsDeepEP uses gmm by default."""
    engine = engine or case.engine
    if engine == "te":
        return GroupedExpertsTE(case.config, BackendConfig(dispatcher=case.dispatcher))
    if engine == "gmm":
        return GroupedExpertsDeepEP(case.config, BackendConfig(dispatcher=case.dispatcher))
    return GroupedExperts(case.config, BackendConfig(experts=engine, dispatcher=case.dispatcher))


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def mesh_of(case: Case) -> DeviceMesh | None:
    """Return the expert-parallel mesh, or None if every rank has all experts."""
    size, world_size = case.ep_size(dist.get_world_size()), dist.get_world_size()
    if size == world_size:
        return all_ranks()
    return None if size == 1 else init_device_mesh("cpu", (world_size // size, size), mesh_dim_names=("dp", "ep"))["ep"]


def sharded(made: ExpertLayer, parameters: Named) -> ExpertLayer:
    """Load all experts, then shard them over all ranks."""
    made.load_state_dict(parameters)
    made.init_token_dispatcher(all_ranks())
    return made


def gathered(made: ExpertLayer) -> Named:
    """Return the state dict with the experts of all ranks."""
    entries = made.state_dict().items()
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in entries}


def distribute(parameters: Named) -> Named:
    return {name: distribute_tensor(tensor, all_ranks(), [Shard(0)]) for name, tensor in parameters.items()}


# Each function below is one way: (case, parameters of all experts, folder) -> layer.


def with_dtensors(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
    """Set parameters that are already DTensors. The first forward takes the mesh from them."""
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
    """Make and shard the layer on the meta device, allocate its memory, then load the parameters."""
    with torch.device("meta"):
        made = build(case)
    made.init_token_dispatcher(mesh_of(case))
    made.to_empty(device="cpu")
    made.load_state_dict(parameters)
    return made


def assigned_to_meta(case: Case, parameters: Named, folder: Path) -> ExpertLayer:
    """Make and shard the layer on the meta device. The loaded tensors become its parameters."""
    with torch.device("meta"):
        made = build(case)
    made.init_token_dispatcher(mesh_of(case))
    made.load_state_dict(parameters, assign=True)
    return made


def other_weights(case: Case) -> ExpertLayer:
    made = build(case)
    made.load_state_dict(random_parameters(case.config, seed=99))
    mesh = mesh_of(case)
    if mesh is not None:
        made.init_token_dispatcher(mesh)
    return made


def loaded(case: Case, parameters: Named, assign: bool = False) -> ExpertLayer:
    """Shard the layer, then load the parameters through a model that contains it."""
    made = other_weights(case)
    before = dict(made.named_parameters())
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": made})})
    state = {f"mlp.experts.{name}": tensor for name, tensor in parameters.items()}
    assert str(model.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert all((parameter is before[name]) is not assign for name, parameter in made.named_parameters())
    return made


def loaded_from_saved(source: Callable[[Case, Named], ExpertLayer]) -> Callable[[Case, Named, Path], ExpertLayer]:
    """Return a way that loads what another layer saved with torch.distributed.checkpoint."""

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
    "assigned-to-meta": assigned_to_meta,
    "plain-checkpoint": lambda case, parameters, _: loaded(case, parameters),
    "assigned-checkpoint": lambda case, parameters, _: loaded(case, parameters, assign=True),
    "dtensor-checkpoint": lambda case, parameters, _: loaded(case, distribute(parameters)),
    "saved-by-loop": loaded_from_saved(lambda case, parameters: sharded(build(case, "loop"), parameters)),
    "saved-by-te": loaded_from_saved(lambda case, parameters: sharded(build(case, "te"), parameters)),
    "saved-by-one": loaded_from_saved(alone),
    "saved-for-one": loaded_from_saved(lambda case, parameters: sharded(build(case, "torch_mm"), parameters)),
    "saved-for-halves": loaded_from_saved(lambda case, parameters: sharded(build(case, "torch_mm"), parameters)),
}
