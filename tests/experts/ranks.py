"""One rank of a group. It runs every case and writes each outcome to a file.

    python -m tests.forked 2 tests/experts/ranks.py FOLDER

If a case raises on one rank, the other ranks may wait for it in a collective. Then the run ends, and the later cases
have no file.
"""

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
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from experts import GroupedExperts, destroy_buffers
from experts.layer import ExpertLayer
from tests.experts import fakes, parallel
from tests.experts.layers import Batch, Named, assert_same, random_batch, random_parameters, run_stacked
from tests.experts.parallel import Case
from tests.experts.parallel_checkpoints import CHECKPOINTS
from tests.experts.parallel_facts import FACTS
from tests.experts.parallel_layers import MAKERS
from tests.experts.parallel_lora import LORA
from tests.experts.parallel_memory import IN_MEMORY
from tests.experts.parallel_optimizer import OPTIMIZER
from tests.experts.parallel_training import TRAINING
from tests.interpreter import replace_functions_once

PATIENCE = timedelta(seconds=60)  # eight ranks on two cores start at very different times


def run_case(case: Case, folder: Path) -> Named:
    """Run a case and return this rank's output and gradients.

    Other tokens go through the layer before. A second run must give the same bits. The run of the other tokens and the
    second run have poisoned memory.
    """
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
    """Make torch.empty fill its memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_dtypes(found: Named, batch: Batch, case: Case) -> None:
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    assert dtypes.pop("weights") is batch.weights.dtype
    assert set(dtypes.values()) == {case.dtype}


def assert_holds(made: ExpertLayer, parameters: Named, rank: int, size: int) -> None:
    """Check that the layer holds its share of the experts in order, with gradients: DTensors if there is a mesh."""
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


class Run:
    """Runs cases one after the other. If a case does not end on every rank, the ranks are out of step: the run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def attempt(self, name: str, function: Callable[[], Named | None]) -> None:
        """Run the function, and write its result or its traceback to this rank's file."""
        found, error = {}, ""
        try:
            found = function() or {}
        except Exception:  # any exception is the outcome of the case
            error = traceback.format_exc()
        torch.save({"found": found, "error": error}, self.folder / f"{name}.rank{self.rank}.pt")
        self.store.set(f"{name}/{self.rank}", "done")
        self.store.wait([f"{name}/{rank}" for rank in range(self.size)], PATIENCE / 2)


def main(folder: Path) -> None:
    replace_functions_once()
    fakes.install(pytest.MonkeyPatch())
    run = Run(folder)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", run.store), rank=run.rank, world_size=run.size, timeout=PATIENCE
    )
    for case in parallel.cases(run.size):
        run.attempt(case.name, lambda case=case: run_case(case, folder))
    for name in parallel.FACTS[run.size]:
        run.attempt(name, (FACTS | TRAINING | IN_MEMORY | CHECKPOINTS | OPTIMIZER | LORA)[name])
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    # Triton's interpreter multiplies rows that nobody wrote
    warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
    main(Path(sys.argv[1]))
