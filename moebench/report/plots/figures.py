"""Draw a frame of results as matplotlib figures that are readable at a width of 400 px.

A workload family is all cases on one machine that differ only in tokens, mode, routing, load of the ranks and seed.
Each family has one figure of throughput, one of the time against the fastest time, and one of memory. If its decoding
steps were captured as CUDA graphs, it has one of decoding. Each of these figures has one panel per mode, routing and
load, and a panel has one line per backend with two or more token counts in the panel. If a backend of a case is not on
a line, an overview of the EP size shows the case, so that every measured case is visible. One roofline figure shows all
cases of an EP size, and one small figure of parity shows all jobs. A case with captured routing has a figure of its
replay. At EP sizes above 1, more figures show the parts of a pass. Workloads that were measured at several EP sizes
have a figure of throughput against the EP size.

A function such as `throughput` plans pictures, and a picture is drawn when it is asked for: `draw` draws all of them,
and one that fails does not keep others from being drawn. No figure belongs to pyplot, so that no display is needed and
matplotlib's state does not change.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from moebench.report.plots import bars, lines, replays, strip
from moebench.report.plots import roofline as rooflines
from moebench.report.plots import scaling as scalings
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
    Kind,
    Metric,
    with_fastest,
)
from moebench.report.plots.rendering import failure, images
from moebench.results.files import write_atomically
from moebench.results.frame import SAMPLE_COLUMNS
from moebench.results.labels import backend_labels, describe, in_case_order, is_decode
from moebench.results.record import Status
from moebench.workload.case import Case

_KINDS = (THROUGHPUT, RATIO, DECODE, SCALING, MEMORY, PARITY, ROOFLINE, BREAKDOWN, REPLAY)
_PREFIXES = tuple(f"{kind.name}-" for kind in _KINDS)  # every written file begins with one of them

_PAGE_IN = 11.0  # the largest height in inches of an overview with more than one case

_LONGEST_SLUG = 120  # characters; a file system takes 255 bytes in the name of a file


class Picture(NamedTuple):
    """A figure that is not drawn yet, and the name of its file without a suffix. `draw` needs moebench's settings."""

    name: str
    draw: Callable[[], Figure]


