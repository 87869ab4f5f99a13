"""Estimated memory agrees with measured memory: for a pass on a GPU, and for the tensors of a whole job on a CPU."""

from typing import Any

import pytest
import torch

from moebench.measure.cache import Workload
from moebench.measure.memory import StorageTracker
from moebench.measure.subject import backend_of, make_subject
from moebench.parity.together import ON_CPU
from moebench.run.memory.footprint import footprint
from moebench.run.memory.passes import pass_bytes
from moebench.workload.case import Case, Job
from moebench.workload.models import MODELS

GIB = 2**30

#: The measured `peak_memory_bytes` in GiB: MEASURED on one H200, OF_TWO on two, on 2026-11-23.
#: The steps were not yet fused then.
OF_TWO = [
    ("train", "torch_mm", "allgather", 2.07),
    ("train", "torch_mm", "deepep", 2.06),
    ("train", "gmm", "deepep", 1.30),
]
MEASURED = [
    ("qwen3-30b-a3b", 16384, "forward", "torch_mm", 2.07),
    ("qwen3-30b-a3b", 16384, "train", "torch_mm", 3.75),
    ("qwen3-30b-a3b", 128, "train", "gmm", 1.14),
    ("qwen3-30b-a3b", 128, "train", "loop", 1.88),
    ("qwen3-30b-a3b", 16384, "train", "te_fp8_block", 4.76),
    ("gpt-oss-20b", 8192, "forward", "gmm", 2.81),
    ("gpt-oss-20b", 8192, "train", "te", 4.44),
    ("nemotron-3-nano", 4096, "train", "torch_mm", 2.73),
    ("mixtral-8x7b", 4096, "train", "torch_mm", 4.03),
    ("deepseek-v3", 4096, "forward", "torch_mm", 1.42),
    ("deepseek-v3", 4096, "forward", "te_fp8_block", 8.40),
    ("deepseek-v3", 4096, "train", "gmm", 22.18),
    ("deepseek-v3", 4096, "train", "te_fp8_block", 36.30),
    ("kimi-k2", 2048, "train", "torch_mm", 32.09),
]


def job(backend: str = "torch_mm", dispatcher: str = "local", model: str | None = None, **fields: Any) -> Job:
    shape = {"n_routed_experts": 16, "n_activated_experts": 4, "dim": 512, "moe_inter_dim": 256}
    if model is not None:
        shape = {**MODELS[model], "model": model}  # type: ignore[dict-item]
    case = Case.model_validate({"num_tokens": 1024, **shape, **fields})
    return Job(case=case, backend=backend, dispatcher=dispatcher)


@pytest.mark.parametrize(("model", "num_tokens", "mode", "backend", "measured"), MEASURED)
def test_a_pass_takes_about_what_was_measured(
    model: str, num_tokens: int, mode: str, backend: str, measured: float
) -> None:
    estimated = pass_bytes(job(backend, model=model, num_tokens=num_tokens, mode=mode)) / GIB
    assert 0.9 < estimated / measured < 1.5


@pytest.mark.parametrize(("mode", "backend", "dispatcher", "measured"), OF_TWO)
def test_a_pass_of_two_ranks_takes_about_what_was_measured(
    mode: str, backend: str, dispatcher: str, measured: float
) -> None:
    one = job(backend, dispatcher, model="qwen3-30b-a3b", num_tokens=4096, mode=mode, ep_size=2)
    assert 0.8 < pass_bytes(one) / GIB / measured < 1.5


SHAPES = [
    {"num_tokens": 64},
    {"num_tokens": 1024},
    {"num_tokens": 1024, "n_routed_experts": 8, "n_activated_experts": 2, "moe_inter_dim": 1024},
    {"num_tokens": 1024, "moe_inter_dim": 512, "expert_activation": "quick_geglu", "expert_bias": True},
]


#: `make test` measures the first shape in both modes, and the second in forward. `make certify` measures all.
FEW = [(SHAPES[0], "forward"), (SHAPES[0], "train"), (SHAPES[1], "forward")]


