"""Facts of a step of the optimizer that ranks check: clipping, AdamW, and checkpoints with the optimizer's state.

Each layer is spread over expert-parallel and FSDP ranks. What a step makes of it is what the step makes of one process.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from experts.layer import ExpertLayer
from tests.experts.layers import F16, F32, Batch, Named, assert_near, assert_same, expected, random_batch
from tests.experts.parallel_checkpoints import Shape, shapes, shared_folder, the_parameters
from tests.experts.parallel_layers import gathered

#: The engines of stacked parameters in float32.
ENGINES = ("loop", "torch_mm")
#: What is saved and loaded: engine, dtype, and engines that load it. Triton's interpreter takes float16 only.
RESHARDED = {"loop": (F32, ENGINES), "torch_mm": (F32, ENGINES), "triton": (F16, ("triton",))}
#: Every rank has the whole layer and all tokens.
ALONE = Shape(1, 1)
#: The norm to which gradients are clipped: a fifth of theirs or less.
MOST = 0.5


def adamw(made: torch.nn.Module) -> torch.optim.AdamW:
    """Return AdamW. Its eps is large enough for float16."""
    return torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)


def with_gradients(made: ExpertLayer, shape: Shape, seed: int = 0) -> Batch:
    """Run forward and backward on this rank's tokens. Return the tokens of all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = random_batch(made.config, 3 * size, seed=seed)
    first, count = (0, 3 * size) if shape == ALONE else (3 * rank, 3)
    share = whole.map(lambda tensor: tensor[first : first + count])
    if shape.dp > 1:
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
    made.zero_grad()
    made(share.x.requires_grad_(), share.token_mask, share.weights, share.indices).backward(share.grad)
    return whole


def stepped(parameters: Named, grads: list[Named]) -> tuple[Named, list[float]]:
    """Return the parameters after clipped steps of AdamW on plain tensors in float64, and each norm."""
    plain = torch.nn.ParameterDict({name: tensor.double() for name, tensor in parameters.items()})
    optimizer, norms = adamw(plain), []
    for grad in grads:
        for name, parameter in plain.items():
            parameter.grad = grad[name].clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), MOST)))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in plain.items()}, norms


def clipped_norm(made: ExpertLayer) -> float:
    norm = torch.nn.utils.clip_grad_norm_(made.parameters(), MOST)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def clips_and_steps() -> None:
    """The norm of all gradients, and two clipped steps of AdamW, are those of one process with all tokens."""
    for engine, shape in itertools.product(ENGINES, shapes()):
        made = shape.spread(engine, the_parameters())
        optimizer, grads, norms = adamw(made), [], []
        for seed in (0, 1):
            right = expected(made.config, gathered(made), with_gradients(made, shape, seed))
            grads.append({name: right[name] for name in the_parameters()})
            norms.append(clipped_norm(made))
            optimizer.step()
        right, right_norms = stepped(the_parameters(), grads)
        assert min(right_norms) > 2 * MOST, "the gradients are clipped"
        torch.testing.assert_close(norms, right_norms, rtol=1e-5, atol=0)
        assert_near(gathered(made), right, F32)
        assert all(parameter.grad.dtype is parameter.dtype for parameter in made.parameters())


def saved_after_a_step(engine: str, shape: Shape, dtype: torch.dtype, folder: Path) -> tuple[Named, Named]:
    """Save a layer and its AdamW after a step. Return the optimizer's state, and the parameters after a second step."""
    made = shape.spread(engine, the_parameters(dtype), dtype)
    optimizer = adamw(made)
    with_gradients(made, shape)
    optimizer.step()
    model, state = get_state_dict(made, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    saved = of_all_ranks(state)
    with_gradients(made, shape, seed=1)
    optimizer.step()
    return saved, gathered(made)


def loaded_and_stepped(engine: str, shape: Shape, dtype: torch.dtype, folder: Path) -> tuple[Named, Named]:
    """Load what `saved_after_a_step` saved, and return the same as it does."""
    made = shape.spread(engine, dtype=dtype)
    optimizer = adamw(made)
    model, state = get_state_dict(made, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(made, optimizer, model_state_dict=model, optim_state_dict=state)
    loaded = of_all_ranks(get_state_dict(made, optimizer)[1])
    with_gradients(made, shape, seed=1)
    optimizer.step()
    return loaded, gathered(made)


def of_all_ranks(state: Any) -> Named:
    """Return the tensors of an optimizer's state by the name of the parameter and their own, gathered."""
    return {
        f"{parameter}.{name}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for parameter, tensors in state["state"].items()
        for name, tensor in tensors.items()
    }


def optimizer_resharded() -> None:
    """A layer and its AdamW, saved after a step at each shape and loaded at each other, take the same second step.

    Engines of stacked parameters have the same parameters, so what one of them saves, another one loads.
    """
    folder = shared_folder()
    saved = {
        (engine, shape): saved_after_a_step(engine, shape, dtype, folder / f"{engine}-{shape.ep}")
        for (engine, (dtype, _)), shape in itertools.product(RESHARDED.items(), shapes())
    }
    assert len({tuple(state) for state, _ in saved.values()}) == 1, "all have the names of stacked parameters"
    for (saved_by, saved_at), (state, after) in saved.items():
        dtype, engines = RESHARDED[saved_by]
        for engine, shape in itertools.product(engines, shapes()):
            if shape != saved_at:
                loaded, stepped = loaded_and_stepped(engine, shape, dtype, folder / f"{saved_by}-{saved_at.ep}")
                assert_same(loaded, state)
                assert_near(stepped, after, dtype)


def optimizer_of_te_resharded() -> None:
    """The same for the tests' stand-in for Transformer Engine, whose parameters are one matrix for each expert.

    FSDP's shards are loaded by ranks without FSDP, and the other way round. With expert parallelism, all ranks use the
    same names for different experts, so that torch cannot save the optimizer's state.
    """
    folder, sharded = shared_folder(), Shape(1, dist.get_world_size())
    for shape, other in ((sharded, ALONE), (ALONE, sharded)):
        state, after = saved_after_a_step("te", shape, F32, folder / str(shape.dp))
        loaded, stepped = loaded_and_stepped("te", other, F32, folder / str(shape.dp))
        assert len(state) == 3 * 4 * 12, "three tensors for each of the four parameters of each expert"
        assert_same(loaded, state)
        assert_near(stepped, after, F32)
    spread = Shape(dist.get_world_size(), 1).spread("te")
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, [name for name, _ in spread.named_parameters()])
    assert all(one == names[0] and len(one) == 4 * spread.n_local_experts for one in names)


FACTS = (clips_and_steps, optimizer_resharded, optimizer_of_te_resharded)
OPTIMIZER: dict[str, Callable[[], None]] = {fact.__name__: fact for fact in FACTS}
