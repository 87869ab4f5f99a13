"""Define the command `moebench advise`, which parses, calls moebench.results.advise and prints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import err, job_progress, out
from moebench.cli.options import MODEL_HELP
from moebench.errors import ResultsError, UsageError
from moebench.results.published import default_folders, kept_folders
from moebench.workload.axes import listed
from moebench.workload.case import Case
from moebench.workload.context import PLAIN
from moebench.workload.modelconfig import read_model

if TYPE_CHECKING:
    import pandas as pd

    from moebench.results.advise import Answer

EXIT_NO_DATA = 3

commands = typer.Typer()


@commands.command("advise")
def advise_(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    num_tokens: Annotated[int, typer.Option(help="tokens per rank")],
    ep_size: Annotated[int, typer.Option(help="ranks that share the experts")] = 1,
    mode: Annotated[str, typer.Option(help="forward or train")] = "forward",
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the layer, as in a sweep; default: the model's, or else bfloat16")
    ] = None,
    routing: Annotated[str, typer.Option(help="routing, as in a sweep")] = "uniform",
    context: Annotated[
        str, typer.Option(help="what surrounds the layer in training, as in a sweep; not fsdp2")
    ] = PLAIN,
    folders: Annotated[
        list[Path] | None, typer.Option("--results", help="a results folder; repeatable; default: results/published/*")
    ] = None,
    measure: Annotated[
        float | None,
        typer.Option(
            "--measure", metavar="MIN", help="measure here what no result answers, in MIN minutes, and keep it"
        ),
    ] = None,
    with_precision: Annotated[
        bool, typer.Option("--precision", help="say whether FP8 pays, also from the map of neighbouring shapes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")] = False,
) -> None:
    """Rank the backends for a workload, by measured results.

    Print the times and the memory of each, and how many such layers fit on the GPU. With --precision, say first whether
    FP8 takes less time. Exit code 3: no results are near the workload.
    """
    from moebench.report.tables.advisetable import advise_json, workload  # these import pandas, not needed by --help
    from moebench.report.tables.precisiontable import precision_json, sentence
    from moebench.results import advise
    from moebench.results.frame import load_all
    from moebench.results.precision.ratios import precision

    shape = read_model(model)
    for note in shape.notes:
        err.print(f"{shape}: {note}", soft_wrap=True)
    if "fsdp2" in context:
        raise UsageError(f"--context {context}: advise answers for the ranks of one group; take it without fsdp2")
    dtypes = {} if dtype is None else {"dtype": dtype}
    asked = advise.question(shape, num_tokens, ep_size=ep_size, mode=mode, routing=routing, context=context, **dtypes)
    opened, frame = _results(folders, can_be_empty=measure is not None)
    answer = advise.advise(frame, asked)
    if measure is not None:
        folder = _measure(answer, measure)
        if folder is not None:
            opened, frame = [*opened, folder], load_all([*opened, folder])
            answer = advise.advise(frame, asked)
    found = precision(frame, asked) if with_precision else []
    if as_json:
        more = {"precision": precision_json(found)} if with_precision else {}
        out.print_json(json.dumps(advise_json(answer) | more))
    else:
        out.print(workload(str(shape), asked), soft_wrap=True)
        for one in found:
            out.print(sentence(one, asked.mode), soft_wrap=True)
        _print(answer, frame, opened, asked)
    if with_precision and not found:
        err.print(
            f"no result says whether FP8 pays near this workload; measure it with: moebench run fp8 --model {model}",
            soft_wrap=True,
        )
    if answer.has_candidates or found:
        return
    known = "" if answer.advices else f"no result has this workload; the results have {listed(answer.others)}; "
    err.print(
        f"no data near this workload: {known}moebench does not extrapolate; "
        "measure it with --measure MIN, or with your own sweep (docs/sweeps.md)"
    )
    raise typer.Exit(EXIT_NO_DATA)


def _results(folders: list[Path] | None, can_be_empty: bool) -> "tuple[list[Path], pd.DataFrame]":
    """Return the folders with results and their rows. The kept results come with the published ones."""
    from moebench.results.frame import load_all, to_frame

    if folders:
        return folders, load_all(folders)
    kept = kept_folders()
    try:
        found = [*default_folders(), *kept]
    except ResultsError:
        if not (kept or can_be_empty):
            raise
        found = kept
    return found, load_all(found) if found else to_frame([])


def _print(answer: "Answer", frame: "pd.DataFrame", folders: Sequence[Path], asked: Case) -> None:
    from moebench.report.fit import fits, gpu_memory
    from moebench.report.tables.advisetable import AdviceTable

    memory = gpu_memory(folders)
    for one in answer.advices:
        memory_bytes = None if one.gpu is None else memory.get(one.gpu)
        out.print(AdviceTable(one, asked, fits(frame, asked, one) if memory_bytes else (), memory_bytes))


def _measure(answer: "Answer", minutes: float) -> Path | None:
    """Measure what no result of this machine answers, and return the folder with the results."""
    from moebench.results.frame import load, write
    from moebench.run import ondemand, request
    from moebench.run.start import start_run

    plan = ondemand.plan_missing(answer, minutes, ondemand.gpu_here())
    if plan is None:
        err.print("every backend has an answer for this machine: nothing was measured")
        return None
    plan, notes = request.on_gpus(plan, None, share=False)
    for note in notes:
        err.print(note)
    with job_progress() as progress:
        progress.plan(plan.num_jobs)
        outcome = start_run(plan, progress.done)
    if not outcome.records:
        return None
    write(load(plan.folder), plan.folder)
    err.print(f"kept in {plan.folder}" + f"; the time was over before {outcome.num_left} jobs" * bool(outcome.num_left))
    return plan.folder
