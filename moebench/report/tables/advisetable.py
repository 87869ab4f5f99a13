"""Show advice as a table in a terminal, and write it as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.machine.units import size
from moebench.report.fit import Fit
from moebench.report.tables.boxes import plain
from moebench.report.tables.cells import DIM, FASTEST, human, milliseconds
from moebench.results.advise import NOT_INSTALLED, NOT_SUPPORTED, WRONG, Advice, Answer, Candidate
from moebench.results.labels import DECODE_TOKENS
from moebench.workload.case import Case
from moebench.workload.context import PLAIN

_LEGEND = """\
#: place; backends with the same place are too close to call
× fastest: the time divided by the fastest time, with the least and the largest ratio of the two 95% intervals"""
_GRAPH_LEGEND = "\ngraph ms: the time when a CUDA graph replays the pass, as servers do for decoding"


def workload(model: str, asked: Case) -> str:
    """Return in words the workload that the user asks about."""
    words = [f"{asked.num_tokens} tokens per rank", f"EP {asked.ep_size}", asked.dtype, asked.mode]
    words += [] if asked.context == PLAIN else [asked.context]
    return ", ".join([model, *words, f"{asked.routing} routing"])


def advise_json(answer: Answer) -> dict[str, Any]:
    """Return the answer as JSON data: the candidates on each machine, the fastest first."""
    return {
        "question": answer.asked.model_dump(),
        "advice": [
            {
                "machine": advice.machine,
                "backend": advice.candidates[0].label if advice.candidates else None,
                "times_the_next": advice.times_the_next,
                "is_close": advice.is_close,
                "candidates": [
                    {"place": place, **_fields(one)}
                    for place, one in zip(advice.places, advice.candidates, strict=True)
                ],
                "left_out": advice.left_out,
                "unmeasured": advice.unmeasured,
            }
            for advice in answer.advices
        ],
    }


def _fields(one: Candidate) -> dict[str, Any]:
    fields = {**asdict(one), "pass_bytes": one.pass_bytes, "step_bytes": one.step_bytes}
    known = {name: None if isinstance(value, float) and pd.isna(value) else value for name, value in fields.items()}
    return {**known, "is_interpolated": one.is_interpolated}


#: In a narrower terminal, the dispatcher stands below the engine, so that no name is broken.
WIDE = 120


@dataclass(frozen=True)
class AdviceTable:
    """The advice from the results of one machine, as sentences and tables. A rich renderable.

    `fits` says what the layer takes at each EP size, and `memory_bytes` is the memory of the machine's GPU. Without a
    GPU, or where its memory is not known, `memory_bytes` is None, and there is no table of EP sizes.
    """

    advice: Advice
    asked: Case
    fits: Sequence[Fit] = ()
    memory_bytes: int | None = None

    @property
    def is_decode(self) -> bool:
        return self.asked.mode == "forward" and self.asked.num_tokens <= DECODE_TOKENS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.advice.machine, style="bold")
        if self.advice.candidates:
            yield Text(sentence(self.advice))
            has_graphs = self.is_decode and any(not pd.isna(one.graph_time_ms) for one in self.advice.candidates)
            yield _table(self.advice, has_graphs, is_narrow=options.max_width < WIDE)
            yield Text(_LEGEND + _GRAPH_LEGEND * has_graphs, style=DIM)
            if any(one.is_interpolated for one in self.advice.candidates):
                yield Text("two token counts in a row: interpolated between the results at these counts", style=DIM)
            yield from map(Text, memory_lines(self.advice.candidates[0]))
        if self.advice.candidates and self.memory_bytes is not None:
            yield Text(f"{self.advice.gpu}, {size(self.memory_bytes)}: how many such layers fit on one GPU")
            yield _fit_table(self.fits, self.memory_bytes)
            yield Text(_fit_legend(self.fits), style=DIM)
        for line in without_answer(self.advice, self.asked):
            yield Text(line, style=DIM)


def without_answer(advice: Advice, asked: Case) -> Iterator[str]:
    """Yield one line for each reason why backends are not in the ranking, with their names.

    A backend that is left out is not installed, not supported or wrong. `advise_json` has the details.
    """
    for word in (NOT_INSTALLED, NOT_SUPPORTED, WRONG):
        names = [label for label, reason in advice.left_out.items() if reason.startswith(word)]
        if names:
            yield f"left out, {word}: {', '.join(names)}"
    if advice.left_out:
        yield "--json has the reasons" + "; `moebench doctor` says how to install" * any(
            reason.startswith(NOT_INSTALLED) for reason in advice.left_out.values()
        )
    if advice.unmeasured:
        yield f"not measured at {asked.num_tokens} tokens: " + ", ".join(
            f"{label} ({reason})" for label, reason in advice.unmeasured.items()
        )


def sentence(advice: Advice) -> str:
    """Return the advice in one or two sentences."""
    first, *others = advice.candidates
    if not others:
        return f"{first.label} is the only backend with results near this workload: {milliseconds(first.time_ms)} ms."
    ties = [one.label for place, one in zip(advice.places, advice.candidates, strict=True) if place == 1]
    if len(ties) > 1:
        return f"Take {', '.join(ties[:-1])} or {ties[-1]}: about {milliseconds(first.time_ms)} ms, too close to call."
    ratio, low, high = others[0].times(first)
    return (
        f"Take {first.label}: {milliseconds(first.time_ms)} ms. "
        f"{others[0].label}, the second fastest, takes {ratio:.2f} times as long ({low:.2f} to {high:.2f})."
    )


def memory_lines(one: Candidate) -> Iterator[str]:
    """Yield the memory of one layer with this backend as sums, as far as it was measured."""
    weights = f"weights {size(one.weight_bytes)}"
    if not pd.isna(one.peak_memory_bytes):
        peak, together = size(one.peak_memory_bytes), size(one.pass_bytes)
        yield f"memory with {one.label}: {weights} + {peak} for the pass = {together}"
    if not pd.isna(one.train_peak_bytes):
        yield (
            f"a train step with Adam in float32: {weights} + {size(one.train_peak_bytes)} for forward, backward and "
            f"gradients + {size(one.adam_bytes)} for Adam = {size(one.step_bytes)}"
        )


def _table(advice: Advice, has_graphs: bool, is_narrow: bool) -> Table:
    table = plain()
    candidates, shared = advice.candidates, Counter(advice.places)
    table.add_column("#")
    table.add_column("backend", overflow="fold")
    for title in ("ms", "95% interval", "× fastest", *["graph ms"] * has_graphs, "tokens/s", "memory", "tokens"):
        table.add_column(title, justify="right")
    for place, one in zip(advice.places, candidates, strict=True):
        table.add_row(
            f"{place}{'=' * (shared[place] > 1)}",
            one.label.replace("+", "\n+") if is_narrow else one.label,
            milliseconds(one.time_ms),
            f"{milliseconds(one.time_ms_low)} to {milliseconds(one.time_ms_high)}",
            "{:.2f} ({:.2f} to {:.2f})".format(*one.times(candidates[0])) if one is not candidates[0] else "1.00",
            *[_or_dash(one.graph_time_ms, milliseconds)] * has_graphs,
            human(one.tokens_per_s),
            _or_dash(one.peak_memory_bytes, size),
            " and ".join(map(str, one.measured_at)),
            style=FASTEST if place == 1 else "",
        )
    return table


def _or_dash(value: float, form: Any) -> str:
    return "-" if pd.isna(value) else str(form(value))


def _fit_table(fits: Sequence[Fit], memory_bytes: int) -> Table:
    table = plain()
    for title in ("EP size", "weights", "+ forward", "layers", "+ train step", "of it stays", "+ Adam", "layers "):
        table.add_column(title, justify="right")
    for fit in fits:
        table.add_row(
            str(fit.ep_size),
            size(fit.weight_bytes),
            size(fit.pass_bytes),
            str(fit.forward_layers(memory_bytes)),
            size(fit.step_bytes),
            size(fit.stay_bytes),
            size(fit.adam_bytes),
            str(fit.train_layers(memory_bytes)) + " (estimate)" * fit.is_estimate,
        )
    return table


def _fit_legend(fits: Sequence[Fit]) -> str:
    text = "the rest of the model, and what CUDA and communication reserve, take their own memory"
    if any(fit.is_estimate for fit in fits):
        return f"estimate: no result has the memory of the passes at this EP size, so it follows from the shape; {text}"
    return text
