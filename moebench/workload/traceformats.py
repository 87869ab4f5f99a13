"""Read captured routing from the files that engines and trainers write, without torch.

Every format gives the indices [tokens, K] of each layer and rank. The formats, as of 2026-11:

* Megatron-Core's router trace (`--moe-routing-trace-path`, megatron/core/transformer/moe/router_trace.py) writes one
  `router_trace_rank{N}.jsonl` per rank, with a line for each step, block and layer: `step`, `block`, `layer`, `rank`,
  `top_indices` [tokens, K]. Lines of other blocks than `decoder` (multi-token prediction) are left out.
* vLLM (`--enable-return-routed-experts`; tests/entrypoints/openai/test_return_routed_experts.py) gives each choice of a
  response a text `routed_experts`: the base64 of a .npy file [tokens, layers, K]. In Python it is the array itself.
* SGLang (`--enable-return-routed-experts`, requests with `return_routed_experts`; the function
  `extract_routed_experts_from_meta_info` of sglang/srt/state_capturer/routed_experts.py reads what it returns) gives
  `meta_info.routed_experts`: the base64 of raw int32 values
  [tokens, layers, K]. The number of layers follows from `prompt_tokens` and `completion_tokens` in the response: the
  last token of a request has not been routed. OpenAI's endpoints have the text in `sglext` and the counts in `usage`.
* NVIDIA Dynamo wraps the values of vLLM as `data` (base64), `shape` and `dtype`.

Responses of vLLM and SGLang are one JSON document a line, or one for the file. Their layers count all layers of the
model. A layer without experts has the same number everywhere, and is left out.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.errors import InputsError

Indices = NDArray[Any]
#: The layer, the rank, and the indices [tokens, K] of a part of a trace.
Part = tuple[int, int, Indices]

#: Columns of a Parquet file with the experts of a row's token (or tokens), in the order in which they are tried.
COLUMNS = ("top_indices", "routed_experts", "topk_ids", "expert_ids", "experts", "indices")
ROUTED, COUNTS = "routed_experts", ("prompt_tokens", "completion_tokens")


def read_arrays(path: Path, files: Sequence[Path], top_k: int) -> dict[tuple[int, int], Indices]:
    """Return the arrays by layer and rank, from the files of the trace at `path`. They should be integers [tokens, K].

    `top_k` is K of the model; only SGLang's format needs it. Raises InputsError for files that cannot be read.
    """
    if not files:
        raise _wrong(path, "there is no such file")
    parts: dict[tuple[int, int], list[Indices]] = {}
    for file in files:
        rank = _number("rank", file.stem) or 0
        try:
            for layer, of_rank, indices in _READERS.get(file.suffix, _npy)(file, rank, top_k):
                parts.setdefault((layer, of_rank), []).append(indices)
        except KeyError as error:
            raise _wrong(path, f"{error} is missing") from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise _wrong(path, " ".join(str(error).split())) from error
    if not parts:
        raise _wrong(path, "there is no routing in it")
    try:
        return {key: np.concatenate(some) for key, some in sorted(parts.items())}
    except ValueError as error:
        raise _wrong(path, f"the number of experts of a token differs within a layer: {error}") from error


def _wrong(path: Path, why: str) -> InputsError:
    return InputsError(
        f"trace {path}: {why}; give a .npy file of integer expert indices [tokens, K] or [tokens, layers, K], or a "
        ".npz, .parquet or .jsonl file as docs/sweeps.md describes it"
    )


def _number(word: str, text: str) -> int | None:
    """Return the number after a word, for example 3 of `layer_3` or `layer3`."""
    found = re.search(rf"{word}[s_.:-]*([0-9]{{1,9}})", text.lower())
    return int(found[1]) if found else None


def _of_array(array: Any, layer: int, rank: int) -> Iterator[Part]:
    """Yield the parts of an array [tokens, K], [tokens, layers, K] or [ranks, tokens, layers, K].

    Layers and ranks of the array count on from `layer` and `rank`.
    """
    found = np.asarray(array)
    if found.ndim == 3:
        for number in range(found.shape[1]):
            of_layer = found[:, number]
            if found.shape[2] < 2 or not len(found) or (of_layer != of_layer[0, 0]).any():  # else it has no experts
                yield layer + number, rank, of_layer
    elif found.ndim == 4:
        for number, of_rank in enumerate(found):
            yield from _of_array(of_rank, layer, rank + number)
    else:
        yield layer, rank, found


def _npy(file: Path, rank: int, _: int) -> Iterator[Part]:
    with file.open("rb") as content:
        yield from _of_array(np.lib.format.read_array(content, allow_pickle=False), 0, rank)


def _npz(file: Path, rank: int, _: int) -> Iterator[Part]:
    """Names may have the layer and the rank: `layer3_rank0`. Arrays without either are layers in the file's order."""
    with np.load(file, allow_pickle=False) as arrays:
        for number, name in enumerate(arrays.files):
            layer, of_rank = _number("layer", name), _number("rank", name)
            alone = layer is None and of_rank is None and len(arrays.files) > 1
            yield from _of_array(arrays[name], number if alone else layer or 0, rank if of_rank is None else of_rank)


