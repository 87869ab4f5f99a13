"""Backends by name: built-in backends, backends of other packages, and unknown names."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import GroupedExperts, GroupedExpertsLoRA, RegistryError, Unsupported
from experts.registry import ENTRY_POINT_GROUP, Backend, backend_names, check_name, get_backend
from tests.experts.layers import BF16, F64, assert_near, expected, moe_config, random_batch, random_parameters, run

CPU = torch.device("cpu")

BUILT_IN = (
    "loop",
    "torch_mm",
    "torch_mm_mxfp8",
    "triton",
    "triton_main_grad",
    "triton_fp8",
    "triton_fp8_e5m2",
    "triton_fp8_16bit_dw",
    "triton_fp8_rows",
    "deep_gemm_fp8",
    "gmm",
    "torch_mm_save_time",
    "gmm_save_time",
    "te",
    "te_fp8_current",
    "te_fp8_delayed",
    "te_fp8_block",
    "te_fp8_current_cached",
    "te_fp8_block_cached",
    "te_mxfp8",
    "loop_lora",
    "torch_mm_lora",
    "triton_lora",
    "peer_transformers",
    "peer_automodel_torch_mm",
    "peer_automodel_te",
    "peer_sonicmoe",
)

#: A module of another package. The harness calls `unsupported` before it builds a backend.
THIRD_PARTY = '''
import torch
from experts import GroupedExperts, Unsupported


class Mine(GroupedExperts):
    """Refuses float64, and every device but the CPU."""

    @staticmethod
    def unsupported(device, config):
        if device.type != "cpu":
            return f"runs on the CPU alone, not on {device.type}"
        if config is not None and config.dtype is torch.float64:
            return Unsupported("no float64")


def plain(config):
    return GroupedExperts(config)


not_callable = 3
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module to a folder on sys.path, and return its name. It is not imported."""
    name = "someones_experts"
    (tmp_path / f"{name}.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def install(folder: Path, *entry_points: str) -> None:
    """Write a distribution to `folder` that declares these entry points."""
    info = folder / "someones-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *entry_points]) + "\n")


def refusal(name: str) -> str:
    with pytest.raises(RegistryError) as caught:
        get_backend(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_it_works(backend: Backend) -> None:
    config = moe_config(expert_bias=True)
    made = backend.build(config)
    parameters = random_parameters(config)
    made.load_state_dict(parameters)
    batch = random_batch(config)
    assert_near(run(made, batch), expected(config, parameters, batch), config.dtype)


def test_the_built_in_names_come_first_and_occur_once() -> None:
    assert backend_names()[: len(BUILT_IN)] == BUILT_IN
    assert len(set(backend_names())) == len(backend_names())


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.usefixtures("no_libraries")
def test_a_built_in_backend_is_found_without_its_library(name: str) -> None:
    """On a CPU without the library, `unsupported` returns a reason and does not raise."""
    check_name(name)
    backend = get_backend(name)
    recipe = {
        "torch_mm_mxfp8": "mxfp8",
        "te_mxfp8": "mxfp8",
        **dict.fromkeys(("triton_fp8", "deep_gemm_fp8"), "block_float32"),
    }.get(name)
    if name.startswith("triton_fp8_"):
        recipe = "block_float32" + name.removeprefix("triton_fp8")
    for fp8 in ("current", "delayed", "block"):
        recipe = fp8 if f"te_fp8_{fp8}" in name else recipe
    assert (backend.name, backend.fp8) == (name, recipe)
    reason = backend.unsupported(CPU, moe_config(dtype=BF16))
    assert (reason is None) == (name in ("loop", "torch_mm", "torch_mm_save_time", "loop_lora", "torch_mm_lora"))


@pytest.mark.parametrize("name", ["loop", "torch_mm"])
def test_a_built_in_backend_builds_its_engine(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == name
    made = backend.build(moe_config())
    assert isinstance(made, GroupedExperts)
    assert made.engine_name == name
    assert_it_works(backend)


@pytest.mark.parametrize("engine", ["loop", "torch_mm", "triton"])
def test_a_backend_with_adapters_is_its_engine_with_adapters(engine: str) -> None:
    backend = get_backend(f"{engine}_lora")
    made = backend.build(moe_config(dtype=BF16), dispatcher="alltoall")
    assert isinstance(made, GroupedExpertsLoRA)
    assert (made.engine_name, made.dispatcher_name) == (engine, "alltoall")
    assert (made.rank, made.alpha) == (backend.lora.rank, backend.lora.alpha) == (16, 32.0)
    assert get_backend(engine).lora is None


def test_a_built_in_backend_gives_the_reason_of_a_refusal() -> None:
    config = moe_config(dtype=F64)
    assert get_backend("loop").unsupported(CPU, config) is None
    assert get_backend("torch_mm").unsupported(CPU) is None
    reason = get_backend("torch_mm").unsupported(CPU, config)
    assert isinstance(reason, Unsupported)
    assert "float64" in reason.reason
    assert "dim = 18" in get_backend("torch_mm").unsupported(CPU, moe_config(dim=18)).reason


NEAR = [
    ("torch_m", "torch_mm"),
    ("lop", "loop"),
    ("torchmm", "torch_mm"),
    ("torch", "loop"),
    ("te_fp8_blok", "te_fp8_block"),
]


@pytest.mark.parametrize(("name", "near"), NEAR)
def test_the_error_for_an_unknown_name_lists_the_names_and_the_nearest(name: str, near: str) -> None:
    message = refusal(name)
    assert message.startswith(f"there is no backend {name!r}; did you mean {near!r}? the backends are loop, torch_mm")
    assert message.endswith("or give module:attribute")


@pytest.mark.parametrize("name", ["", "cutlass", "LOOP"])
def test_the_error_for_a_name_far_from_every_other_suggests_none(name: str) -> None:
    assert refusal(name).startswith(f"there is no backend {name!r}; the backends are loop, torch_mm")


@pytest.mark.parametrize("attribute", ["Mine", "plain"])
def test_a_backend_can_be_named_by_module_and_attribute(third_party: str, attribute: str) -> None:
    name = f"{third_party}:{attribute}"
    backend_names()
    assert third_party not in sys.modules
    backend = get_backend(name)
    assert third_party in sys.modules
    assert backend.name == name
    assert name not in backend_names()
    assert_it_works(backend)


def test_a_third_party_reason_is_returned_as_unsupported(third_party: str) -> None:
    backend = get_backend(f"{third_party}:Mine")
    assert backend.unsupported(CPU) is None
    assert backend.unsupported(CPU, moe_config()) is None
    given = backend.unsupported(CPU, moe_config(dtype=F64))
    assert isinstance(given, Unsupported)
    assert given.reason == "no float64"
    text = backend.unsupported(torch.device("cuda"), moe_config())
    assert isinstance(text, Unsupported)
    assert text.reason == "runs on the CPU alone, not on cuda"


def test_a_backend_without_unsupported_runs_anywhere(third_party: str) -> None:
    backend = get_backend(f"{third_party}:plain")
    assert backend.unsupported(CPU) is None
    assert backend.unsupported(torch.device("cuda"), moe_config(dtype=F64)) is None


def test_a_backend_gets_the_options_of_its_dispatcher_that_it_takes() -> None:
    options = {"max_tokens_per_rank": 64, "capacity_factor": 1.5}
    made = get_backend("torch_mm").build(moe_config(), "symm_mem", **options)
    assert made.dispatcher_options == options
    got: list[dict[str, object]] = []
    some = Backend("some", lambda config, dispatcher=None, capacity_factor=None: got.append(locals()), lambda *_: None)
    some.build(moe_config(), "symm_mem", **options)
    every = Backend("every", lambda config, **given: got.append(given), lambda *_: None)
    every.build(moe_config(), "symm_mem", **options)
    every.build(moe_config(), **options)
    assert (got[0]["dispatcher"], got[0]["capacity_factor"]) == ("symm_mem", 1.5)
    assert got[1:] == [{"dispatcher": "symm_mem", **options}, {}]


def test_a_callable_without_the_argument_dispatcher_is_for_one_process() -> None:
    config = moe_config()
    spread = {
        "any": lambda config, **named: GroupedExperts(config),
        "named": lambda config, dispatcher=None: GroupedExperts(config),
    }
    for build in spread.values():
        assert Backend("spread", build, lambda *_: None).unsupported(CPU, config, "allgather") is None
    alone = Backend("alone", lambda config: GroupedExperts(config), lambda *_: None)
    assert alone.unsupported(CPU, config) is None
    reason = alone.unsupported(CPU, config, "allgather")
    assert reason is not None
    assert "takes no argument `dispatcher`" in reason.reason


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("{}:Yours", "has no attribute 'Yours'"),
        ("{}:", "cannot import"),
        (":Mine", "cannot import"),
        (":", "cannot import"),
        (".{}:Mine", "cannot import"),
        ("{}:Mine:Mine", "cannot import"),
    ],
)
def test_the_error_for_a_missing_module_or_attribute_gives_the_reason(
    third_party: str, target: str, reason: str
) -> None:
    name = target.format(third_party)
    message = refusal(name)
    assert message.startswith(f"backend {name!r}: cannot import {name!r}: ")
    assert reason in message
    assert message.endswith("is it on PYTHONPATH?")


def test_checking_a_name_imports_nothing(third_party: str, tmp_path: Path) -> None:
    install(tmp_path, f"zeta = {third_party}:Mine")
    for name in ("loop", "torch_mm", "zeta", f"{third_party}:Mine", f"{third_party}.inner:Mine"):
        check_name(name)
    assert third_party not in sys.modules


@pytest.mark.parametrize("name", ["", "lop", "no_such_module:Mine", "no_such_module.inner:Mine", ":Mine", ":", ".a:b"])
def test_checking_an_unknown_name_is_a_one_line_error(name: str) -> None:
    with pytest.raises(RegistryError) as caught:
        check_name(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checking_a_name_in_a_main_without_a_spec_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script runs with such a __main__."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(RegistryError, match="backend '__main__:Mine': there is no module '__main__'"):
        check_name("__main__:Mine")


def test_an_attribute_that_is_not_callable_is_refused(third_party: str) -> None:
    assert "is not callable; it must take a MoEConfig and return a module" in refusal(f"{third_party}:not_callable")


def test_entry_points_are_listed_and_built_by_name(third_party: str, tmp_path: Path) -> None:
    before = backend_names()
    install(tmp_path, f"zeta = {third_party}:Mine", f"alpha={third_party}:plain", "broken = no_such_module:Mine")
    assert {*backend_names()} == {*before, "zeta", "alpha", "broken"}
    assert backend_names()[:2] == ("loop", "torch_mm")
    assert backend_names().index("alpha") < backend_names().index("broken") < backend_names().index("zeta")
    assert get_backend("loop").name == "loop"
    assert "zeta" in refusal("zet")
    assert third_party not in sys.modules, "the module was imported before its backend was named"

    backend = get_backend("zeta")
    assert backend.name == "zeta"
    assert backend.unsupported(CPU, moe_config(dtype=F64)).reason == "no float64"
    assert_it_works(backend)
    assert_it_works(get_backend("alpha"))


def test_a_broken_entry_point_raises_only_when_it_is_named(third_party: str, tmp_path: Path) -> None:
    install(tmp_path, "broken = no_such_module:Mine")
    message = refusal("broken")
    assert message.startswith("backend 'broken': cannot import 'no_such_module:Mine': ")


def test_an_entry_point_cannot_take_a_built_in_name(third_party: str, tmp_path: Path) -> None:
    install(tmp_path, f"loop = {third_party}:Mine")
    assert backend_names().count("loop") == 1
    assert type(get_backend("loop").build(moe_config())) is GroupedExperts
    assert third_party not in sys.modules


@pytest.mark.parametrize("error", ["RuntimeError", "KeyError", "AssertionError"])
def test_an_error_inside_a_third_party_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    (tmp_path / "raises_at_import.py").write_text(f"raise {error}('theirs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception, match="theirs") as caught:
        get_backend("raises_at_import:Mine")
    assert type(caught.value).__name__ == error


def test_save_time_is_the_engine_with_the_option_save() -> None:
    for name, options in (("torch_mm", {}), ("torch_mm_save_time", {"save": "time"})):
        layer = get_backend(name).build(moe_config())
        assert isinstance(layer, GroupedExperts)
        assert (layer.engine_name, layer.engine_options) == ("torch_mm", options)
