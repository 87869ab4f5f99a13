"""Plant every fault in right experts, in every dtype and FP8 recipe, and run every check of `moebench parity` on it.

`python -m tests.moebench.faultbench` examines every fault. It takes a quarter of an hour on one core and writes
docs/faults.md.
"""

import inspect
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from experts import BackendConfig, GroupedExperts
from experts.registry import Backend
from moebench.measure import subject as subject_module
from moebench.measure.cache import Workload
from moebench.measure.job import measure_job
from moebench.parity.checks import CHECKS, suite_jobs
from moebench.results.record import Status
from moebench.workload.case import DTYPES, Job
from tests.backends import coarse, faulty, faulty_rows, faulty_weights, fp8

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
CPU = torch.device("cpu")
#: The document names a check if its error is this many times its budget, so that it finds the fault on other machines.
CLEARLY = 1.5
#: The document names at most this many of the checks that find a fault.
MOST = 5
#: The checks left out need a GPU, or processes of their own, or report which operator ran.
IN_PROCESS = tuple(name for name in CHECKS if name not in ("expert-parallel", "large-offsets", "fallback"))


@dataclass(frozen=True)
class Variant:
    """Right experts in which a fault is planted: the loop in a dtype, or FP8 products on bfloat16."""

    name: str
    dtype: str
    experts: type[GroupedExperts]


FP8_VARIANTS = (
    Variant("FP8 current", "bfloat16", fp8.Current),
    Variant("FP8 block", "bfloat16", fp8.Block),
    Variant("FP8 delayed", "bfloat16", fp8.Delayed),
)
VARIANTS = {one.name: one for one in (*(Variant(name, name, GroupedExperts) for name in DTYPES), *FP8_VARIANTS)}


COARSE = (coarse.SumInDtype, coarse.ActivationInDtype)


class TorchMM(GroupedExperts):
    """Right experts that use grouped_mm."""

    def __init__(self, config):
        super().__init__(config, BackendConfig(experts="torch_mm"))


RIGHT = (
    *VARIANTS.values(),
    *(Variant(f"torch_mm {name}", name, TorchMM) for name in DTYPES[1:]),
    *(Variant(f"{kind.__name__} {name}", name, kind) for kind in COARSE for name in DTYPES[2:]),
)

FAULTS: dict[str, type[GroupedExperts]] = {
    name: kind
    for module in (faulty, faulty_rows, faulty_weights)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
    if issubclass(kind, GroupedExperts)
}
_WIDE = ("float64", "float32")
#: The dtypes in which a fault is wrong: bfloat16 experts may round to bfloat16, and FP8 rounds by more than 2%.
ONLY_IN = {
    "LowPrecisionWeights": _WIDE,
    "RoundedWeights": _WIDE,
    "ScaledExpert": DTYPES,
    "ScaledGradOfOneExpert": DTYPES,
}


def variants_of(fault: str) -> list[Variant]:
    """Return the variants in which the fault is wrong."""
    return [one for name, one in VARIANTS.items() if name in ONLY_IN.get(fault, VARIANTS)]


def planted(kind: type[GroupedExperts], variant: Variant, **fields: float) -> type[GroupedExperts]:
    """Plant the fault in the variant's experts, and set its class attributes to `fields`."""
    kinds = (kind,) if issubclass(kind, variant.experts) else (kind, variant.experts)
    return type(kind.__name__, kinds, fields)


def over_budget(build: type[nn.Module], job: Job, workload: Workload) -> float:
    """Return one job's worst error over its budget; infinity if the backend raised."""
    backend = Backend(job.backend, build, lambda device, config: None, getattr(build, "fp8", None))
    with mock.patch.object(subject_module, "get_backend", return_value=backend):
        try:
            found = measure_job(job, workload, None)
        except Exception:
            return math.inf
    assert found["status"] in (Status.ok, Status.mismatch), found
    return found["parity_worst"]


