"""Draw a frame of results as matplotlib figures that are readable at a width of 400 px.

A workload family is all cases on one machine that differ only in tokens, mode, routing, load of the ranks and seed.
Each family has one figure of throughput, one of memory and one of parity. Each of these figures has one panel per mode,
routing and load, and a panel has one line per backend with two or more token counts in the panel. If a backend of a
case is not on a line, an overview of the EP size shows the case, so that every measured case is visible. One roofline
figure shows all cases of an EP size. At EP sizes above 1, more figures show the parts of a forward pass. Workloads that
were measured at several EP sizes have a figure of throughput against the EP size.

This module does not import pyplot, so that an import of this module does not change matplotlib's state.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from moebench.report.plots import bars, lines
from moebench.report.plots import roofline as rooflines
from moebench.report.plots import scaling as scalings
from moebench.report.plots.kinds import BREAKDOWN, MEMORY, PARITY, ROOFLINE, SCALING, THROUGHPUT, Kind, Metric
from moebench.report.plots.look import RC, settle
from moebench.results.files import write_atomically
from moebench.results.labels import backend_labels, describe, in_case_order
from moebench.workload.case import Case

_KINDS = (THROUGHPUT, SCALING, MEMORY, PARITY, ROOFLINE, BREAKDOWN)
_PREFIXES = tuple(f"{kind.name}-" for kind in _KINDS)  # every written file begins with one of them

_PAGE_IN = 11.0  # the largest height in inches of an overview with more than one case

Named = list[tuple[str, Figure]]

#: A figure holds cases that differ only in these fields and in the backend.
_ALONG_A_LINE = ("num_tokens", "mode", "routing", "rank_load", "seed")
_FAMILY = (*(name for name in Case.model_fields if name not in _ALONG_A_LINE), "device", "gpu")


def throughput(frame: pd.DataFrame) -> Named:
    """Return figures of tokens/s and TFLOP/s per GPU against tokens, with the 95% confidence interval as a band.

    The figures show only rows with status ok.
    """
    return _metric_figures(frame, THROUGHPUT)


def scaling(frame: pd.DataFrame) -> Named:
    """Return figures of tokens/s per GPU against the EP size. All points of a line have equal tokens per rank.

    The figures show only rows with status ok.
    """
    named: Named = []
    columns = [name for name in _FAMILY if name != "ep_size"]
    with matplotlib.rc_context(RC):
        for _, family in in_case_order(frame).groupby(columns, dropna=False, sort=False):
            some = scalings.on_lines(family)
            if _has_values(some, SCALING):
                named.append((_slug(SCALING, some), scalings.family_figure(some)))
    return _distinct(named)


def memory(frame: pd.DataFrame) -> Named:
    """Return figures of peak memory (solid) and memory saved for backward (dashed) against tokens.

    The figures show only rows with status ok.
    """
    return _metric_figures(frame, MEMORY)


def parity(frame: pd.DataFrame) -> Named:
    """Return figures of the worst error divided by its budget, against tokens.

    A line marks the budget, and a cross marks each mismatch.
    """
    return _metric_figures(frame, PARITY)


def breakdown(frame: pd.DataFrame) -> Named:
    """Return figures with bars of dispatch, compute and combine under expert parallelism, at two token counts."""
    drawing = _Drawing(bars.in_family, bars.family_figure, bars.page_figure, bars.case_in)
    return _figures(frame[frame["ep_size"] > 1], BREAKDOWN, drawing)


def roofline(frame: pd.DataFrame) -> Named:
    """Return figures of TFLOP/s per GPU against arithmetic intensity, with ceilings if the run measured ceilings."""
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    named: Named = []
    with matplotlib.rc_context(RC):
        for _, some in rows.groupby(["ep_size", "device", "gpu"], dropna=False, sort=False):
            if _has_values(some, ROOFLINE):
                named.append((_overview(ROOFLINE, some["ep_size"].iloc[0]), rooflines.page_figure(some)))
    return _distinct(named)


def all_figures(frame: pd.DataFrame) -> Named:
    """Return all figures of `frame` with their names. The layout of each figure is fixed."""
    drawn = (throughput, scaling, memory, parity, roofline, breakdown)
    named = [pair for draw in drawn for pair in draw(frame)]
    for _, figure in named:
        settle(figure)
    return named


def image(figure: Figure, kind: str) -> bytes:
    """Return a figure with a fixed layout as "png" or "svg". The same frame gives the same bytes of SVG."""
    content = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def write_plots(named: Named, folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write the figures of a frame into `folder`, and return the paths. Remove plots that the frame no longer has.

    A missing folder is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for slug, figure in named:
        for kind in formats:
            paths.append(folder / f"{slug}.{kind}")
            write_atomically(paths[-1], image(figure, kind))
    _remove_all_but({slug for slug, _ in named}, folder)
    return paths


def _remove_all_but(slugs: set[str], folder: Path) -> None:
    """Remove plots with other names than `slugs`. Keep every file that `write_plots` cannot have written."""
    for path in folder.iterdir():
        ours = path.suffix in (".png", ".svg") and path.stem.startswith(_PREFIXES) and path.is_file()
        if ours and path.stem not in slugs:
            path.unlink()


def _metric_figures(frame: pd.DataFrame, metric: Metric) -> Named:
    drawing = _Drawing(
        in_family=lines.on_lines,
        family=lambda rows: lines.family_figure(rows, metric),
        page=lambda rows: lines.page_figure(rows, metric),
        case_in=lines.case_in,
    )
    return _figures(frame, metric, drawing)


@dataclass(frozen=True)
class _Drawing:
    """The functions that draw one kind of figure."""

    in_family: Callable[[pd.DataFrame], "pd.Series[bool]"]  # which rows of a workload family its figure shows
    family: Callable[[pd.DataFrame], Figure]  # the figure of a family, from the rows that `in_family` chose
    page: Callable[[pd.DataFrame], Figure]  # one page of an overview, from the rows of the page
    case_in: Callable[[int], float]  # approximate height in inches of a case on a page, from its number of backends


def _figures(frame: pd.DataFrame, kind: Kind, drawing: _Drawing) -> Named:
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    rows["case"] = rows.groupby(["case_id", "device", "gpu", "run_id"], dropna=False, sort=False).ngroup()
    named: Named = []
    gathered = [rows.iloc[:0]]
    with matplotlib.rc_context(RC):
        for _, family in rows.groupby(list(_FAMILY), dropna=False, sort=False):
            in_family = drawing.in_family(family)
            rest = set(family.loc[~in_family, "case"])
            gathered.append(family[family["case"].isin(rest)])  # with all backends of the case, to compare the backends
            some = family[in_family]
            if _has_values(some, kind):
                named.append((_slug(kind, some), drawing.family(some)))
        lone = pd.concat(gathered)
        for ep_size in sorted(set(lone["ep_size"])):
            pages = _pages(lone[lone["ep_size"] == ep_size], drawing.case_in)
            named += [(_overview(kind, ep_size), drawing.page(page)) for page in pages if _has_values(page, kind)]
    return _distinct(named)


def _pages(rows: pd.DataFrame, case_in: Callable[[int], float]) -> list[pd.DataFrame]:
    """Return the rows of each page. A page has as many cases as fit."""
    pages: list[list[pd.DataFrame]] = []
    room = 0.0
    for _, case in rows.groupby("case", sort=False):
        room -= case_in(case["line"].nunique())
        if room < 0 or not pages:
            pages.append([])
            room = _PAGE_IN - case_in(case["line"].nunique())
        pages[-1].append(case)
    return [pd.concat(page) for page in pages]


def _has_values(rows: pd.DataFrame, kind: Kind) -> bool:
    return bool(kind.points(rows)["value"].notna().any())


def _slug(kind: Kind, rows: pd.DataFrame) -> str:
    words = f"{kind.name} {describe(rows).title('tokens', *_ALONG_A_LINE[1:])}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _overview(kind: Kind, ep_size: int) -> str:
    return f"{kind.name}-overview" if ep_size == 1 else f"{kind.name}-overview-ep-{ep_size}"


def _distinct(named: Named) -> Named:
    """Return the figures with distinct names. A name that occurs again, as on a second machine, gets a number."""
    counts: Counter[str] = Counter()
    distinct = []
    for slug, figure in named:
        counts[slug] += 1
        distinct.append((slug if counts[slug] == 1 else f"{slug}-{counts[slug]}", figure))
    return distinct
