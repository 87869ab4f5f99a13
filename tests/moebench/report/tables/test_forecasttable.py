"""The lines of a forecast."""

from typing import Any

from rich.console import Console

from moebench.report.tables.forecasttable import ForecastTable
from moebench.results.bulk.tables import table_of
from moebench.results.record import Record
from moebench.run.forecast import KnownTimes, forecast
from moebench.workload.case import Job
from tests.moebench.drawn import case, ok


def took(job_s: float, backend: str = "te", dispatcher: str = "local", **fields: Any) -> Record:
    return ok(case(**{"num_tokens": 1024, **fields}), backend, dispatcher=dispatcher, job_s=job_s)


def asked(backend: str = "te", dispatcher: str = "local", **fields: Any) -> Job:
    return Job(case=case(**{"num_tokens": 1024, **fields}), backend=backend, dispatcher=dispatcher)


def of(*rows: Record) -> KnownTimes:
    return KnownTimes(table_of(rows))


def shown(found: Any) -> str:
    console = Console(width=80, record=True)
    with console.capture() as captured:
        console.print(ForecastTable(found))
    return captured.get()


def test_it_says_that_it_is_an_estimate_of_what_and_what_is_missing() -> None:
    text = " ".join(shown(forecast([asked(), asked("loop")], of(took(90.0)))).split())
    assert "Estimates, nothing was measured." in text
    assert "Time: 90 s, estimated from the nearest of 1 measured jobs (NVIDIA H200, 2026-11-23); 1 jobs have no" in text
    text = " ".join(shown(forecast([asked()], None)).split())
    assert "Time: unknown, because no measured job is near any of these jobs." in text


def test_of_a_run_with_nothing_left_there_is_nothing_to_say() -> None:
    found = forecast([], of(took(1.0)))
    assert (found.memory_bytes, found.time_s, found.num_untimed, shown(found)) == (0, None, 0, "")
