"""`moebench advise` answers for a model that a configuration describes."""

import json

import pytest

from tests.moebench.families import FAMILIES


@pytest.mark.parametrize("family", ["qwen3-moe", "llama4", "ernie"])
def test_a_configuration_is_a_workload(moebench, tmp_path, family):
    """It prints the workload in the configuration's dtype, and what the case leaves out. No result has it: exit 3."""
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family].config))
    end = moebench("advise", "--model", "config.json", "--num-tokens", 300, "--results", tmp_path / "none")
    assert end.code == 2, "a folder without results is refused, so the question was understood"
    notes = end.err.splitlines()[:-1]
    assert all(part in note for part, note in zip(FAMILIES[family].notes, notes, strict=True))


def test_an_architecture_without_experts_says_what_it_looked_for(moebench, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}))
    for command in (["advise", "--num-tokens", 4], ["run", "quick", "--dry-run"]):
        end = moebench(*command, "--model", tmp_path)
        assert end.code == 2
        (line,) = end.err.splitlines()
        assert "architecture LlamaForCausalLM: no routed experts" in line
        assert "num_local_experts" in line


def test_run_prints_the_jobs_of_a_model(moebench, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["qwen2-moe"].config))
    end = moebench("run", "quick", "--model", "config.json", "--filter", "num_tokens=16", "--dry-run", "--json")
    assert end.code == 0, end.err
    cases = [job["case"] for job in json.loads(end.out)["jobs"]]
    assert {(case["n_routed_experts"], case["n_activated_experts"]) for case in cases} == {(60, 4)}
    assert "shared_expert_intermediate_size = 5632" in end.err
    assert moebench("run", "--resume", ".", "--model", "config.json").code == 2


def test_advice_is_about_the_context_that_was_asked_for(moebench):
    asked = ("advise", "--model", "qwen3-30b-a3b", "--num-tokens", 16384, "--mode", "train")
    plain, again = moebench(*asked), moebench(*asked, "--context", "checkpoint")
    assert "bfloat16, train, checkpoint, uniform routing" in again.out
    assert "checkpoint" not in plain.out
    assert "8.382" in again.out
    end = moebench(*asked, "--context", "fsdp2")
    assert end.code == 2
    assert end.err.splitlines() == ["--context fsdp2: advise answers for the ranks of one group; take it without fsdp2"]
