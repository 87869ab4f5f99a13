"""Define the Arrow schema of results, which follows from the fields of `Record`."""

from collections.abc import Hashable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa  # type: ignore[import-untyped]

from moebench.results.columns import Rounds
from moebench.results.record import COLUMN_OF, Record, Status

#: Columns with one list for each row, which has one entry for each sample.
SAMPLE_COLUMNS = tuple(name for name, column in COLUMN_OF.items() if column.rounds is Rounds.SAMPLES)

ARROW_TYPES: Mapping[Hashable, Any] = {
    str: pa.string(),
    Status: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    tuple[str, ...]: pa.list_(pa.string()),
    tuple[int, ...]: pa.list_(pa.int64()),
    tuple[float, ...]: pa.list_(pa.float64()),
    tuple[bool, ...]: pa.list_(pa.bool_()),
    dict[str, float]: pa.string(),
}


def _bare(annotation: Any) -> Any:
    """Return the type of the values that an annotation allows, without `Annotated` and without None."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bare(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (tuple, dict):
        return origin[tuple(some if some is ... else _bare(some) for some in arguments)]
    if origin in (Union, UnionType):
        (some,) = (kind for kind in arguments if kind is not NoneType)
        return _bare(some)
    return annotation


#: The name of each field of Record in the journal and in frames.
ALIASES = {name: field.alias or name for name, field in Record.model_fields.items()}
#: The Arrow schema of all results: Record's fields in their order, with the names that the journal uses.
ARROW_SCHEMA = pa.schema(
    [(ALIASES[name], ARROW_TYPES[_bare(field.annotation)]) for name, field in Record.model_fields.items()]
)
COLUMNS: tuple[str, ...] = tuple(ARROW_SCHEMA.names)
