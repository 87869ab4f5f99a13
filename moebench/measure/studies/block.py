"""Measure what share of a whole MoE block is the routed experts: the block, and its router, shared experts and experts.

    python -m moebench.measure.studies.block --model qwen3-30b-a3b --num-tokens 4096 --backend torch_mm --out FILE.csv
    python -m moebench.measure.studies.block --shape e64k6d512i256 --like deepseek-v3 --backend loop --backend torch_mm

The whole block and each part are timed alone, on the same tokens and with the routing that the router computes. Weights
and tokens are random, so the routing is close to uniform. `forward` is without gradients, and `train` is a forward and
a backward pass. Times are medians, with a cold cache on a GPU. `rest` is the block's time without its parts: the
additions, and what the parts gain or lose together. It may be negative. Everything runs on one process.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experts.block import BlockConfig, MoEBlock
from experts.errors import ConfigError, RegistryError
from experts.registry import get_backend
from moebench.errors import UsageError
from moebench.machine import environment
from moebench.measure import timing
from moebench.measure.context.block import block_config
from moebench.measure.studies import places, run
from moebench.measure.timing import Timing, TimingPolicy
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config
from moebench.workload.models import BLOCKS as OF_MODELS
from moebench.workload.models import MODELS, shape_fields, shape_name

WARM_UPS = 3
#: The parts of a block, in the order in which it runs them.
PARTS = ("router", "shared", "experts")
SUFFIXES = (".csv", ".json", ".parquet")

#: The router and the shared experts of models. `route_scale` is there for the result and changes no time.
BLOCKS: Mapping[str, BlockConfig] = MappingProxyType({name: block_config(fields) for name, fields in OF_MODELS.items()})


@dataclass(frozen=True)
class Work:
    """A block with the inputs of each of its parts. The parts get the routing that the router computes."""

    block: MoEBlock
    x_TD: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    grad_TD: Tensor

    @property
    def load(self) -> float:
        """The number of tokens of the busiest expert, divided by the mean of all experts."""
        counts_E = torch.bincount(self.indices_TK.flatten(), minlength=self.block.config.n_routed_experts)
        return float(counts_E.max() / counts_E.float().mean())

    def calls(self) -> Iterator[tuple[str, nn.Module, Callable[[], tuple[list[Tensor], Tensor, Tensor]]]]:
        """Yield the block and each part that it has: its name, its module, and what one call of it computes.

        A call returns its inputs that get gradients, its output, and the gradient of the output.
        """
        block, mask_T = self.block, torch.ones(len(self.x_TD), dtype=torch.bool, device=self.x_TD.device)
        x_TD, weights_TK = (tensor.detach().requires_grad_() for tensor in (self.x_TD, self.weights_TK))
        grad_weights_TK = torch.randn_like(self.weights_TK)
        yield "block", block, lambda: ([x_TD], block(x_TD), self.grad_TD)
        yield "router", block.router, lambda: ([x_TD], block.router(x_TD)[0], grad_weights_TK)
        shared = block.shared_experts
        if shared is not None:
            yield "shared", shared, lambda: ([x_TD], shared(x_TD), self.grad_TD)
        yield (
            "experts",
            block.experts,
            lambda: ([x_TD, weights_TK], block.experts(x_TD, mask_T, weights_TK, self.indices_TK), self.grad_TD),
        )


def work_of(case: Case, like: BlockConfig, backend: str, device: torch.device) -> Work:
    """Return a block of the case's experts, computed by a backend, with random weights and tokens.

    Raises ConfigError if the router does not fit the experts.
    """
    config = moe_config(case)
    with torch.device(device):
        block = MoEBlock(config, like, get_backend(backend).build(config))
    torch.manual_seed(case.seed)  # every backend gets the same router, so the same routing
    parts: list[Any] = [part for part in (block.router, block.shared_experts) if part is not None]
    for part in parts:
        part.init_weights(device, init_std=config.dim**-0.5)
    experts: Any = block.experts
    experts.load_state_dict(make_parameters(case, device))
    inputs = make_inputs(case, device)
    with torch.no_grad():
        weights_TK, indices_TK = block.router(inputs.x_TD)
    return Work(block, inputs.x_TD, weights_TK, indices_TK, inputs.grad_TD)


def measure_block(work: Work, mode: str, device: torch.device, policy: TimingPolicy) -> dict[str, Any]:
    """Return the times of the block and of its parts, and the experts' share of the block.

    `experts_share` has the experts' time divided by the block's. A part that the block does not have is None.
    """
    times: dict[str, Timing] = {}
    for name, module, compute in work.calls():
        call = _forward(compute) if mode == "forward" else _train(module, compute)
        for _ in range(WARM_UPS):
            call()
        times[name] = timing.time_stages([call], device, policy)
    ms = {name: measured.time_ms for name, measured in times.items()}
    return {
        "mode": mode,
        "block_ms": ms["block"],
        "block_ms_low": times["block"].time_ms_low,
        "block_ms_high": times["block"].time_ms_high,
        **{f"{part}_ms": ms.get(part) for part in PARTS},
        "rest_ms": ms["block"] - sum(ms.get(part, 0.0) for part in PARTS),
        "experts_share": ms["experts"] / ms["block"],
        "load": work.load,
    }


def _forward(compute: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            compute()

    return call


def _train(module: nn.Module, compute: Callable[[], tuple[list[Tensor], Tensor, Tensor]]) -> Callable[[], None]:
    def call() -> None:
        module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            inputs, output, grad = compute()
            for tensor in inputs:
                tensor.grad = None
            output.backward(grad)

    return call


def main(
    model: Annotated[list[str], typer.Option(help=f"one of {', '.join(BLOCKS)}; repeatable")] = [],  # noqa: B006
    shape: Annotated[
        list[str],
        typer.Option(help="a layer of your own, besides or instead of a model: e64k6d1024i512; repeatable"),
    ] = [],  # noqa: B006
    like: Annotated[
        str, typer.Option(help="the model whose router and shared experts the layers of --shape get")
    ] = "qwen3-30b-a3b",
    num_tokens: Annotated[list[int], typer.Option(min=1, help="repeatable")] = [4096],  # noqa: B006
    backend: Annotated[list[str], typer.Option(help="a backend of the routed experts; repeatable")] = ["torch_mm"],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="forward or train; repeatable")] = ["forward", "train"],  # noqa: B006
    dtype: str = "bfloat16",
    device: str | None = None,
    time_cap_s: Annotated[float, typer.Option(help="most seconds per measurement")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="a file .csv, .json or .parquet")] = None,
) -> None:
    """Measure the whole MoE block and its parts, and print the share of the experts."""
    for value in [*model, like]:
        if value not in BLOCKS:
            raise UsageError(f"--{'like' if value == like else 'model'} {value}: it must be one of {', '.join(BLOCKS)}")
    for value in mode:
        if value not in ("forward", "train"):
            raise UsageError(f"--mode {value}: it must be forward or train")
    if out is not None and out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: it must end in {', '.join(SUFFIXES)}")
    on = places(device, out)
    named = model or ([] if shape else ["qwen3-30b-a3b"])
    given = [({"model": name, **MODELS[name]}, BLOCKS[name]) for name in named]
    given += [(_fields_of(text), BLOCKS[like]) for text in shape]
    policy = TimingPolicy(TimingPolicy.default(on).interval_target, time_cap_s)
    rows: list[dict[str, Any]] = []
    for fields, config in given:
        for count in num_tokens:
            case = _case(fields, count, dtype)
            for name in backend:
                rows += _measured(case, config, name, mode, on, policy)
    described = environment.collect(on.type)
    Console().print(table_of(rows))
    if out is not None:
        _write(rows, described, out)


def _measured(
    case: Case, config: BlockConfig, backend: str, modes: Sequence[str], device: torch.device, policy: TimingPolicy
) -> Iterator[dict[str, Any]]:
    try:
        reason = get_backend(backend).unsupported(device, moe_config(case))
        if reason is not None:
            raise UsageError(f"--backend {backend}: {reason.reason}")
        work = work_of(case, config, backend, device)
    except RegistryError as error:
        raise UsageError(f"--backend {backend}: {error}") from error
    except ConfigError as error:
        raise UsageError(f"{case.model or 'the shape'}: {error}") from error
    what = {"model": case.model, "shape": shape_name(case.model_dump()), "num_tokens": case.num_tokens}
    for mode in modes:
        yield {**what, "dtype": case.dtype, "backend": backend, **measure_block(work, mode, device, policy)}


def _fields_of(text: str) -> dict[str, Any]:
    fields = shape_fields(text)
    if fields is None:
        raise UsageError(f"--shape {text}: it must be experts, top-k, dim and inter; for example e128k8d2048i768")
    return dict(fields)


def _case(fields: Mapping[str, Any], num_tokens: int, dtype: str) -> Case:
    try:
        return Case.model_validate({"num_tokens": num_tokens, "dtype": dtype, **fields})
    except ValueError as error:
        raise UsageError(f"{dict(fields)} in {dtype}: {str(error).splitlines()[-1].strip()}") from None


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as a table: milliseconds, and the share of the block's time that the experts take."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "tokens", "backend", "mode", "block ms", *PARTS, "rest", "experts' share"):
        table.add_column(title, justify="left" if title in ("layer", "backend", "mode") else "right")
    for row in rows:
        times = [row[f"{part}_ms"] for part in (*PARTS, "rest")]
        table.add_row(
            *(row["model"] or row["shape"], str(row["num_tokens"]), row["backend"], row["mode"]),
            f"{row['block_ms']:.3f}",
            *("–" if ms is None else f"{ms:.3f}" for ms in times),
            f"{row['experts_share']:.0%}",
        )
    return table


def _write(rows: Sequence[dict[str, Any]], described: environment.Environment, out: Path) -> None:
    """Write the rows and the environment. In CSV and Parquet, each row has the GPU or CPU and torch's version."""
    if out.suffix == ".json":
        content = {"environment": described.model_dump(mode="json"), "rows": rows}
        out.write_text(json.dumps(content, indent=2) + "\n")
        return
    machine = described.gpus[0].name if described.gpus and described.device != "cpu" else described.cpu_model
    facts = {"device": described.device, "machine": machine, "torch": described.versions.get("torch")}
    frame = pd.DataFrame(rows).assign(**facts, env_id=described.env_id)
    if out.suffix == ".csv":
        frame.to_csv(out, index=False)
    else:
        frame.to_parquet(out, index=False)


if __name__ == "__main__":
    run(main, "moebench.measure.studies.block")
