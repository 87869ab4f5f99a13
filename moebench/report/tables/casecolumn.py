"""Write the cases of a table as one column of text whose parts are aligned."""

from collections.abc import Iterable, Mapping

from moebench.results.labels import Description
from moebench.workload.models import shape_fields

_TITLED_PARTS = ("experts", "tokens", "dtype", "mode", "routing", "activation")


def case_column(described: Description, width: int) -> tuple[str, list[str]]:
    """Return header and labels of the parts that vary between cases, without trailing spaces in the header.

    If the parts fit in `width`, they are aligned. Else the labels have them in words. If nothing varies, header and
    labels are empty.
    """
    varying = _without_fixed(described.varying)
    # the last parts, such as "25% masked" or "EP 8", need no title
    titles = [name if name in _TITLED_PARTS else "" for name in varying]
    wide = [max(len(title), *map(len, texts)) for title, texts in zip(titles, varying.values(), strict=True)]
    if not titles or sum(wide) + len(wide) - 1 > width:
        return "case" * bool(titles), described.headings

    def straight(texts: Iterable[str]) -> str:
        cells = zip(texts, titles, wide, strict=True)
        return " ".join(text.rjust(size) if title == "tokens" else text.ljust(size) for text, title, size in cells)

    labels = [straight(row) for row in zip(*varying.values(), strict=True)]
    return straight(titles).rstrip() or "case", _named(labels)


def _without_fixed(varying: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
    """Return the parts without the activation if all cases name a model, which fixes its activation."""
    if not {"experts", "activation"} <= varying.keys() or any(map(shape_fields, set(varying["experts"]))):
        return varying
    pairs = set(zip(varying["experts"], varying["activation"], strict=True))
    is_fixed = len(pairs) == len(set(varying["experts"]))
    return {name: texts for name, texts in varying.items() if not (name == "activation" and is_fixed)}


def _named(labels: list[str]) -> list[str]:
    """Return the labels with a word for a case whose varying parts are all at their defaults."""
    has_text = any(map(str.strip, labels))
    return [label if label.strip() or not has_text else "defaults" for label in labels]
