"""The call of a backend that is timed: what it reads and returns, and which of its samples parity judges.

The values that a call reads change from sample to sample, so that a backend cannot return what it computed before.
Samples drawn at random are judged, so that a backend cannot be right when it is checked and wrong when it is timed.
"""

import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moebench.measure.samplers import Stage
from moebench.parity.block import Around
from moebench.parity.judge import ParityVerdict
from moebench.parity.passes import grads_of, micro_batches, step
from moebench.parity.reference import Tensors
from moebench.workload.inputs import Inputs, redraw, route
from moebench.workload.ranks import Ranks, is_dtensor
from moebench.workload.replay import Replay

#: The number of samples that are kept and judged. A backend is faster by wrong results only if at least half of its
#: samples are wrong, because times are medians. Each job then finds it with a probability of 3/4 or more.
DRAWN = 2
#: If memory cannot hold copies of samples, one sample among the first `EARLY` is judged in its place.
EARLY = 20

Judge = Callable[[list[Tensors], Inputs], ParityVerdict]


class NoSpeed(Exception):
    """The times of a job must not be believed. The message says why.

    `verdict` has the errors of the call that was judged wrong; None if no call was.
    """

    def __init__(self, reason: str, verdict: ParityVerdict | None = None) -> None:
        super().__init__(reason)
        self.verdict = verdict


class Call:
    """The call that is timed and whose memory is measured: forward and, in mode train, the backward of its output.

    With several micro-batches, the call is a step: forward and backward of each micro-batch in turn. In training, each
    step of an optimizer changes the weights. So in mode train the call first tells the layer that the weights have
    changed, if the layer keeps something that depends on them and has a method for that.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, mode: str, num_micro_batches: int = 1) -> None:
        self.inputs = inputs
        self._module, self._train = module, mode == "train"
        self._parameters = tuple(module.parameters())
        self._batches = micro_batches(inputs, num_micro_batches, self._train)
        self._output_TD: Tensor | None = None
        self._tell = weights_changed(module) if self._train else []

    @property
    def is_step(self) -> bool:
        """Whether the call is a step of several micro-batches, whose backward is no stage of its own."""
        return len(self._batches) > 1

    @property
    def stages(self) -> list[Stage]:
        return [self.forward, self.backward] if self._train and not self.is_step else [self.forward]

    def forward(self) -> Tensor:
        """Run forward, or the whole step, and return the output."""
        for tell in self._tell:
            tell()
        if self.is_step:
            self._output_TD = step(self._module, self._batches)
            return self._output_TD
        with torch.set_grad_enabled(self._train):
            self._output_TD = self._batches[0].forward(self._module)
        return self._output_TD

    def backward(self, output_TD: Tensor | None = None) -> None:
        output_TD = self._output_TD if output_TD is None else output_TD
        assert output_TD is not None
        output_TD.backward(self.inputs.grad_TD)

    def clear(self) -> None:
        """Drop the last call's output and gradients, so that the next backward does not add to these gradients."""
        self._output_TD = None
        for batch in self._batches:
            batch.x_TD.grad = batch.weights_TK.grad = None
        self._module.zero_grad(set_to_none=True)

    def result(self) -> Tensors:
        """Return the tensors of the last call by name, as `moebench.parity.passes.run_pass` names them."""
        assert self._output_TD is not None
        output = {"output": self._output_TD.detach()}
        return output | grads_of(self._module, self._batches) if self._train else output

    def complaint(self) -> str | None:
        """Return why the last call may not have computed its tensors yet, or None if nothing speaks for it.

        A subclass of torch.Tensor, or a mode that torch calls around its operators, can put off work until somebody
        reads the tensor, which is after the clock was read.
        """
        if type(self._output_TD) is not Tensor:
            return _of_subclass("output", self._output_TD)
        leaves = [leaf for batch in self._batches for leaf in (batch.x_TD, batch.weights_TK)]
        for grad in (leaf.grad for leaf in (*leaves, *self._parameters)):
            if grad is not None and type(grad) is not Tensor and not is_dtensor(grad):
                return _of_subclass("a gradient", grad)
        functions = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
        for mode in (*functions, *_get_current_dispatch_mode_stack()):
            return f"{type(mode).__name__} is active after the call: a mode may compute later; leave it in the call"
        return None


def weights_changed(module: nn.Module) -> list[Callable[[], None]]:
    """Return the methods `weights_changed` of the modules that keep something that depends on their weights."""
    keep = [one for one in module.modules() if getattr(one, "caches_weights", False)]
    return [one.weights_changed for one in keep if hasattr(one, "weights_changed")]  # type: ignore[misc]