@dataclass
class Drawn:
    """The pictures of a frame: the bytes of each file by name and kind, and one line for each that failed."""

    images: dict[str, dict[str, bytes]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


#: A figure holds cases that differ only in these fields and in the backend.
_ALONG_A_LINE = ("num_tokens", "mode", "routing", "rank_load", "seed")
_FAMILY = (*(name for name in Case.model_fields if name not in _ALONG_A_LINE), "device", "gpu")


def throughput(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of tokens/s and TFLOP/s per GPU against tokens, with the 95% confidence interval as a band.

    The figures show only rows with status ok.
    """
    return _metric_figures(frame, THROUGHPUT)


def ratio(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of each time divided by the fastest time of its case, against tokens.

    A case with fewer than two times has no ratio.
    """
    return _metric_figures(with_fastest(frame), RATIO)


def decode(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of the time of decoding steps: replayed as a CUDA graph (solid), and called (dashed).

    They show the cases in which a backend was captured as a graph.
    """
    steps = frame[is_decode(frame)]
    captured = steps.loc[steps["graph_time_ms"].notna(), "case_id"]
    return _metric_figures(steps[steps["case_id"].isin(captured)], DECODE)


def scaling(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of tokens/s per GPU against the EP size. All points of a line have equal tokens per rank.

    The figures show only rows with status ok.
    """
    pictures = []
    columns = [name for name in _FAMILY if name != "ep_size"]
    for _, family in in_case_order(frame).groupby(columns, dropna=False, sort=False):
        some = scalings.on_lines(family)
        if _has_values(some, SCALING):
            pictures.append(Picture(_slug(SCALING, some), partial(scalings.family_figure, some)))
    return _distinct(pictures)


def memory(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of peak memory (solid) and memory saved for backward (dashed) against tokens.

    The figures show only rows with status ok.
    """
    return _metric_figures(frame, MEMORY)


def parity(frame: pd.DataFrame) -> list[Picture]:
    """Return one small picture for each machine: the worst error of each job divided by its budget, by backend.

    A line marks the budget, and a cross marks each mismatch.
    """
    pictures = [
        Picture(f"{PARITY.name}-overview", partial(strip.page_figure, some))
        for _, some in in_case_order(frame).groupby(["device", "gpu"], dropna=False, sort=False)
        if _has_values(some, PARITY)
    ]
    return _distinct(pictures)


def breakdown(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures with bars of dispatch, compute and combine under expert parallelism, at two token counts.

    The layers of other libraries have no parts, and no bars.
    """
    drawing = _Drawing(bars.in_family, bars.family_figure, bars.page_figure, bars.case_in)
    has_parts = frame["dispatch_ms"].notna() | frame["status"].ne(Status.ok)
    return _figures(frame[(frame["ep_size"] > 1) & has_parts], BREAKDOWN, drawing)


def replay(frame: pd.DataFrame) -> list[Picture]:
    """Return a picture of each case with captured routing: times of steps, load of experts and ranks."""
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    pictures = []
    rows = rows[rows["case_id"].isin(rows.loc[rows["num_steps"].notna(), "case_id"])]  # most runs have no replay
    for _, case in rows.groupby(["case_id", "device", "gpu"], dropna=False, sort=False):
        if _has_values(case, REPLAY):
            pictures.append(Picture(_slug(REPLAY, case), partial(replays.case_figure, case)))
    return _distinct(pictures)


def roofline(frame: pd.DataFrame) -> list[Picture]:
    """Return pictures of TFLOP/s per GPU against arithmetic intensity, with ceilings if the run measured ceilings."""
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    pictures = []
    for _, some in rows.groupby(["ep_size", "device", "gpu"], dropna=False, sort=False):
        if _has_values(some, ROOFLINE):
            name = _overview(ROOFLINE, some["ep_size"].iloc[0])
            pictures.append(Picture(name, partial(rooflines.page_figure, some)))
    return _distinct(pictures)


#: Columns that no picture shows.
_UNSEEN = ("detail", "flags", "executed", "gpu_uuid", "parity_worst_tensor", "parity_errors", "env_id", "check")


def draw(frame: pd.DataFrame, formats: Sequence[str] = ("png", "svg")) -> Drawn:
    """Draw all pictures of `frame`. The same frame gives the same bytes of SVG.

    An error of one picture becomes a line in `failures`, whatever it is: results must not be lost for a picture.
    """
    drawn = Drawn()
    frame = frame.drop(columns=[*SAMPLE_COLUMNS, *_UNSEEN])  # it takes long to move them
    for plan in (throughput, ratio, decode, scaling, memory, parity, roofline, breakdown, replay):
        try:
            pictures = plan(frame)
        except Exception as error:
            drawn.failures.append(failure(f"of {plan.__name__}", error))
            continue
        for picture in pictures:
            try:
                drawn.images[picture.name] = images(picture.draw, formats)
            except Exception as error:
                drawn.failures.append(failure(picture.name, error))
    return drawn


def write_plots(drawn: Drawn, folder: Path) -> list[Path]:
    """Write the pictures of a frame into `folder`, and return the paths. Remove plots that the frame no longer has.

    A missing folder is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, by_kind in drawn.images.items():
        for kind, content in by_kind.items():
            paths.append(folder / f"{name}.{kind}")
            write_atomically(paths[-1], content)
    _remove_all_but(set(drawn.images), folder)
    return paths


def _remove_all_but(slugs: set[str], folder: Path) -> None:
    """Remove plots with other names than `slugs`. Keep every file that `write_plots` cannot have written."""
    for path in folder.iterdir():
        ours = path.suffix in (".png", ".svg") and path.stem.startswith(_PREFIXES) and path.is_file()
        if ours and path.stem not in slugs:
            path.unlink()


def _metric_figures(frame: pd.DataFrame, metric: Metric) -> list[Picture]:
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


def _figures(frame: pd.DataFrame, kind: Kind, drawing: _Drawing) -> list[Picture]:
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    rows["case"] = rows.groupby(["case_id", "device", "gpu", "run_id"], dropna=False, sort=False).ngroup()
    pictures = []
    gathered = [rows.iloc[:0]]
    for _, family in rows.groupby(list(_FAMILY), dropna=False, sort=False):
        in_family = drawing.in_family(family)
        rest = set(family.loc[~in_family, "case"])
        gathered.append(family[family["case"].isin(rest)])  # with all backends of the case, to compare the backends
        some = family[in_family]
        if _has_values(some, kind):
            pictures.append(Picture(_slug(kind, some), partial(drawing.family, some)))
    lone = pd.concat(gathered)
    for ep_size in sorted(set(lone["ep_size"])):
        pages = [page for page in _pages(lone[lone["ep_size"] == ep_size], drawing.case_in) if _has_values(page, kind)]
        pictures += [Picture(_overview(kind, ep_size), partial(drawing.page, page)) for page in pages]
    return _distinct(pictures)


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
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    if len(slug) <= _LONGEST_SLUG:
        return slug
    return f"{slug[:_LONGEST_SLUG]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _overview(kind: Kind, ep_size: int) -> str:
    return f"{kind.name}-overview" if ep_size == 1 else f"{kind.name}-overview-ep-{ep_size}"


def _distinct(pictures: list[Picture]) -> list[Picture]:
    """Return the pictures with distinct names. A name that occurs again, as on a second machine, gets a number."""
    counts: Counter[str] = Counter()
    distinct = []
    for name, make in pictures:
        counts[name] += 1
        distinct.append(Picture(name if counts[name] == 1 else f"{name}-{counts[name]}", make))
    return distinct
