"""Measure which tiles make the products of the engine `triton` fastest on this GPU. `moebench tune` stores them.

Every product that a layer's forward and train step launch is measured alone, with random operands and the layer's
routing. First each candidate is timed shortly. Then the best one and the default tile are timed in turn. The candidate
is better only if it was faster each time, by more than the intervals of the medians.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from experts import MoEConfig, gemm
from experts.gemm import choices, kinds
from experts.gemm.choices import Asked, Choice, Key
from experts.registry import get_backend
from experts.steps import Permutation, steps_on
from moebench.errors import UsageError
from moebench.machine.environment import gpu_numbers
from moebench.measure import timing
from moebench.measure.studies.products import Call, layer_of, passes
from moebench.measure.timing import Timing, TimingPolicy
from moebench.measure.worker import pick_device
from moebench.results.files import writable
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config

BACKEND = "triton"
#: Pairs of measurements that decide between the best candidate and the default tile.
TURNS = 3
#: A tile's result may differ from the default tile's by this part of the result's size: sums have another order.
MOST_DIFFERENCE = 0.02

#: Measures a call that is warm.
Measure = Callable[[Call, TimingPolicy], Timing]


@dataclass(frozen=True)
class Tuned:
    """The tile that won for one product, and the default tile. They are equal if no candidate is better."""

    key: Key
    tile: Any
    default_tile: Any
    time_ms: float
    default_time_ms: float
    num_measured: int  # tiles that were measured, the default tile included
    num_refused: int  # candidates that need more than the GPU has
    num_wrong: int  # candidates whose result differs from the default tile's

    @property
    def choice(self) -> Choice | None:
        """What to store; None if no candidate is better."""
        return None if self.tile == self.default_tile else Choice(self.tile, self.time_ms, self.default_time_ms)


def products_of(case: Case, device: torch.device) -> dict[Key, Asked]:
    """Return the products that a forward and a train step of the case launch.

    Raises UsageError if the engine cannot run here.
    """
    reason = get_backend(BACKEND).unsupported(device, moe_config(case))
    if reason is not None:
        raise UsageError(f"{BACKEND}: {reason.reason}")
    forward, train = passes(
        layer_of(BACKEND, make_parameters(case, device), moe_config(case)), make_inputs(case, device)
    )
    with choices.asked() as asked:
        with torch.no_grad():
            forward()
        train()
    return asked


def tune(cases: Sequence[Case], device: str | None, measure: Measure | None = None) -> Iterator[Tuned]:
    """Yield the better tile of each product of the cases, one after another, as soon as the user's file has it.

    Without a `device`, measures on the first GPU. Raises UsageError for a device that this machine lacks, if the engine
    cannot run a case, and if the file cannot be written.
    """
    try:
        gpu_numbers(device or "cpu")
    except ValueError as error:
        raise UsageError(str(error)) from error
    on = pick_device(device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    place = choices.place_of(on)
    for case in cases:
        for tuned in _tune(case, on, measure or _measure_on(on)):
            with writable(choices.own_file(place)):
                choices.store(place, {tuned.key: tuned.choice})
            yield tuned


def file_of(device: str | None) -> tuple[Path, choices.Place]:
    """Return the user's file for a device, and what the file holds for."""
    place = choices.place_of(pick_device(device))
    return choices.own_file(place), place


def _tune(case: Case, device: torch.device, measure: Measure) -> Iterator[Tuned]:
    inputs, config = make_inputs(case, device), moe_config(case)
    rows = steps_on(device, config.dtype).sort_by_expert(inputs.active_indices_TK, 0, config.n_routed_experts)
    for key, asked in products_of(case, device).items():
        call = call_of(asked, rows, inputs.weights_TK, config)
        yield _better_tile(key, asked, call, measure)


def call_of(asked: Asked, rows: Permutation, weights_TK: Tensor, config: MoEConfig) -> Callable[[], Tensor]:
    """Return the call of a product with random operands of the layer's shapes."""
    kind, matrices, per_expert = asked.kind, asked.matrices.detach(), asked.rows_per_expert
    _, depth, width = matrices.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=matrices.device).to(matrices.dtype)

    if kind is kinds.PRODUCT:
        return _bound(gemm.product, random(rows.num_rows, depth), matrices, rows, per_expert)
    if kind is kinds.PRODUCT_BACK:
        return _bound(gemm.product_back, random(rows.num_rows, width), matrices, rows, per_expert)
    if kind is kinds.GATHERED_PRODUCT:
        return _bound(gemm.gathered_product, random(rows.num_tokens, depth), matrices, rows, per_expert)
    if kind is kinds.GATHERED_PRODUCT_BACK:
        return _bound(gemm.gathered_product_back, random(rows.num_tokens, width), matrices, rows, per_expert)
    if kind in (kinds.ACTIVATED_PRODUCT, kinds.GATED_PRODUCT, kinds.INTERLEAVED_PRODUCT):
        bias_LH = random(len(matrices), width) if config.expert_bias else None
        operands = random(rows.num_tokens, depth), matrices, rows, per_expert
        return _bound(gemm.activated_product, *operands, weights_TK, bias_LH, config)
    raise NotImplementedError(f"nothing here calls a {kind.name}")


def _bound(product: Callable[..., Tensor], *operands: Any) -> Callable[[], Tensor]:
    return lambda: product(*operands)


def _better_tile(key: Key, asked: Asked, call: Callable[[], Tensor], measure: Measure) -> Tuned:
    kind = asked.kind
    default = choices.default(*asked)
    short, long = TimingPolicy(interval_target=0.02, time_cap_s=0.1), TimingPolicy(0.002, time_cap_s=0.5)

    def timed(tile: Any, policy: TimingPolicy) -> Timing:
        with choices.forced(kind, tile):
            return measure(call, policy)

    with choices.forced(kind, default):
        right = call().float()
    best, best_ms = default, timed(default, short).time_ms
    measured, refused, wrong = 1, 0, 0
    for tile in kind.candidates(key.rows_per_expert):
        if tile == default:
            continue
        with choices.forced(kind, tile):
            result = _result(call)
        if result is None or not _near(result, right):
            refused, wrong = refused + (result is None), wrong + (result is not None)
            continue
        measured += 1
        ms = timed(tile, short).time_ms
        if ms < best_ms:
            best, best_ms = tile, ms
    before = after = timed(default, long)
    if best != default:
        turns = [(timed(best, long), timed(default, long)) for _ in range(TURNS)]
        after, before = (min(column, key=lambda timing: timing.time_ms) for column in zip(*turns, strict=True))
        if not all(new.time_ms_high < old.time_ms_low for new, _ in turns for _, old in turns):
            best, after = default, before
    return Tuned(key, best, default, after.time_ms, before.time_ms, measured, refused, wrong)


def _result(call: Callable[[], Tensor]) -> Tensor | None:
    """Return the result of a product in float32, or None if the tile needs more than the GPU has."""
    try:
        return call().float()
    except TritonError:
        return None
    except RuntimeError as error:
        if "PassManager::run failed" in str(error):  # Triton's compiler gives up
            return None
        raise


def _near(result: Tensor, right: Tensor) -> bool:
    return bool((result - right).norm() <= MOST_DIFFERENCE * right.norm())


def _measure_on(device: torch.device) -> Measure:
    return lambda call, policy: timing.time_stages([call], device, policy)