def _of_subclass(name: str, tensor: object) -> str:
    return f"{name} is a {type(tensor).__name__}: a subclass may compute later; return a torch.Tensor"


@dataclass(frozen=True)
class _Kept:
    """A copy of a sample's tensors, the seed of the values that the sample read, and the step of its routing."""

    seed: int
    step: int
    tensors: Tensors


class Samples:
    """Gives each sample of a call new values to read, and has samples that are drawn at random judged.

    New values are drawn in place. This takes no memory, the values round as the case's own values do, and no backend
    can have seen them before. Token mask and parameters stay. With `replay`, each sample has the routing of the next
    step; without it, the indices stay, except those of a block, which routes the new values (`around`). A sample is
    drawn after its call has ended, so that the backend cannot know. The seed comes from the operating system. All ranks
    share it, so that they draw the same samples.

    `original` are the case's inputs, which the backend has never had. If `fits` is false, memory does not hold copies
    of DRAWN samples. Then one sample is judged where it is, and nothing is copied.
    """

    def __init__(
        self,
        call: Call,
        original: Inputs,
        judge: Judge,
        ranks: Ranks,
        fits: bool,
        replay: Replay | None = None,
        around: Around | None = None,
    ) -> None:
        self._around = around
        self._replay, self._step, self._steps = replay, 0, list[int]()
        self._call, self._original, self._judge, self._ranks, self.fits = call, original, judge, ranks, fits
        self._random = random.Random(ranks.tell(secrets.randbits(64))[0])
        self._generator = torch.Generator(original.x_TD.device)
        self._seed = self._count = 0
        self._early = self._random.randrange(EARLY)
        self._kept: list[_Kept] = []
        self._verdicts: list[ParityVerdict] = []
        self._complaint: str | None = None

    def prepare(self) -> None:
        """Drop the last call's tensors, and draw the values of the next call."""
        self._call.clear()
        self.renew()

    def renew(self) -> None:
        """Draw the values of the next call."""
        self._seed = (self._random.getrandbits(31) + self._ranks.rank) % 2**31
        self._step = (self._step + 1) % len(self._replay.steps) if self._replay else 0
        self._give(self._call.inputs, self._seed, self._step)

    def _give(self, inputs: Inputs, seed: int, step: int) -> None:
        redraw(inputs, self._generator.manual_seed(seed))
        if self._replay is not None:
            route(inputs, self._replay, step, self._ranks.rank)
        if self._around is not None:
            self._around.route(inputs)

    def keep(self) -> None:
        """Copy the tensors of the call that has just ended, if it is drawn (Vitter 1985, algorithm R).

        On a GPU the copies are enqueued on the current stream behind the call. The copy of a tensor that another stream
        or another thread still writes is wrong. The smallest tensors come first, so that late work has little time.
        """
        self._count += 1
        self._steps.append(self._step)
        if self.fits:
            place = len(self._kept) if len(self._kept) < DRAWN else self._random.randrange(self._count)
            if place < DRAWN:
                ascending = sorted(self._call.result().items(), key=lambda item: item[1].nbytes)
                kept = _Kept(self._seed, self._step, {name: tensor.clone() for name, tensor in ascending})
                self._kept[place : place + 1] = [kept]
        elif self._count == self._early + 1:
            self._judge_one(_Kept(self._seed, self._step, self._call.result()))
        self._complaint = self._complaint or self._call.complaint()

    def _judge_one(self, kept: _Kept) -> None:
        read = self._original.clone()
        self._give(read, kept.seed, kept.step)
        self._verdicts.append(self._judge([kept.tensors], read))

    def check(self) -> list[int]:
        """Judge the samples that were kept, and forget them. Raises NoSpeed if one is wrong; all ranks raise together.

        Return the step of `replay` that each sample had since the last check.

        Call this after sampling, before the last sample's tensors are dropped.
        """
        complaints = [complaint for complaint in self._ranks.tell(self._complaint) if complaint is not None]
        if complaints:  # a mode that is still active could also change what the judge computes
            raise NoSpeed(complaints[0])
        if not self.fits and not self._verdicts:  # fewer than EARLY samples
            self._kept = [_Kept(self._seed, self._step, self._call.result())]
        while self._kept:
            self._judge_one(self._kept.pop())
        self._count = 0
        steps, self._steps = self._steps, []
        for verdict in self._verdicts:
            if not verdict.passed:
                raise NoSpeed(f"{verdict.worst}, in a call that was timed", verdict)
        self._verdicts = []
        return steps
