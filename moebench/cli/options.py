"""Define the options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

Sweep = Annotated[str, typer.Argument(help="a sweep file, or the name of one in suites/")]
Out = Annotated[Path | None, typer.Option("--out", help="results folder to write; default: a new one in results/runs/")]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="also use this backend, beside the sweep's backends; repeatable")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", help="use this backend instead of the sweep's backends; repeatable")
]
Filters = Annotated[
    list[str] | None,
    typer.Option("--filter", help="only jobs with KEY=V1,V2  KEY!=V  KEY<V  KEY<=V  KEY>V  or KEY>=V; repeatable"),
]
CaseIds = Annotated[list[str] | None, typer.Option("--case", help="only the case with this case_id; repeatable")]
MODEL_HELP = (
    "a model's name, a shape such as e64k6d1024i512, a config.json of Hugging Face or its folder, or the id of a model "
    "in the hub's local cache"
)
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help=f"measure this model instead of the sweep's models and shapes: {MODEL_HELP}"),
]
SubjectOption = Annotated[
    str | None,
    typer.Option("--subject", help="measure this instead: experts, block, or block:MODEL with that model's router"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one")]
Gpus = Annotated[str | None, typer.Option(metavar="0,2|all", help="the GPUs to use; default: all free GPUs")]
ShareGpus = Annotated[bool, typer.Option("--share-gpus", help="also use GPUs that other processes are using")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="HOST:PORT|auto", help="run the workers on the nodes of this Ray cluster"),
]
Slurm = Annotated[bool, typer.Option("--slurm", help="run the workers on the nodes of this Slurm job")]
TimeBudget = Annotated[
    float | None, typer.Option("--time-budget", min=0, metavar="MIN", help="start no new job after this many minutes")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


def _found(paths: Any) -> Any:
    """Return the paths. The name of published results that is not a path here stands for their folder."""
    from moebench.results.published import find

    return [find(path) for path in paths] if isinstance(paths, list | tuple) else paths and find(paths)


_ONE = "a results folder, its Parquet file, or the name of published results"
Folder = Annotated[Path, typer.Argument(help=_ONE, callback=_found)]
Results = Annotated[
    list[Path],
    typer.Argument(help="results folders, their Parquet files, or names of published results", callback=_found),
]
