"""Define what the functions for scripts and notebooks return. Each object shows itself in a terminal and a notebook."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from moebench.report import ranking
from moebench.report.console import as_html, as_text
from moebench.report.gatewords import change, memory_change, parity_change, total
from moebench.report.tables.advisetable import AdviceTable, workload
from moebench.report.tables.audittable import AuditTable
from moebench.report.tables.gatetable import GateTable
from moebench.report.tables.tables import summary
from moebench.results.advise import Answer
from moebench.results.frame import load, to_frame
from moebench.run.audit import Audit
from moebench.verdicts.gate import GateResult


class Shown:
    """An object that rich can print, and that shows itself as text in a terminal and as HTML in a notebook."""

    def _renderable(self) -> RenderableType:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._renderable()

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


@dataclass(frozen=True, repr=False)
class Measured(Shown):
    """The results of a run. `folder` is its results folder, and `frame` has one row per job.

    `notes` say what the run left out, and why.
    """

    folder: Path
    notes: tuple[str, ...] = ()

    @cached_property
    def frame(self) -> pd.DataFrame:
        return load(self.folder)

    @property
    def best(self) -> pd.DataFrame:
        """One row for each case: its fastest backend, with its lead over the next."""
        return ranking.best(self.frame)

    def _renderable(self) -> RenderableType:
        return Group(summary(self.frame), *map(Text, self.notes), Text(f"results: {self.folder}"))


@dataclass(frozen=True, repr=False)
class Checked(Shown):
    """What a search for a wrong result found. It is true if the backend passed.

    `frame` has one row per case that was tried.
    """

    audit: Audit

    def __bool__(self) -> bool:
        return self.passed

    @property
    def passed(self) -> bool:
        return self.audit.passed and not self.audit.interrupted

    @cached_property
    def frame(self) -> pd.DataFrame:
        return to_frame(row for one in self.audit.backends for row in one.records)

    def _renderable(self) -> RenderableType:
        return AuditTable(self.audit)


@dataclass(frozen=True, repr=False)
class Gated(Shown):
    """The verdicts on every job of two results. `frame` has one row per job, and `exit_code` is the command's."""

    result: GateResult

    @property
    def exit_code(self) -> int:
        return self.result.exit_code

    @property
    def passed(self) -> bool:
        """Whether no job is slower, larger, wrong or missing, and none is undecided."""
        return self.exit_code == 0

    def __bool__(self) -> bool:
        return self.passed

    @property
    def total(self) -> str:
        """The number of jobs with each verdict, such as `2 REGRESSED, 105 PASS`."""
        return total(self.result)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per job: its verdict, the reasons, and the changes in words."""
        words: dict[str, Callable[[Any], Any]] = {"time": change, "memory": memory_change, "parity": parity_change}
        return pd.DataFrame(
            {
                **job.key._asdict(),
                "verdict": job.verdict.value,
                "reasons": "; ".join(f"{one.measure}: {one.reason}" for one in job.findings),
                "time_ms_ratio": None if job.time is None else job.time.ratio,
                **{name: word(job) for name, word in words.items()},
            }
            for job in self.result.jobs
        )

    def _renderable(self) -> RenderableType:
        return GateTable(self.result)


@dataclass(frozen=True, repr=False)
class Advised(Shown):
    """The advice on a workload. `answer` has one advice for each machine, and `frame` one row for each candidate."""

    model: str
    answer: Answer

    @property
    def backend(self) -> str | None:
        """The fastest backend of the first machine; None if no result is near the workload."""
        return next((one.candidates[0].label for one in self.answer.advices if one.candidates), None)

    @cached_property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(
            {"machine": advice.machine, **vars(one)} for advice in self.answer.advices for one in advice.candidates
        )

    def _renderable(self) -> RenderableType:
        known: list[RenderableType] = [AdviceTable(one, self.answer.asked) for one in self.answer.advices]
        nothing = Text("no result is near this workload; measure it with moebench.bench")
        return Group(Text(workload(self.model, self.answer.asked)), *(known or [nothing]))
