"""Check whether this process still computes right, by a layer with a known result."""

import gc
import math

import torch

from experts import BackendConfig, GroupedExperts, MoEConfig

#: A process may keep this much GPU memory between jobs. Workspaces of libraries take tens of MiB each.
KEPT_BYTES = 2**28
_TOKENS, _EXPERTS, _WIDTH = 4, 2, 8
_TOLERANCE = 1e-5  # for float32 sums of a few equal terms; if a backend switched TF32 on, the error exceeds it


class Unhealthy(Exception):
    """This process must not measure more jobs; the message says why."""


def sing(device: torch.device) -> None:
    """Check that the backend `loop` gives the right result, and that the memory of a failed job is free.

    Raises Unhealthy if one of the two checks fails. If the device is broken, raises the device's own error.

    All inputs are 1, and every matrix computes the mean of its input. Gate and up are therefore 1, so that
    y = silu(1) and dx = silu'(1) + silu(1).
    """
    if torch.get_default_dtype() != torch.float32:
        raise Unhealthy(f"the default dtype is {torch.get_default_dtype()}: a backend has changed it")
    config = MoEConfig(
        n_routed_experts=_EXPERTS, n_activated_experts=_EXPERTS, dim=_WIDTH, moe_inter_dim=_WIDTH, dtype=torch.float32
    )
    with device:
        layer = GroupedExperts(config, BackendConfig(experts="loop"))
        x_TD = torch.ones(_TOKENS, _WIDTH, requires_grad=True)
        weights_TK = torch.full((_TOKENS, _EXPERTS), 1 / _EXPERTS)
        indices_TK = torch.arange(_EXPERTS).expand(_TOKENS, _EXPERTS).contiguous()
        token_mask_T = torch.ones(_TOKENS, dtype=torch.bool)
    with torch.no_grad():
        for parameter in layer.to(device).parameters():
            parameter.fill_(1 / _WIDTH)
    y_TD = layer(x_TD, token_mask_T, weights_TK, indices_TK)
    y_TD.backward(torch.ones_like(y_TD))
    sigmoid = 1 / (1 + math.exp(-1))
    slope = sigmoid * (1 + (1 - sigmoid))
    for name, found, right in (("output", y_TD, sigmoid), ("input gradient", x_TD.grad, slope + sigmoid)):
        error = math.inf if found is None else float((found.detach() - right).abs().max())
        if not error <= _TOLERANCE:
            raise Unhealthy(f"the canary's {name} is off by {error:.2g}, over {_TOLERANCE:.0e}: another worker goes on")
    _check_memory(device)


def _check_memory(device: torch.device) -> None:
    if device.type != "cuda":
        return
    gc.collect()
    held = torch.cuda.memory_allocated(device)
    if held > KEPT_BYTES:
        raise Unhealthy(f"{held} bytes of the GPU are still held after a failed job, more than {KEPT_BYTES}")
