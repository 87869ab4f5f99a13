"""One rank of two, for test_nemo_automodel.py: NeMo AutoModel's layers under expert parallelism.

    python -m tests.forked 2 tests/experts/automodel_ranks.py FOLDER

The environment variable AUTOMODEL is the mode. In the mode `fake`, fakes replace AutoModel, Transformer Engine and
deep_ep, over gloo. In the mode `real`, AutoModel's own code runs with the other two fakes. In the mode `gpu`, nothing
is a fake, and each rank has a GPU. Each rank writes the traceback of each fact into a file, or nothing if it holds.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from experts import ConfigError, MoEConfig, Unsupported, destroy_buffers
from experts.peers.layer import PeerExperts
from experts.registry import get_backend
from experts.state_dict import as_local, local_share, sharded
from tests.experts import fake_nemo_automodel, fakes
from tests.experts.fake_deep_ep import Buffer
from tests.experts.layers import (
    BF16,
    Batch,
    Named,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
)

BY_DEEPEP = "peer_automodel_torch_mm", "peer_automodel_te"
MODE = os.environ.get("AUTOMODEL", "fake")
DEVICE = "cuda" if MODE == "gpu" else "cpu"
SIZES = {"n_routed_experts": 6, "dtype": BF16, **({"dim": 256, "moe_inter_dim": 128} if MODE == "gpu" else {})}


def mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (2,), mesh_dim_names=("ep",))


def spread(name: str, dispatcher: str, config: MoEConfig, parameters: Named) -> PeerExperts:
    """Build the peer as moebench does: shards of the parameters are loaded after the experts are spread."""
    made: Any = get_backend(name).build(config, dispatcher).to(DEVICE)
    made.init_token_dispatcher(mesh())
    if MODE == "real" and dispatcher == "deepep":  # the fused functions of Transformer Engine need a GPU
        made.peer.token_dispatcher._comm_manager.permute_fusion = False
    made.load_state_dict(shards(parameters))
    return made


def shards(parameters: Named) -> dict[str, DTensor]:
    return {name: sharded(local_share(whole.to(DEVICE), mesh()), mesh()) for name, whole in parameters.items()}


def run(made: PeerExperts, batch: Batch) -> Named:
    made.zero_grad()
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}


def of_ranks(config: MoEConfig, counts: tuple[int, int]) -> tuple[Batch, Batch]:
    """Return the tokens of all ranks, some masked and some without an expert, and the tokens of this rank."""
    whole = random_batch(config, sum(counts))
    whole.indices[whole.indices == 1] = 2  # nobody chooses expert 1, and some choose 2 twice
    whole.indices[whole.indices[:, 0] == whole.indices[:, 1], 1] = -1
    whole.token_mask[::7] = False
    first = sum(counts[: dist.get_rank()])
    return whole, whole.map(lambda tensor: tensor[first : first + counts[dist.get_rank()]].to(DEVICE))


def check(name: str, dispatcher: str, counts: tuple[int, int], **fields: Any) -> None:
    config = moe_config(**{**SIZES, **fields})
    parameters = random_parameters(config)
    made = spread(name, dispatcher, config, parameters)
    whole, own = of_ranks(config, counts)
    right = expected(config, parameters, whole)
    tokens = slice(sum(counts[: dist.get_rank()]), sum(counts[: dist.get_rank() + 1]))
    count = config.n_routed_experts // 2
    experts = slice(count * dist.get_rank(), count * (dist.get_rank() + 1))
    mine = {name: t[tokens if name in ("output", "x", "weights") else experts] for name, t in right.items()}
    for _ in range(2):
        assert_near(run(made, own), mine, config.dtype)
    with torch.no_grad():
        output = made(own.x, own.token_mask, own.weights, own.indices)
    assert_near({"output": output}, {"output": mine["output"]}, config.dtype)
    narrow = own.with_(indices=own.indices.int(), weights=own.weights.t().contiguous().t())
    assert_near(run(made, narrow), mine, config.dtype)


def matches_the_oracle() -> None:
    for name in BY_DEEPEP:
        for bias in (False, True):
            check(name, "deepep", (9, 9), expert_bias=bias)
        check(name, "deepep", (11, 4))
        check(name, "deepep", (8, 8), expert_activation="geglu")
    check("peer_automodel_torch_mm", "deepep", (7, 5), apply_router_weight_after_down=True)
    check("peer_automodel_torch_mm", "allgather", (9, 9), expert_bias=True)
    check("peer_automodel_torch_mm", "allgather", (11, 4))


def a_rank_has_no_tokens() -> None:
    for name in BY_DEEPEP:
        check(name, "deepep", (0, 12))


def state_dict_has_the_stacked_layout() -> None:
    config = moe_config(**SIZES, expert_bias=True)
    parameters = random_parameters(config)
    for name in BY_DEEPEP:
        made = spread(name, "deepep", config, parameters)
        state = made.state_dict()
        assert list(state) == list(parameters)
        assert all(isinstance(tensor, DTensor) for tensor in state.values())
        own = {name: local_share(whole.to(DEVICE), mesh()) for name, whole in parameters.items()}
        assert_same({name: as_local(tensor) for name, tensor in state.items()}, own)
        inside = torch.nn.Sequential(made)
        inside.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
        assert list(inside.state_dict()) == [f"0.{name}" for name in parameters]
        with pytest.raises(RuntimeError, match="down_projs"):
            made.load_state_dict({key: tensor for key, tensor in state.items() if key != "down_projs"})
        with pytest.raises(RuntimeError, match="more"):
            made.load_state_dict({**state, "more": torch.zeros(1)})
        assert made.stacked_grads() == {}
        assert sum(as_local(p).numel() for p in made.parameters()) == sum(tensor.numel() for tensor in own.values())


def layers_of_other_shapes_follow_each_other() -> None:
    """Each layer has a dispatcher of its own, and one buffer is large enough for the current layer."""
    destroy_buffers()
    before = Buffer.made - Buffer.destroyed
    check("peer_automodel_torch_mm", "deepep", (5, 6), dim=16)
    check("peer_automodel_te", "deepep", (5, 6), dim=32, n_routed_experts=8)
    check("peer_automodel_torch_mm", "deepep", (5, 6), dim=8, n_routed_experts=4)
    assert Buffer.made - Buffer.destroyed == before + 1
    destroy_buffers()
    assert Buffer.made - Buffer.destroyed == before


def refusals() -> None:
    for name in BY_DEEPEP:
        with pytest.raises(ConfigError, match="n_routed_experts = 3 is not a multiple of the EP size 2"):
            spread(name, "deepep", moe_config(n_routed_experts=3), {})
        with pytest.raises(Unsupported, match=r"at most 128 experts per rank, .* = 384 on 2 ranks is 192"):
            spread(name, "deepep", moe_config(n_routed_experts=384), {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Buffer, "get_dispatch_config", _refuses)
            with pytest.raises(Unsupported, match="deep_ep does not run on 2 ranks"):
                spread(name, "deepep", moe_config(), {})


def _refuses(size: int) -> None:
    raise AssertionError


FACTS = (matches_the_oracle, a_rank_has_no_tokens, state_dict_has_the_stacked_layout)
WITH_FAKES = (layers_of_other_shapes_follow_each_other, refusals)


def install() -> None:
    patch = pytest.MonkeyPatch()
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "nemo_automodel"}
    fakes.install(patch)
    if MODE == "fake":
        fake_nemo_automodel.install(patch)
        return
    patch.delitem(sys.modules, "nemo_automodel")  # `fakes.install` blocks its import
    patch.setitem(sys.modules, "transformers", None)
    sys.modules.update(own)
    engine: Any = sys.modules["transformer_engine.pytorch"]
    engine.moe_permute = engine.moe_permute_with_probs = engine.moe_unpermute = None
    # AutoModel's patch of Transformer Engine is for FP8 and for other modules. Its module needs transformers
    for name in ("", ".common", ".common.utils"):
        full = f"nemo_automodel.components.models{name}"
        module: Any = ModuleType(full)
        module._patch_te_modules = lambda: None
        module.__path__ = []
        patch.setitem(sys.modules, full, module)


def main(folder: Path) -> None:
    timeout = timedelta(seconds=60)
    if DEVICE == "cuda":
        device = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        install()
        dist.init_process_group("gloo", timeout=timeout)
    for fact in FACTS if DEVICE == "cuda" else FACTS + WITH_FAKES:
        error = ""
        try:
            fact()
        except Exception:  # any exception is the outcome of the fact
            error = traceback.format_exc()
        (folder / f"{fact.__name__}.rank{dist.get_rank()}.txt").write_text(error)
        if error:
            os._exit(1)  # the other rank may wait
    destroy_buffers()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
