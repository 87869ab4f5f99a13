"""Make the data that all backends of a case share, each once: parameters, inputs and ceilings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moebench.measure import ceilings
from moebench.measure.ceilings import Ceilings
from moebench.parity.block import Around, make_around
from moebench.workload.backends import sends_fp8_rows
from moebench.workload.case import Case, Job, Weights
from moebench.workload.inputs import Inputs, make_inputs, make_parameters
from moebench.workload.ranks import ALONE, Ranks
from moebench.workload.replay import Replay, replay


@dataclass
class Workload:
    """The parameters and inputs of the current case, kept for the next backend.

    Parameters are also kept for the next case if it has the same weights. The current job writes its profiler trace to
    the file `trace`; if `trace` is None, the job writes no trace. If its routing was captured, `routing_file` has it. A
    job of `moebench parity` tells `tell` each trial before it plays it.
    """

    device: torch.device
    ranks: Ranks = ALONE
    trace: Path | None = None
    routing_file: str | None = None
    tell: Callable[[str], None] = lambda trial: None
    _parameters: tuple[Weights, dict[str, Tensor]] | None = field(default=None, repr=False)
    _inputs: tuple[str, Inputs] | None = field(default=None, repr=False)
    _ceilings: dict[tuple[str, str, bool, bool, bool], Ceilings] = field(default_factory=dict, repr=False)
    _copy_gb_per_s: float | None = field(default=None, repr=False)

    def parameters(self, case: Case) -> dict[str, Tensor]:
        if self._parameters is None or self._parameters[0] != case.weights:
            self._parameters = None  # free the old ones before the new ones are made
            self._parameters = case.weights, make_parameters(case, self.device, self.ranks.ep_rank)
        return self._parameters[1]

    def inputs(self, case: Case) -> Inputs:
        if self._inputs is None or self._inputs[0] != case.case_id:
            self._inputs = None
            inputs = make_inputs(case, self.device, self.ranks.rank, self.routing_file)
            if (around := self.around(case)) is not None:
                around.route(inputs)
            self._inputs = case.case_id, inputs
        return self._inputs[1]

    def around(self, case: Case) -> Around | None:
        """Return what surrounds the experts of the case, if its subject is a block."""
        return make_around(case, self.device)

    def begin(self, job: Job) -> Replay | None:
        """Take the file of the job's captured routing. Return the steps of the trace; None for other routing."""
        self.routing_file = job.routing_file
        return replay(job.case, job.routing_file) if job.case.routing.startswith("trace:") else None

    def ceilings(self, job: Job, fp8: bool, cold: bool, *, is_frozen: bool = False, anew: bool = False) -> Ceilings:
        """Return the case's ceilings for the job's dispatcher, with dense matrix products in FP8 if `fp8` is true.

        If `is_frozen` is true, the gradients of the parameters are not part of the work. The collective sends rows in
        FP8 if the job's backend does.

        Each such set of ceilings is measured once per case. The speed of a copy is measured once for all cases. If
        `anew` is true, both are measured again.
        """
        case, fp8_rows = job.case, sends_fp8_rows(job.backend)
        key = case.case_id, job.dispatcher, fp8, is_frozen, fp8_rows
        if anew:
            self._copy_gb_per_s = None
            self._ceilings.pop(key, None)
        if key not in self._ceilings:
            if self._copy_gb_per_s is None:
                self._copy_gb_per_s = ceilings.copy_gb_per_s(self.device)
            self._ceilings = {known: each for known, each in self._ceilings.items() if known[0] == case.case_id}
            inputs = self.inputs(case)
            work = ceilings.work_of(case, inputs, self.parameters(case), self.ranks, is_frozen)
            self._ceilings[key] = ceilings.measure_ceilings(
                *(work, inputs, job.dispatcher, fp8, self._copy_gb_per_s, cold, self.ranks, fp8_rows)
            )
        return self._ceilings[key]

    def forget(self) -> None:
        """Free the tensors. They are made again when a job needs them."""
        self._parameters = self._inputs = None
