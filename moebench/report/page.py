"""Frame -> one self-contained HTML page: what was measured where, how it ended, tables, plots. No torch here.

The page loads nothing: styles, script and plots are in it, and its content security policy forbids the rest. All that
comes from results is escaped by the template. Without its script the table is a plain one.
"""

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jinja2
import pandas as pd

from moebench.machine.environment import Environment, Gpu
from moebench.machine.units import size
from moebench.report import pagetable
from moebench.report.plots.kinds import BREAKDOWN, MEMORY, PARITY, ROOFLINE, SCALING, THROUGHPUT
from moebench.report.reproduce import Reproducer
from moebench.report.tables.tables import details, fastest_rows
from moebench.results.folder import environments_beside
from moebench.results.labels import backend_labels, describe, in_case_order, machine
from moebench.results.record import GOOD
from moebench.verdicts.document import GateDocument

REPORT_NAME = "report.html"
_HEADLINE = ("torch", "cuda", "revision")  # of the environment, for the page's head


def page(frame: pd.DataFrame, svgs: Mapping[str, bytes], folder: Path, gate: GateDocument | None = None) -> str:
    """The page of `frame`, the results in `folder`, with its plots `svgs` by their names, and a gate's verdicts.

    Raises ResultsError where a file of `folder` that should hold an environment holds none.
    """
    rows = in_case_order(frame)
    rows = rows.assign(label=backend_labels(rows), fastest=fastest_rows(rows), heading=describe(rows).headings)
    environments = [environment_facts(found) for found in environments_beside(folder).values()]
    headline = [f"{name} {value}" for facts in environments for name, value in facts if name in _HEADLINE]
    return _template().render(
        title=" and ".join(dict.fromkeys(rows["run_id"])) if rows["run_id"].nunique() < 3 else folder.name,
        where=machine(rows),
        shared=describe(rows).title(),
        environments=environments,
        software=", ".join(dict.fromkeys(headline)),
        statuses=Counter(map(str, rows["status"])),
        good=[status.value for status in GOOD],
        gate=gate,
        reasons=[text.plain for text in details(rows)],
        wins=_wins(rows),
        num_compared=int(rows["fastest"].sum()),
        plots=_plots(svgs),
        has_ceilings=bool(rows["roofline_fraction"].notna().any()),
        table=pagetable.results_table(rows),
        extremes=pagetable.extremes(rows, Reproducer.of(folder)),
        spent=pagetable.time_spent(rows),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moebench.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def environment_facts(found: Environment) -> list[tuple[str, str]]:
    """Names and values of machine and software."""
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
    """Of each backend, in how many cases it has the lowest median."""
    counts = Counter(map(str, rows.loc[rows["fastest"], "label"]))
    return dict(counts.most_common())


def _plots(svgs: Mapping[str, bytes]) -> list[list[tuple[str, str]]]:
    """Name and data URI of every plot: those that compare backends, and those that say why."""
    groups = (THROUGHPUT, SCALING, MEMORY, PARITY), (ROOFLINE, BREAKDOWN)
    return [
        [(name, _data_uri(svg)) for kind in kinds for name, svg in svgs.items() if name.startswith(f"{kind.name}-")]
        for kinds in groups
    ]


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
