"""Write the cases of a table as one column of text whose parts are aligned."""

from collections.abc import Iterable

import pandas as pd

from moebench.results.labels import Description
from moebench.workload.models import shape_fields

_TITLED_PARTS = ("experts", "tokens", "dtype", "mode", "routing", "activation")


def case_column(described: Description, width: int) -> tuple[str, "pd.Series[str]"]:
    """Return header and labels of the parts that vary between cases, without trailing spaces in the header.

    If the parts fit in `width`, they are aligned. Else the labels have them in words. If nothing varies, header and
    labels are empty.
    """
    varying = _without_fixed(described.varying)
    # the last parts, such as "25% masked" or "EP 8", need no title
    titles = [str(name) if name in _TITLED_PARTS else "" for name in varying]
    wide = [
        max(len(title), int(texts.str.len().max())) for title, (_, texts) in zip(titles, varying.items(), strict=True)
    ]
    if not titles or sum(wide) + len(wide) - 1 > width:
        return "case" * bool(titles), described.headings

    def straight(texts: Iterable[str]) -> str:
        cells = zip(texts, titles, wide, strict=True)
        return " ".join(text.rjust(size) if title == "tokens" else text.ljust(size) for text, title, size in cells)

    labels = [straight(row) for row in varying.itertuples(index=False)]
    return straight(titles).rstrip() or "case", _named(pd.Series(labels, index=varying.index, dtype="str"))


def _without_fixed(varying: pd.DataFrame) -> pd.DataFrame:
    """Return the parts without the activation if all cases name a model, which fixes its activation."""
    if not {"experts", "activation"} <= set(varying) or any(map(shape_fields, varying["experts"].unique())):
        return varying
    is_fixed = varying.groupby("experts")["activation"].nunique().max() == 1
    return varying.drop(columns="activation") if is_fixed else varying


def _named(labels: "pd.Series[str]") -> "pd.Series[str]":
    """Return the labels with a word for a case whose varying parts are all at their defaults."""
    is_blank = labels.str.strip() == ""
    return labels if is_blank.all() else labels.mask(is_blank, "defaults")
