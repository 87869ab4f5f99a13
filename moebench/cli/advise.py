"""Define the command `moebench advise`, which parses, calls moebench.results.advise and prints."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.console import err, out
from moebench.cli.options import MODEL_HELP
from moebench.report.tables.advisetable import AdviceTable, advise_json, workload
from moebench.results import advise
from moebench.results.published import default_folders, load_all
from moebench.workload.axes import listed
from moebench.workload.modelconfig import read_model

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
    folders: Annotated[
        list[Path] | None, typer.Option("--results", help="a results folder; repeatable; default: results/published/*")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")] = False,
) -> None:
    """Name the fastest backend for a workload, by measured results.

    Print how much faster it is than the next backend, and its memory. Exit code 3: no results are near the workload.
    """
    shape = read_model(model)
    for note in shape.notes:
        err.print(f"{shape}: {note}", soft_wrap=True)
    dtypes = {} if dtype is None else {"dtype": dtype}
    asked = advise.question(shape, num_tokens, ep_size=ep_size, mode=mode, routing=routing, **dtypes)
    frame = load_all(folders or default_folders())
    advices = advise.advise(frame, asked)
    if as_json:
        out.print_json(json.dumps(advise_json(asked, advices)))
    else:
        out.print(workload(str(shape), asked), soft_wrap=True)
        for one in advices:
            out.print(AdviceTable(one))
    if any(one.candidates for one in advices):
        return
    others = listed(advise.elsewhere(frame, asked))
    found = "" if advices else f"no result has this workload; the results have {others}; "
    err.print(
        f"no data near this workload: {found}moebench does not extrapolate; "
        "measure it with your own sweep (docs/sweeps.md)"
    )
    raise typer.Exit(EXIT_NO_DATA)
