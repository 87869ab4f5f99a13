"""Say at which EP sizes the layers of a model fit into the memory of a GPU.

The weights and Adam's state follow from the shape. What a pass takes and keeps beside them comes from results where
results have it, and otherwise from the estimates of `moebench.run.memory.passes`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine import nvml
from moebench.results.advise import Advice, Candidate, advise
from moebench.results.folder import environments_beside
from moebench.run.memory.passes import gradient_bytes, kept_bytes, pass_bytes
from moebench.workload.backends import DISPATCHERS, collective_of
from moebench.workload.case import ITEMSIZE, Case, Job, adam_bytes, weight_bytes
from moebench.workload.context import PLAIN

EP_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: The dispatcher of an estimate, if the best backend was measured on one rank. A rank gets only the tokens it needs.
_DISPATCHER = next(name for name in DISPATCHERS if collective_of(name) == "all_to_all")


@dataclass(frozen=True)
class Fit:
    """What one rank holds of a layer at an EP size, in bytes.

    `pass_bytes` is what a forward pass takes beside the weights. `step_bytes` is what a forward and backward pass
    takes, gradients included. `stay_bytes` is the part of it that stays while other layers run: the gradients, and what
    forward keeps for backward. `token_bytes` is the layer's input, which stays as well. `is_estimate` says whether one
    of the passes is an estimate.
    """

    ep_size: int
    weight_bytes: int
    pass_bytes: float
    step_bytes: float
    stay_bytes: float
    token_bytes: int
    adam_bytes: int
    is_estimate: bool

    def forward_layers(self, memory_bytes: int) -> int:
        """Return how many such layers fit for forward passes. The layers run one after another and share the room."""
        return max(0, int((memory_bytes - self.pass_bytes) // self.weight_bytes))

    def train_layers(self, memory_bytes: int) -> int:
        """Return how many such layers fit for train steps with Adam in float32.

        Each layer has its weights, Adam's state, its input and what stays. The layers share the room of the rest of a
        step, because they run one after another.
        """
        shared = max(0.0, self.step_bytes - self.stay_bytes)
        each = self.weight_bytes + self.stay_bytes + self.token_bytes + self.adam_bytes
        return max(0, int((memory_bytes - shared) // each))


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
    forward, train = (
        Job(case=case.model_copy(update=update), backend=backend, dispatcher=dispatcher)
        for update in ({"mode": "forward", "context": PLAIN}, {"mode": "train"})
    )
    passes, step = _measured(frame, forward, advice), _measured(frame, train, advice)
    saved = math.nan if step is None else step.saved_memory_bytes
    step_bytes = pass_bytes(train) if step is None else step.peak_memory_bytes
    stay_bytes = gradient_bytes(train) + (kept_bytes(train) if math.isnan(saved) else saved)
    return Fit(
        ep_size=case.ep_size,
        weight_bytes=weight_bytes(case),
        pass_bytes=pass_bytes(forward) if passes is None else passes.peak_memory_bytes,
        step_bytes=step_bytes,
        stay_bytes=min(stay_bytes, step_bytes),  # backward may free what forward keeps before it makes the gradients
        token_bytes=case.num_tokens * case.dim * ITEMSIZE[case.dtype],
        adam_bytes=adam_bytes(case),
        is_estimate=passes is None or step is None,
    )


def _measured(frame: pd.DataFrame, job: Job, advice: Advice) -> Candidate | None:
    """Return the job's values on the advice's machine, if its memory was measured."""
    for one in advise(frame, job.case).advices:
        for candidate in one.candidates:
            is_same = (one.gpu, candidate.backend, candidate.dispatcher) == (advice.gpu, job.backend, job.dispatcher)
            if is_same and not pd.isna(candidate.peak_memory_bytes):
                return candidate
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
