"""Compare a layer's memory-bound steps with a plain copy, and the whole layer with only its matrix products.

    python -m moebench.measure.studies.steps --model qwen3-30b-a3b --num-tokens 16384 --out FILE.json
    python -m moebench.measure.studies.steps --shape e32k8d7168i2048 --num-tokens 4096 --backend torch_mm --backend te

The bytes of a step are those that it must read or write at least once. The step's speed is compared with a copy that is
measured in the same run. All measurements have a cold cache, bfloat16 and uniform routing. The matrix products are the
grouped GEMMs of the backend's own library on sorted rows: two in a forward pass, and six in a train step. If
Transformer Engine can take the sizes of the groups both on the host and on the device, the faster call counts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from experts import MoEConfig
from experts.config import is_gated_activation
from experts.registry import get_backend
from experts.steps import make_of_steps, steps_on
from moebench.errors import UsageError
from moebench.machine import environment
from moebench.measure import timing
from moebench.measure.studies import places, run
from moebench.measure.studies.products import BACKENDS, Call, CountedCall, of_backend
from moebench.measure.timing import TimingPolicy
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs, make_inputs, make_parameters, moe_config
from moebench.workload.models import MODELS, shape_fields

COPY_BYTES = 1 << 30
WARM_UPS = 3


def memory_bound(
    inputs: Inputs, parameters: dict[str, Tensor], config: MoEConfig, copy_bytes: int
) -> Iterator[CountedCall]:
    """Yield a copy, then each step with the bytes of its largest tensors."""
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

    yield CountedCall("copy", lambda: target.copy_(source), copy_bytes)
    masked = (inputs.indices_TK, inputs.token_mask_T)
    yield CountedCall("mask_choices", lambda: steps.mask_choices(*masked), rows * 8 * 2)
    # reads the indices twice and writes three maps
    sort = (inputs.active_indices_TK, 0, config.n_routed_experts)
    yield CountedCall("sort_by_expert", lambda: steps.sort_by_expert(*sort), rows * 8 * 5)
    yield CountedCall("gather_rows", lambda: steps.gather_rows(x_TD, permutation), (tokens + rows) * dim * e)
    yield CountedCall("activate", lambda: steps.activate(h_NH, *looked_up), rows * (width + inter) * e)
    yield CountedCall(
        "sum_rows",
        lambda: steps.sum_rows(y_ND, permutation, None if down_bias is None else weights_TK, down_bias),
        (tokens + rows) * dim * e,
    )
    yield CountedCall(
        "activate_backward",  # it overwrites the same memory in every call: the values become wrong, the time does not
        lambda: steps.activate_backward(h_NH, a_NI, *looked_up, again=True),
        rows * 2 * (width + inter) * e,
    )
    if up_bias is not None:
        yield CountedCall("sum_by_expert (up)", lambda: steps.sum_by_expert(h_NH, permutation), rows * width * e)
        yield CountedCall(
            "sum_by_expert (down)", lambda: steps.sum_by_expert(y_ND, permutation, weights_TK), rows * dim * e
        )
        yield CountedCall("dot_rows", lambda: steps.dot_rows(x_TD, permutation, None, down_bias), tokens * dim * e)


def measure_step(work: CountedCall, device: torch.device, policy: TimingPolicy) -> dict[str, Any]:
    """Return a row: the name, the milliseconds, and GB/s or TFLOP/s; with two calls, also the times of both."""

    def time(call: Call) -> float:
        for _ in range(WARM_UPS):
            call()
        return timing.time_stages([call], device, policy).time_ms

    times = [time(call) for call in (work.call, work.other) if call is not None]
    ms = min(times)
    row: dict[str, Any] = {"name": work.name, "ms": ms}
    if len(times) > 1:
        row["ms_by_place_of_sizes"] = dict(zip(("host", "device"), times, strict=True))
    if work.num_bytes:
        return {**row, "gb_per_s": work.num_bytes / ms / 1e6}
    return {**row, "tflops": work.num_flops / ms / 1e9}


@torch.no_grad()
def main(
    model: Annotated[
        str | None, typer.Option(help="a preset of moebench.workload.models; default qwen3-30b-a3b")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="instead of a model, a layer with SwiGLU and no bias: e64k6d1024i512")
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=1)] = 16_384,
    backend: Annotated[list[str], typer.Option(help=f"one of {', '.join(BACKENDS)}; repeatable")] = ["torch_mm"],  # noqa: B006
    device: str | None = None,
    time_cap_s: Annotated[float, typer.Option(help="most seconds per measurement")] = 1.0,
    out: Path | None = None,
) -> None:
    """Measure the steps of one expert layer, only its matrix products, and the whole layer."""
    if model is not None and shape is not None:
        raise UsageError(f"--model {model} and --shape {shape}: give one of them, not both")
    case = _case(model or "qwen3-30b-a3b", num_tokens) if shape is None else _case_of_shape(shape, num_tokens)
    on = places(device, out)
    config = moe_config(case)
    for name in backend:
        _check_backend(name, on, config)
    inputs, parameters = make_inputs(case, on), make_parameters(case, on)
    policy = TimingPolicy(TimingPolicy.default(on).interval_target, time_cap_s)
    copy_bytes = COPY_BYTES if on.type == "cuda" else COPY_BYTES >> 4
    steps = [measure_step(work, on, policy) for work in memory_bound(inputs, parameters, config, copy_bytes)]
    rows = steps_on(on).sort_by_expert(inputs.active_indices_TK, 0, config.n_routed_experts)
    wholes = [
        measure_step(work, on, policy)
        for name in backend
        for work in of_backend(name, inputs, parameters, config, rows)
    ]
    for row in steps:
        row["fraction"] = row["gb_per_s"] / steps[0]["gb_per_s"]
    for products, layer in zip(wholes[::2], wholes[1::2], strict=True):
        products["fraction"], layer["fraction"] = 1.0, layer["tflops"] / products["tflops"]
    _tell(steps + wholes, config, on, out)


def _case(model: str, num_tokens: int) -> Case:
    if model not in MODELS:
        raise UsageError(f"--model {model}: it must be one of {', '.join(MODELS)}")
    return Case(model=model, num_tokens=num_tokens, **MODELS[model])  # type: ignore[arg-type]


def _case_of_shape(shape: str, num_tokens: int) -> Case:
    try:
        return Case.model_validate({"num_tokens": num_tokens, **(shape_fields(shape) or {})})
    except ValueError:
        rule = "it must be four positive numbers: experts, top-k, dim and inter, with top-k at most experts"
        raise UsageError(f"--shape {shape}: {rule}; for example e128k8d2048i768") from None


def _check_backend(name: str, device: torch.device, config: MoEConfig) -> None:
    if name not in BACKENDS:
        raise UsageError(f"--backend {name}: it must be one of {', '.join(BACKENDS)}")
    reason = get_backend(name).unsupported(device, config)
    if reason is not None:
        raise UsageError(f"--backend {name}: {reason.reason}")


def _tell(rows: list[dict[str, Any]], config: MoEConfig, device: torch.device, out: Path | None) -> None:
    make = make_of_steps(device, config.dtype)
    print(f"steps: {make}; last column: speed over the copy's speed (steps) or over the products' speed (layer)")
    for row in rows:
        speed = f"{row['gb_per_s']:8.0f} GB/s   " if "gb_per_s" in row else f"{row['tflops']:8.1f} TFLOP/s"
        print(f"{row['name']:<32} {row['ms']:9.4f} ms {speed} {row['fraction']:6.2f}")
    if out is not None:
        described = environment.collect(device.type).model_dump(mode="json")
        out.write_text(json.dumps({"environment": described, "steps": make, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "moebench.measure.studies.steps")
