"""`moebench tune` as a user types it. tests/moebench/measure/studies/test_tiles.py has what is measured."""

import importlib.util
import json

import pytest

from experts.gemm.choices import Key, Place
from experts.gemm.tiling import Tiling
from moebench.measure.studies import tiles
from tests.moebench.typed import is_refused

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt-5"], ["gpt-5: it must be a shape like e64k6d1024i512", "qwen3-30b-a3b"]),
        (["e8k16d64i64"], ["e8k16d64i64: n_activated_experts = 16 exceeds n_routed_experts = 8"]),
        (["olmoe", "--dtype", "float32"], ["--dtype float32: it must be bfloat16 or float16"]),
        (["olmoe", "--device", "gpu"], ["--device gpu: it must be cpu, cuda or cuda:N"]),
        (["olmoe", "--num-tokens", "0"], ["--num-tokens"]),
        (["olmoe", "--num-tokens", "9999999999"], ["num_tokens = 9999999999"]),
        (["e4k2d16i16", "--device", "cpu"], ["triton: the triton engine needs a CUDA GPU, the device is cpu"]),
    ],
)
def test_bad_usage_is_refused_in_one_line(moebench, arguments, said):
    is_refused(moebench("tune", *arguments), *said)


def test_without_triton_the_message_says_how_to_get_it(moebench, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("moebench.cli.tune.find_spec", lambda name: None if name == "triton" else find(name))
    is_refused(moebench("tune", "olmoe"), "triton is not installed; install a CUDA build of torch")


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Replace the measurements by two products, of which one has a better tile. Return the cases that are asked for."""
    asked = []
    key = Key("product", (4, 16, 32), "bfloat16", 512.0)
    default, better = Tiling(128, 256, 64, 3, 8), Tiling(64, 128, 64, 4, 4)
    found = [
        tiles.Tuned(key, better, default, 0.5, 0.75, 9, 1, 0),
        tiles.Tuned(key._replace(kind="product_back"), default, default, 0.25, 0.25, 9, 1, 0),
    ]

    def tune(cases, device):
        asked.extend(cases)
        return iter(found)

    monkeypatch.setattr(tiles, "tune", tune)
    monkeypatch.setattr(tiles, "file_of", lambda device: (tmp_path / "tiles.json", Place("NVIDIA H200", "3.6.0")))
    return asked


def test_the_table_names_each_product_and_the_file(moebench, tuned, tmp_path):
    found = moebench("tune", "olmoe", "--num-tokens", "64", "--num-tokens", "512", "--num-tokens", "64")
    assert found.code == 0
    assert [(case.num_tokens, case.n_routed_experts, case.dtype) for case in tuned] == [
        (64, 64, "bfloat16"),
        (512, 64, "bfloat16"),
    ]
    lines = [" ".join(line.split()) for line in found.out.splitlines()]
    assert lines == [
        "product matrices rows/expert default ms best ms speedup",
        "product 4×16×32 512 0.7500 0.5000 1.50",
        "product_back 4×16×32 512 0.2500 0.2500 default",
    ]
    assert found.err.strip() == f"1 of 2 products have a faster tile on this NVIDIA H200: {tmp_path / 'tiles.json'}"


def test_json_has_tiles_and_times(moebench, tuned, tmp_path):
    found = json.loads(moebench("tune", "e4k2d16i32", "--json").out)
    assert [case.num_tokens for case in tuned] == [16, 256, 4096, 16384]
    assert {name: found[name] for name in ("file", "gpu", "triton")} == {
        "file": str(tmp_path / "tiles.json"),
        "gpu": "NVIDIA H200",
        "triton": "3.6.0",
    }
    first, second = found["products"]
    assert first["tile"] == {"rows": 64, "columns": 128, "depth": 64, "stages": 4, "warps": 4, "listed": False}
    assert (first["kind"], first["time_ms"], first["default_time_ms"]) == ("product", 0.5, 0.75)
    assert second["tile"] == second["default_tile"]
