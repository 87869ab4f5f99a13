"""The figures of sentences.py and tables.py about `symm_mem` on two GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from moebench.verdicts.findings import rounds_of
from tests.figures import data
from tests.figures.data import CASE, SYMM_MEM, WAITING, results, select, the
from tests.figures.quoted import WORDS

QWEN = "qwen3-30b-a3b"


@dataclass(frozen=True)
class Compared:
    """A case with `symm_mem`: the rows of `triton` and `torch_mm`, and the fastest row with another dispatcher."""

    model: str
    mode: str
    num_tokens: int
    triton: pd.Series
    torch_mm: pd.Series
    other: pd.Series | None

    @property
    def limit_ms(self) -> float:
        """The products and the collectives, one after another."""
        return float(self.triton["grouped_ms"] + self.triton["collective_ms"])

    @property
    def over_limit(self) -> list[float]:
        """The time of `triton` over the limit, in each round."""
        return [ms / self.limit_ms for ms in rounds_of(self.triton.to_dict()).values()]

    @property
    def exposed_ms(self) -> float:
        """The time of a forward in which no expert is computed."""
        return float(self.triton["dispatch_ms"] + self.triton["combine_ms"])


def compared() -> Iterator[Compared]:
    """Yield all cases of the run with `symm_mem`."""
    ours, waiting = select(results(SYMM_MEM), dispatcher="symm_mem"), results(WAITING)
    cases = ours[CASE].drop_duplicates().sort_values(["model", "mode", "num_tokens"], ascending=[False, True, True])
    for case in cases.to_dict("records"):
        rows, others = select(ours, **case), select(waiting, **case)
        fastest = others.loc[others["time_ms"].idxmin()] if len(others) else None
        triton, torch_mm = (the(rows, backend=name) for name in ("triton", "torch_mm"))
        yield Compared(**case, triton=triton, torch_mm=torch_mm, other=fastest)


def range_of(ratios: list[float]) -> str:
    """The median of the rounds, with the least and the largest."""
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def fastest() -> dict[str, Any]:
    """`triton` with `symm_mem` is the fastest layer of every case, and how long the fastest other dispatcher takes."""
    cases = list(compared())
    assert all((one.triton["time_ms_high"] < one.torch_mm["time_ms_low"]) for one in cases)
    ratios = [one.other["time_ms"] / one.triton["time_ms"] for one in cases if one.other is not None]
    return {
        "cases": WORDS[len(ratios)],
        "low": f"{min(ratios):.1f}",
        "high": f"{max(ratios):.1f}",
        "all": WORDS[len(cases)],
    }


def of_automodel() -> dict[str, str]:
    """The time of `triton` with `symm_mem` over that of AutoModel's layer on DeepEP: train steps of 4096 tokens."""
    case = select(results(SYMM_MEM), model=QWEN, mode="train", num_tokens=4096)
    ours, theirs = (rounds_of(the(case, backend=name).to_dict()) for name in ("triton", "peer_automodel_torch_mm"))
    ratios = [ours[number] / theirs[number] for number in ours]
    slow = the(case, backend="peer_automodel_te")["time_ms"] / the(case, backend="peer_automodel_torch_mm")["time_ms"]
    assert slow > 1
    return {
        "ratio": f"{median(ratios):.2f}",
        "low": f"{min(ratios):.2f}",
        "high": f"{max(ratios):.2f}",
        "slow": f"{slow:.1f}",
    }


def precision() -> dict[str, Any]:
    """How many jobs with `symm_mem` reached the target of the interval, and how far rounds are apart."""
    rows = select(results(SYMM_MEM), dispatcher="symm_mem")
    assert not rows["waits"].any()
    apart = [max(rounds) / min(rounds) - 1 for rounds in (rounds_of(row).values() for row in rows.to_dict("records"))]
    return {"jobs": len(rows), "reach": int(rows["converged"].sum()), "apart": f"{max(apart):.1%}"}


def pieces() -> dict[str, str]:
    """Four calls with a quarter of the tokens against the whole call, and the time that overlap could hide."""
    cases = {(one.mode, one.num_tokens): one for one in compared() if one.model == QWEN}
    more, exposed = [], []
    for (mode, num_tokens), whole in cases.items():
        if mode == "forward" and (mode, num_tokens // 4) in cases:
            quarter = cases[mode, num_tokens // 4]
            more.append(4 * quarter.triton["time_ms"] - whole.triton["time_ms"])
            exposed.append(whole.exposed_ms)
    assert all(cost > gain for cost, gain in zip(more, exposed, strict=True))
    (few, many), (few_exposed, many_exposed) = more, exposed
    return {
        "few": f"{few:.2f}",
        "many": f"{many:.2f}",
        "few_exposed": f"{few_exposed:.2f}",
        "many_exposed": f"{many_exposed:.2f}",
    }


def small_messages() -> dict[str, str]:
    """The times of `symm_mem` over those of the raw call, with 1024 tokens of Qwen3-30B-A3B."""
    rows = select(data.bandwidths(SYMM_MEM), dispatcher="symm_mem", model=QWEN, num_tokens=1024)
    return {way: f"{1 / the(rows, way=way)['fraction']:.2f}" for way in ("dispatch", "combine")}
