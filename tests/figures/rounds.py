"""The figures of the runs of `peers` in rounds of new processes, with few tokens in one round."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moebench.verdicts.findings import rounds_of
from moebench.workload.models import MODELS, SHAPE_AXES, shape_name
from tests.figures import data
from tests.figures.data import BOTH, DECODE, ROUNDS, SHAPES, TRAIN, results, select, the
from tests.figures.markdown import markdown

Shape = tuple[int, ...]


class Case(NamedTuple):
    """A case of `triton` and other layers, and the run that measured it."""

    name: str
    shape: Shape
    num_tokens: int
    mode: str
    run: str


def _shape_of(model: str) -> Shape:
    return tuple(MODELS[model][axis] for axis in SHAPE_AXES)


#: The cases that SonicMoE ran, too.
CASES = [
    *(
        Case(shape_name(dict(zip(SHAPE_AXES, shape, strict=True))), shape, num_tokens, mode, run)
        for shape, num_tokens in SHAPES.items()
        for mode, run in (("forward", BOTH), ("train", BOTH), ("train", TRAIN))
    ),
    *(Case(name, _shape_of(name), 4096, "train", ROUNDS) for name in ("qwen3-30b-a3b", "qwen3-235b-a22b")),
]
#: Train steps of other layers.
OTHERS = [
    *(case for case in CASES if case.mode == "train" and case.run != BOTH),
    *(
        Case(name, _shape_of(name), 4096, "train", run)
        for name, run in (("gpt-oss-120b", BOTH), ("glm-4.5-air", TRAIN), ("mixtral-8x7b", TRAIN))
    ),
]
_DECODED = (128, 8, 2048, 768)


def _rows(case: Case) -> pd.DataFrame:
    return select(data.of_shape(results(case.run), case.shape), num_tokens=case.num_tokens, mode=case.mode)


def ratios(backend: str, case: Case) -> list[float]:
    """The times of a backend over those of `triton`, for each round that both have."""
    own, other = (rounds_of(the(_rows(case), backend=name).to_dict()) for name in ("triton", backend))
    return [other[key] / own[key] for key in sorted(own.keys() & other.keys())]


def train_step(backend: str, shape: Shape) -> pd.Series:
    """The row of a train step of one of the three shapes."""
    (case,) = (case for case in CASES if case[1:] == (shape, SHAPES.get(shape), "train", TRAIN))
    return the(_rows(case), backend=backend)


def beside_sonicmoe() -> str:
    header = ["shape or model", "tokens", "mode", "measured", "`triton`, ms", "`peer_sonicmoe`, ms", "ratio"]
    header += ["by round", "`triton` peak, MiB", "`peer_sonicmoe` peak, MiB"]

    def rows() -> Iterator[list[Any]]:
        for case in CASES:
            both = [the(_rows(case), backend=backend) for backend in ("triton", "peer_sonicmoe")]
            by_round = ratios("peer_sonicmoe", case)
            assert len(by_round) == 3
            times, peaks = ([one[column] for one in both] for column in ("time_ms", "peak_memory_bytes"))
            day = case.run[-len("2026-12-01") :]
            yield [
                *(case.name, case.num_tokens, case.mode, day, *(f"{ms:.3f}" for ms in times)),
                f"{np.median(by_round):.3f}",
                *(", ".join(f"{one:.3f}" for one in by_round), *(f"{peak / 2**20:.0f}" for peak in peaks)),
            ]

    return markdown(header, rows())


def beside_others() -> str:
    backends = ["torch_mm", "peer_automodel_torch_mm", "peer_transformers"]

    def rows() -> Iterator[list[Any]]:
        for case in OTHERS:
            measured = set(_rows(case)["backend"])
            found = {backend: ratios(backend, case) for backend in backends if backend in measured}
            assert {len(by_round) for by_round in found.values()} == {3}
            yield [
                *(case.name, case.num_tokens),
                *(f"{np.median(found[backend]):.2f}" if backend in found else "–" for backend in backends),
            ]

    return markdown(["train step", "tokens", *(f"`{name}`" for name in backends)], rows())


def sonicmoe() -> dict[str, str]:
    """The ratios of the run with both modes (`forward0`, `train0` and so on), of the run before, and of models."""
    found = {}
    for case in CASES:
        if case.run == ROUNDS:
            key = f"qwen{case.name.split('-')[1]}"
        else:
            key = f"{case.mode if case.run == BOTH else 'before'}{list(SHAPES).index(case.shape)}"
        found[key] = f"{np.median(ratios('peer_sonicmoe', case)):.3f}"
    steps = [found[f"{key}{number}"] for key in ("train", "before") for number in range(len(SHAPES))]
    return {**found, "least": min(steps), "most": max(steps)}


def others() -> dict[str, str]:
    """The least and the largest ratio of each other layer over `triton`, in train steps."""
    found: dict[str, str] = {}
    for backend in ("torch_mm", "peer_automodel_torch_mm", "peer_transformers"):
        medians = [float(np.median(ratios(backend, case))) for case in OTHERS if backend in set(_rows(case)["backend"])]
        found |= {f"{backend}_low": f"{min(medians):.2f}", f"{backend}_high": f"{max(medians):.2f}"}
    return found


def clocks() -> dict[str, str]:
    """The clock in the train steps with the widest tokens, in MHz, in both runs."""
    frames = {"": select(results(BOTH), dim=7168, mode="train"), "before_": select(results(TRAIN), dim=7168)}
    return {
        f"{prefix}{name}": f"{the(frame, backend=name)['sm_clock_mhz']:.0f}"
        for prefix, frame in frames.items()
        for name in ("triton", "peer_sonicmoe")
    }


def few_tokens() -> Iterator[tuple[int, float, dict[str, float], float]]:
    """Tokens, the time to read the weights, the times from a graph, and that of `triton` in the run before, in ms."""
    before = select(data.of_shape(results(DECODE), _DECODED), mode="forward", backend="triton")
    for num_tokens in (1, 4, 16, 64):
        case = _rows(Case("", _DECODED, num_tokens, "forward", ROUNDS))
        times = {backend: the(case, backend=backend)["graph_time_ms"] for backend in ("torch_mm", "triton")}
        yield num_tokens, case["roofline_ms"].median(), times, the(before, num_tokens=num_tokens)["graph_time_ms"]


def decode_again() -> str:
    header = ["tokens", "weights", "`torch_mm`", "`triton`", "`triton` on 2026-11-23"]
    return markdown(
        header,
        (
            [str(num_tokens), *(f"{ms:.3f}" for ms in (bound, times["torch_mm"], times["triton"], before))]
            for num_tokens, bound, times, before in few_tokens()
        ),
    )


def one_token() -> dict[str, str]:
    _, bound, times, before = next(few_tokens())
    return {"now": f"{times['triton']:.3f}", "before": f"{before:.3f}", "over": f"{times['triton'] / bound:.1f}"}


def counted() -> dict[str, Any]:
    """The jobs of the run: all, and those with many tokens, each of which has a job in each round that it ran in."""
    frame = results(ROUNDS)
    many = frame[frame["num_tokens"] >= 4096]
    return {"jobs": len(frame), "done": int(many["num_rounds"].sum()), "asked": 3 * len(many)}


def counted_train() -> dict[str, Any]:
    return _counted(TRAIN)


def counted_both() -> dict[str, Any]:
    return _counted(BOTH)


def _counted(run: str) -> dict[str, Any]:
    """The jobs of a run, and how often they were measured in all."""
    frame = results(run)
    return {"jobs": len(frame), "done": int(sum(len(rounds_of(row)) for row in frame.to_dict("records")))}
