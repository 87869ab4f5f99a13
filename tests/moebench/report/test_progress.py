"""A run says how far it is: with a bar that nothing pushes away, or with a line every few jobs."""

import io

import pytest
from rich.console import Console

from moebench.report.console import EscapingConsole
from moebench.report.progress import job_progress, progress_bar
from moebench.results.record import Status
from tests.moebench.drawn import bad, case

LONG = "acme_kernels.experiments.grouped:FancyGroupedExpertsWithEpilogueFusion"


def lines_of(total: int, **console: object) -> list[str]:
    stream = Console(file=io.StringIO(), width=80, **console)  # type: ignore[arg-type]
    with job_progress(stream) as progress:
        progress.plan(total)
        for number in range(total):
            progress.done(bad(case(8), Status.oom if number % 4 == 3 else Status.unsupported, "loop"))
        progress.doing("writing")
    return stream.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("total", "done"),
    [(9, []), (10, []), (12, [10]), (40, [10, 20, 30]), (400, list(range(20, 400, 20)))],
)
def test_without_a_terminal_there_is_a_line_every_few_jobs(total: int, done: list[int]) -> None:
    printed = lines_of(total)
    assert [line.partition(" of ")[0] for line in printed] == [str(count) for count in done]
    assert all(f" of {total} jobs: " in line for line in printed)
    if done == [10, 20, 30]:
        assert printed[1] == "20 of 40 jobs: 15 unsupported, 5 oom; last: loop"


def test_on_a_terminal_there_is_a_bar_and_no_line() -> None:
    printed = "\n".join(lines_of(12, force_terminal=True, force_interactive=True, legacy_windows=False))
    assert "12/12" in printed
    assert "writing" in printed, "the bar stays after the last job"
    assert "of 12 jobs" not in printed


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_long_name_never_pushes_the_bar_away(width: int) -> None:
    console = EscapingConsole(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True)
    with progress_bar(console) as progress:
        task = progress.add_task(f"{LONG} ok {case(8).case_id}", total=1234, completed=999)
        table = progress.make_tasks_table(progress.tasks)
        assert task == 0
    plain = Console(file=io.StringIO(), width=width)
    plain.print(table)
    (line,) = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "999/1234" in line
    assert line.count("━") >= 15, "the bar keeps its width"
    assert LONG[:8] in line
