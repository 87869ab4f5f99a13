"""Run a backend in ways that often expose a bug, and compare every pass with the reference.

Each of these ways is a probe. Each check in moebench.parity.checks names the probe that it runs on its cases.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts import Unsupported
from experts.registry import get_backend
from moebench.machine.units import size
from moebench.measure.cache import Workload
from moebench.measure.profiling import executed
from moebench.measure.subject import Measured, Subject, backend_of, make_subject, verdict_fields
from moebench.parity import judge
from moebench.parity.checks import CHECKS
from moebench.parity.judge import ParityVerdict, TensorError
from moebench.workload.case import Case, Job
from moebench.workload.inputs import Inputs, make_inputs, make_parameters, moe_config

#: The number of calls in the check `repeated`. Every call must be right.
REPEATS = 12
#: The memory that the largest check needs at once: inputs, the backend's rows, and the reference in float64.
LARGE_BYTES = 80 << 30


@dataclass(frozen=True)
class Examined:
    """The result of a probe.

    `deterministic` says whether the passes agreed bit by bit; it is None if the probe does not compare their bits.
    `executed` names the kernel that ran; it is None if the probe does not profile the backend.
    """

    verdict: ParityVerdict
    deterministic: bool | None = None
    executed: str | None = None


def examine(job: Job, workload: Workload) -> Measured:
    """Run the probe of a check's job, and return the measured fields of the job's record.

    Raises Unsupported if the backend cannot run the case here, and all errors of the backend.
    """
    assert job.check is not None
    probe = CHECKS[job.check].probe
    if probe == "large":
        _refuse_large(workload.device)
    found = PROBES[probe](make_subject(backend_of(job, workload), job, workload))
    return verdict_fields(found.verdict) | {"deterministic": found.deterministic, "executed": found.executed}


def _refuse_large(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unsupported(f"needs a GPU with {size(LARGE_BYTES, '.0f')} free, the device is {device.type}")
    free = torch.cuda.mem_get_info(device)[0]
    if free < LARGE_BYTES:
        raise Unsupported(f"needs a GPU with {size(LARGE_BYTES, '.0f')} free, this GPU has {size(free)} free")


def _passes(subject: Subject, changed: Inputs | None = None) -> Examined:
    """Compare two passes with the reference, on the case's inputs or, if they are given, on the inputs `changed`."""
    inputs = changed or subject.inputs
    handed = inputs.clone()
    subject.settle(handed)
    passes = [subject.run(handed) for _ in range(2)]
    return Examined(subject.judge(passes, inputs), judge.are_identical(passes, subject.ranks))


def _profiled(subject: Subject) -> Examined:
    found, handed = _passes(subject), subject.inputs.clone()
    ran = executed(lambda: judge.run_pass(subject.module, handed, "forward"), subject.device)
    return dataclasses.replace(found, executed=ran)


# special inputs


def _on(change: Callable[[Inputs, Case], Inputs]) -> Callable[[Subject], Examined]:
    return lambda subject: _passes(subject, change(subject.inputs, subject.case))


def _random(inputs: Inputs, case: Case) -> Tensor:
    """Return a random number in [0, 1) for every choice, [T, K]."""
    generator = torch.Generator(inputs.x_TD.device).manual_seed(case.seed + 2)
    return torch.rand(inputs.weights_TK.shape, device=inputs.x_TD.device, generator=generator)


def dropped(inputs: Inputs, case: Case) -> Inputs:
    """Set a quarter of the choices to −1, and also all choices of the first token that the mask keeps."""
    random_TK = _random(inputs, case)
    random_TK[int(inputs.token_mask_T.long().argmax())] = 0.0
    return dataclasses.replace(inputs, indices_TK=inputs.indices_TK.masked_fill(random_TK < 0.25, -1))


def duplicates(inputs: Inputs, case: Case) -> Inputs:
    """Let every other token choose its first expert twice, and the last unmasked token choose one expert K times."""
    indices_TK = inputs.indices_TK.clone()
    indices_TK[::2, 1] = indices_TK[::2, 0]
    last = int(inputs.token_mask_T.nonzero()[-1])
    indices_TK[last] = indices_TK[last, :1]
    return dataclasses.replace(inputs, indices_TK=indices_TK)


def unnormalised(inputs: Inputs, case: Case) -> Inputs:
    """Set an eighth of the routing weights to 0 and the rest between 0.2 and 2.2; a token's weights do not sum to 1."""
    random_TK = _random(inputs, case).to(inputs.weights_TK.dtype)
    weights_TK = torch.where(random_TK < 0.125, 0.0, 0.2 + 2 * random_TK)
    return dataclasses.replace(inputs, weights_TK=weights_TK)


def amplified(inputs: Inputs, case: Case) -> Inputs:
    """Multiply tokens by four: a limit at 3 standard deviations is then at 0.75 standard deviations."""
    return dataclasses.replace(inputs, x_TD=4 * inputs.x_TD)


def input_dtypes(inputs: Inputs, case: Case) -> Inputs:
    """Convert indices to int32 and routing weights to bfloat16."""
    return dataclasses.replace(
        inputs, indices_TK=inputs.indices_TK.int(), weights_TK=inputs.weights_TK.to(torch.bfloat16)
    )


