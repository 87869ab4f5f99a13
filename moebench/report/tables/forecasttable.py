"""What a dry run prints: a table of EP sizes and backends, with the memory and the time that they may take."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult

from moebench.machine.units import size
from moebench.report.tables.boxes import plain
from moebench.run.forecast import Forecast


@dataclass(frozen=True)
class ForecastTable:
    """The lines of a forecast, and below them its sums in words. Nothing where there are no jobs. For rich."""

    forecast: Forecast

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.forecast.jobs:
            return
        table = plain()
        for name in ("EP", "backend", "jobs", "memory of a rank", "time"):
            table.add_column(name, justify="left" if name == "backend" else "right", overflow="fold")
        for line in self.forecast.lines:
            cells = str(line.ep_size), line.backend, str(line.num_jobs), size(line.memory_bytes)
            table.add_row(*cells, minutes(line.time_s, line.num_untimed))
        yield table
        yield from sentences(self.forecast)


def sentences(forecast: Forecast) -> list[str]:
    """The whole sweep's memory and time."""
    memory = f"Estimates, nothing was measured. Memory: at most {size(forecast.memory_bytes)} a rank, without contexts"
    if forecast.time_s is None:
        return [f"{memory}.", "Time: unknown, no measured job is near any of these."]
    without = f"; {forecast.num_untimed} jobs have none near and are not in it" if forecast.num_untimed else ""
    time = f"Time: {minutes(forecast.time_s)}, of the nearest of {forecast.based_on}{without}"
    return [f"{memory}.", f"{time}; processes start on top of it."]


def minutes(time_s: float | None, num_untimed: int = 0) -> str:
    """A time as `84 s` or `12.5 min`, `?` where it is unknown, and how many jobs have none."""
    if time_s is None:
        return "?"
    text = f"{time_s:.0f} s" if time_s < 100 else f"{time_s / 60:.1f} min"
    return f"{text} + {num_untimed} jobs?" if num_untimed else text
