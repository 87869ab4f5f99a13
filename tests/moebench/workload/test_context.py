"""Contexts are read, written in one order, and refused with one line where they make no sense."""

import pytest
from pydantic import ValidationError

from moebench.workload.case import Case
from moebench.workload.context import CHECKPOINTS, PARTS, Context

SHAPE = {"num_tokens": 8, "n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}


def case(**fields: object) -> Case:
    return Case.model_validate({**SHAPE, "mode": "train", **fields})


def mistakes(**fields: object) -> list[str]:
    with pytest.raises(ValidationError) as raised:
        case(**fields)
    return [line for error in raised.value.errors() for line in error["msg"].removeprefix("Value error, ").splitlines()]


def test_a_context_has_its_parts() -> None:
    assert Context.parse("plain") == Context()
    assert Context.parse("checkpoint_experts+offload+accumulate:12") == Context(
        checkpoint="checkpoint_experts", offload=True, num_micro_batches=12
    )
    assert Context.parse("fsdp2+compile") == Context(fsdp2=True, compiled=True)
    assert [Context.parse(kind).checkpoint for kind in CHECKPOINTS] == list(CHECKPOINTS)


def test_the_order_of_the_parts_makes_no_other_case() -> None:
    ids = {case(context=text).case_id for text in ("accumulate:4+checkpoint", "checkpoint+accumulate:04")}
    assert len(ids) == 1
    assert case(context="accumulate:4+checkpoint").context == "checkpoint+accumulate:4"


def test_the_text_of_a_context_is_read_as_the_same_context() -> None:
    for text in ("plain", *(part for part in PARTS if part != "accumulate"), "fsdp2+compile+offload+accumulate:2"):
        assert Context.parse(text).text == text
        assert Context.parse(Context.parse(text).text) == Context.parse(text)


def test_plain_is_no_new_case() -> None:
    assert case(context="plain", dp_size=1).case_id == case().case_id
    assert case(context="checkpoint").case_id != case().case_id


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("chekpoint", "it must be plain, or parts joined with +"),
        ("compile+chekpoint", "'chekpoint' is no part of a context: it must be plain, or parts joined with +"),
        ("plain+compile", "'plain' is no part of a context"),
        ("", "it must be plain, or parts joined with +"),
        ("accumulate", "it must be plain, or parts joined with +"),
        ("accumulate:1", "it must be plain, or parts joined with +"),
        ("accumulate:1025", "it must be plain, or parts joined with +"),
        ("accumulate:99999999999999", "it must be plain, or parts joined with +"),
        ("accumulate:-2", "it must be plain, or parts joined with +"),
        ("compile:3", "it must be plain, or parts joined with +"),
        ("offload+offload", "'offload+offload' has a part twice; name each part once"),
        ("checkpoint+checkpoint_experts", "checkpoint and checkpoint_experts recompute the same layer; take one of"),
    ],
)
def test_a_text_that_is_no_context_is_refused(text: str, reason: str) -> None:
    (line,) = mistakes(context=text, num_tokens=2000)
    assert reason in line


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"context": "checkpoint+offload", "mode": "forward"}, "it has no backward for checkpoint and offload; take"),
        ({"context": "accumulate:2", "mode": "forward"}, "it has no backward for accumulate:2; take mode train"),
        ({"context": "fsdp2"}, "context = fsdp2 at dp_size = 1: fsdp2 shards over dp_size ranks; take dp_size = 2"),
        ({"dp_size": 2}, "dp_size = 2 with context = plain: only fsdp2 spreads a layer over data-parallel ranks"),
        ({"context": "accumulate:9"}, "context = accumulate:9 with num_tokens = 8: a micro-batch has at least one"),
        ({"context": "fsdp2", "dp_size": 2, "routing": "trace:ab"}, "dp_size = 2 with captured routing: a trace has"),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused(fields: dict[str, object], reason: str) -> None:
    (line,) = mistakes(**fields)
    assert reason in line


def test_what_needs_no_backward_may_be_measured_in_forward() -> None:
    assert case(context="compile", mode="forward").context == "compile"
    assert case(context="fsdp2", dp_size=2, ep_size=2, mode="forward").processes == (4, 2)


def test_each_group_of_ranks_has_the_same_numbers_of_tokens() -> None:
    spread = case(context="fsdp2", dp_size=2, ep_size=4, rank_load="uneven")
    assert [spread.tokens_of_rank(rank) for rank in range(8)] == [2, 4, 6, 8, 2, 4, 6, 8]
    assert spread.num_active_tokens == 5