# layouts in memory


def _every_other(tensor: Tensor) -> Tensor:
    """Return the same values as a view of every other column of a wider tensor.

    The columns between are NaN in a tensor of floats, True in a mask, and 0 in a tensor of indices.
    """
    rest = math.nan if tensor.is_floating_point() else int(tensor.dtype is torch.bool)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), rest, dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _by_columns(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _laid_out(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(*(layout(getattr(inputs, field.name)) for field in dataclasses.fields(inputs)))


def _strided(subject: Subject) -> Examined:
    """Run passes on the same values in other layouts, and compare the passes with the reference.

    One more pass has an output gradient that is a single number, expanded to [T, D], as the backward of a sum gives it.
    """
    inputs = subject.inputs
    subject.settle(inputs.clone())
    passes = [subject.run(_laid_out(inputs, layout)) for layout in (_every_other, _by_columns)]
    ones = inputs.grad_TD.new_ones(()).expand_as(inputs.grad_TD)
    expanded = dataclasses.replace(inputs.clone(), grad_TD=ones)
    return Examined(_all_of([subject.judge(passes), subject.judge([subject.run(expanded)], expanded)]))


# several calls


def _other_inputs(subject: Subject) -> Examined:
    """Compare three calls with the reference.

    The first call gets other tokens, twice as many as the case has. The second call gets other tokens, as many as the
    case has. The third call gets the case's tokens.
    """
    case = subject.case
    verdicts = []
    subject.settle(subject.inputs.clone())
    for other in (_next(case, 1, num_tokens=2 * case.num_tokens), _next(case, 2), case):
        inputs = subject.inputs if other is case else make_inputs(other, subject.device)
        verdicts.append(subject.judge([subject.run(inputs.clone())], inputs, case=other))
    return Examined(_all_of(verdicts))


def _next(case: Case, seed: int, **fields: int) -> Case:
    return case.model_copy(update={"seed": case.seed + seed, **fields})


def _repeated(subject: Subject) -> Examined:
    handed = subject.inputs.clone()
    subject.settle(handed)
    passes = [subject.run(handed) for _ in range(REPEATS)]
    return Examined(subject.judge(passes), judge.are_identical(passes))


# weights


def _state_dict(subject: Subject) -> Examined:
    """Load the module's state dict into the loop's module, which must then hold the parameters bit by bit.

    After a call, load other weights into the module. The next call must use these other weights.
    """
    case, module = subject.case, subject.module
    loop = get_backend("loop").build(moe_config(case)).to(subject.device)
    loop.load_state_dict(module.state_dict())
    found = _differences(loop.state_dict(), subject.parameters, "differs after a round trip through the state dict")
    subject.settle(handed := subject.inputs.clone())
    subject.run(handed)
    others = make_parameters(_next(case, 1), subject.device)
    loop.load_state_dict(others)
    module.load_state_dict(loop.state_dict())
    subject.settle(handed)
    passes = [subject.run(handed) for _ in range(2)]
    found += _differences(module.state_dict(), others, "is not what was loaded after a call")
    return Examined(_all_of([ParityVerdict(tuple(found)), subject.judge(passes, parameters=others)]))


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> list[TensorError]:
    """Return one error per name. It is infinite if one side lacks the name, or if the two tensors differ in a bit."""
    errors = []
    for name in sorted({*found, *expected}):
        pair = [{key: side[key] for key in {name} & side.keys()} for side in (found, expected)]
        errors.append(TensorError(name, what, 0.0 if judge.are_identical(pair) else math.inf, 1.0))
    return errors


def _in_place(subject: Subject) -> Examined:
    """Halve every parameter in place after a call; the next passes must use the halved parameters.

    Halving is exact in any dtype.
    """
    if getattr(subject.module, "caches_weights", False):
        raise Unsupported("keeps weights between calls: loading weights renews them, an update in place does not")
    handed = subject.inputs.clone()
    subject.settle(handed)
    subject.run(handed)
    with torch.no_grad():
        for parameter in subject.module.parameters():
            parameter.mul_(0.5)
    halved = {name: 0.5 * parameter for name, parameter in subject.parameters.items()}
    subject.settle(handed)
    return Examined(subject.judge([subject.run(handed) for _ in range(2)], parameters=halved))


def _all_of(verdicts: Sequence[ParityVerdict]) -> ParityVerdict:
    return ParityVerdict(tuple(error for verdict in verdicts for error in verdict.tensor_errors))


PROBES: dict[str, Callable[[Subject], Examined]] = {
    "passes": _passes,
    "profiled": _profiled,
    "dropped": _on(dropped),
    "duplicates": _on(duplicates),
    "unnormalised": _on(unnormalised),
    "amplified": _on(amplified),
    "input_dtypes": _on(input_dtypes),
    "strided": _strided,
    "other_inputs": _other_inputs,
    "repeated": _repeated,
    "state_dict": _state_dict,
    "in_place": _in_place,
    "large": _passes,
}
