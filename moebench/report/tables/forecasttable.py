"""Show the estimates that a dry run prints: the memory and the time of each EP size and backend."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult

from moebench.machine.units import size
from moebench.report.tables.boxes import plain
from moebench.run.forecast import Forecast


@dataclass(frozen=True)
class ForecastTable:
    """A table of a forecast with the totals in words below it, as an object that rich can print; empty without jobs."""

    forecast: Forecast

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.forecast.jobs:
            return
        table = plain()
        for name in ("EP", "backend", "jobs", "memory per rank", "time"):
            table.add_column(name, justify="left" if name == "backend" else "right", overflow="fold")
        for line in self.forecast.lines:
            cells = str(line.ep_size), line.backend, str(line.num_jobs), size(line.memory_bytes)
            table.add_row(*cells, minutes(line.time_s, line.num_untimed))
        yield table
        yield from sentences(self.forecast)


def sentences(forecast: Forecast) -> list[str]:
    """Return sentences about the memory and time of the whole sweep."""
    largest = size(forecast.memory_bytes)
    memory = f"Estimates, nothing was measured. Memory: at most {largest} per rank, without CUDA contexts"
    if forecast.time_s is None:
        return [f"{memory}.", "Time: unknown, because no measured job is near any of these jobs."]
    without = (
        f"; {forecast.num_untimed} jobs have no measured job near and are not included" if forecast.num_untimed else ""
    )
    time = f"Time: {minutes(forecast.time_s)}, estimated from the nearest of {forecast.based_on}{without}"
    return [f"{memory}.", f"{time}. The start of processes takes more time."]


def minutes(time_s: float | None, num_untimed: int = 0) -> str:
    """Return a time as text: `84 s` or `12.5 min`, or `?` if it is None.

    `num_untimed` is the number of jobs that the time does not include; the text then ends in ` + 3 jobs?`.
    """
    if time_s is None:
        return "?"
    text = f"{time_s:.0f} s" if time_s < 100 else f"{time_s / 60:.1f} min"
    return f"{text} + {num_untimed} jobs?" if num_untimed else text
