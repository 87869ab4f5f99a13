"""Peers: their layouts, their form of the routing, and their results if their library is installed.

SonicMoE needs a GPU. Here a fake with its documented layouts replaces it. `moebench run peers` tests it on a GPU.
"""

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from experts import MoEConfig, Unsupported
from experts.peers.layer import Kept, PeerExperts, Translated, transposed
from experts.peers.sonicmoe import SonicMoE, in_halves, in_turns
from experts.registry import PEERS, get_backend
from tests.experts import fake_sonicmoe
from tests.experts.layers import (
    BF16,
    F32,
    F64,
    Batch,
    Named,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
)

BETWEEN_RANKS = {"peer_automodel_torch_mm", "peer_automodel_te"}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: Some experts have no token, one token has no expert, and one token has only one expert.
INDICES = [[3, 0], [1, 0], [-1, -1], [-1, 3], [0, 1]]


def masked(batch: Batch) -> Batch:
    """Mask one token and fill it with NaN."""
    batch.token_mask[1] = False
    batch.x[1] = math.nan
    return batch


def run_stacked(made: PeerExperts, batch: Batch) -> Named:
    """Run the peer, and return `output` and the gradients by name in the stacked layout."""
    made.zero_grad()
    x, weights = batch.x.detach().requires_grad_(), batch.weights.detach().requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    assert x.grad is not None
    assert weights.grad is not None
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}


def check(made: PeerExperts, config: MoEConfig, batch: Batch) -> None:
    parameters = random_parameters(config)
    made.load_state_dict(parameters)
    reference = expected(config, parameters, batch)
    for _ in range(2):
        assert_near(run_stacked(made, batch), reference, config.dtype)
    with torch.no_grad():
        output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert_near({"output": output}, {"output": reference["output"]}, config.dtype)


# code that all peers share


