"""Tiles: a choice measured on this GPU with this Triton is used, and every other choice is ignored."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from experts import gemm
from experts.gemm import choices, kinds, lists, products
from experts.gemm.choices import Choice, Key, Place
from experts.gemm.tiling import Tiling
from experts.steps import eager
from tests.experts.layers import moe_config

CPU = torch.device("cpu")
HERE = Place("NVIDIA H200", "3.6.0")
DOWN = torch.empty(8, 64, 128, dtype=torch.bfloat16)
#: A candidate that the rule does not choose for many rows per expert.
OTHER = Tiling(128, 128, 64, 4, 8, listed=True)
KEY = Key("product", (8, 64, 128), "bfloat16", 1024.0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Pretend that the tensors are on an H200, and that the user's files are in a folder of this test."""
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "tiles"))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(choices, "place_of", lambda device: HERE)
    choices.forget()
    yield tmp_path / "tiles"
    choices.forget()


def chosen(rows_per_expert: float = 1024.0, matrices: torch.Tensor = DOWN, kind: kinds.Kind = kinds.PRODUCT) -> Any:
    return choices.choose(kind, matrices, rows_per_expert)


def rule(rows_per_expert: float = 1024.0) -> Any:
    return kinds.PRODUCT.rule(rows_per_expert)


def write(path: Path, place: Place = HERE, **changed: Any) -> None:
    """Write a file that has the choice OTHER for KEY, with some entries of the file changed."""
    entry = {**KEY._asdict(), "tile": vars(OTHER), "time_ms": 0.9, "default_time_ms": 1.0}
    whole = {"version": choices.VERSION, **place._asdict(), "choices": [entry], **changed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    choices.forget()


def test_a_stored_choice_is_used_for_its_product_only() -> None:
    assert chosen() == rule() != OTHER
    choices.store(HERE, {KEY: Choice(OTHER, 0.9, 1.0)})
    assert chosen() == OTHER
    assert chosen(724.1) == chosen(1448.0) == OTHER, "rows per expert are rounded to a power of two"
    assert chosen(724.0) == chosen(1449.0) == rule()
    assert chosen(matrices=DOWN.half()) == rule()
    assert chosen(matrices=DOWN.mT.contiguous()) == rule()
    assert chosen(matrices=DOWN[:4]) == rule()
    assert chosen(kind=kinds.PRODUCT_BACK) == rule()


def test_fewer_rows_than_experts_have_choices_of_their_own() -> None:
    small = kinds.PRODUCT.candidates(0.0625)[-1]
    choices.store(HERE, {KEY._replace(rows_per_expert=0.0625): Choice(small, 0.9, 1.0)})
    assert chosen(0.06) == small
    assert chosen(0.5) == rule(0.5) != small


def test_the_users_choice_goes_before_the_shipped_one(own_folder: Path) -> None:
    write(choices.SHIPPED / HERE.file_name)
    assert chosen() == OTHER
    third = Tiling(256, 128, 64, 3, 8, listed=True)
    choices.store(HERE, {KEY: Choice(third, 0.8, 1.0)})
    assert chosen() == third
    assert choices.default(kinds.PRODUCT, DOWN, 1024.0) == OTHER
    assert choices.default(kinds.PRODUCT, DOWN, 16.0) == rule(16.0)


@pytest.mark.parametrize(
    "changed",
    [{"version": choices.VERSION + 1}, {"gpu": "NVIDIA H100"}, {"triton": "3.7.1"}],
    ids=["version", "gpu", "triton"],
)
def test_a_file_for_something_else_is_ignored(own_folder: Path, changed: dict[str, Any]) -> None:
    """Nothing is said about it, even if the file has the right name."""
    write(own_folder / HERE.file_name)
    assert chosen() == OTHER
    write(own_folder / HERE.file_name, **changed)
    assert chosen() == rule()


def test_every_gpu_and_triton_has_a_file_of_its_own() -> None:
    places = [HERE, HERE._replace(gpu="NVIDIA H100"), HERE._replace(triton="3.7.1")]
    assert len({choices.own_file(place) for place in places}) == 3
    assert choices.own_file(Place("a/../b: GPU", "3.6.0+git1")).name == "a_.._b_GPU-triton-3.6.0+git1.json"


@pytest.mark.parametrize(
    "tile",
    [
        {**vars(OTHER), "rows": 100},
        {**vars(OTHER), "rows": "128"},
        {"rows": 128},
        {**vars(OTHER), "splits": 2},
        None,
    ],
)
def test_a_tile_that_is_not_a_candidate_never_reaches_a_kernel(own_folder: Path, tile: Any) -> None:
    entry = {**KEY._asdict(), "tile": tile, "time_ms": 0.9, "default_time_ms": 1.0}
    write(own_folder / HERE.file_name, choices=[entry, {"kind": "of another version"}])
    assert chosen() == rule()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"version": 1}', "[" * 100_000, "\xff\xfe"],
    ids=["empty", "half", "list", "number", "no-entries", "version-only", "deep", "not-utf-8"],
)
def test_a_file_that_is_none_is_named_in_one_line(own_folder: Path, text: str) -> None:
    own_folder.mkdir()
    path = own_folder / HERE.file_name
    path.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="Delete it or correct it") as told:
        assert chosen() == rule()
    (message,) = [str(one.message) for one in told]
    assert str(path) in message
    assert "\n" not in message
    assert chosen() == rule(), "it is said once in a process"


