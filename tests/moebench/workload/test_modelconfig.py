"""A model is read from its Hugging Face configuration: a file, a folder, the hub's local cache or a mapping."""

import json
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.workload.modelconfig import read_model
from moebench.workload.models import MODELS, SHAPE_AXES

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
