"""How near the memory-bound steps of an expert layer come to a plain copy, and the layer to its products alone.

    python -m moebench.steps --model qwen3-30b-a3b --num-tokens 16384 --out FILE.json

A step's bytes are those that it must read and write once; its speed is set against a copy that is measured in the same
run, cold like everything. The products alone are the grouped GEMMs of `torch_mm`, two forward and six in a train step,
on rows that are sorted already. bfloat16, uniform routing.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.compute import grouped_mm
from experts.compute.whole import Products
from experts.config import is_gated_activation
from experts.steps import Permutation, make_of_steps, steps_on
from moebench import environment, timing
from moebench.case import Case
from moebench.inputs import Inputs, make_inputs, make_parameters, moe_config
from moebench.models import MODELS
from moebench.timing import TimingPolicy
from moebench.worker import pick_device

Call = Callable[[], object]
COPY_BYTES = 1 << 30
WARM_UPS = 3


@dataclass(frozen=True)
class Work:
    """A call and what it must do at least: bytes read and written, or floating-point operations."""

    name: str
    call: Call
    num_bytes: int = 0
    num_flops: int = 0


def memory_bound(inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, copy_bytes: int) -> Iterator[Work]:
    """A copy, then each step, with the bytes of its largest tensors."""
    x_TD, weights_TK = inputs.x_TD, inputs.weights_TK
    steps, e = steps_on(x_TD.device, x_TD.dtype), x_TD.element_size()
    permutation = steps.sort_by_expert(inputs.active_indices_TK, 0, config.n_routed_experts)
    tokens, rows, dim, inter = len(x_TD), permutation.num_rows, config.dim, config.moe_inter_dim
    width = inter * (2 if is_gated_activation(config.expert_activation) else 1)
    y_ND = steps.gather_rows(x_TD, permutation)
    h_NH, a_NI = (torch.randn(rows, columns, device=x_TD.device).to(x_TD.dtype) for columns in (width, inter))
    up_bias, down_bias = parameters.get("gate_up_proj_bias"), parameters.get("down_proj_bias")
    looked_up = (permutation, weights_TK, up_bias, config)
    source = torch.ones(copy_bytes // 2, dtype=torch.uint8, device=x_TD.device)
    target = torch.empty_like(source)

    yield Work("copy", lambda: target.copy_(source), copy_bytes)
    # the indices twice; three maps
    sort = (inputs.active_indices_TK, 0, config.n_routed_experts)
    yield Work("sort_by_expert", lambda: steps.sort_by_expert(*sort), rows * 8 * 5)
    yield Work("gather_rows", lambda: steps.gather_rows(x_TD, permutation), (tokens + rows) * dim * e)
    yield Work("activate", lambda: steps.activate(h_NH, *looked_up), rows * (width + inter) * e)
    yield Work(
        "sum_rows",
        lambda: steps.sum_rows(y_ND, permutation, None if down_bias is None else weights_TK, down_bias),
        (tokens + rows) * dim * e,
    )
    yield Work(
        "activate_backward",  # over the same memory again and again: its numbers go astray, its time does not
        lambda: steps.activate_backward(h_NH, a_NI, *looked_up, again=True),
        rows * 2 * (width + inter) * e,
    )
    if up_bias is not None:
        yield Work("sum_by_expert (up)", lambda: steps.sum_by_expert(h_NH, permutation), rows * width * e)
        yield Work("sum_by_expert (down)", lambda: steps.sum_by_expert(y_ND, permutation, weights_TK), rows * dim * e)
        yield Work("dot_rows", lambda: steps.dot_rows(x_TD, permutation, None, down_bias), tokens * dim * e)


def products_alone(
    inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, permutation: Permutation
) -> Iterator[Work]:
    """The grouped GEMMs of a forward and of a train step, on sorted rows."""
    products: Products = grouped_mm.products(permutation.offsets_L)
    up, down = parameters["gate_and_up_projs"], parameters["down_projs"]
    x_ND = inputs.x_TD.index_select(0, permutation.row_to_token_N)
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

    flops = 2 * permutation.num_rows * (up[0].numel() + down[0].numel())
    yield Work("products, forward", forward, num_flops=flops)
    yield Work("products, train", train, num_flops=3 * flops)


def layers(inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig) -> Iterator[Work]:
    """`torch_mm` as a whole: forward without gradients, and train steps for what may be saved."""
    num_rows = inputs.indices_TK.numel()
    flops = 2 * num_rows * sum(parameters[name][0].numel() for name in ("gate_and_up_projs", "down_projs"))
    x_TD, weights_TK = (tensor.detach().requires_grad_() for tensor in (inputs.x_TD, inputs.weights_TK))
    for save in ("memory", "time"):
        with torch.device(x_TD.device):
            layer = GroupedExperts(config, BackendConfig(experts="torch_mm", save=save))
        layer.load_state_dict(parameters)

        def forward(layer: GroupedExperts = layer) -> Tensor:
            output: Tensor = layer(x_TD, inputs.token_mask_T, weights_TK, inputs.indices_TK)
            return output

        def train(layer: GroupedExperts = layer, forward: Callable[[], Tensor] = forward) -> None:
            layer.zero_grad(set_to_none=True)
            x_TD.grad = weights_TK.grad = None
            with torch.enable_grad():
                forward().backward(inputs.grad_TD)

        if save == "memory":
            yield Work("torch_mm, forward", forward, num_flops=flops)
        yield Work(f"torch_mm, train ({save})", train, num_flops=3 * flops)


def measure(work: Work, device: torch.device, policy: TimingPolicy) -> dict[str, Any]:
    """A row: milliseconds, and the speed of what there is to do."""
    for _ in range(WARM_UPS):
        work.call()
    ms = timing.measure([work.call], device, policy).time_ms
    row: dict[str, Any] = {"name": work.name, "ms": ms}
    if work.num_bytes:
        return {**row, "gb_per_s": work.num_bytes / ms / 1e6}
    return {**row, "tflops": work.num_flops / ms / 1e9}


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="a preset of moebench.models")] = "qwen3-30b-a3b",
    num_tokens: int = 16_384,
    device: str | None = None,
    time_cap_s: Annotated[float, typer.Option(help="seconds a measurement may take")] = 1.0,
    out: Path | None = None,
) -> None:
    """Measure the steps of one model's expert layer, its products alone, and the layer."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model {model}: it must be one of {', '.join(MODELS)}")
    on = pick_device(device)
    case = Case(model=model, num_tokens=num_tokens, **MODELS[model])  # type: ignore[arg-type]
    config, inputs, parameters = moe_config(case), make_inputs(case, on), make_parameters(case, on)
    policy = TimingPolicy(TimingPolicy.default(on).interval_target, time_cap_s)
    copy_bytes = COPY_BYTES if on.type == "cuda" else COPY_BYTES >> 4
    steps = [measure(work, on, policy) for work in memory_bound(inputs, parameters, config, copy_bytes)]
    permutation = steps_on(on).sort_by_expert(inputs.active_indices_TK, 0, config.n_routed_experts)
    wholes = [measure(work, on, policy) for work in products_alone(inputs, parameters, config, permutation)]
    wholes += [measure(work, on, policy) for work in layers(inputs, parameters, config)]
    for row in steps:
        row["fraction"] = row["gb_per_s"] / steps[0]["gb_per_s"]
    for row in wholes:
        row["fraction"] = row["tflops"] / wholes["train" in row["name"]]["tflops"]
    _tell(steps + wholes, config, on, out)


def _tell(rows: list[dict[str, Any]], config: MoEConfig, device: torch.device, out: Path | None) -> None:
    make = make_of_steps(device, config.dtype)
    print(f"steps: {make}; fraction of the copy's speed, of the products' speed alone")
    for row in rows:
        speed = f"{row['gb_per_s']:8.0f} GB/s   " if "gb_per_s" in row else f"{row['tflops']:8.1f} TFLOP/s"
        print(f"{row['name']:<26} {row['ms']:9.4f} ms {speed} {row['fraction']:6.2f}")
    if out is not None:
        described = environment.collect(device.type).model_dump(mode="json")
        out.write_text(json.dumps({"environment": described, "steps": make, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
