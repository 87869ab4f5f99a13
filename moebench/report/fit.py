"""Say at which EP sizes the layers of a model fit into the memory of a GPU.

The weights and Adam's state follow from the shape. What a pass takes beside them comes from results where results have
it, and otherwise from the estimate of `moebench.run.footprint`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine import nvml
from moebench.results.advise import Advice, Candidate, advise
from moebench.results.folder import environments_beside
from moebench.run.footprint import pass_bytes
from moebench.workload.backends import DISPATCHERS, collective_of
from moebench.workload.case import Case, Job, adam_bytes, weight_bytes

EP_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: The dispatcher of an estimate, if the best backend was measured on one rank. A rank gets only the tokens it needs.
_DISPATCHER = next(name for name in DISPATCHERS if collective_of(name) == "all_to_all")


@dataclass(frozen=True)
class Fit:
    """What one rank holds of a layer at an EP size, in bytes.

    `pass_bytes` is what a forward pass takes beside the weights. `step_bytes` is what a forward and backward pass
    takes, gradients included. `is_estimate` says whether either of the two is an estimate.
    """

    ep_size: int
    weight_bytes: int
    pass_bytes: float
    step_bytes: float
    adam_bytes: int
    is_estimate: bool

    def forward_layers(self, memory_bytes: int) -> int:
        """Return how many such layers fit for forward passes. The layers run one after another and share the room."""
        return max(0, int((memory_bytes - self.pass_bytes) // self.weight_bytes))

    def train_layers(self, memory_bytes: int) -> int:
        """Return how many such layers fit for train steps with Adam in float32."""
        return int(memory_bytes // (self.weight_bytes + self.step_bytes + self.adam_bytes))


def fits(frame: pd.DataFrame, asked: Case, advice: Advice) -> list[Fit]:
    """Return the memory of the layer at each EP size, for the best backend of the advice on the advice's machine."""
    sizes = [size for size in EP_SIZES if asked.n_routed_experts % size == 0]
    best = advice.candidates[0] if advice.candidates else None
    return [_fit(frame, _at(asked, size), advice, best) for size in sizes]


def _at(asked: Case, ep_size: int) -> Case:
    return asked.model_copy(update={"ep_size": ep_size, "rank_load": asked.rank_load if ep_size > 1 else "even"})


def _fit(frame: pd.DataFrame, case: Case, advice: Advice, best: Candidate | None) -> Fit:
    backend = "torch_mm" if best is None else best.backend
    between = _DISPATCHER if best is None or best.dispatcher == "local" else best.dispatcher
    dispatcher = "local" if case.ep_size == 1 else between
    passes, is_estimate = [], False
    for mode in ("forward", "train"):
        of_mode = case.model_copy(update={"mode": mode})
        measured = _measured(frame, of_mode, advice, backend, dispatcher)
        is_estimate |= measured is None
        estimate = pass_bytes(Job(case=of_mode, backend=backend, dispatcher=dispatcher))
        passes.append(float(estimate) if measured is None else measured)
    return Fit(case.ep_size, weight_bytes(case), passes[0], passes[1], adam_bytes(case), is_estimate)


def _measured(frame: pd.DataFrame, case: Case, advice: Advice, backend: str, dispatcher: str) -> float | None:
    for one in advise(frame, case).advices:
        for candidate in one.candidates:
            is_same = (one.gpu, candidate.backend, candidate.dispatcher) == (advice.gpu, backend, dispatcher)
            if is_same and not pd.isna(candidate.peak_memory_bytes):
                return candidate.peak_memory_bytes
    return None


def gpu_memory(folders: Iterable[Path]) -> dict[str, int]:
    """Return the memory in bytes of the GPUs of this machine, and of the environments in the results folders."""
    found: dict[str, int] = {}
    for folder in folders:
        try:
            environments = environments_beside(folder)
        except ResultsError:
            continue  # the rows of results are good without it
        found |= {gpu.name: gpu.memory_bytes for one in environments.values() for gpu in one.gpus}
    try:
        readings = [reading for reading, _ in nvml.read_all()]
    except nvml.NvmlUnavailable:
        readings = []
    return found | {gpu.name: gpu.memory_bytes for gpu in readings if gpu.name and gpu.memory_bytes}
