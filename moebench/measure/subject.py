"""Build a backend for one case, run the backend's passes, and compare the passes with the reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts import Unsupported
from moebench.measure.cache import Workload
from moebench.measure.context.block import in_block
from moebench.measure.context.compiled import Graphs
from moebench.measure.context.layer import LayerInContext, in_context
from moebench.measure.protocol import told
from moebench.parity.adapters import Lora, flops, lora_of, make_adapters
from moebench.parity.block import Around
from moebench.parity.judge import ParityVerdict, TensorError, check
from moebench.parity.passes import run_pass
from moebench.parity.poison import poisoned
from moebench.parity.reference import Tensors
from moebench.results.record import Status
from moebench.workload.case import Case, Job
from moebench.workload.context import PLAIN
from moebench.workload.driven import Backend, get_backend
from moebench.workload.inputs import Inputs, moe_config
from moebench.workload.ranks import Ranks, sharded

#: The number of passes (forward and backward) before the checked passes, by FP8 recipe. Delayed scaling takes its
#: scales from earlier passes.
SETTLING_PASSES = {"delayed": 2}

#: The measured fields of a record.
Measured = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A backend's module with the case's parameters, and the case's inputs.

    With several ranks, the module, the parameters and the inputs are those of this rank. `fp8` is the backend's FP8
    recipe; None for a backend without FP8. `lora` has the rank and alpha of its adapters; None without adapters. The
    adapters are among the parameters. `around` is what surrounds the experts, if the subject is a block.
    """

    case: Case
    module: nn.Module
    inputs: Inputs
    parameters: Mapping[str, Tensor]
    fp8: str | None
    lora: Lora | None
    around: Around | None
    device: torch.device
    ranks: Ranks
    #: What backward computed again in the passes of `run`: errors of its rows, and outputs that differ from forward's.
    again: list[TensorError] = field(default_factory=list)
    outputs_again: list[Tensor] = field(default_factory=list)

    def settle(self, handed: Inputs) -> None:
        """Run the passes that the backend's recipe needs before its passes can be checked."""
        for _ in range(SETTLING_PASSES.get(self.fp8 or "", 0)):
            run_pass(self.module, handed, "train")

    @property
    def flops(self) -> float:
        """The useful floating-point operations of a call on one rank."""
        return flops(self.case, self.lora) + (0.0 if self.around is None else self.around.flops())

    @property
    def graphs(self) -> Graphs | None:
        """The compiler's counts; None if the layer is not compiled."""
        return self.module.graphs if isinstance(self.module, LayerInContext) else None

    def run(self, handed: Inputs) -> Tensors:
        """Run one pass in poisoned memory. The backend may write into `handed`, so pass a clone.

        A compiled layer has its memory as it is: on a CPU, poisoned memory is a mode of torch, for which torch would
        compile the layer anew.
        """
        if not isinstance(self.module, LayerInContext):
            return self._pass(handed)
        watch = self.module.watch
        with watch.on():
            tensors = self._pass(handed) if self.graphs is None else self.pass_on(handed)
        if self.graphs is not None:
            self.graphs.end_pass()
        self.again.extend(watch.errors())
        if outputs := watch.outputs_again():
            self.outputs_again.append(torch.cat(outputs))
        return tensors

    def pass_on(self, handed: Inputs) -> Tensors:
        """Run one pass. The backend may write into `handed`."""
        return run_pass(self.module, handed, self.case.mode, self.case.surroundings.num_micro_batches)

    def _pass(self, handed: Inputs) -> Tensors:
        with poisoned(self.device):
            return self.pass_on(handed)

    def judge(
        self,
        passes: list[Tensors],
        inputs: Inputs | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        case: Case | None = None,
    ) -> ParityVerdict:
        """Compare passes with the reference, and return the verdict.

        If the passes did not use the subject's own inputs, parameters or case, the arguments say what they used. What
        backward computed again in the passes of `run` since the last verdict is judged as well.
        """
        parameters, fp8, ranks = parameters or self.parameters, self.fp8, self.ranks
        more: dict[str, Any] = {"around": self.around, "lora_scale": 0.0 if self.lora is None else self.lora.scale}
        found = check(case or self.case, inputs or self.inputs, parameters, passes, fp8, ranks, **more)
        errors = [*found.tensor_errors, *(error for rank in ranks.tell(self.again) for error in rank)]
        outputs = [{"output": output} for output in self.outputs_again]
        if any(ranks.tell(len(outputs))):  # on a rank without different outputs, its pass has the right ones
            forward = self.case.model_copy(update={"mode": "forward", "context": PLAIN})
            outputs = (outputs or [{"output": passes[0]["output"]}])[:1]
            again = check(forward, self.inputs, self.parameters, outputs, fp8, ranks, **more).tensor_errors
            errors += [replace(one, tensor="recomputed output") for one in again]
        self.again.clear()
        self.outputs_again.clear()
        return ParityVerdict(tuple(errors))


def backend_of(job: Job, workload: Workload) -> Backend:
    """Return the job's backend. Raises Unsupported if it cannot run the case here."""
    backend = get_backend(job.backend)
    reason = backend.unsupported(workload.device, moe_config(job.case), _dispatcher(job, workload))
    if reason is not None:
        raise reason
    return backend


def reason_of(unsupported: Unsupported) -> str:
    """Return the reason that a backend gives for not running a case."""
    return told(unsupported).strip() or "the backend gives no reason"


def make_subject(backend: Backend, job: Job, workload: Workload) -> Subject:
    """Build the backend's module for the job's case. Errors of the backend are not caught."""
    inputs, parameters, lora = workload.inputs(job.case), workload.parameters(job.case), lora_of(backend)
    if lora is not None:
        parameters = parameters | make_adapters(job.case, lora, parameters, workload.ranks.ep_rank)
    layer = _build(backend, job.case, _dispatcher(job, workload), parameters, workload)
    around = workload.around(job.case)
    if around is not None:
        layer = in_block(layer, around, workload.device)
    module = in_context(layer, job.case, workload.device, workload.ranks)
    return Subject(job.case, module, inputs, parameters, backend.fp8, lora, around, workload.device, workload.ranks)


def _dispatcher(job: Job, workload: Workload) -> str | None:
    return None if workload.ranks.mesh is None else job.dispatcher


def _build(
    backend: Backend, case: Case, dispatcher: str | None, parameters: dict[str, Tensor], workload: Workload
) -> nn.Module:
    with workload.device:
        module = backend.build(moe_config(case), dispatcher)
    module.to(workload.device)
    mesh = workload.ranks.mesh
    if mesh is not None:
        spread: Callable[[DeviceMesh], None] = module.init_token_dispatcher  # type: ignore[assignment]
        spread(mesh)
        shards = {name: sharded(local, mesh) for name, local in parameters.items()}
        module.load_state_dict(shards)
    else:
        module.load_state_dict(parameters)
    return module


def verdict_fields(verdict: ParityVerdict) -> Measured:
    """Return the fields of a record that a verdict sets, including the status."""
    worst = verdict.worst
    found = {
        "parity_worst": worst.over_budget,
        "parity_worst_tensor": worst.tensor,
        "parity_errors": verdict.errors,
    }
    return found | ({"status": Status.ok} if verdict.passed else {"status": Status.mismatch, "detail": str(worst)})
