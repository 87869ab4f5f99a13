"""A shape is written in one notation, and read in that notation and the earlier one. Blocks are those of models."""

from typing import Any

import pytest

from moebench.errors import SweepError
from moebench.workload.case import Case
from moebench.workload.models import BLOCKS, MODELS, SHAPE_AXES, shape_fields, shape_name
from moebench.workload.spec import SweepSpec, parse_sweep


@pytest.mark.parametrize("text", ["e64k6d1024i512", "64/6/1024/512"])
def test_both_notations_are_read(text: str) -> None:
    assert shape_fields(text) == dict(zip(SHAPE_AXES, (64, 6, 1024, 512), strict=True))


@pytest.mark.parametrize(
    "text",
    ["", "olmoe", "64/6/1024", "e64k6d1024", "e64k6d1024i512-t8", "64/6/1024/512/1", "e64/6/1024/512"],
)
def test_any_other_text_is_no_shape(text: str) -> None:
    assert shape_fields(text) is None


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_is_read_again(model: str) -> None:
    shape = {name: MODELS[model][name] for name in SHAPE_AXES}
    assert shape_fields(shape_name(MODELS[model])) == shape


GRID = """
name = "x"
[[grid]]
n_routed_experts = 16
n_activated_experts = 2
dim = 16
moe_inter_dim = 32
num_tokens = 4
backend = "loop"
"""


def sweep(more: str = "") -> SweepSpec:
    return parse_sweep(GRID + more, "x.toml")


def test_a_sweep_may_have_experts_and_blocks_which_are_different_cases() -> None:
    experts, block = (job.case for job in sweep('subject = ["experts", "block:olmoe"]').jobs())
    assert (experts.subject, block.subject) == ("experts", "block:olmoe")
    assert experts.case_id == sweep().jobs()[0].case.case_id != block.case_id


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ('subject = "blocks"', "must be experts, block, or block:MODEL"),
        ('subject = "block"', "subject = block: its router is not known; take block:MODEL"),
        ('subject = "block:gpt-oss-20b"', "subject = block:gpt-oss-20b: its router is not known"),
        ('subject = "block:olmoe"\nrouting = "zipf"', "a block routes its tokens itself; leave routing out"),
        ('subject = "block:deepseek-v3"\nn_routed_experts = 8', "from 4 of 8 equal groups of two or more experts"),
        ('subject = "block:deepseek-v3"\nn_routed_experts = 20', "with n_routed_experts = 20: its router chooses"),
        ('subject = "block:deepseek-v3"\nn_activated_experts = 9', "which must hold the experts of a token"),
    ],
)
def test_what_a_block_cannot_be_is_one_line(more: str, reason: str) -> None:
    keys = [line.split(" =")[0] for line in more.splitlines()]
    kept = [line for line in GRID.splitlines() if line.split(" =")[0] not in keys]
    with pytest.raises(SweepError) as error:
        parse_sweep("\n".join([*kept, more]), "x.toml")
    (line,) = error.value.mistakes
    assert reason in line


def test_each_known_block_fits_the_model_that_it_is_of() -> None:
    for model in BLOCKS:
        fields: dict[str, Any] = {"num_tokens": 1, "model": model, "subject": "block", **MODELS[model]}
        assert Case.model_validate(fields).subject == "block"


def test_the_subject_of_a_command_stands_for_that_of_the_sweep() -> None:
    spec = sweep('routing = ["uniform", "zipf"]\nmode = ["forward", "train"]')
    cases = [job.case for job in spec.with_subject("block:olmoe").jobs()]
    assert [(one.subject, one.routing, one.mode) for one in cases] == [
        ("block:olmoe", "uniform", mode) for mode in ("forward", "train")
    ]
    assert len(spec.with_subject("experts").jobs()) == 4
    for subject, reason in (("blocks", "must be experts, block, or"), ("block", "its router is not known")):
        with pytest.raises(SweepError, match=f"^--subject {subject}: .*{reason}"):
            spec.with_subject(subject)
