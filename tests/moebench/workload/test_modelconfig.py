"""A model is read from its Hugging Face configuration: a file, a folder, the hub's local cache or a mapping."""

import json
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.workload.case import Case
from moebench.workload.modelconfig import read_model
from moebench.workload.models import MODELS, SHAPE_AXES, shape_fields
from tests.moebench.families import FAMILIES

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_a_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    file = write(tmp_path / "one", QWEN3)
    model = read_model(file)
    assert model == read_model(str(file)) == read_model(tmp_path / "one") == read_model("one", tmp_path)
    assert model == read_model(QWEN3)
    assert model.name == "qwen3-30b-a3b"
    assert dict(model.fields) == dict(MODELS["qwen3-30b-a3b"])
    assert model.dtype == "bfloat16"


def test_a_name_and_a_shape_are_models() -> None:
    assert read_model("olmoe").fields == MODELS["olmoe"]
    shape = read_model("e64k6d1024i512")
    assert shape.name is None
    assert dict(shape.fields) == dict(zip(SHAPE_AXES, (64, 6, 1024, 512), strict=True))


def test_a_dense_model_says_which_keys_were_looked_for() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008}
    with pytest.raises(UsageError, match="architecture LlamaForCausalLM: no routed experts") as caught:
        read_model(config)
    assert len(caught.value.lines) == 1
    assert "n_local_experts" not in str(caught.value)
    assert "num_local_experts" in str(caught.value)
    assert "num_experts_per_tok" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_by_the_keys_of_its_configuration(family: str, tmp_path: Path) -> None:
    of = FAMILIES[family]
    model = read_model(write(tmp_path, of.config))
    standard = {"expert_activation": "swiglu", "expert_bias": False, "swiglu_limit": 0.0}
    assert dict(model.fields) == {**(shape_fields(of.shape) or {}), **standard, **of.fields}
    assert len(model.notes) == len([*of.notes])
    assert all(part in note for part, note in zip(of.notes, model.notes, strict=True))
    nested = of.config.get("text_config", {})
    assert model.dtype == (nested.get("dtype") or of.config.get("dtype") or of.config.get("torch_dtype"))
    case = Case.model_validate(model.values(num_tokens=16))
    assert (case.model, case.dtype) == (model.name, model.dtype or "bfloat16")


@pytest.mark.parametrize("family", ["qwen3-next", "gpt-oss", "mixtral", "deepseek-v2", "olmoe", "kimi", "nemotron-h"])
def test_a_configuration_of_a_preset_has_its_name_and_case_ids(family: str) -> None:
    model = read_model(FAMILIES[family].config)
    preset = read_model(str(model.name))
    cases = [Case.model_validate(one.values(num_tokens=16, dtype="float32")) for one in (model, preset)]
    assert cases[0].case_id == cases[1].case_id


def test_another_type_of_the_same_shape_is_another_model() -> None:
    other = {**QWEN3, "model_type": "qwen3_vl_moe"}
    assert read_model(other).name == "qwen3_vl_moe-e128k8d2048i768"
    assert read_model({**QWEN3, "num_experts": 64}).name == "qwen3_moe-e64k8d2048i768"


def test_the_name_does_not_depend_on_the_place(tmp_path: Path) -> None:
    changed = {**QWEN3, "num_experts": 96}
    assert read_model(write(tmp_path / "a", changed)) == read_model(write(tmp_path / "b", changed))


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_hub_id_is_read_from_the_local_cache(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision that refs/main names counts; without refs/main, the one that is there."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    under = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    there = tmp_path / under / "models--Qwen--Qwen3-30B-A3B"
    write(there / "snapshots" / "bbb", QWEN3)
    assert read_model("Qwen/Qwen3-30B-A3B").name == "qwen3-30b-a3b"
    write(there / "snapshots" / "aaa", {**QWEN3, "num_experts": 64})
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("bbb")
    assert read_model("Qwen/Qwen3-30B-A3B").fields["n_routed_experts"] == 128
    with pytest.raises(UsageError, match="nothing is downloaded"):
        read_model("Qwen/Qwen3-235B-A22B")


def test_layers_that_differ_are_said() -> None:
    model = read_model({**QWEN3, "moe_intermediate_size": [768, 768, 1024, 0]})
    assert model.fields["moe_inter_dim"] == 768
    assert model.notes == ("moe_intermediate_size differs between layers (768, 1024): 768 is taken",)


def test_experts_on_a_latent_vector_have_its_size() -> None:
    model = read_model({**FAMILIES["nemotron-h"].config, "moe_latent_size": 1024})
    assert model.fields["dim"] == 1024
    assert any("moe_latent_size = 1024" in note for note in model.notes)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"swiglu_limit": 10.0}, {"expert_activation": "swiglu", "swiglu_limit": 10.0}),
        ({"hidden_act": "swigluoai", "swiglu_limit": 5.0}, {"activation_limit": 5.0, "activation_alpha": 1.702}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"expert_activation": "geglu"}),
        ({"mlp_bias": True}, {"expert_bias": True}),
    ],
)
def test_activation_limit_and_bias_are_read(change: dict[str, object], fields: dict[str, object]) -> None:
    found = read_model({**QWEN3, **change}).fields
    assert {name: found[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act = "relu" is no activation of moebench, which has silu, '),
        ({"num_experts": "many"}, 'num_experts = "many" is no size of a layer'),
        ({"num_experts": -1}, "num_experts = -1 is no size of a layer"),
        ({"num_experts": 4}, "a token chooses 8 experts of 4"),
        ({"hidden_size": None}, "it looked for dim in moe_latent_size, hidden_size, d_model, n_embd; give"),
        ({"swiglu_limit": -1}, "swiglu_limit = -1 is no positive number"),
    ],
)
def test_a_wrong_value_is_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_model({**QWEN3, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read: "), ("[]", "is not a JSON object"), ("[" * 99999, "cannot be read")]
)
def test_a_file_that_is_no_configuration(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_model(tmp_path)


@pytest.mark.parametrize("text", ["nothing", "a/b", "\0", "x" * 5000, "../..", ""])
def test_what_is_no_model_lists_the_ways_to_name_one(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"must be a model of moebench, or a shape .*config.json .*there are qwen3-30b-a3b, "
    ):
        read_model(text, tmp_path)
