"""Write the parity errors of a row as the text of a cell, and read such a cell."""

import json
import math
from collections.abc import Mapping
from functools import cache

from moebench.results.columns import jsonable


def cell_of_errors(errors: Mapping[str, float] | None) -> str | None:
    """Return the cell of the column `parity_errors`: a JSON object, or None without errors."""
    if not errors:
        return None
    if not math.isfinite(sum(errors.values())):
        return json.dumps({name: jsonable(error) for name, error in errors.items()})
    return _template(tuple(errors)) % tuple(errors.values())


@cache
def _template(names: tuple[str, ...]) -> str:
    """Return the text of errors of these tensors, with `%r` for each number, as which JSON writes it."""
    cells = (json.dumps(name).replace("%", "%%") + ": %r" for name in names)
    return "{" + ", ".join(cells) + "}"


def errors_of_cell(cell: str | None) -> dict[str, float]:
    """Return the errors in a cell that is not empty; an empty dictionary for None."""
    return {} if cell is None else {tensor: float(error) for tensor, error in json.loads(cell).items()}
