"""moebench.measure.studies.tiles stores a tile only if it is right and faster than the default each time."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from experts.gemm import choices, kinds
from experts.gemm import products as launches
from experts.gemm.choices import Asked, Key
from experts.gemm.tiling import Tiling
from experts.steps import eager
from moebench.errors import UsageError
from moebench.measure.studies import tiles
from moebench.workload.case import Case
from moebench.workload.inputs import moe_config
from tests import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
SHAPE = {"n_routed_experts": 3, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 16, "dtype": "float16"}
CASE = Case(num_tokens=10, **SHAPE)
FIRST, SECOND, THIRD = (Tiling(rows, 16, 16, stages=2, warps=4) for rows in (16, 32, 64))
DOWN = torch.zeros(3, 16, 16)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path))
    monkeypatch.setattr(kinds.tiling, "tiling_for", lambda rows, pairs: FIRST)
    monkeypatch.setattr(kinds, "candidates_for", lambda rows, pairs: (FIRST, SECOND, THIRD))
    choices.forget()
    yield tmp_path
    choices.forget()


class Gpu:
    """Stands for a GPU on which each tile takes a time, gives a result, and may need more than there is."""

    def __init__(self, times: dict[Tiling, list[float]], results: dict[Tiling, Any] | None = None) -> None:
        self.times = {tile: iter(series) for tile, series in times.items()}
        self.results = results or {}

    def call(self) -> torch.Tensor:
        result = self.results.get(self.tile(), 1.0)
        if isinstance(result, Exception):
            raise result
        return torch.tensor([result, 1.0])

    def tile(self) -> Any:
        return choices.choose(kinds.PRODUCT, DOWN, 4.0)

    def measure(self, call: Callable[[], object], policy: Any) -> Any:
        assert call == self.call
        ms = next(self.times[self.tile()])
        return SimpleNamespace(time_ms=ms, time_ms_low=ms - 0.1, time_ms_high=ms + 0.1)

    def better(self) -> tiles.Tuned:
        key = choices.key_of(kinds.PRODUCT, DOWN, 4.0)
        return tiles._better_tile(key, Asked(kinds.PRODUCT, DOWN, 4.0), self.call, self.measure)


def test_the_fastest_tile_wins() -> None:
    found = Gpu({FIRST: [9, 9, 9, 9, 9], SECOND: [5], THIRD: [4, 4.1, 4, 4.2]}).better()
    assert (found.tile, found.default_tile, found.time_ms, found.default_time_ms) == (THIRD, FIRST, 4, 9)
    assert (found.num_measured, found.num_refused, found.num_wrong) == (3, 0, 0)
    assert found.choice == choices.Choice(THIRD, 4, 9)


@pytest.mark.parametrize(
    ("default", "second"),
    [([5, 6, 6, 6, 6], [7]), ([5, 6, 6, 4.15, 6], [4, 4, 4, 4]), ([5, 6, 6, 6, 6], [4, 4, 5.9, 4])],
    ids=["slower", "default-once-near", "candidate-once-near"],
)
def test_a_tile_that_is_not_faster_each_time_does_not_win(default: list[float], second: list[float]) -> None:
    found = Gpu({FIRST: default, SECOND: second, THIRD: [9]}).better()
    assert (found.tile, found.choice, found.time_ms) == (FIRST, None, found.default_time_ms)


def test_tiles_that_do_not_fit_or_are_wrong_are_left_out() -> None:
    results = {SECOND: OutOfResources(300, 200, "shared memory"), THIRD: 1.1}
    found = Gpu({FIRST: [9, 9]}, results).better()
    assert (found.tile, found.num_measured, found.num_refused, found.num_wrong) == (FIRST, 1, 1, 1)
    found = Gpu({FIRST: [9, 9]}, {SECOND: RuntimeError("PassManager::run failed"), THIRD: torch.nan}).better()
    assert (found.num_refused, found.num_wrong) == (1, 1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Gpu({FIRST: [9]}, {SECOND: RuntimeError("an illegal memory access was encountered")}).better()


def test_every_kind_of_product_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call asks for the tile of the kind and shape that it was made for."""
    monkeypatch.setattr(launches, "launch", lambda *_, **__: None)
    rows = eager.sort_by_expert(torch.tensor([[0, 1], [2, 1], [0, 2]]), 0, 3)
    activations = {"activated_product": "relu2", "interleaved_product": "quick_geglu"}
    for name, kind in kinds.KINDS.items():
        matrices = torch.zeros(3, 16, 32 if name in ("gated_product", "interleaved_product") else 16)
        case = Case(
            num_tokens=3, **{**SHAPE, "expert_activation": activations.get(name, "swiglu"), "expert_bias": True}
        )
        call = tiles.call_of(Asked(kind, matrices, 2.0), rows, torch.ones(3, 2), moe_config(case))
        with choices.asked() as asked:
            call()
        assert list(asked) == [Key(name, tuple(matrices.shape), "float32", 2.0)]


