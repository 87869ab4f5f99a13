"""Frame -> matplotlib figures, readable at 400 px width: throughput, memory and parity against tokens. No torch here.

A workload family (all of a case but its tokens, mode, routing, load of the ranks and seed, on one machine) with two
token counts or more has a figure of its own, with a panel for each mode, routing and load; the rest of an EP size is
gathered in an overview, so that nothing measured is invisible. Under expert parallelism there is also the breakdown of
a forward. Only figures, no pyplot: importing this changes nothing for who imports it.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from moebench import bars
from moebench.frame import write_atomically
from moebench.labels import backend_labels, describe, in_case_order
from moebench.lines import line_figure, overview_figure
from moebench.look import RC, settle
from moebench.metrics import BREAKDOWN, MEMORY, PARITY, THROUGHPUT, Kind, Metric

_CASES_A_PAGE, _MARKS_A_PAGE = 24, 72
_PREFIXES = tuple(f"{kind.name}-" for kind in (THROUGHPUT, MEMORY, PARITY, BREAKDOWN))  # of every file that is written

Named = list[tuple[str, Figure]]

#: A line joins cases that agree in these; they differ in tokens, mode, routing, load, seed and backend.
_FAMILY = (
    *("model", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "dtype", "expert_activation"),
    *("expert_bias", "activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down"),
    *("masked_share", "ep_size", "device", "gpu"),
)


def throughput(frame: pd.DataFrame) -> Named:
    """Tokens/s per GPU against tokens, TFLOP/s on the right, the 95% interval as a band. Only rows with status ok."""
    return _metric_figures(frame, THROUGHPUT)


def memory(frame: pd.DataFrame) -> Named:
    """Peak memory against tokens, and dashed what forward leaves saved for backward. Only rows with status ok."""
    return _metric_figures(frame, MEMORY)


def parity(frame: pd.DataFrame) -> Named:
    """The worst error over its budget against tokens, with a line at the budget; a mismatch has a cross."""
    return _metric_figures(frame, PARITY)


def breakdown(frame: pd.DataFrame) -> Named:
    """Dispatch, compute and combine of a forward under expert parallelism, at the largest and a middle token count."""
    return _figures(frame[frame["ep_size"] > 1], BREAKDOWN, bars.family_figure, bars.page_figure)


def write_plots(frame: pd.DataFrame, folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write every figure of `frame` into `folder`, made if missing, and remove plots there of what it no longer holds.

    The same frame gives the same SVG, to the byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    named = [*throughput(frame), *memory(frame), *parity(frame), *breakdown(frame)]
    for slug, figure in named:
        settle(figure)
        for kind in formats:
            image = io.BytesIO()
            with matplotlib.rc_context(RC):
                figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
            paths.append(folder / f"{slug}.{kind}")
            write_atomically(paths[-1], image.getvalue())
    _remove_all_but({slug for slug, _ in named}, folder)
    return paths


def _remove_all_but(slugs: set[str], folder: Path) -> None:
    """Remove the plots of other names, but no file that `write_plots` cannot have written."""
    for path in folder.iterdir():
        ours = path.suffix in (".png", ".svg") and path.stem.startswith(_PREFIXES) and path.is_file()
        if ours and path.stem not in slugs:
            path.unlink()


def _metric_figures(frame: pd.DataFrame, metric: Metric) -> Named:
    return _figures(frame, metric, lambda rows: line_figure(rows, metric), lambda page: overview_figure(page, metric))


def _figures(
    frame: pd.DataFrame,
    kind: Kind,
    of_family: Callable[[pd.DataFrame], Figure],
    of_page: Callable[[pd.DataFrame], Figure],
) -> Named:
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    rows["case"] = rows.groupby(["case_id", "device", "gpu", "run_id"], dropna=False, sort=False).ngroup()
    named: Named = []
    gathered = [rows.iloc[:0]]
    with matplotlib.rc_context(RC):
        for _, family in rows.groupby(list(_FAMILY), dropna=False, sort=False):
            some = family[family["num_tokens"] > 0]  # a logarithmic axis has no place for 0
            is_line = some["num_tokens"].nunique() > 1
            gathered.append(family.drop(some.index) if is_line else family)
            if is_line and _has_values(some, kind):
                named.append((_slug(kind, some), of_family(some)))
        lone = pd.concat(gathered)
        for ep_size in sorted(set(lone["ep_size"])):
            name = f"{kind.name}-overview" if ep_size == 1 else f"{kind.name}-overview-ep-{ep_size}"
            named += [(name, of_page(page)) for page in _pages(lone[lone["ep_size"] == ep_size], kind)]
    return _distinct(named)


def _pages(rows: pd.DataFrame, kind: Kind) -> list[pd.DataFrame]:
    """Rows of as many cases as fit one overview, if they have something to show."""
    cases = list(dict.fromkeys(rows["case"]))
    step = max(1, min(_CASES_A_PAGE, _MARKS_A_PAGE // rows["line"].nunique()))
    parts = [cases[start : start + step] for start in range(0, len(cases), step)]
    pages = [rows[rows["case"].isin(part)] for part in parts]
    return [page for page in pages if _has_values(page, kind)]


def _has_values(rows: pd.DataFrame, kind: Kind) -> bool:
    return bool(kind.points(rows)["value"].notna().any())


def _slug(kind: Kind, rows: pd.DataFrame) -> str:
    words = f"{kind.name} {describe(rows).title('tokens', 'mode', 'routing', 'rank_load', 'seed')}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _distinct(named: Named) -> Named:
    """Number the names that occur again, as on a second machine."""
    counts: Counter[str] = Counter()
    distinct = []
    for slug, figure in named:
        counts[slug] += 1
        distinct.append((slug if counts[slug] == 1 else f"{slug}-{counts[slug]}", figure))
    return distinct
