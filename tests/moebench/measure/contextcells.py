"""The matrix of contexts: which cells there are, which of them a run measures, and what it says about the others.

A cell is a backend with a dispatcher, on some ranks, in a context. All cells of as many ranks share one group of
processes, because a group takes long to start.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from moebench.results.record import Record
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.moebench.executed import python_path, share_workers

ROOT = Path(__file__).parents[3]
DISPATCHERS = ("allgather", "alltoall", "symm_mem")
#: Triton's interpreter computes in float16. Each engine has the smallest shape that it takes.
DTYPES = {"loop": "float32", "torch_mm": "float32", "triton": "float16", "triton_main_grad": "float16"}
#: The engines; the others are variants of them.
ENGINES = ("loop", "torch_mm", "triton")
ALONE = (
    *("checkpoint", "checkpoint_reentrant", "checkpoint_experts", "compile", "offload", "accumulate:3"),
    *("checkpoint+accumulate:2", "checkpoint_experts+offload", "compile+checkpoint"),
)
#: The contexts that have main gradients.
ADDED = ("accumulate:3", "checkpoint+accumulate:2", "checkpoint_reentrant+accumulate:2", "offload+accumulate:2")
SHARDED = (
    *("fsdp2", "fsdp2+checkpoint", "fsdp2+checkpoint_reentrant", "fsdp2+checkpoint_experts", "fsdp2+compile"),
    *("fsdp2+offload", "fsdp2+accumulate:2", "fsdp2+checkpoint+accumulate:2"),
)
#: What no CPU can run, and why a run here says nothing about it.
NEEDS_GPUS = {
    "te, gmm": "need a CUDA GPU; the tests' stand-ins for their libraries are no cells",
    "deepep": "needs CUDA GPUs",
    "offload from a GPU to pinned memory": "needs a CUDA GPU",
    "NCCL": "needs CUDA GPUs; the cells here run over gloo",
}


class Cell(NamedTuple):
    """One cell: EP size and data-parallel size, backend, dispatcher, context, and what is measured."""

    ep_size: int
    dp_size: int
    backend: str
    dispatcher: str
    context: str
    subject: str = "experts"

    @property
    def job(self) -> Job:
        fields = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 16, "num_tokens": 18}
        unkind = {"masked_share": 0.2, "routing": "zipf", "rank_load": "uneven" if self.ep_size > 1 else "even"}
        bias = {"expert_bias": not self.backend.startswith("triton")}
        of = {"ep_size": self.ep_size, "dp_size": self.dp_size, "context": self.context, "subject": self.subject}
        if self.subject != "experts":  # its router chooses from groups
            unkind |= {"routing": "uniform", "n_routed_experts": 16}
        case = Case.model_validate({**fields, **unkind, **bias, **of, "mode": "train", "dtype": self.dtype})
        return Job(case=case, backend=self.backend, dispatcher=self.dispatcher)

    @property
    def dtype(self) -> str:
        return "float16" if self.backend.endswith("MainGrads") else DTYPES.get(self.backend, "float32")

    @property
    def where(self) -> str:
        return f"EP {self.ep_size} x DP {self.dp_size} {self.backend}+{self.dispatcher}"

    def __str__(self) -> str:
        return f"{self.where} {self.context}" + f" {self.subject}" * (self.subject != "experts")


CELLS = [
    *(Cell(1, 1, backend, "local", context) for backend in ENGINES for context in ALONE),
    *(Cell(1, 1, "triton_main_grad", "local", context) for context in (*ADDED, "compile+accumulate:2")),
    *(Cell(2, 1, backend, way, context) for backend in ENGINES for way in DISPATCHERS for context in ALONE),
    *(Cell(2, 1, "triton_main_grad", way, context) for way in DISPATCHERS for context in ADDED),
    *(Cell(1, 2, backend, "local", context) for backend in ENGINES for context in SHARDED),
    *(Cell(2, 2, backend, way, context) for backend in ENGINES for way in DISPATCHERS for context in SHARDED),
]
#: A block with groups of experts, a correction bias and shared experts, in every context.
_BLOCK = ("torch_mm", "alltoall", "block:deepseek-v3")
BLOCKS = [
    Cell(ep, dp, _BLOCK[0], _BLOCK[1] if ep > 1 else "local", context, _BLOCK[2])
    for ep, dp in ((1, 1), (2, 1), (1, 2), (2, 2))
    for context in (ALONE if dp == 1 else SHARDED)
]
SEED = 3


#: Faults and the context that shows them, and the same backends where they are right.
FAULTS = {
    Cell(2, 1, "ranks:GradTwice", "allgather", "checkpoint"): "gradients",
    Cell(1, 1, "faulty_contexts:RecomputesOtherRows", "local", "checkpoint"): "rows",
    Cell(1, 1, "faulty_contexts:ScaleLostInAccumulation", "local", "accumulate:3"): "gradients",
    Cell(1, 1, "main_grads:OverwritesMainGrads", "local", "accumulate:3"): "gradients of weights",
}
#: A backend with main gradients does not run in the context `plain`, and in the context of the fault it is a cell.
RIGHT_ELSEWHERE = [
    cell._replace(ep_size=1, dispatcher="local", context="plain") for cell in FAULTS if "MainGrads" not in cell.backend
]


def some(count_of_size: dict[tuple[int, int], int]) -> list[Cell]:
    """Return as many cells of each size, drawn with a seed, without those that are compiled: they take long."""
    drawn = []
    for size, count in count_of_size.items():
        of_size = [cell for cell in CELLS if cell[:2] == size and "compile" not in cell.context]
        drawn += random.Random(SEED).sample(of_size, count)
    return drawn


def run(cells: Iterable[Cell], folder: Path) -> list[Record]:
    """Measure the cells as `moebench run` does."""
    jobs = tuple(cell.job for cell in cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TRITON_INTERPRET", "1")
        share_workers(patch)
        policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=200.0)
        return execute(Plan(jobs, policy, folder, "run", device="cpu")).records


def cell_of(row: Record) -> Cell:
    return Cell(row.ep_size, row.dp_size, row.backend, row.dispatcher, row.context, row.subject)


def summary(rows: Sequence[Record]) -> list[str]:
    """Return lines that say which cells ran and how they ended, and each cell that did not run."""
    ran = {cell_of(row): row.status.value for row in rows}
    ends = ", ".join(f"{list(ran.values()).count(status)} {status}" for status in dict.fromkeys(ran.values()))
    lines = [f"contexts: {len(ran)} of {len(CELLS)} cells ran on a CPU over gloo: {ends}"]
    left: dict[str, list[str]] = {}
    for cell in CELLS:
        if cell not in ran:
            left.setdefault(cell.where, []).append(cell.context)
    lines += [f"  not run: {where}: {', '.join(contexts)}" for where, contexts in left.items()]
    return lines + [f"  not run: {what}, which {why}" for what, why in NEEDS_GPUS.items()]