class Transposed(nn.Module):
    """A peer that keeps its weights as [E, out, in]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.n_routed_experts, 2 * config.moe_inter_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.n_routed_experts, config.dim, config.moe_inter_dim))


def wrapped(config: MoEConfig) -> PeerExperts:
    up, down = (Kept(name, transposed, transposed) for name in ("up", "down"))
    return PeerExperts(config, Transposed(config), {"gate_and_up_projs": up, "down_projs": down})


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_stacked_and_the_peer_keeps_its_own_layout(assign: bool) -> None:
    config = moe_config()
    parameters = random_parameters(config)
    made = wrapped(config)
    made.load_state_dict(parameters, assign=assign)
    assert_same(dict(made.state_dict()), parameters)
    assert made.peer.down.is_contiguous()
    assert made.peer.down.shape == (config.n_routed_experts, config.dim, config.moe_inter_dim)
    inside = nn.Sequential(wrapped(config))
    inside.load_state_dict({f"0.{name}": value for name, value in parameters.items()})
    assert_same(dict(inside.state_dict()), {f"0.{name}": value for name, value in parameters.items()})
    with pytest.raises(RuntimeError, match="down"):
        made.load_state_dict({"gate_and_up_projs": parameters["gate_and_up_projs"]})


def test_gradients_are_stacked_and_a_missing_gradient_is_left_out() -> None:
    made = wrapped(moe_config())
    assert made.stacked_grads() == {}
    made.peer.down.grad = torch.randn_like(made.peer.down)
    (name,) = made.stacked_grads()
    assert name == "down_projs"
    assert torch.equal(made.stacked_grads()[name], made.peer.down.grad.transpose(1, 2))


def test_routing_is_translated_once_for_unchanged_tensors() -> None:
    asked = []

    def translate(mask: torch.Tensor, indices: torch.Tensor) -> int:
        asked.append((mask, indices))
        return len(asked)

    translated = Translated(translate)
    mask, indices = torch.ones(3, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64)
    assert [translated(mask, indices), translated(mask, indices)] == [1, 1]
    indices[0] = 1
    assert [translated(mask, indices), translated(mask, indices)] == [2, 2]
    mask[0] = False
    assert [translated(mask, indices), translated(mask, indices)] == [3, 3]
    assert translated(mask.clone(), indices) == 4
    assert translated(mask, indices.clone()) == 5
    with torch.inference_mode():
        untracked = torch.zeros(3, 2, dtype=torch.int64)
        assert [translated(mask, untracked), translated(mask, untracked)] == [6, 7]


# without their libraries


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("no_libraries")
def test_the_reason_for_a_missing_library_says_how_to_install_it(name: str) -> None:
    reason = get_backend(name).unsupported(CUDA)
    assert reason is not None
    library = {"peer_transformers": "transformers", "peer_sonicmoe": "sonicmoe"}.get(name, "nemo_automodel")
    assert reason.reason.startswith(f"{library} is not installed; pip install ")
    with pytest.raises(Unsupported, match=f"(?i){library.split('_')[0]}.*pip install "):
        get_backend(name).build(moe_config(), "deepep" if name in BETWEEN_RANKS else None)


@pytest.mark.parametrize("name", sorted(PEERS.keys() - BETWEEN_RANKS))
def test_a_peer_refuses_a_dispatcher(name: str) -> None:
    backend = dataclasses.replace(get_backend(name), _unsupported=lambda *_: None)
    reason = backend.unsupported(CPU, moe_config(), "allgather")
    assert reason is not None
    assert "one process" in reason.reason


def refusal(name: str, device: torch.device = CPU, **fields: Any) -> str | None:
    reason = get_backend(name).unsupported(device, moe_config(**fields))
    return None if reason is None else reason.reason


# transformers


TRANSFORMERS = [("swiglu", False), ("geglu", False), ("relu2", False), ("quick_geglu", True)]


@pytest.fixture
def transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("activation", "bias"), TRANSFORMERS)
def test_transformers_matches_the_oracle(activation: str, bias: bool, dtype: torch.dtype, after: bool) -> None:
    fields: dict[str, Any] = {"expert_activation": activation, "expert_bias": bias, "dtype": dtype}
    config = moe_config(apply_router_weight_after_down=after, **fields)
    backend = get_backend("peer_transformers")
    assert backend.unsupported(CPU, config) is None
    check(backend.build(config), config, masked(random_batch(config, indices=INDICES)))


@pytest.mark.usefixtures("transformers")
def test_transformers_takes_the_constants_of_gpt_oss_from_the_config() -> None:
    fields: dict[str, Any] = {"activation_alpha": 0.5, "activation_limit": 0.75}
    config = moe_config(expert_activation="quick_geglu", expert_bias=True, **fields)
    check(get_backend("peer_transformers").build(config), config, random_batch(config))


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": F64}, "float64"),
        ({"dim": 18}, "dim = 18"),
        ({"expert_bias": True}, "never have a bias"),
        ({"expert_activation": "quick_geglu"}, "always have a bias"),
        ({"expert_activation": "swigluoai"}, "does not compute swigluoai;"),
        ({"swiglu_limit": 2.0}, "does not compute swiglu with swiglu_limit = 2.0"),
    ],
)
def test_transformers_gives_the_reason_of_a_refusal(fields: dict[str, Any], said: str) -> None:
    assert said in (refusal("peer_transformers", **fields) or "")


# NeMo AutoModel


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_automodel_matches_the_oracle_or_gives_the_reason(bias: bool) -> None:
    pytest.importorskip("nemo_automodel", reason="nemo_automodel is not installed")
    config = moe_config(expert_bias=bias)
    backend = get_backend("peer_automodel_torch_mm")
    assert backend.unsupported(CPU, config) is None
    check(backend.build(config), config, masked(random_batch(config, indices=INDICES)))
    assert "whole graph" in (refusal(backend.name, expert_activation="relu2") or "")
    assert "swiglu_limit = 2.0" in (refusal(backend.name, swiglu_limit=2.0) or "")
    assert "float64" in (refusal(backend.name, dtype=F64) or "")


# SonicMoE


@pytest.fixture
def sonicmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_sonicmoe.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("sonicmoe")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_sonicmoe_matches_the_oracle(activation: str, bias: bool) -> None:
    config = moe_config(expert_activation=activation, expert_bias=bias)
    check(SonicMoE(config), config, masked(random_batch(config, indices=INDICES)))
    check(SonicMoE(config), config, random_batch(config))
    check(SonicMoE(config), config, random_batch(config, indices=[[-1, -1]]))
    check(SonicMoE(config), config, random_batch(config, indices=[]))


def test_gate_and_up_columns_alternate_and_back() -> None:
    halves = torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]])
    assert in_turns(halves).tolist() == [[1.0, 10.0, 2.0, 20.0, 3.0, 30.0]]
    assert torch.equal(in_halves(in_turns(halves)), halves)


@pytest.mark.usefixtures("sonicmoe")
def test_sonicmoe_gives_the_reason_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.peers.sonicmoe.not_installed", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert refusal("peer_sonicmoe", CUDA, dtype=BF16) is None
    assert "CUDA GPU, the device is cpu" in (refusal("peer_sonicmoe", CPU, dtype=BF16) or "")
    for fields, said in (
        ({"dtype": F32}, "not float32"),
        ({"expert_activation": "relu2"}, "does not compute relu2"),
        ({"swiglu_limit": 2.0}, "swiglu_limit = 2.0"),
        ({"dim": 12}, "dim = 12"),
    ):
        assert said in (refusal("peer_sonicmoe", CUDA, **{"dtype": BF16, **fields}) or ""), fields
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "needs SM90, this is SM80" in (refusal("peer_sonicmoe", CUDA, dtype=BF16) or "")