@pytest.mark.certify
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("fields", SHAPES)
def test_a_job_takes_about_what_its_tensors_are(fields: dict[str, Any], mode: str, certify: bool) -> None:
    if not certify and (fields, mode) not in FEW:
        pytest.skip("takes half a minute: `make certify` runs it")
    one = job(mode=mode, **fields)
    with StorageTracker() as tracker:
        workload = Workload(torch.device("cpu"))
        subject = make_subject(backend_of(one, workload), one, workload)
        handed = subject.inputs.clone()
        subject.judge([subject.run(handed), subject.run(handed)])
    assert 0.85 < footprint(one, ON_CPU).peak_bytes / tracker.peak_bytes < 1.4


def test_frozen_weights_have_no_gradients_but_adapters_have() -> None:
    shape = {"model": "qwen3-30b-a3b", "num_tokens": 16, "mode": "train"}
    whole, adapted = footprint(job("torch_mm", **shape)), footprint(job("torch_mm_lora", **shape))
    weights = 128 * 3 * 2048 * 768 * 2
    adapters = 128 * 16 * (2 * 2048 + 3 * 768) * 2
    assert adapted.building == whole.building + 2 * adapters
    assert whole.passes - adapted.passes == pytest.approx(2 * weights - 4 * adapters, rel=0.01)
    assert footprint(job("torch_mm_lora", **shape | {"mode": "forward"})).passes < whole.passes - weights


def test_ranks_share_parameters_but_build_the_whole_layer() -> None:
    one, eight = (
        footprint(job("gmm", dispatcher, model="kimi-k2", num_tokens=16, ep_size=size, mode="train"))
        for size, dispatcher in ((1, "local"), (8, "alltoall"))
    )
    assert eight.passes == pytest.approx(one.passes / 8, rel=0.02)
    layer = 384 * 3 * 7168 * 2048 * 2
    assert eight.building == pytest.approx(layer * (1 + 2 / 8), rel=0.01)
    assert eight.peak_bytes == eight.building


def test_memory_grows_with_what_reaches_a_rank() -> None:
    """All-gather brings all tokens to a rank. Another dispatcher brings only the tokens that chose the rank.

    Only some engines skip the rows that belong to other ranks.
    """
    fields = {"model": "deepseek-v3", "num_tokens": 4096, "ep_size": 8}
    gathered, sent = (pass_bytes(job("torch_mm", way, **fields)) for way in ("allgather", "alltoall"))
    assert gathered / sent == pytest.approx(1 / (1 - (7 / 8) ** 8), rel=0.05)
    counted = pass_bytes(job("te", "allgather", **fields))
    assert gathered / counted == pytest.approx(8, rel=0.25)
    skewed = pass_bytes(job("te", "alltoall", routing="one-hot", **fields))
    assert skewed > 4 * pass_bytes(job("te", "alltoall", **fields))


def test_a_dispatcher_that_reserves_rows_takes_memory_for_the_tokens_of_all_ranks() -> None:
    """Its own memory is there before the passes. In a pass, it brings as many rows as all-gather does."""
    fields = {"model": "deepseek-v3", "num_tokens": 4096, "ep_size": 8, "mode": "train", "rank_load": "one-empty"}
    reserving, gathering = (job("torch_mm", way, **fields) for way in ("symm_mem", "allgather"))
    assert pass_bytes(reserving) == pass_bytes(gathering)
    reserved = 8 * 4096 * (7168 * 2 + 8 * (4 + 4))
    assert footprint(reserving).passes - footprint(gathering).passes == reserved


@pytest.mark.parametrize("rank_load", ["even", "uneven", "one-empty"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_ranks_without_tokens_still_hold_their_experts(num_tokens: int, rank_load: str) -> None:
    one = job(dispatcher="alltoall", num_tokens=num_tokens, rank_load=rank_load, ep_size=4, mode="train")
    parameter_bytes = 16 // 4 * 3 * 512 * 256 * 2
    assert footprint(one).passes >= 4 * parameter_bytes
