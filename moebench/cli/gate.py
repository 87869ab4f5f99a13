"""Define the commands that compare results with a baseline: `gate` and `baseline`."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import err, out
from moebench.cli.options import AsJson
from moebench.cli.show import filtered
from moebench.errors import UsageError
from moebench.machine.comparability import CHANGES
from moebench.results.files import writable, write_atomically
from moebench.results.stats import THRESHOLD
from moebench.workload.axes import cut

if TYPE_CHECKING:
    from moebench.results.folder import Result
    from moebench.verdicts.gate import GateResult

#: The environment variable in which GitHub Actions names the file for a step's summary.
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"

commands = typer.Typer()

Threshold = Annotated[
    str, typer.Option(metavar="SHARE", help="the smallest slowdown that must not pass, such as 3% or 0.03")
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="write the verdicts to FILE, as JUnit XML")]
Github = Annotated[bool, typer.Option("--github", help="for GitHub Actions: print annotations, write the step summary")]


def share(option: str, text: str) -> float:
    """Return the share that a text stands for: 0.03 for `3%` and for `0.03`.

    Raises UsageError if the text is not a number between 0 and 1. `option` is for the message.
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    value = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 < value < 1:
        raise UsageError(f"{option} {cut(text)}: it must be a share between 0 and 1, written as 3% or 0.03")
    return value


@commands.command("gate")
def gate_(
    baseline: Annotated[str, typer.Argument(help="results folder or Parquet file; baseline:NAME; or auto")],
    candidate: Annotated[Path, typer.Argument(help="results folder or Parquet file to judge")],
    threshold: Threshold = f"{THRESHOLD:.0%}",
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="judge only these jobs, as in moebench run; repeatable")
    ] = None,
    allow_env_change: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help=f"compare even if this differs; repeatable: {', '.join(CHANGES)}, all"),
    ] = None,
    junit_file: Junit = None,
    for_github: Github = False,
    as_json: AsJson = False,
) -> None:
    """Judge new results against a baseline.

    Is the candidate slower than the baseline, does it use more memory, or is it wrong? Exit code 0: no. 1: yes, or a
    job is missing. 2: bad usage. 3: not decided. With `auto`, the baseline is the stored one of the same machine and
    software.
    """
    from moebench.results.folder import open_result  # these import pandas and scipy, which --help does not need
    from moebench.verdicts.comparability import Comparability
    from moebench.verdicts.gate import gate

    smallest = share("--threshold", threshold)
    allowed = _allowed(allow_env_change or [])
    after = open_result(candidate)
    before = _baseline(baseline, after)
    before, after = (_filtered(result, filters or []) for result in (before, after))
    comparability = Comparability(before.environments, after.environments, allowed)
    report(gate(before.frame, after.frame, comparability, threshold=smallest), junit_file, for_github, as_json)


def _baseline(text: str, candidate: "Result") -> "Result":
    """Return the results of the baseline that the user named.

    `text` is a path, `baseline:NAME` for a stored baseline, or `auto` for the stored baseline of the candidate's
    machine.
    """
    from moebench.results.folder import open_result
    from moebench.verdicts import baseline as baselines

    kind, colon, name = text.partition(":")
    if colon and kind == "baseline":
        return baselines.named(name).result
    if text == "auto":
        found = baselines.matching(candidate)
        err.print(f"baseline: {found.path}")
        return found.result
    return open_result(Path(text))


def _filtered(result: "Result", filters: list[str]) -> "Result":
    """Return the result with only the jobs that pass every filter. Raises SweepError for a wrong filter."""
    return replace(result, frame=filtered(result.frame, filters))


def _allowed(named: list[str]) -> frozenset[str]:
    unknown = [name for name in named if name not in (*CHANGES, "all")]
    if unknown:
        raise UsageError(f"--allow-env-change {unknown[0]}: it must be one of {', '.join(CHANGES)}, or all")
    return frozenset((*CHANGES, "env_id") if "all" in named else named)


def check_outputs(for_github: bool, as_json: bool) -> None:
    """Raise UsageError if --json and --github are both given."""
    if as_json and for_github:
        raise UsageError("--json and --github both write to standard output: choose one")


def report(result: "GateResult", junit_file: Path | None, for_github: bool, as_json: bool) -> None:
    """Print a gate's verdicts, write the files that were asked for, and exit with the gate's code."""
    from moebench.report.junit import junit_xml
    from moebench.report.tables.gatetable import GateTable
    from moebench.verdicts.document import GateDocument

    check_outputs(for_github, as_json)
    if as_json:
        out.print_json(GateDocument.of(result).to_json())
    else:
        out.print(GateTable(result))
    if junit_file:
        _write(junit_file, junit_xml(result))
    if for_github:
        _tell_github(result)
    raise typer.Exit(result.exit_code)


def _tell_github(result: "GateResult") -> None:
    from moebench.report import github

    for line in github.annotations(result):
        print(line)
    summary_file = os.environ.get(SUMMARY_VARIABLE)
    if not summary_file:
        err.print(f"--github: {SUMMARY_VARIABLE} is not set, so no step summary was written")
        return
    with writable(Path(summary_file)), Path(summary_file).open("a", encoding="utf-8") as file:
        file.write(github.summary(result))


stored = typer.Typer(no_args_is_help=True, help="Store and list the results that a gate compares with.")
commands.add_typer(stored, name="baseline")


@stored.command()
def update(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="results folders of runs; each run is a session of its own")
    ],
    add: Annotated[
        bool, typer.Option("--add", help="keep the stored rounds: the runs are further sessions of the baseline")
    ] = False,
) -> None:
    """Take runs into the baseline of their machine and software.

    Jobs that the baseline already has are replaced, unless --add is given. With several runs, the gate also knows how
    much times differ between sessions. A run should have 20 rounds.
    """
    from moebench.verdicts import baseline as baselines
    from moebench.verdicts.times import MIN_ROUNDS

    baseline = baselines.update(folders, add=add)
    least, _ = baseline.rounds
    out.print(f"baseline:{baseline.name}: {len(baseline.result.frame)} jobs in {baseline.path}", soft_wrap=True)
    for text in baseline.replaced:
        out.print(f"replaced {text}", soft_wrap=True)
    if least < MIN_ROUNDS:
        err.print(
            f"some jobs have {least} rounds: the gate needs {MIN_ROUNDS} or more to judge times, else it says "
            "INCONCLUSIVE; measure again with `moebench run --rounds 20`"
        )


@stored.command("show")
def show_baselines(as_json: AsJson = False) -> None:
    """List the stored baselines.

    Print the machine, the software, the numbers of jobs and rounds, and the runs of each.
    """
    from moebench.verdicts import baseline as baselines

    found = baselines.stored()
    if as_json:
        out.print_json(json.dumps([some.as_dict() for some in found]))
        return
    if not found:
        out.print(f"no baselines in {baselines.BASELINES}; store one with `moebench baseline update DIR`")
    for some in found:
        out.print(f"baseline:{some.name}", soft_wrap=True)
        for name, value in some.as_dict().items():
            if name != "name":
                out.print(f"  {name}: {value}", soft_wrap=True)


def _write(path: Path, content: bytes) -> None:
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