@pytest.mark.parametrize("entry", [[], {}, {**KEY._asdict(), "tile": vars(OTHER)}, {**KEY._asdict(), "matrices": 3}])
def test_an_entry_that_is_none_is_named_in_one_line(own_folder: Path, entry: Any) -> None:
    write(own_folder / HERE.file_name, choices=[entry])
    with pytest.warns(UserWarning, match="holds no choices of tiles"):
        assert chosen() == rule()


def test_a_file_that_cannot_be_read_is_named(own_folder: Path) -> None:
    (own_folder / HERE.file_name).mkdir(parents=True)
    with pytest.warns(UserWarning, match="Is a directory"):
        assert chosen() == rule()


def test_storing_keeps_other_choices_and_removes_what_is_no_longer_better() -> None:
    other_key = KEY._replace(kind="product_back")
    choices.store(HERE, {KEY: Choice(OTHER, 0.9, 1.0)})
    path = choices.store(HERE, {other_key: Choice(OTHER, 0.8, 1.0)})
    assert choices.read(path, HERE) == {KEY: Choice(OTHER, 0.9, 1.0), other_key: Choice(OTHER, 0.8, 1.0)}
    choices.store(HERE, {KEY: None})
    assert choices.read(path, HERE) == {other_key: Choice(OTHER, 0.8, 1.0)}
    choices.store(HERE, {other_key: None})
    assert choices.read(path, HERE) == {}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    path = choices.store(HERE, {KEY: Choice(OTHER, 0.9, 1.0)})
    before = path.read_bytes()

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, no_space)
            with pytest.raises(OSError, match="No space"):
                choices.store(HERE, {KEY: None})
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choices.folder() == tmp_path / "tiles"
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert choices.folder() == tmp_path / "cache" / "moebench" / "tiles"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert choices.folder() == tmp_path / ".cache" / "moebench" / "tiles"


def test_the_fingerprint_is_of_the_users_tiles_alone(own_folder: Path) -> None:
    write(choices.SHIPPED / HERE.file_name)
    assert choices.fingerprint(CPU) is None
    choices.store(HERE, {KEY: Choice(OTHER, 0.9, 1.0)})
    first = choices.fingerprint(CPU)
    assert first is not None
    choices.store(HERE, {KEY: Choice(OTHER, 0.8, 1.1)})
    assert choices.fingerprint(CPU) == first, "times do not count"
    choices.store(HERE, {KEY._replace(rows_per_expert=64.0): Choice(OTHER, 0.9, 1.0)})
    assert choices.fingerprint(CPU) not in (first, None)


