"""Define the command `moebench tune`, which stores tiles of the engine `triton` that are faster on the user's GPU."""

import json
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from experts.catalog import missing
from moebench.cli.console import err, out, progress_bar
from moebench.cli.options import AsJson, Device
from moebench.errors import UsageError, first_mistake
from moebench.run import request
from moebench.workload.case import Case
from moebench.workload.models import MODELS, shape_fields

commands = typer.Typer()


@commands.command()
def tune(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="a model, or a shape like e64k6d1024i512")],
    num_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens of a call; repeatable; default: 16, 256, 4096 and 16384")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure tiles of the engine triton on this GPU, and store those that are faster than the default.

    A choice holds for this GPU model, this version of Triton, the shape, the dtype and about this number of tokens.
    Layers read the choices when their process starts. Nothing is measured while a layer runs. Takes minutes for each
    number of tokens, most of it to compile.
    """
    cases = [_case(shape, count, dtype) for count in dict.fromkeys(num_tokens or [16, 256, 4096, 16384])]
    request.check_device(device)
    if find_spec("triton") is None:
        raise UsageError(missing("triton"))
    from moebench.measure.studies import tiles

    found: dict[Any, Any] = {}
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        for tuned in tiles.tune(cases, device):
            found[tuned.key] = tuned
            progress.update(task, advance=1, description=f"{tuned.key.kind}, {tuned.key.rows_per_expert:g} rows")
    file, place = tiles.file_of(device)
    better = sum(tuned.choice is not None for tuned in found.values())
    if as_json:
        products = [_as_dict(tuned) for tuned in found.values()]
        out.print_json(json.dumps({"file": str(file), **place._asdict(), "products": products}))
    else:
        out.print(_table(list(found.values())))
    err.print(f"{better} of {len(found)} products have a faster tile on this {place.gpu}: {file}")


def _case(shape: str, num_tokens: int, dtype: str) -> Case:
    fields = MODELS.get(shape) or shape_fields(shape)
    if fields is None:
        raise UsageError(
            f"{shape}: it must be a shape like e64k6d1024i512 (experts, top-k, dim, inter), "
            f"or one of {', '.join(MODELS)}"
        )
    if dtype not in ("bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: it must be bfloat16 or float16, which the engine triton takes")
    try:
        return Case.model_validate({"num_tokens": num_tokens, "dtype": dtype, **fields})
    except ValidationError as error:
        raise UsageError(f"{shape}: {first_mistake(error)}") from None


def _table(found: list[Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("product", "matrices", "rows/expert", "default ms", "best ms", "speedup"):
        table.add_column(name, justify="left" if name in ("product", "matrices") else "right", no_wrap=True)
    for tuned in found:
        times = tuned.default_time_ms, tuned.time_ms
        table.add_row(
            tuned.key.kind,
            "×".join(map(str, tuned.key.matrices)),
            f"{tuned.key.rows_per_expert:g}",
            *(f"{time:.4f}" for time in times),
            "default" if tuned.choice is None else f"{times[0] / times[1]:.2f}",
        )
    return table


def _as_dict(tuned: Any) -> dict[str, Any]:
    whole = {**vars(tuned), **tuned.key._asdict(), "tile": vars(tuned.tile), "default_tile": vars(tuned.default_tile)}
    return {name: value for name, value in whole.items() if name != "key"}
