"""Cut captured routing into the steps that a case replays."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.errors import InputsError
from moebench.workload.case import Case
from moebench.workload.traceformats import Indices, read_arrays
from moebench.workload.traces import DIGITS, digest, files_of, parts_of

#: A case replays at most this many steps of a trace. They are spread evenly over its layers and its tokens.
MOST_STEPS = 128


@dataclass(frozen=True)
class Replay:
    """The steps that a case replays of a trace. A step is a batch of `num_tokens` consecutive tokens of one layer.

    `indices_of` gives the expert indices of each rank in a step.
    """

    case: Case
    arrays: dict[tuple[int, int], Indices]  # [tokens, K] by layer and rank of the trace
    steps: tuple[tuple[int, int], ...]  # the layer of each step, and the number of its batch

    def indices_of(self, step: int, rank: int) -> Indices:
        """Return the indices [T, K] int32 of a rank's tokens in a step. A trace that is shorter repeats."""
        layer, batch = self.steps[step]
        sources = _ranks(self.arrays)
        array = self.arrays[layer, sources[rank % len(sources)]]
        first = (batch * _sharers(self.case, sources) + rank // len(sources)) * self.case.num_tokens
        return array[(first + np.arange(self.case.tokens_of_rank(rank))) % len(array)].astype(np.int32)

    def rows(self) -> NDArray[np.int64]:
        """Return the number of rows [S, E] of each expert in each step, on all ranks and before the token mask."""
        return np.stack(
            [
                np.sum([self._rows(step, rank) for rank in range(self.case.ep_size)], axis=0)
                for step in range(len(self.steps))
            ]
        )

    def columns(self, steps: Sequence[int], samples_ms: Sequence[float], marked: Sequence[bool]) -> dict[str, Any]:
        """Return the columns of results that a replay adds. `steps` has the step of each sample.

        The time of a step is the median of its samples that are not marked, or of all if all are marked.
        """
        by_step: dict[int, list[float]] = {}
        for step, ms, is_marked in zip(steps, samples_ms, marked, strict=True):
            if not is_marked or all(marked):
                by_step.setdefault(step, []).append(ms)
        times_ms = [float(np.median(some)) for some in by_step.values()]
        experts_SE = self.rows()
        ranks_SR = experts_SE.reshape(len(experts_SE), self.case.ep_size, -1).sum(axis=2)
        return {
            "num_steps": len(by_step),
            "step_p50_ms": float(np.percentile(times_ms, 50)),
            "step_p99_ms": float(np.percentile(times_ms, 99)),
            "expert_rows": tuple(map(int, experts_SE.sum(axis=0))),
            "rank_rows": tuple(map(int, ranks_SR.sum(axis=0))),
            "expert_skew": _skew(experts_SE),
            "rank_skew": _skew(ranks_SR),
        }

    def _rows(self, step: int, rank: int) -> NDArray[np.int64]:
        chosen = self.indices_of(step, rank)
        return np.bincount(chosen[chosen >= 0], minlength=self.case.n_routed_experts)


def _skew(rows: NDArray[np.int64]) -> float | None:
    """Return the largest number of rows in a step divided by the mean, as the mean over steps that have rows."""
    some = rows[rows.sum(axis=1) > 0]
    return float((some.max(axis=1) / some.mean(axis=1)).mean()) if len(some) else None


def _ranks(arrays: dict[tuple[int, int], Indices]) -> list[int]:
    return sorted({rank for _, rank in arrays})


def _sharers(case: Case, sources: Sequence[int]) -> int:
    """Return how many ranks of the case share the tokens of one rank of the trace."""
    return -(-case.ep_size // len(sources))


def replay(case: Case, file: str | None = None) -> Replay:
    """Return the steps of a case whose routing is a trace. `file` is the trace; without it, the routing is its path.

    A rank of the case reads the tokens of a rank of the trace. If the trace has fewer ranks, they share its tokens in
    turn. The step with the fewest experts comes first: ceilings are measured with it, and they must hold for all steps.
    Raises InputsError for a trace that does not fit the case, or that has changed since the run was planned.
    """
    named, layer = parts_of(case.routing)
    path = Path(file or named)
    if file is not None and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", named) and digest(path) != named:
        raise InputsError(f"trace {path}: its content has changed since the run was planned; run the sweep again")
    arrays = _arrays(path, case.n_activated_experts, tuple((one, one.stat().st_mtime_ns) for one in files_of(path)))
    layers = sorted({one for one, _ in arrays})
    if layer is not None:
        if layer not in layers:
            raise InputsError(f"trace {path} has no layer {layer}; it has {', '.join(map(str, layers))}")
        layers = [layer]
    chosen = {key: array for key, array in arrays.items() if key[0] in layers}
    _check(path, case, chosen)
    every = tuple(_all_steps(case, chosen, layers))
    places = np.unique(np.linspace(0, len(every) - 1, min(len(every), MOST_STEPS)).astype(int))
    made = Replay(case, chosen, tuple(every[place] for place in places))
    first = int(np.count_nonzero(made.rows(), axis=1).argmin())
    return Replay(case, chosen, made.steps[first:] + made.steps[:first])


@lru_cache(maxsize=2)
def _arrays(path: Path, top_k: int, _changed: object) -> dict[tuple[int, int], Indices]:
    return read_arrays(path, files_of(path), top_k)


def _all_steps(case: Case, arrays: dict[tuple[int, int], Indices], layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    sharers = _sharers(case, _ranks(arrays))
    for layer in layers:
        num_tokens = min(len(array) for (one, _), array in arrays.items() if one == layer)
        batches = num_tokens // (case.num_tokens * sharers) if case.num_tokens else 1
        yield from ((layer, batch) for batch in range(max(1, batches)))


def _check(path: Path, case: Case, arrays: dict[tuple[int, int], Indices]) -> None:
    layers, sources = sorted({layer for layer, _ in arrays}), _ranks(arrays)
    for layer in layers:
        for rank in sources:
            if (layer, rank) not in arrays:
                raise InputsError(f"trace {path} has no layer {layer} of rank {rank}; capture all layers on every rank")
    for (layer, rank), array in arrays.items():
        place = f"trace {path}, layer {layer}, rank {rank}," if len(arrays) > 1 else f"trace {path}"
        columns = case.n_activated_experts
        if array.ndim != 2 or not len(array) or array.shape[1] != columns or array.dtype.kind not in "iu":
            raise InputsError(
                f"{place} is {array.dtype} {list(array.shape)}, but the case needs integers "
                f"[tokens >= 1, n_activated_experts = {columns}]; record it from a model with that many"
            )
        if array.min() < -1 or array.max() >= case.n_routed_experts:
            raise InputsError(
                f"{place} names experts {array.min()} to {array.max()}, but the case has 0 to "
                f"{case.n_routed_experts - 1} (-1 for no expert); record it from a model with that many experts"
            )
