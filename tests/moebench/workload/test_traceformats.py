"""Every format of captured routing gives the same indices, by layer and rank; a file that is none is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebench.errors import InputsError
from moebench.workload.traceformats import read_arrays
from moebench.workload.traces import files_of
from tests.moebench.captured import FORMATS, LAYERS, RANKS, ROUTING, TOP_K


def read(path: Path) -> dict[tuple[int, int], Any]:
    return read_arrays(path, files_of(path), TOP_K)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_has_the_routing_of_each_layer_and_rank(kind: str, tmp_path: Path) -> None:
    found = read(FORMATS[kind](tmp_path))
    assert found.keys() == {(layer, rank) for layer in range(LAYERS) for rank in range(RANKS)}
    for (layer, rank), indices in found.items():
        assert indices.tolist() == ROUTING[rank, :, layer].tolist()


def test_the_names_of_arrays_say_layer_and_rank(tmp_path: Path) -> None:
    of = [np.full((3, 2), number) + np.arange(2) for number in range(3)]
    np.savez(tmp_path / "a.npz", b=of[0], a=of[1])
    assert {key: array[0, 0] for key, array in read(tmp_path / "a.npz").items()} == {(0, 0): 0, (1, 0): 1}
    np.savez(tmp_path / "b.npz", **{"model.layers.7": of[0], "layer_3": of[1], "layer3-rank-1": of[2]})  # type: ignore[arg-type]
    assert {key: array[0, 0] for key, array in read(tmp_path / "b.npz").items()} == {(7, 0): 0, (3, 0): 1, (3, 1): 2}
    np.savez(tmp_path / "c.npz", indices=ROUTING[0])
    assert read(tmp_path / "c.npz").keys() == {(layer, 0) for layer in range(LAYERS)}


def test_a_layer_without_experts_is_left_out(tmp_path: Path) -> None:
    """An engine that counts all layers of the model writes one number for the dense ones."""
    dense = ROUTING[0].copy()
    dense[:, 0] = 0
    np.save(tmp_path / "a.npy", dense)
    assert read(tmp_path / "a.npy").keys() == {(1, 0), (2, 0)}


def test_a_step_without_tokens_is_no_mistake(tmp_path: Path) -> None:
    lines = [{"layer": 0, "rank": 0, "top_indices": []}, {"layer": 0, "rank": 0, "top_indices": [[1, 2]]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read(tmp_path / "a.jsonl")[0, 0].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", '{"layer": 0}\n', "there is no routing in it"),
        ("a.jsonl", "{", "Expecting property name"),
        ("a.jsonl", '{"routed_experts": "AAAAAA=="}', "'prompt_tokens' is missing"),
        ("a.jsonl", '{"routed_experts": "%%"}', "base64"),
        (
            *("a.jsonl", '{"prompt_tokens": 2, "completion_tokens": 2, "routed_experts": "AAAAAAAAAAA="}'),
            "2 routed experts are not 3 tokens of 2 experts in some layers",
        ),
        ("a.jsonl", '{"routed_experts": {"shape": [1, 1, 2]}}', "'data' is missing"),
        ("a.jsonl", '{"top_indices": [[1, 2], [3]]}', "inhomogeneous"),
        ("a.json", "[" * 99999, "recursion"),
        ("a.npz", "text", "pickled (object) data"),
        ("a.parquet", "text", "Parquet"),
        ("a.npy", "text", "magic string"),
    ],
)
def test_a_file_that_is_no_trace_is_one_line(name: str, content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputsError) as caught:
        read(tmp_path / name)
    (line,) = caught.value.lines
    assert "\n" not in line
    assert line.startswith(f"trace {tmp_path / name}: ")
    assert why in line
    assert "give a .npy file" in line