def examine(
    build: type[nn.Module], dtype: str, checks: Sequence[str] = IN_PROCESS, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """Yield each check with an error over budget: its first case that clearly fails, else its worst case."""
    workload = Workload(CPU)
    for check in checks:
        worst = 0.0
        for job in suite_jobs(["planted"], [check], [dtype], seed):
            worst = max(worst, over_budget(build, job, workload))
            if worst >= CLEARLY:
                break
        yield check, worst


# the document


@dataclass(frozen=True)
class Row:
    """A fault, with the error over budget by variant and check. A check is kept where it clearly finds the fault."""

    fault: str
    found: dict[str, dict[str, float]]

    @property
    def named(self) -> list[str]:
        """The checks that clearly find the fault in every variant, in the order of CHECKS."""
        return [check for check in CHECKS if all(check in each for each in self.found.values())]

    def __str__(self) -> str:
        what = " ".join(inspect.getdoc(FAULTS[self.fault]).split())
        best = {name: max((each[check] for check in self.named), default=0.0) for name, each in self.found.items()}
        cells = [_times(best[name]) if name in best else "–" for name in VARIANTS]
        return f"| {self.fault} | {what} | {', '.join(self.named)} | {' | '.join(cells)} |"


def _times(error: float) -> str:
    return "∞" if math.isinf(error) else f"{error:.2g}".replace("e+0", "e").replace("e+", "e")


def row_of(fault: str) -> Row:
    """Examine the fault under every check in one dtype.

    In every other variant, examine it under the MOST checks that found it most clearly in the first.
    """
    variants = variants_of(fault)
    first = VARIANTS["bfloat16"] if VARIANTS["bfloat16"] in variants else variants[0]
    clear = _clear(fault, first, IN_PROCESS)
    most = dict(sorted(clear.items(), key=lambda pair: -pair[1])[:MOST])
    found = {one.name: most if one is first else _clear(fault, one, tuple(most)) for one in variants}
    return Row(fault, found)


def _clear(fault: str, variant: Variant, checks: Sequence[str]) -> dict[str, float]:
    each = examine(planted(FAULTS[fault], variant), variant.dtype, checks)
    return {check: worst for check, worst in each if worst >= CLEARLY}


def read() -> dict[str, list[str]]:
    """Return the document's faults and the checks that it names for each."""
    rows = re.findall(r"^\| (\w+) \| [^|]* \| ([^|]*) \|(?: [\de.–∞]+ \|){7}$", DOCUMENT.read_text(), re.MULTILINE)
    return {fault: checks.split(", ") if checks else [] for fault, checks in rows}


#: A fault multiplies one expert's contribution, or its weights' gradients, by 1 + one of these.
SCALES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)

#: The checks for these faults. Cases with few experts are left out, because the fault is large there.
SCALED_UNDER = ("one-hot", "few-tokens", "many-experts", "determinism")


def least_scale(kind: type[GroupedExperts], variant: Variant) -> float:
    """Return the least of SCALES that a check finds."""
    for scale in SCALES:
        build = planted(kind, variant, factor=1 + scale)
        if any(worst > 1 for _, worst in examine(build, variant.dtype, SCALED_UNDER)):
            return scale
    return math.inf


def scales() -> str:
    """Return the table of the least scales."""
    kinds = (faulty.ScaledExpert, faulty_weights.ScaledGradOfOneExpert)
    lines = [
        f"| {variant.name} | " + " | ".join(f"{least_scale(kind, variant):.0%}" for kind in kinds) + " |"
        for variant in VARIANTS.values()
    ]
    return "\n".join(lines)


def part(name: str) -> str:
    """Return the comment that marks where a part of the document begins or ends."""
    return f"<!-- {name} -->"


def write(rows: str, least: str) -> None:
    """Put the tables into their places in the document."""
    text = DOCUMENT.read_text()
    for name, table in (("faults", rows), ("scales", least)):
        begin, end = part(f"{name}, made by tests/moebench/faultbench.py"), part(f"end of {name}")
        head, rest = text.split(begin)
        header = "\n".join(rest.strip().splitlines()[:2])
        text = f"{head}{begin}\n\n{header}\n{table}\n\n{end}{rest.split(end)[1]}"
    DOCUMENT.write_text(text)


def main() -> None:
    """Examine all faults, or the faults named on the command line, and write the document."""
    torch.set_num_threads(1)
    rows = []
    for fault in FAULTS:
        rows.append(str(row_of(fault)))
        print(rows[-1], file=sys.stderr, flush=True)
    write("\n".join(rows), scales())


if __name__ == "__main__":
    main()