def _parquet(file: Path, rank: int, _: int) -> Iterator[Part]:
    """A row is a token, or a record of several tokens. `layer`, `rank` and `step` are columns, as far as they exist.

    The experts are a column of lists (COLUMNS), or the columns expert_0, expert_1, …
    """
    import pandas as pd

    frame = pd.read_parquet(file)
    column = next((name for name in COLUMNS if name in frame), None)
    numbered = sorted(
        (name for name in map(str, frame) if re.fullmatch("expert_[0-9]+", name)), key=lambda name: int(name[7:])
    )
    if column is None and not numbered:
        raise ValueError(f"no column is named {', '.join(COLUMNS)} or expert_0; it has {', '.join(map(str, frame))}")
    frame = frame.assign(layer=frame.get("layer", 0), rank=frame.get("rank", rank))
    if "step" in frame:
        frame = frame.sort_values("step", kind="stable")
    for key, rows in frame.groupby(["layer", "rank"], sort=True):
        cells = rows[numbered].to_numpy() if column is None else [_deep(cell) for cell in rows[column]]
        array = np.asarray(cells) if column is None or cells[0].ndim == 1 else np.concatenate(cells)
        layer, of_rank = (int(str(one)) for one in key)
        yield from _of_array(array, layer, of_rank)


def _deep(cell: Any) -> NDArray[Any]:
    """Return a cell as an array. Parquet gives a list of lists as an array of arrays."""
    array = np.asarray(cell)
    return np.stack([_deep(one) for one in array]) if array.dtype == object else array


def _json_lines(file: Path, rank: int, top_k: int) -> Iterator[Part]:
    def documents() -> Iterator[Any]:
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())

    yield from _of_documents(documents(), rank, top_k)


def _json(file: Path, rank: int, top_k: int) -> Iterator[Part]:
    found = json.loads(file.read_text(encoding="utf-8"))
    yield from _of_documents(found if isinstance(found, list) else [found], rank, top_k)


def _of_documents(documents: Iterable[Any], rank: int, top_k: int) -> Iterator[Part]:
    for document in documents:
        if isinstance(document, Mapping) and "top_indices" in document:
            if document.get("block", "decoder") == "decoder":
                of_rank = int(document.get("rank", rank))
                yield from _of_array(_tokens(document["top_indices"], top_k), int(document.get("layer", 0)), of_rank)
            continue
        for value, counts in _routed(document, {}):
            yield from _of_array(_response(value, counts, top_k), 0, rank)


def _tokens(rows: Any, top_k: int) -> NDArray[Any]:
    """Return lists [tokens, K] as an array. A step without tokens has no K of its own."""
    return np.asarray(rows) if rows else np.empty((0, top_k), np.int32)


def _routed(document: Any, around: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield each value of `routed_experts` within a document, with the token counts of the response around it."""
    if isinstance(document, list):
        for value in document:
            yield from _routed(value, around)
    if not isinstance(document, Mapping):
        return
    told = [around, document.get("usage"), document]
    counts = {name: one[name] for one in told if isinstance(one, Mapping) for name in COUNTS if name in one}
    if document.get(ROUTED) is not None:
        yield document[ROUTED], counts
    for name, value in document.items():
        if name != ROUTED:
            yield from _routed(value, counts)


def _response(value: Any, counts: Mapping[str, Any], top_k: int) -> NDArray[Any]:
    """Return the array [tokens, layers, K] of a response."""
    if isinstance(value, Mapping):
        content = base64.b64decode(value["data"], validate=True)
        return np.frombuffer(content, np.dtype(value.get("dtype", "int32"))).reshape(value["shape"])
    if not isinstance(value, str):
        return np.asarray(value)
    content = base64.b64decode(value, validate=True)
    if content.startswith(b"\x93NUMPY"):
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    values = np.frombuffer(content, np.dtype("<i4"))
    num_tokens = sum(int(counts[name]) for name in COUNTS) - 1
    if num_tokens < 1 or values.size % (num_tokens * top_k):
        raise ValueError(f"{values.size} routed experts are not {num_tokens} tokens of {top_k} experts in some layers")
    return values.reshape(num_tokens, -1, top_k)


_READERS: Mapping[str, Callable[[Path, int, int], Iterator[Part]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
}