def test_files_are_read_once(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(own_folder / HERE.file_name)
    assert chosen() == OTHER
    monkeypatch.setattr(choices, "read", lambda *_: pytest.fail("it was read again"))
    assert chosen() == OTHER
    assert chosen(16.0) == rule(16.0)


def test_a_forced_tile_is_only_for_its_kind_and_its_block() -> None:
    with choices.forced(kinds.PRODUCT, OTHER):
        assert chosen() == OTHER
        assert chosen(kind=kinds.PRODUCT_BACK) == rule()
    assert chosen() == rule()


def test_every_product_asks_for_the_tile_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind has a tile of its own here. A launch shows its tile."""
    launched: list[Any] = []
    monkeypatch.setattr(products, "launch", lambda kernel, grid, *_, **constants: launched.append(constants))
    heights = {name: 16 << number for number, name in enumerate(kinds.KINDS)}
    rows, x_TD = eager.sort_by_expert(torch.tensor([[0, 1], [2, 1]]), 0, 3), torch.zeros(2, 16)
    y_ND, up, weights_TK = torch.zeros(4, 16), torch.zeros(3, 16, 32), torch.ones(2, 2)

    def activated(activation: str) -> torch.Tensor:
        config = moe_config(dim=16, moe_inter_dim=16, expert_activation=activation)
        return gemm.activated_product(x_TD, up, rows, 2.0, weights_TK, None, config)

    calls: dict[str, Callable[[], object]] = {
        "product": lambda: gemm.product(y_ND, up, rows, 2.0),
        "product_back": lambda: gemm.product_back(y_ND, up.mT.contiguous(), rows, 2.0),
        "gathered_product": lambda: gemm.gathered_product(x_TD, up, rows, 2.0),
        "gathered_product_back": lambda: gemm.gathered_product_back(x_TD, up.mT.contiguous(), rows, 2.0),
        "activated_product": lambda: activated("relu2"),
        "gated_product": lambda: activated("swiglu"),
        "interleaved_product": lambda: activated("quick_geglu"),
    }
    with contextlib.ExitStack() as stack:
        for name, height in heights.items():
            stack.enter_context(choices.forced(kinds.KINDS[name], Tiling(height, 32, 16, 2, 4)))
        for call in calls.values():
            call()
    found = dict(zip(calls, [constants["ROWS"] for constants in launched], strict=True))
    assert found == heights


def test_a_product_that_a_kernel_finishes_has_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moebench tune` measures products alone. A tile that is faster there must not replace a kernel that does more."""
    monkeypatch.setattr(products, "runs_on_hopper", lambda *_: True)
    done: list[str] = []
    finishing = SimpleNamespace(
        kept_and_activated=lambda *_: done.append("forward"), activated_back=lambda *_: done.append("backward")
    )
    monkeypatch.setitem(sys.modules, "experts.gemm.hopper", finishing)
    monkeypatch.setattr(gemm, "hopper", finishing, raising=False)
    monkeypatch.setattr(lists, "launch", lambda *_, **constants: None)
    rows, weights_TK = eager.sort_by_expert(torch.tensor([[0, 1], [2, 1]]), 0, 3), torch.ones(2, 2)
    x_TD, h_NH, up, down = torch.zeros(2, 16), torch.zeros(4, 32), torch.zeros(3, 16, 32), torch.zeros(3, 16, 16)
    config = moe_config(dim=16, moe_inter_dim=16, expert_activation="swiglu")
    kept, back = kinds.GATHERED_PRODUCT, kinds.GATHERED_PRODUCT_BACK
    with choices.asked() as asked, choices.forced(kept, OTHER), choices.forced(back, OTHER):
        for rows_per_expert in (57.0, 4.0):
            gemm.kept_and_activated(x_TD, up, rows, rows_per_expert, None, None, config)
            gemm.activated_back(x_TD, down, h_NH, rows, rows_per_expert, weights_TK, None, config)
    assert done == ["forward", "backward"]
    assert not asked


def test_what_is_asked_is_recorded_once() -> None:
    with choices.asked() as asked:
        chosen()
        chosen(1000.0)
        chosen(kind=kinds.PRODUCT_BACK)
    chosen(16.0)
    assert list(asked) == [KEY, KEY._replace(kind="product_back")]
    assert asked[KEY].matrices is DOWN
    assert (asked[KEY].kind, asked[KEY].rows_per_expert) == (kinds.PRODUCT, 1000.0)


@pytest.mark.parametrize("kind", kinds.KINDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows_per_expert", [0.0625, 1.0, 8.0, 16.0, 32.0, 64.0, 4096.0])
def test_candidates_are_different_tiles_of_powers_of_two(kind: kinds.Kind, rows_per_expert: float) -> None:
    candidates = kind.candidates(rows_per_expert)
    assert len(set(candidates)) == len(candidates) > 2
    for tile in (*candidates, kind.rule(rows_per_expert)):
        assert isinstance(tile, kind.tile)
        numbers = [getattr(tile, name) for name in ("rows", "columns", "depth", "warps") if hasattr(tile, name)]
        assert all(number & (number - 1) == 0 for number in numbers)


def test_shipped_files_are_complete() -> None:
    """Each choice is one that `choose` would use, and faster than the rule's tile."""
    for path in (Path(choices.__file__).parent / "measured").glob("*.json"):
        stored = json.loads(path.read_text())
        place = Place(stored["gpu"], stored["triton"])
        assert path.name == place.file_name
        read = choices.read(path, place)
        assert len(read) == len(stored["choices"]) > 0
        assert all(choice.time_ms < choice.default_time_ms for choice in read.values())
