"""Facts of checkpoints that the ranks of a group check: saved at one EP × FSDP shape, loaded at another."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from experts.layer import ExpertLayer
from tests.experts.layers import F32, Named, assert_near, assert_same, expected, random_batch, random_parameters
from tests.experts.parallel import Case
from tests.experts.parallel_layers import build, gathered

#: One engine of each module class.
ENGINES = ("torch_mm", "gmm", "te")


class Shape(NamedTuple):
    """Over how many ranks expert parallelism and FSDP spread a layer."""

    ep: int
    dp: int

    def spread(self, engine: str, parameters: Named | None = None, dtype: torch.dtype = F32) -> ExpertLayer:
        """Return a layer with the parameters, or with other values, spread over the ranks."""
        case = Case("uneven", engine, "alltoall", dtype)
        made = build(case)
        made.load_state_dict(random_parameters(case.config, seed=99) if parameters is None else parameters)
        mesh = init_device_mesh("cpu", (self.dp, self.ep), mesh_dim_names=("dp", "ep"))
        if self.ep > 1:
            made.init_token_dispatcher(mesh["ep"], moe_mesh=mesh)
        return fully_shard(made, mesh=mesh["dp"]) if self.dp > 1 else made


def shapes() -> list[Shape]:
    size = dist.get_world_size()
    return [Shape(ep, size // ep) for ep in (1, 2, 4) if ep <= size]


def the_parameters(dtype: torch.dtype = F32) -> Named:
    return random_parameters(Case("uneven", "loop", "alltoall", dtype).config)


def shared_folder() -> Path:
    """Return a new folder of rank 0."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(str(folder[0]))


def resharded() -> None:
    """What every module class saves at every shape, the class loads at every shape, and every class at this shape."""
    parameters, folder = the_parameters(), shared_folder()
    spreads = list(itertools.product(ENGINES, shapes()))
    for engine, shape in spreads:
        state = shape.spread(engine, parameters).state_dict()
        assert all(isinstance(tensor, DTensor) for tensor in state.values())
        dcp.save(state, checkpoint_id=folder / f"{engine}-{shape.ep}")
    for (engine, shape), (saved_by, saved_at) in itertools.product(spreads, spreads):
        if engine == saved_by or shape == saved_at:
            made = shape.spread(engine)
            state = made.state_dict()
            dcp.load(state, checkpoint_id=folder / f"{saved_by}-{saved_at.ep}")
            assert not made.load_state_dict(state).missing_keys
            assert_same(gathered(made), parameters)


def spread_over_two_meshes() -> None:
    """The entries of a state dict are on FSDP's and the expert-parallel mesh together, for each class on the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for engine in ENGINES:
        state = Shape(2, 2).spread(engine, the_parameters()).state_dict()
        assert {tensor.device_mesh for tensor in state.values()} == {mesh}
        assert all(tensor.to_local().numel() * 4 == tensor.numel() for tensor in state.values())
        state = mesh_alone(engine).state_dict()
        assert {tensor.device_mesh for tensor in state.values()} == {mesh["ep"]}


def mesh_alone(engine: str) -> ExpertLayer:
    """Return a layer whose experts are spread over the pairs of four ranks, and equal in each pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    made = build(Case("uneven", engine, "alltoall"))
    made.load_state_dict(the_parameters())
    made.init_token_dispatcher(mesh["ep"], moe_mesh=mesh)
    return made


def replicas_are_saved_once() -> None:
    """Of experts that several ranks hold, one copy is in the checkpoint, and all ranks load it."""
    parameters, folder = the_parameters(), shared_folder()
    for engine in ENGINES:
        dcp.save(mesh_alone(engine).state_dict(), checkpoint_id=folder / engine)
        size = sum(file.stat().st_size for file in (folder / engine).glob("*.distcp"))
        assert size < 1.5 * sum(tensor.numel() * 4 for tensor in parameters.values()) + 60_000
        for shape in shapes():
            made = shape.spread(engine)
            state = made.state_dict()
            dcp.load(state, checkpoint_id=folder / engine)
            made.load_state_dict(state)
            assert_same(gathered(made), parameters)


