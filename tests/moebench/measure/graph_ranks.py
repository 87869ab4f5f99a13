"""One rank of two on CPUs that captures and replays a stand-in for a CUDA graph, for test_samplers.py.

    python -m tests.forked 2 tests/moebench/measure/graph_ranks.py FOLDER

As a real capture, the stand-in runs nothing while it captures. A stage that runs waits for the same stage of the other
rank, as the barriers in the graph of a layer do. If one rank replays more often than the other, it waits in vain, and
gloo ends both. Each rank writes what it found in each of SCENES into a file.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moebench.measure import job as job_module
from moebench.measure import samplers, timing
from moebench.measure.cache import Workload
from moebench.measure.call import NoSpeed
from moebench.measure.timing import TimingPolicy
from moebench.workload.case import Case, Job
from moebench.workload.ranks import Ranks, join, leave

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MS = 1_000_000
SHAPE = {"num_tokens": 4, "n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 8}


@dataclass(frozen=True)
class Scene:
    """What differs between the ranks; each pair has one value for each rank."""

    flags: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    errors: tuple[Exception | None, Exception | None] = (None, None)
    times_ms: tuple[float, float] = (1.0, 3.0)
    noise_ms: tuple[float, float] = (0.0, 0.0)
    fits: bool = True
    is_wrong: bool = False


SCENES = {
    "both capture": Scene(),
    "noisy ranks": Scene(noise_ms=(0.01, 2.0)),
    "the second cannot capture": Scene(errors=(None, RuntimeError("operation not permitted"))),
    "the first refuses": Scene(errors=(ValueError("not in a graph"), None)),
    "the second waits": Scene(flags=((), ("clock_changed", "synchronises"))),
    "both wait": Scene(flags=(("synchronises",), ("synchronises",))),
    "memory is short": Scene(fits=False),
    "a replay is wrong": Scene(is_wrong=True),
}


@dataclass
class Rank:
    """A rank that plays a scene. `now_ns` is its own clock, which only its stages move."""

    scene: Scene
    ranks: Ranks
    now_ns: int = 0
    num_captures: int = 0
    num_runs: int = 0
    num_replays: int = 0
    is_capturing: bool = False
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.ranks.rank)

    def mine(self, pair: tuple[Any, Any]) -> Any:
        return pair[self.ranks.rank]

    def stage(self) -> None:
        if self.is_capturing:
            if self.mine(self.scene.errors) is not None:
                raise self.mine(self.scene.errors)
            return
        dist.barrier(group=self.ranks.group)
        self.num_runs += 1
        self.now_ns += round(
            (self.mine(self.scene.times_ms) + self.random.random() * self.mine(self.scene.noise_ms)) * MS
        )

    def check(self) -> None:
        if self.scene.is_wrong:
            raise NoSpeed("wrong")

    @contextmanager
    def graph(self, graph: "Graph", stream: object) -> Iterator[None]:
        self.num_captures += 1
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False

    def play(self) -> dict[str, Any]:
        """Return what the rank found: the time of a replay, and how often it captured, ran and replayed."""
        one = Job(
            case=Case.model_validate({**SHAPE, "mode": "forward", "dtype": "bfloat16", "ep_size": 2}), backend="loop"
        )
        policy = TimingPolicy(interval_target=0.005, time_cap_s=4.0)
        measured = job_module._Job(one, Workload(CUDA, self.ranks), policy)
        call = SimpleNamespace(stages=[self.stage], clear=lambda: None)
        samples = SimpleNamespace(fits=self.scene.fits, renew=lambda: None, keep=lambda: None, check=self.check)
        with pytest.MonkeyPatch.context() as patch:
            self.replace(patch)
            found_ms = measured._graph_time_ms(call, samples, SimpleNamespace(flags=self.mine(self.scene.flags)))
        before = self.num_runs
        self.stage()  # the ranks are still in step
        return {
            "graph_time_ms": found_ms,
            "num_captures": self.num_captures,
            "num_replays": self.num_replays,
            "num_warm": before - self.num_replays,
        }

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """Put stand-ins in place of CUDA, of the sampler and of the clock."""
        on_cpu: Callable[..., Any] = samplers.make_sampler
        patch.setattr(timing, "make_sampler", lambda stages, device, *rest: on_cpu(stages, CPU, *rest))
        now = SimpleNamespace(perf_counter=lambda: self.now_ns / 1e9, perf_counter_ns=lambda: self.now_ns)
        for module in (timing, samplers):
            patch.setattr(module, "clock", now)
        patch.setattr(samplers, "_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
        patch.setattr(samplers, "_free_generator", lambda: None)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "stream", nullcontext)
        for name in ("current_stream", "synchronize"):
            patch.setattr(torch.cuda, name, lambda device: None)


@dataclass
class Graph:
    of: Rank

    def replay(self) -> None:
        self.of.num_replays += 1
        self.of.stage()

    def reset(self) -> None:
        assert not self.of.is_capturing


def main(folder: Path) -> None:
    ranks = join(CPU, timeout_s=30)
    found = {name: Rank(scene, ranks).play() for name, scene in SCENES.items()}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
