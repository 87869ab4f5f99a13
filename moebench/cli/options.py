"""Options and arguments that several commands have. No torch here."""

from pathlib import Path
from typing import Annotated

import typer

Sweep = Annotated[str, typer.Argument(help="a sweep file, or the name of one in suites/")]
Out = Annotated[Path | None, typer.Option("--out", help="results folder; default results/runs/<new>")]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="measure this backend instead of the sweep's; repeatable")
]
Filters = Annotated[
    list[str] | None, typer.Option("--filter", help="KEY=V1,V2  KEY!=V  KEY<V  KEY<=V  KEY>V  KEY>=V; repeatable")
]
CaseIds = Annotated[list[str] | None, typer.Option("--case", help="only the case with this id; repeatable")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default a GPU if there is one")]
Gpus = Annotated[str | None, typer.Option(metavar="0,2|all", help="the GPUs to use; default all that are free")]
ShareGpus = Annotated[bool, typer.Option("--share-gpus", help="use GPUs that other processes use too")]
TimeBudget = Annotated[
    float | None, typer.Option("--time-budget", min=0, metavar="MIN", help="start no job after so many minutes")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output, for machines")]
