"""Measure one part of a layer with each of these programs: `python -m moebench.measure.studies.NAME --help`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from moebench import escapes
from moebench.errors import EXIT_USAGE, MoebenchError, UsageError, wrong_usage
from moebench.machine.environment import gpu_numbers
from moebench.measure.worker import pick_device

_TyperUsageError: Any = typer.BadParameter.__bases__[0]  # typer has no public name for it


def run(study: Callable[..., None], name: str) -> None:
    """Run a study as a program with the function's arguments. A wrong argument ends it with one line and exit code 2.

    `name` is the name of the program's module.
    """
    program = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    program.command()(study)
    try:
        raise SystemExit(program(prog_name=f"python -m {name}", standalone_mode=False))
    except MoebenchError as error:
        lines = list(error.lines)
    except _TyperUsageError as error:
        lines = [wrong_usage(error, f"python -m {name}")]
    for line in lines:
        sys.stderr.write(f"{escapes.line(line)}\n")
    raise SystemExit(EXIT_USAGE)


def places(device: str | None, out: Path | None) -> torch.device:
    """Return the device that a study measures on.

    Raises UsageError if the device or the folder of `out` is not there.
    """
    try:
        gpu_numbers(device or "cpu")
    except ValueError as absent:
        raise UsageError(f"--{str(absent).replace(' = ', ' ', 1)}") from absent
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it, or name a file in another folder")
    return pick_device(device)
