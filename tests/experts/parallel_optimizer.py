"""Facts of a step of the optimizer that ranks check: clipping, AdamW, and checkpoints with the optimizer's state.

Each layer is spread over expert-parallel and FSDP ranks. What a step makes of it is what the step makes of one process.
"""

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from experts.layer import ExpertLayer
from tests.experts.layers import F32, Named, assert_near, expected, random_batch
from tests.experts.parallel_checkpoints import Shape, shapes, shared_folder, the_parameters
from tests.experts.parallel_layers import gathered

#: The engines of stacked parameters that run on a CPU. The interpreter of Triton would take float16 only.
ENGINES = ("loop", "torch_mm")
#: The norm to which gradients are clipped: a fifth of theirs or less.
MOST = 0.5


def adamw(made: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.1)


def with_gradients(made: ExpertLayer, shape: Shape, seed: int = 0) -> Named:
    """Run forward and backward on this rank's tokens. Return the gradients over the tokens of all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = random_batch(made.config, 3 * size, seed=seed)
    share = whole.map(lambda tensor: tensor[3 * rank : 3 * rank + 3])
    if shape.dp > 1:
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
    made.zero_grad()
    made(share.x.requires_grad_(), share.token_mask, share.weights, share.indices).backward(share.grad)
    right = expected(made.config, gathered(made), whole)
    return {name: right[name] for name in the_parameters()}


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
            grads.append(with_gradients(made, shape, seed))
            norms.append(clipped_norm(made))
            optimizer.step()
        right, right_norms = stepped(the_parameters(), grads)
        assert min(right_norms) > 2 * MOST, "the gradients are clipped"
        torch.testing.assert_close(norms, right_norms, rtol=1e-5, atol=0)
        assert_near(gathered(made), right, F32)
        assert all(parameter.grad.dtype is parameter.dtype for parameter in made.parameters())


def optimizer_resharded() -> None:
    """A layer and its AdamW, saved after a step at each shape and loaded at each other, take the same second step."""
    folder = shared_folder()
    spreads = list(itertools.product(ENGINES, shapes()))
    after: dict[tuple[str, Shape], Named] = {}
    for engine, shape in spreads:
        made = shape.spread(engine, the_parameters())
        optimizer = adamw(made)
        with_gradients(made, shape)
        optimizer.step()
        model, state = get_state_dict(made, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / f"{engine}-{shape.ep}")
        with_gradients(made, shape, seed=1)
        optimizer.step()
        after[engine, shape] = gathered(made)
    for (engine, shape), (saved_by, saved_at) in itertools.product(spreads, spreads):
        if shape == saved_at:
            continue
        made = shape.spread(engine)
        optimizer = adamw(made)
        model, state = get_state_dict(made, optimizer)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder / f"{saved_by}-{saved_at.ep}")
        set_state_dict(made, optimizer, model_state_dict=model, optim_state_dict=state)
        with_gradients(made, shape, seed=1)
        optimizer.step()
        assert_near(gathered(made), after[saved_by, saved_at], F32)


OPTIMIZER: dict[str, Callable[[], None]] = {fact.__name__: fact for fact in (clips_and_steps, optimizer_resharded)}
