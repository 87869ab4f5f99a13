"""Show advice as a table in a terminal, and write it as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.machine.units import size
from moebench.report.tables.boxes import plain
from moebench.report.tables.cells import DIM, FASTEST, human, milliseconds
from moebench.results.advise import Advice, Candidate
from moebench.workload.case import Case


def workload(model: str, asked: Case) -> str:
    """Return in words the workload that the user asks about."""
    words = (f"{asked.num_tokens} tokens per rank", f"EP {asked.ep_size}", asked.dtype, asked.mode)
    return ", ".join([model, *words, f"{asked.routing} routing"])


def advise_json(asked: Case, advices: Sequence[Advice]) -> dict[str, Any]:
    """Return the advice as JSON data: the candidates on each machine, the fastest first."""
    return {
        "question": asked.model_dump(),
        "advice": [
            {
                "machine": advice.machine,
                "backend": advice.candidates[0].label if advice.candidates else None,
                "times_the_next": advice.times_the_next,
                "is_close": advice.is_close,
                "candidates": [_fields(one) for one in advice.candidates],
                "left_out": advice.left_out,
            }
            for advice in advices
        ],
    }


def _fields(one: Candidate) -> dict[str, Any]:
    fields = {name: None if pd.isna(value) else value for name, value in asdict(one).items() if _is_single(value)}
    return {**fields, "measured_at": one.measured_at, "run_ids": one.run_ids, "is_interpolated": one.is_interpolated}


def _is_single(value: object) -> bool:
    return not isinstance(value, tuple)


@dataclass(frozen=True)
class AdviceTable:
    """The advice from the results of one machine, as a sentence and a table. A rich renderable."""

    advice: Advice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.advice.machine, style="bold")
        if self.advice.candidates:
            yield Text(sentence(self.advice))
            yield _table(self.advice.candidates)
            if any(one.is_interpolated for one in self.advice.candidates):
                yield Text(
                    "two token counts in a row: its numbers are interpolated between the results at these counts",
                    style=DIM,
                )
        for label, reason in self.advice.left_out.items():
            yield Text(f"left out: {label}: {reason}", style=DIM)


def sentence(advice: Advice) -> str:
    """Return the advice in one sentence."""
    first, *others = advice.candidates
    if not others:
        return f"{first.label} is the only backend with results near this workload: {_cost(first)}."
    second, ratio = others[0], others[0].time_ms / first.time_ms
    if advice.is_close:
        return f"{first.label} ({_cost(first)}) or {second.label} ({_cost(second)}): their times are too close to call."
    faster = f"{ratio:.2f} times as fast as" if ratio >= 2 else f"{ratio - 1:.0%} faster than"
    return f"Take {first.label}: it is {faster} {second.label}, the second fastest. It takes {_cost(first)}."


def _cost(one: Candidate) -> str:
    return f"{milliseconds(one.time_ms)} ms" + (
        "" if pd.isna(one.peak_memory_bytes) else f", peak memory {size(one.peak_memory_bytes)}"
    )


def _table(candidates: Sequence[Candidate]) -> Table:
    table = plain()
    table.add_column("backend", overflow="fold")
    for title in ("ms", "95% interval", "time", "tokens/s", "memory", "tokens"):
        table.add_column(title, justify="right")
    for place, one in enumerate(candidates):
        table.add_row(
            one.label,
            milliseconds(one.time_ms),
            f"{milliseconds(one.time_ms_low)} to {milliseconds(one.time_ms_high)}",
            f"{one.time_ms / candidates[0].time_ms:.2f}x",
            human(one.tokens_per_s),
            "-" if pd.isna(one.peak_memory_bytes) else size(one.peak_memory_bytes),
            " and ".join(map(str, one.measured_at)),
            style="" if place else FASTEST,
        )
    return table
