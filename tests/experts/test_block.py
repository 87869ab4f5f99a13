"""The block against a sum over experts that is written here, with real routing, and with every kind of backend."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from experts import BackendConfig, ConfigError, GroupedExperts, InputError, MoEConfig, get_backend
from experts.block import BlockConfig, MoEBlock
from experts.router import RouterConfig
from tests.experts import oracle
from tests.experts.layers import BF16, F32, F64, moe_config, on_every_engine

DEEPSEEK = RouterConfig(
    score_func="sigmoid",
    norm_topk_prob=True,
    n_expert_groups=4,
    n_limited_groups=2,
    correction_bias=True,
    route_scale=2.5,
)
BLOCKS = {
    "qwen3": BlockConfig(router=RouterConfig(norm_topk_prob=True)),
    "qwen3-next": BlockConfig(router=RouterConfig(norm_topk_prob=True), n_shared_experts=1, shared_expert_gate=True),
    "deepseek-v3": BlockConfig(router=DEEPSEEK, n_shared_experts=2),
}


def block_of(name: str, engine: str = "loop", **fields: Any) -> MoEBlock:
    config = moe_config(**{"n_routed_experts": 8, "n_activated_experts": 3, **fields})
    made = MoEBlock(config, BLOCKS[name], GroupedExperts(config, BackendConfig(experts=engine)))
    torch.manual_seed(8)
    made.init_weights(torch.device("cpu"), init_std=0.3)
    if made.router.e_score_correction_bias is not None:
        made.router.e_score_correction_bias.normal_(std=0.2)
    return made


def tokens(config: MoEConfig, num_tokens: int = 9) -> Tensor:
    return torch.randn(num_tokens, config.dim, generator=torch.Generator().manual_seed(9)).to(config.dtype)


def expected(made: MoEBlock, x_TD: Tensor) -> Tensor:
    """Return the block's output in float64, token by token."""
    weights, indices = made.router(x_TD)
    name = made.config.expert_activation
    own: dict[str, Tensor] = {key: value.detach().double() for key, value in made.experts.named_parameters()}
    rows = []
    for x, token_weights, token_indices in zip(x_TD.double(), weights.double(), indices.tolist(), strict=True):
        row = torch.zeros(made.config.dim, dtype=F64)
        for weight, expert in zip(token_weights, token_indices, strict=True):
            row += oracle.activation(name, x @ own["gate_and_up_projs"][expert]) * weight @ own["down_projs"][expert]
        if made.shared_experts is not None:
            shared = {key: value.detach().double() for key, value in made.shared_experts.named_parameters()}
            always = oracle.activation(name, x @ shared["gate_and_up_proj"]) @ shared["down_proj"]
            row += always * torch.sigmoid(x @ shared["gate"]) if "gate" in shared else always
        rows.append(row)
    return torch.stack(rows)


@on_every_engine
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_output_is_the_sum_over_chosen_and_shared_experts(name: str, activation: str, engine: str) -> None:
    made = block_of(name, engine, expert_activation=activation)
    x = tokens(made.config)
    torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-4, atol=1e-5)


@on_every_engine
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_the_loop_in_float64(name: str, engine: str) -> None:
    """The loop's own gradients are compared with the oracle elsewhere, and the router's with finite differences."""
    made, wide = block_of(name, engine), block_of(name).to(F64)
    wide.load_state_dict(made.state_dict())
    found = []
    for block in (made, wide):
        x = tokens(made.config).to(block.router.weight.dtype).requires_grad_()
        block(x).square().sum().backward()
        found.append({"x": x.grad, **{key: value.grad for key, value in block.named_parameters()}})
    assert all(grad is not None for grad in found[0].values())
    assert found[0].keys() == found[1].keys()
    for key, grad in found[1].items():
        assert grad is not None
        error = (found[0][key].double() - grad).norm() / grad.norm()
        assert error < 1e-5, key


def test_a_masked_token_gives_zero_and_harms_nobody() -> None:
    made = block_of("deepseek-v3")
    x, mask = tokens(made.config), torch.ones(9, dtype=torch.bool)
    mask[[0, 5]] = False
    right = made(x)[mask]
    x[~mask] = torch.nan
    x.requires_grad_()
    output = made(x.view(3, 3, -1), mask.view(3, 3))
    assert output.shape == (3, 3, made.config.dim)
    torch.testing.assert_close(output.flatten(0, 1)[mask], right)  # matrix products of other sizes have other last bits
    assert not output.flatten(0, 1)[~mask].any()
    output.sum().backward()
    assert x.grad is not None
    assert not x.grad[~mask].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@on_every_engine
def test_a_block_compiles_as_one_graph(engine: str) -> None:
    made = block_of("deepseek-v3", engine, dtype=BF16)
    x = tokens(made.config)
    right = made(x)
    counter = CompileCounterWithBackend("aot_eager")
    made.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(made(x), right)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_any_backend_can_be_the_experts() -> None:
    config = moe_config(dtype=F32)
    made = MoEBlock(config, BLOCKS["qwen3"], get_backend("torch_mm_save_time").build(config))
    made.init_weights(torch.device("cpu"), init_std=0.3)
    x = tokens(config)
    torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    config = moe_config()
    with pytest.raises(ConfigError, match="n_shared_experts = 0, shared_expert_gate = True"):
        MoEBlock(config, BlockConfig(shared_expert_gate=True), GroupedExperts(config))
    made = block_of("qwen3")
    with pytest.raises(InputError, match=r"x \[2, 3\] with no token_mask: x must be \[..., dim = 16\]"):
        made(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"x \[2, 16\] with token_mask \[3\]"):
        made(torch.zeros(2, 16), torch.ones(3, dtype=torch.bool))


def test_a_block_on_the_meta_device_is_allocated_by_init_weights() -> None:
    with torch.device("meta"):
        config = moe_config()
        made = MoEBlock(config, BLOCKS["qwen3-next"], GroupedExperts(config))
    made.init_weights(torch.device("cpu"))
    assert {parameter.device.type for parameter in made.parameters()} == {"cpu"}
    assert made(tokens(config)).isfinite().all()