@pytest.mark.skipif(INTERPRETED, reason="here the engine runs on a CPU")
def test_a_device_without_the_engine_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^triton: the triton engine needs a CUDA GPU, the device is cpu"):
        list(tiles.tune([CASE], "cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"^device = 'cuda:3': torch .* sees 0 CUDA GPUs"):
            list(tiles.tune([CASE], "cuda:3"))


@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
def test_in_tritons_interpreter() -> None:
    interpreter.assert_passes([str(Path(__file__)), "-k", "layer"], EXPERTS_STEPS="fused")


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")
def test_the_products_of_a_layer_are_tuned_and_the_next_layer_uses_the_tiles(own_folder: Path) -> None:
    """Here THIRD is always the fastest. SECOND takes part in every product."""
    seen: list[Any] = []
    slow = {FIRST: 3.0, SECOND: 2.0, THIRD: 1.0}

    def measure(call: Callable[[], object], policy: Any) -> Any:
        with choices.asked() as asked:
            call()
        (one,) = asked.values()
        ms = slow[choices.choose(*one)]
        seen.append(one.kind.name)
        return SimpleNamespace(time_ms=ms, time_ms_low=ms, time_ms_high=ms)

    found = list(tiles.tune([CASE], "cpu", measure))
    names = ["gated_product", "product", "gathered_product", "gathered_product_back", "product_back"]
    assert [tuned.key.kind for tuned in found] == names
    assert all((tuned.tile, tuned.num_measured, tuned.num_wrong) == (THIRD, 3, 0) for tuned in found)
    assert [tuned.key.matrices for tuned in found] == [(3, 16, 32), (3, 16, 16), (3, 16, 32), (3, 16, 16), (3, 16, 32)]
    (file,) = own_folder.iterdir()
    assert {entry["kind"] for entry in json.loads(file.read_text())["choices"]} == set(names)
    for asked in tiles.products_of(CASE, CPU).values():
        assert choices.choose(*asked) == THIRD
    slow[FIRST] = 0.5
    assert all(tuned.choice is None for tuned in tiles.tune([CASE], "cpu", measure))
    assert choices.read(file, choices.place_of(CPU)) == {}, "what is no longer better is removed"


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_tuning_on_a_gpu_stores_tiles_that_layers_use(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    """The real rule and a few real candidates: every tile that is stored is faster, and choose returns it."""
    monkeypatch.undo()
    monkeypatch.setenv(choices.VARIABLE, str(own_folder))
    candidates_for = kinds.candidates_for
    monkeypatch.setattr(kinds, "candidates_for", lambda rows, pairs: candidates_for(rows, pairs)[:6:2])
    shape = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 512, "moe_inter_dim": 512}
    case = Case(num_tokens=2048, dtype="bfloat16", **shape)
    found = list(tiles.tune([case], "cuda"))
    assert [tuned.num_wrong for tuned in found] == [0] * 5
    assert all(tuned.num_measured > 1 for tuned in found)
    for key, asked in tiles.products_of(case, torch.device("cuda", 0)).items():
        (tuned,) = [tuned for tuned in found if tuned.key == key]
        assert choices.choose(*asked) == tuned.tile
        assert tuned.choice is None or tuned.time_ms < tuned.default_time_ms
