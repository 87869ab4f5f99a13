"""Show a frame of results as one self-contained HTML page with the machine, the verdict, tables and plots.

The page contains its styles, script and plots. It loads nothing, and its content security policy forbids loading.
The template escapes every text that comes from results. Without the script, the table has no filters and no sorting.
"""

import base64
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pandas as pd

from moebench import escapes
from moebench.machine.environment import Environment, Gpu
from moebench.machine.units import size
from moebench.report import pagetable
from moebench.report.pagebest import best_table, context_table
from moebench.report.plots.kinds import (
    BREAKDOWN,
    DECODE,
    MEMORY,
    PARITY,
    RATIO,
    REPLAY,
    ROOFLINE,
    SCALING,
    THROUGHPUT,
)
from moebench.report.ranking import close_rows, num_compared
from moebench.report.reproduce import Reproducer
from moebench.report.tables.tables import details, fastest_rows
from moebench.results.folder import environments_beside
from moebench.results.frame import SAMPLE_COLUMNS
from moebench.results.labels import DECODE_TOKENS, backend_labels, describe, in_case_order, machine, shape_names
from moebench.results.record import GOOD

if TYPE_CHECKING:
    from moebench.verdicts.document import GateDocument

_HEADLINE = ("torch", "cuda", "revision")  # the facts of the environment that the head of the page shows


def page(frame: pd.DataFrame, svgs: Mapping[str, bytes], folder: Path, gate: "GateDocument | None" = None) -> str:
    """Return the HTML page of `frame`, which has the results in `folder`.

    `svgs` has the plots by name. `gate` has the verdicts of a gate to show, or is None. Raises ResultsError if a file
    of an environment in `folder` is not valid.
    """
    rows = in_case_order(frame.drop(columns=list(SAMPLE_COLUMNS)))
    described = describe(rows)
    rows = rows.assign(
        label=backend_labels(rows),
        shape=shape_names(rows),
        fastest=fastest_rows(rows),
        close=close_rows(rows),
        heading=described.headings,
    )
    environments = [environment_facts(found) for found in environments_beside(folder).values()]
    headline = [f"{name} {value}" for facts in environments for name, value in facts if name in _HEADLINE]
    return template("report.html").render(
        title=" and ".join(dict.fromkeys(rows["run_id"])) if rows["run_id"].nunique() < 3 else folder.name,
        where=machine(rows),
        shared=described.title(),
        environments=environments,
        software=", ".join(dict.fromkeys(headline)),
        statuses=Counter(map(str, rows["status"])),
        good=[status.value for status in GOOD],
        gate=gate,
        reasons=[text.plain for text in details(rows)],
        wins=_wins(rows),
        num_compared=num_compared(rows),
        plots=_plots(svgs),
        decode_tokens=DECODE_TOKENS,
        has_ceilings=bool(rows["roofline_fraction"].notna().any()),
        best=best_table(rows),
        contexts=context_table(rows),
        table=pagetable.results_table(rows),
        extremes=pagetable.extremes(rows, Reproducer.of(folder)),
        spent=pagetable.time_spent(rows),
    )


def template(name: str) -> jinja2.Template:
    """Return a template of this package. It escapes every text."""
    return _environment().get_template(name)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("moebench.report", "templates"),
        autoescape=True,
        finalize=lambda value: escapes.visible(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def environment_facts(found: Environment) -> list[tuple[str, str]]:
    """Return names and values that describe the machine and the software."""
    gpus = Counter(map(_gpu_text, found.gpus))
    revision = f"{found.git_revision[:12]}{', with changes' if found.git_dirty else ''}" if found.git_revision else None
    facts = [
        *(("GPU", f"{count} × {text}" if count > 1 else text) for text, count in gpus.items()),
        ("CPU", f"{found.cpu_model}, {found.cpu_cores_usable} cores, {found.num_threads} threads"),
        ("memory", size(found.memory_bytes)),
        ("system", f"{found.os}, Python {found.python}"),
        *found.versions.items(),
        ("moebench", found.moebench),
        ("revision", revision),
        ("fingerprint", found.env_id),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _gpu_text(gpu: Gpu) -> str:
    facts = {
        "{}": gpu.name,
        "{} of memory": size(gpu.memory_bytes),
        "driver {}": gpu.driver_version,
        "{:g} W": gpu.power_limit_w,
        "at most {} MHz": gpu.max_sm_clock_mhz,
    }
    return ", ".join(text.format(value) for text, value in facts.items() if value is not None)


def _wins(rows: pd.DataFrame) -> dict[str, int]:
    """Return the number of cases in which each backend is the fastest, by more than noise, the most first."""
    counts = Counter(map(str, rows.loc[rows["fastest"], "label"]))
    return dict(counts.most_common())


def _plots(svgs: Mapping[str, bytes]) -> list[list[tuple[str, str]]]:
    """Return the name and data URI of every plot in two groups.

    The plots of the first group compare backends. The plots of the second group show why backends differ, and that
    they are right.
    """
    groups = (RATIO, THROUGHPUT, DECODE, SCALING, MEMORY), (ROOFLINE, BREAKDOWN, PARITY, REPLAY)
    return [
        [(name, _data_uri(svg)) for kind in kinds for name, svg in svgs.items() if name.startswith(f"{kind.name}-")]
        for kinds in groups
    ]


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
