"""The figures of the run of `peers` in three rounds of new processes, with few tokens in one round."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from moebench.verdicts.findings import rounds_of
from moebench.workload.models import SHAPE_AXES, shape_name
from tests.figures import data
from tests.figures.data import DECODE, MORE_MODELS, ROUNDS, SHAPES, WIDE, results, select, the
from tests.figures.markdown import markdown
from tests.figures.quoted import WORDS

Shape = tuple[int, ...]
#: Layers of models that SonicMoE ran, with 4096 tokens.
MODELS: dict[str, Shape] = {"qwen3-30b-a3b": (128, 8, 2048, 768), "qwen3-235b-a22b": (128, 8, 4096, 1536)}
#: Name, shape, tokens and mode of the cases of both `triton` and SonicMoE.
CASES = [
    *(
        (shape_name(dict(zip(SHAPE_AXES, shape, strict=True))), shape, num_tokens, mode)
        for shape, num_tokens in SHAPES.items()
        for mode in ("forward", "train")
    ),
    *((name, shape, 4096, "train") for name, shape in MODELS.items()),
]
#: Those that WIDE measured again.
_LATER = [case for case in CASES if case[1][0] == 32 and case[3] == "train"]
_DECODED = (128, 8, 2048, 768)
#: Those of MORE_MODELS.
OTHER_MODELS = ("gpt-oss-120b", "glm-4.5-air", "mixtral-8x7b")


def _rows(shape: Shape, num_tokens: int, mode: str, run: str = ROUNDS) -> pd.DataFrame:
    return select(data.of_shape(results(run), shape), num_tokens=num_tokens, mode=mode)


def row(backend: str, shape: Shape, num_tokens: int, mode: str, run: str = ROUNDS) -> pd.Series:
    return the(_rows(shape, num_tokens, mode, run), backend=backend)


def ratios(backend: str, shape: Shape, num_tokens: int, mode: str, run: str = ROUNDS) -> list[float]:
    """The times of a backend over those of `triton`, for each round that both have."""
    own, other = (rounds_of(row(name, shape, num_tokens, mode, run).to_dict()) for name in ("triton", backend))
    return [other[key] / own[key] for key in sorted(own.keys() & other.keys())]


def beside_sonicmoe() -> str:
    return _table(CASES, ROUNDS)


def beside_sonicmoe_later() -> str:
    return _table(_LATER, WIDE)


def _table(cases: list[tuple[str, Shape, int, str]], run: str) -> str:
    header = ["shape or model", "tokens", "mode", "`triton`, ms", "`peer_sonicmoe`, ms", "ratio", "by round"]
    header += ["`triton` peak, MiB", "`peer_sonicmoe` peak, MiB"]

    def rows() -> Iterator[list[Any]]:
        for name, *case in cases:
            both = [row(backend, *case, run) for backend in ("triton", "peer_sonicmoe")]
            by_round = ratios("peer_sonicmoe", *case, run)
            times, peaks = ([one[column] for one in both] for column in ("time_ms", "peak_memory_bytes"))
            yield [
                *(name, *case[1:], *(f"{ms:.3f}" for ms in times), f"{np.median(by_round):.3f}"),
                *(", ".join(f"{one:.3f}" for one in by_round), *(f"{peak / 2**20:.0f}" for peak in peaks)),
            ]

    return markdown(header, rows())


def beside_others() -> str:
    backends = ["torch_mm", "peer_automodel_torch_mm", "peer_transformers"]

    def rows() -> Iterator[list[Any]]:
        for name, *case in CASES:
            measured = set(_rows(*case)["backend"])
            if measured & set(backends):
                found = {backend: ratios(backend, *case) for backend in backends if backend in measured}
                yield [
                    *(name, case[1]),
                    *(f"{np.median(found[backend]):.2f}" if backend in found else "–" for backend in backends),
                ]

    return markdown(["train step", "tokens", *(f"`{name}`" for name in backends)], rows())


def sonicmoe() -> dict[str, str]:
    found = {}
    for number, (name, *case) in enumerate(CASES):
        key = f"qwen{name.split('-')[1]}" if name in MODELS else f"{case[-1]}{number // 2}"
        found[key] = f"{np.median(ratios('peer_sonicmoe', *case)):.3f}"
    for number, (_, *case) in enumerate(_LATER, start=1):
        found[f"later{number}"] = f"{np.median(ratios('peer_sonicmoe', *case, WIDE)):.3f}"
    return found


def others() -> dict[str, str]:
    """The least and the largest ratio of each other layer over `triton`, in train steps."""
    found: dict[str, str] = {}
    for backend in ("torch_mm", "peer_automodel_torch_mm", "peer_transformers"):
        cases = [case for _, *case in CASES if case[-1] == "train"]
        medians = [
            float(np.median(ratios(backend, *case))) for case in cases if backend in set(_rows(*case)["backend"])
        ]
        found |= {f"{backend}_low": f"{min(medians):.2f}", f"{backend}_high": f"{max(medians):.2f}"}
    return found


def few_tokens() -> Iterator[tuple[int, float, dict[str, float], float]]:
    """Tokens, the time to read the weights, the times from a graph, and that of `triton` in the run before, in ms."""
    before = select(data.of_shape(results(DECODE), _DECODED), mode="forward", backend="triton")
    for num_tokens in (1, 4, 16, 64):
        case = _rows(_DECODED, num_tokens, "forward")
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


def later() -> dict[str, Any]:
    frame = results(WIDE)
    assert set(frame["mode"]) == {"train"}
    experts, rounds = {int(n) for n in frame["n_routed_experts"]}, {int(n) for n in frame["num_rounds"]}
    return {"experts": experts.pop(), "rounds": WORDS[rounds.pop()]}


def _of_model(model: str, backend: str) -> list[float]:
    """The times of a backend over those of `triton`, for each round of MORE_MODELS that has both."""
    frame = select(results(MORE_MODELS), model=model)
    own, other = (rounds_of(the(frame, backend=name).to_dict()) for name in ("triton", backend))
    return [other[key] / own[key] for key in sorted(own.keys() & other.keys())]


def more_models() -> str:
    backends = ["torch_mm", "peer_automodel_torch_mm"]
    header = ["train step", "tokens", "`triton`, ms", *(f"`{name}` over `triton`" for name in backends)]
    header += [f"`{name}` by round" for name in backends]

    def rows() -> Iterator[list[Any]]:
        for model in OTHER_MODELS:
            own = the(results(MORE_MODELS), model=model, backend="triton")
            found = [_of_model(model, name) for name in backends]
            yield [
                *(model, str(own["num_tokens"]), f"{own['time_ms']:.3f}"),
                *(f"{np.median(one):.2f}" for one in found),
                *(", ".join(f"{ratio:.3f}" for ratio in one) for one in found),
            ]

    return markdown(header, rows())


def of_more_models() -> dict[str, str]:
    """The least and the largest ratio of each other layer over `triton`, and SonicMoE's on the three shapes."""
    found: dict[str, str] = {}
    for backend in ("torch_mm", "peer_automodel_torch_mm"):
        medians = [float(np.median(_of_model(model, backend))) for model in OTHER_MODELS]
        found |= {f"{backend}_low": f"{min(medians):.2f}", f"{backend}_high": f"{max(medians):.2f}"}
    for number, (shape, num_tokens) in enumerate(SHAPES.items()):
        found[f"forward{number}"] = f"{np.median(_again(shape, num_tokens, 'forward')):.3f}"
    for number, (_, *case) in enumerate(_LATER, start=1):
        (found[f"train{number}"],) = (f"{ratio:.3f}" for ratio in _again(*case))
    return found


def _again(shape: Shape, num_tokens: int, mode: str) -> list[float]:
    frame = results(MORE_MODELS)
    own, other = (
        rounds_of(the(data.of_shape(select(frame[frame["model"].isna()], mode=mode), shape), backend=name).to_dict())
        for name in ("triton", "peer_sonicmoe")
    )
    assert mode == "train" or len(own) == len(other) == 3
    return [other[key] / own[key] for key in sorted(own.keys() & other.keys())]


def clocks_again() -> dict[str, str]:
    """The clock in the train steps with the widest tokens, in MHz."""
    frame = select(results(MORE_MODELS), dim=7168, mode="train")
    return {name: f"{the(frame, backend=name)['sm_clock_mhz']:.0f}" for name in ("triton", "peer_sonicmoe")}


def counted_again() -> dict[str, Any]:
    frame = results(MORE_MODELS)
    return {"jobs": len(frame), "done": int(sum(len(rounds_of(row)) for row in frame.to_dict("records")))}
