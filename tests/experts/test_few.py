"""The kernels for few tokens: their results in Triton's interpreter and on a GPU, and their code for an H200.

As in test_gemm.py, the interpreter needs its own process, which test_gemm.py starts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.compute import Adapters, ExpertParameters
from experts.compute.loop import compute as loop
from experts.config import MoEConfig
from tests.experts import compiled
from tests.experts.compiled import assemble, compile_launches
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    INTERPRETED,
    Batch,
    assert_near,
    layer,
    misaligned,
    moe_config,
    poisoned,
    random_batch,
    random_parameters,
)

pytest.importorskip("triton")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_gemm.py")
on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, id="few-cpu", marks=in_interpreter),
        *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in (F16, BF16)),
    ],
)
on_interpreter = pytest.mark.parametrize("device", [pytest.param("cpu", id="few-cpu", marks=in_interpreter)])

#: Experts of each choice. The experts 1 to 3 of 5 are local.
ROUTINGS = {
    "one-choice": [[2]],
    "other-ranks": [[0, 4], [-1, 0], [4, -1]],
    "shared": [[1, 3, -1], [3, 1, 0], [4, 3, 2]],
    "one-expert-many-times": [[3, 3, 3]] * 7,  # 21 choices, and a program multiplies at most 16 rows
}


def local(config: MoEConfig, device: str) -> ExpertParameters:
    named = random_parameters(config)
    return ExpertParameters(*(named[n][1:4].to(device) if n in named else None for n in ExpertParameters._fields))


def right(batch: Batch, parameters: ExpertParameters, config: MoEConfig) -> Tensor:
    """Return what the loop computes in float32."""
    exact = (None if p is None else p.cpu().float() for p in parameters)
    return loop(batch.x.float(), batch.weights, batch.indices, ExpertParameters(*exact), config, 1)


@on_every_setup
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"expert_activation": "quick_geglu", "activation_limit": 1.0, "expert_bias": True, "dim": 96},
        {"expert_activation": "swiglu", "swiglu_limit": 1.0, "moe_inter_dim": 80},
        {"expert_activation": "swigluoai", "expert_bias": True, "apply_router_weight_after_down": True},
        {"expert_activation": "geglu", "expert_bias": True},
        {"expert_activation": "relu2", "apply_router_weight_after_down": True},
    ],
    ids=lambda fields: fields["expert_activation"],
)
def test_few_tokens_are_right(
    device: str, dtype: torch.dtype, fields: dict[str, Any], routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and routing weights of choices that are not local are NaN. New memory is NaN, or the largest integer."""
    from experts import gemm

    rows = ROUTINGS[routing]
    config = moe_config(
        **{"n_routed_experts": 5, "n_activated_experts": len(rows[0]), "dim": 40, "moe_inter_dim": 24, **fields},
        dtype=dtype,
    )
    batch, parameters = random_batch(config, indices=rows), local(config, device)
    exact = right(batch, parameters, config)
    is_local = (batch.indices >= 1) & (batch.indices <= 3)
    x = batch.x.masked_fill(~is_local.any(dim=1, keepdim=True), torch.nan)
    given = batch.with_(x=x, weights=batch.weights.masked_fill(~is_local, torch.nan)).map(lambda one: one.to(device))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        found, again, strided = (
            gemm.few_tokens(x, given.weights, indices, made, config, 1)
            for x, indices, made in (
                (given.x, given.indices, parameters),
                (misaligned(given.x), given.indices.int(), parameters),
                (
                    given.x.t().contiguous().t(),
                    given.indices.t().contiguous().t(),
                    ExpertParameters(*(None if p is None else p.mT.contiguous().mT for p in parameters)),
                ),
            )
        )
    assert found.dtype is dtype
    assert_near({"output": found}, {"output": exact.double()}, dtype)
    assert torch.equal(found, again)
    assert torch.equal(found, strided)


@on_interpreter
def test_the_engine_takes_them_only_without_gradients_and_adapters(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts import gemm
    from experts.gemm import few

    calls: list[int] = []

    def seen(x_TD: Tensor, *others: Any) -> Tensor:
        calls.append(len(x_TD))
        return few.few_tokens(x_TD, *others)

    monkeypatch.setattr(gemm, "few_tokens", seen)
    made = layer("triton", moe_config(n_routed_experts=36, dtype=F16))

    def run(num_tokens: int, masked: int = 0) -> Tensor:
        batch = random_batch(made.config, num_tokens)
        batch.token_mask[:masked] = False
        output: Tensor = made(batch.x, batch.token_mask, batch.weights, batch.indices)
        return output

    with torch.no_grad():
        few_outputs = run(4, masked=1)
        run(5)  # more than a choice for 4 experts
        run(0)
        batch, parameters = random_batch(made.config, 2), made.expert_parameters()
        adapters = Adapters(1.0, *(torch.zeros(36, *s, dtype=F16) for s in ((16, 1), (1, 16), (8, 1), (1, 16))))
        made.engine.compute(batch.x, batch.weights, batch.indices, parameters, made.config, 0, adapters=adapters)
    assert calls == [4]
    assert not gemm.takes_few(40, moe_config(n_routed_experts=512))
    assert gemm.takes_few(32, moe_config(n_routed_experts=128))
    with_gradients = run(4, masked=1)
    made.requires_grad_(False)
    assert torch.equal(run(4, masked=1), few_outputs)
    assert calls == [4, 4]
    assert with_gradients.requires_grad
    assert not few_outputs[:1].any()
    assert_near({"output": few_outputs}, {"output": with_gradients.detach()}, F16)


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu"])
def test_kernels_compile_for_sm90_without_spilling(
    activation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The weights come in copies of 16 bytes, and several steps' copies are on their way at a time."""
    from experts.gemm import few

    monkeypatch.setattr(compiled, "SHARED_MEMORY_BYTES", 99 * 1024)  # of SM86 and SM89
    ptx = compile_launches(monkeypatch, tmp_path, few)
    config = moe_config(
        n_routed_experts=128, n_activated_experts=8, dim=2048, moe_inter_dim=768, expert_activation=activation
    )
    shapes = ((128, 2048, 1536), (128, 768, 2048), (128, 1536), (128, 2048))
    parameters = ExpertParameters(*(torch.empty(shape, dtype=BF16) for shape in shapes))
    indices_TK = torch.empty(1, 8, dtype=torch.int64)
    few.few_tokens(torch.empty(1, 2048, dtype=BF16), torch.empty(1, 8, dtype=F32), indices_TK, parameters, config, 0)
    for name in ("few_up_gemm", "few_down_gemm"):
        code = ptx.pop(name)
        assert "mma.sync" in code
        assert "cp.async.cg.shared.global" in code
        assert "cp.async.ca" not in code
        assert "0 bytes spill stores, 0 bytes spill loads" in assemble(code, tmp_path)
