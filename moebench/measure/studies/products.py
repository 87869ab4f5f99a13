"""Make calls to time: only the matrix products of a backend, by its own library, and the backend's whole layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experts import MoEConfig, catalog
from experts.compute.whole import Products
from experts.engines import get_engine
from experts.registry import get_backend
from experts.steps import Permutation
from moebench.workload.backends import engine_of
from moebench.workload.inputs import Inputs

Call = Callable[[], object]


def _has_products(backend: catalog.BackendEntry) -> bool:
    engine = backend.engine
    if engine is None or backend.fp8 is not None or backend.lora is not None or backend.gradient_accumulation_fusion:
        return False
    return not engine.stacked or get_engine(engine.name).products is not None


#: The backends that can be compared with the products of a library: those without FP8, adapters and main gradients.
#: `triton` is compared with torch's products, because its own products do more.
BACKENDS = tuple(backend.name for backend in catalog.BACKENDS if _has_products(backend))


@dataclass(frozen=True)
class CountedCall:
    """A call, with the least bytes that it must read and write or with its floating-point operations.

    `other` is another call of the library that computes the same, or None. The faster one counts.
    """

    name: str
    call: Call
    num_bytes: int = 0
    num_flops: int = 0
    other: Call | None = None


@dataclass(frozen=True)
class Alone:
    """The calls of only the matrix products of a forward pass and of a train step, on rows sorted by expert."""

    forward: Call
    train: Call


def alone(backend: str, inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, rows: Permutation) -> Alone:
    """Return the products to compare a backend of BACKENDS with; for Transformer Engine, its two GroupedLinears.

    Transformer Engine gets the sizes of the groups on the host.
    """
    x_ND = inputs.x_TD.index_select(0, rows.row_to_token_N)
    engine = engine_of(backend)
    products = get_engine(engine.name).products if engine is not None and engine.stacked else None
    if products is None:
        return _of_linears(x_ND, parameters, config, rows.tokens_per_expert_L.tolist())
    return _of_products(products(rows), x_ND, parameters, config)


def alone_on_device(
    backend: str, inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, rows: Permutation
) -> Alone | None:
    """Return Transformer Engine's products with the sizes on the device; None if it cannot, or for other backends."""
    engine = engine_of(backend)
    if engine is None or engine.stacked:
        return None
    layer: Any = layer_of(backend, parameters, config)
    if not layer.takes_sizes_on_device(config.dtype):
        return None
    x_ND = inputs.x_TD.index_select(0, rows.row_to_token_N)
    return _of_linears(x_ND, parameters, config, rows.tokens_per_expert_L)


def _of_products(products: Products, x_ND: Tensor, parameters: dict[str, Tensor], config: MoEConfig) -> Alone:
    up, down = parameters["gate_and_up_projs"], parameters["down_projs"]
    h_NH = products.rows(x_ND, up)
    a_NI = h_NH[:, : config.moe_inter_dim].contiguous()

    def forward() -> None:
        products.rows(x_ND, up)
        products.rows(a_NI, down)

    def train() -> None:
        forward()
        products.rows_back(x_ND, down)
        products.rows_back(h_NH, up)
        products.outer(a_NI, x_ND)
        products.outer(x_ND, h_NH)

    return Alone(forward, train)


def _of_linears(x_ND: Tensor, parameters: dict[str, Tensor], config: MoEConfig, sizes: list[int] | Tensor) -> Alone:
    layer = layer_of("te", parameters, config)
    up: Any = layer.gate_up_linear
    down: Any = layer.down_linear
    for linear in (up, down):
        linear.use_grouped_tensor = isinstance(sizes, Tensor)
    # a linear that has its own bias returns a pair
    h_NH = _first(up(x_ND, sizes))
    a_NI = h_NH[:, : config.moe_inter_dim].contiguous()
    x_ND, a_NI = (rows.detach().requires_grad_() for rows in (x_ND, a_NI))

    def forward() -> None:
        up(x_ND, sizes)
        down(a_NI, sizes)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        x_ND.grad = a_NI.grad = None
        with torch.enable_grad():
            torch.autograd.backward([_first(up(x_ND, sizes)), _first(down(a_NI, sizes))], [h_NH, x_ND.detach()])

    return Alone(forward, train)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def of_backend(
    backend: str, inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, rows: Permutation
) -> Iterator[CountedCall]:
    """Yield a backend's products and its layer: first a forward pass without gradients, then a train step."""
    given = backend, inputs, parameters, config, rows
    own, other = alone(*given), alone_on_device(*given)
    others = (None, None) if other is None else (other.forward, other.train)
    flops = 2 * rows.num_rows * (parameters["gate_and_up_projs"][0].numel() + parameters["down_projs"][0].numel())
    forward, train = passes(layer_of(backend, parameters, config), inputs)
    yield CountedCall(f"{backend}: products, forward", own.forward, num_flops=flops, other=others[0])
    yield CountedCall(f"{backend}: layer, forward", forward, num_flops=flops)
    yield CountedCall(f"{backend}: products, train", own.train, num_flops=3 * flops, other=others[1])
    yield CountedCall(f"{backend}: layer, train", train, num_flops=3 * flops)


def layer_of(backend: str, parameters: dict[str, Tensor], config: MoEConfig) -> nn.Module:
    """Return the backend's layer on the device of these parameters. The layer shares their memory if it can."""
    with torch.device(parameters["down_projs"].device):
        layer = get_backend(backend).build(config)
    layer.load_state_dict(parameters, assign=True)
    return layer


def passes(layer: nn.Module, inputs: Inputs) -> tuple[Call, Call]:
    """Return the calls of a forward pass and of a train step."""
    x_TD, weights_TK = (tensor.detach().requires_grad_() for tensor in (inputs.x_TD, inputs.weights_TK))

    def forward() -> Tensor:
        output: Tensor = layer(x_TD, inputs.token_mask_T, weights_TK, inputs.indices_TK)
        return output

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = weights_TK.grad = None
        with torch.enable_grad():
            forward().backward(inputs.grad_TD)

    return forward, train
