"""The same captured routing in every format that is read: two ranks, three layers, K = 2 of 8 experts."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

RANKS, LAYERS, TOKENS, TOP_K, EXPERTS = 2, 3, 24, 2, 8
#: [ranks, tokens, layers, K]; a token's experts differ, and every layer and rank has other routing.
ROUTING: NDArray[np.int32] = np.argsort(
    np.random.RandomState(0).standard_normal((RANKS, TOKENS, LAYERS, EXPERTS)), axis=-1
)[..., :TOP_K].astype(np.int32)
#: Where a request or a step ends.
CUT = 10


def _npz(folder: Path) -> Path:
    arrays = {f"layer{at}_rank{rank}": ROUTING[rank, :, at] for rank in range(RANKS) for at in range(LAYERS)}
    np.savez_compressed(folder / "routing.npz", **arrays)  # type: ignore[arg-type]
    return folder / "routing.npz"


def _npy(folder: Path) -> Path:
    np.save(folder / "routing.npy", ROUTING)
    return folder / "routing.npy"


def _records() -> list[dict[str, Any]]:
    """Return the lines of Megatron's router trace: a line per step, rank and layer."""
    return [
        {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
        | {"num_tokens": len(part), "topk": TOP_K, "top_indices": part.tolist()}
        for step, tokens in enumerate((slice(0, CUT), slice(CUT, None)))
        for rank in range(RANKS)
        for layer in range(LAYERS)
        for part in [ROUTING[rank, tokens, layer]]
    ]


def _parquet(folder: Path) -> Path:
    """A row is a step, as in Megatron's trace."""
    pd.DataFrame(_records()).to_parquet(folder / "routing.parquet")
    return folder / "routing.parquet"


def _parquet_of_tokens(folder: Path) -> Path:
    """A row is a token; its experts are the columns expert_0 and expert_1."""
    rows = [
        {"rank": rank, "layer": layer, "expert_0": int(choice[0]), "expert_1": int(choice[1])}
        for rank in range(RANKS)
        for layer in range(LAYERS)
        for choice in ROUTING[rank, :, layer]
    ]
    pd.DataFrame(rows).to_parquet(folder / "tokens.parquet")
    return folder / "tokens.parquet"


def _lines(file: Path, documents: list[Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _megatron(folder: Path) -> Path:
    """A folder with a file per rank. A head for multi-token prediction has lines of its own."""
    for rank in range(RANKS):
        lines = [record for record in _records() if record["rank"] == rank]
        lines.append({**lines[0], "block": "mtp", "mtp_idx": 0})
        _lines(folder / "megatron" / f"router_trace_rank{rank}.jsonl", lines)
    return folder / "megatron"


def _responses(folder: Path, encode: Callable[[NDArray[np.int32]], dict[str, Any]]) -> Path:
    """A file of responses per rank: two requests, whose last token has not been routed."""
    for rank in range(RANKS):
        requests = [ROUTING[rank, :CUT], ROUTING[rank, CUT:]]
        _lines(folder / "responses" / f"rank{rank}.jsonl", [encode(request) for request in requests])
    return folder / "responses"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _vllm(request: NDArray[np.int32]) -> dict[str, Any]:
    content = io.BytesIO()
    np.save(content, request)
    return {"id": "cmpl-1", "choices": [{"index": 0, "routed_experts": _base64(content.getvalue())}]}


def _sglang(request: NDArray[np.int32]) -> dict[str, Any]:
    counts = {"prompt_tokens": 5, "completion_tokens": len(request) - 4}
    return {"text": "a", "meta_info": {"id": "1", **counts, "routed_experts": _base64(request.tobytes())}}


def _sglang_openai(request: NDArray[np.int32]) -> dict[str, Any]:
    counts = {"prompt_tokens": 5, "completion_tokens": len(request) - 4, "total_tokens": len(request) + 1}
    return {"usage": counts, "choices": [{"index": 0}], "sglext": {"routed_experts": _base64(request.tobytes())}}


def _dynamo(request: NDArray[np.int32]) -> dict[str, Any]:
    content = {"data": _base64(request.astype(np.int16).tobytes()), "shape": list(request.shape), "dtype": "int16"}
    return {"routed_experts": {**content, "start": 0}}


#: Each format writes ROUTING into a folder and returns the path of the trace.
FORMATS: Mapping[str, Callable[[Path], Path]] = MappingProxyType(
    {
        "npy": _npy,
        "npz": _npz,
        "parquet": _parquet,
        "parquet of tokens": _parquet_of_tokens,
        "megatron": _megatron,
        "vllm": lambda folder: _responses(folder, _vllm),
        "sglang": lambda folder: _responses(folder, _sglang),
        "sglang, openai": lambda folder: _responses(folder, _sglang_openai),
        "dynamo": lambda folder: _responses(folder, _dynamo),
        "lists": lambda folder: _responses(folder, lambda request: {"routed_experts": request.tolist()}),
    }
)