def trains_from_a_checkpoint() -> None:
    """Each spread layer with loaded weights has the outputs and gradients of one process.

    The layer also loads after a forward that left FSDP's parameters whole.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    for engine, shape in itertools.product(("torch_mm", "te"), shapes()):
        made, parameters = shape.spread(engine), the_parameters()
        whole = random_batch(made.config, 3 * size)
        share = whole.map(lambda tensor: tensor[3 * rank : 3 * rank + 3])
        inputs = share.x.requires_grad_(), share.token_mask, share.weights, share.indices
        with torch.no_grad():
            made(*inputs)
        made.load_state_dict(parameters)
        output = made(*inputs)
        output.backward(share.grad)
        right = expected(made.config, parameters, whole)
        of_tokens = {name: right[name][3 * rank : 3 * rank + 3] for name in ("output", "x")}
        assert_near({"output": output, "x": share.x.grad}, of_tokens, F32)
        assert_near(whole_gradients(made, shape), {name: right[name] for name in parameters}, F32)
        assert_same(gathered(made), parameters)


def whole_gradients(made: ExpertLayer, shape: Shape) -> Named:
    """Return the stacked gradients of all experts, as sums over the data-parallel ranks (FSDP takes their mean)."""
    found = {}
    for name, entry in made.state_dict().items():
        local = made.stacked_grads()[name]
        placed = DTensor.from_local(
            local, entry.device_mesh, entry.placements, run_check=False, shape=entry.shape, stride=entry.stride()
        )
        found[name] = shape.dp * placed.full_tensor()
    return found


def loaded_from_other_layouts() -> None:
    """A spread layer loads plain tensors, the DTensors of another class, and replicated DTensors, also into meta."""
    parameters = the_parameters()
    for engine, shape in itertools.product(ENGINES, shapes()):
        for other in ENGINES:
            made = shape.spread(engine)
            made.load_state_dict(shape.spread(other, parameters).state_dict())
            assert_same(gathered(made), parameters)
        made = shape.spread(engine)
        mesh = made.state_dict()["down_projs"].device_mesh
        everywhere = [Replicate()] * mesh.ndim
        made.load_state_dict({name: distribute_tensor(t, mesh, everywhere) for name, t in parameters.items()})
        assert_same(gathered(made), parameters)


def of_a_layer_on_another_mesh() -> None:
    """Te refuses DTensors on a mesh that has nothing to do with its own, and stays as it was."""
    made, parameters = Shape(1, dist.get_world_size()).spread("te", the_parameters()), the_parameters()
    made = Shape(2, dist.get_world_size() // 2).spread("te", parameters)
    other = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))["b"]
    strange = {name: distribute_tensor(tensor, other, [Shard(0)]) for name, tensor in parameters.items()}
    with pytest.raises(RuntimeError, match=r"down_projs is a DTensor on .*, but this layer's experts are on .*; pass"):
        made.load_state_dict(strange)
    assert_same(gathered(made), parameters)


def set_as_attributes() -> None:
    """The stacked properties of Te can be set: to all experts, to this rank's, to a DTensor, to a Parameter."""
    parameters = the_parameters()
    for shape in shapes():
        made = shape.spread("te")
        before = dict(made.named_parameters())
        first, count = made.first_local_expert, made.n_local_experts
        state = shape.spread("torch_mm", parameters).state_dict()
        made.gate_and_up_projs = nn.Parameter(parameters["gate_and_up_projs"])
        made.down_projs = state["down_projs"]
        made.gate_up_proj_bias = parameters["gate_up_proj_bias"][first : first + count]
        made.down_proj_bias = parameters["down_proj_bias"]
        assert_same(gathered(made), parameters)
        assert all(parameter is before[name] for name, parameter in made.named_parameters())


def state_dict_options() -> None:
    """get_model_state_dict and set_model_state_dict of torch give and take whole state dicts.

    With broadcast_from_rank0, torch sends only what the ranks have a parameter for, which TE's stacked names are not:
    the load says that they are missing.
    """
    parameters = the_parameters()
    for engine, shape in itertools.product(ENGINES, shapes()):
        model, other = (nn.ModuleDict({"experts": shape.spread(engine, given)}) for given in (parameters, None))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert_same(whole, {f"experts.{name}": tensor for name, tensor in parameters.items()})
        set_model_state_dict(other, dict(whole), options=StateDictOptions(full_state_dict=True))
        assert_same(gathered(other["experts"]), parameters)
        other = nn.ModuleDict({"experts": shape.spread(engine)})
        given = whole if dist.get_rank() == 0 else {}
        from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if engine != "te":
            set_model_state_dict(other, given, options=from_rank_0)
            assert_same(gathered(other["experts"]), parameters)
        elif dist.get_rank() > 0:
            with pytest.raises(RuntimeError, match=r'Missing key.*"experts.down_projs"'):
                set_model_state_dict(other, given, options=from_rank_0)
        else:
            set_model_state_dict(other, given, options=from_rank_0)


CHECKPOINTS: dict[str, Callable[[], None]] = {
    fact.__name__: fact
    for fact in (
        resharded,
        spread_over_two_meshes,
        replicas_are_saved_once,
        trains_from_a_checkpoint,
        loaded_from_other_layouts,
        of_a_layer_on_another_mesh,
        set_as_attributes,
        state_dict_options,
    )
}
