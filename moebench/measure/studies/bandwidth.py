"""Measure how much of its library's bandwidth a dispatcher reaches, in `dispatch` and in `combine`.

    torchrun --nproc-per-node 2 -m moebench.measure.studies.bandwidth --model deepseek-v3 --num-tokens 4096
        --out FILE.json

The program compares the dispatcher with the raw library call that moves the same rows. Both are measured in one run,
without backward, in bfloat16, with uniform routing. A barrier aligns the ranks before each sample, and times are
medians of the slowest rank. The raw call gets the sizes and the sorted rows. The dispatcher must compute the sizes and
sort the rows, and it must also carry weights and indices. This additional work counts in the dispatcher's time.

With `--fp8-rows`, each dispatcher that can sends rows out in FP8, too. The raw call then moves as many bytes, and
quantising counts in the dispatcher's time. Rows come back in bfloat16.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experts import MoEConfig, catalog
from experts.dispatch import Dispatched, Dispatcher
from experts.dispatchers import dispatcher_unsupported, make_dispatcher
from moebench.errors import UsageError
from moebench.machine import environment
from moebench.measure import timing
from moebench.measure.ceilings import rows_between_ranks
from moebench.measure.studies import places, run
from moebench.measure.timing import TimingPolicy
from moebench.workload.backends import collective_of
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs, make_inputs, moe_config
from moebench.workload.models import MODELS
from moebench.workload.ranks import Ranks, all_gather_rows, all_to_all_rows, join, leave, reduce_scatter_rows

Way = Callable[[], object]


def raw_ways(
    name: str, dispatcher: Dispatcher, inputs: Inputs, sent: Dispatched, config: MoEConfig, ranks: Ranks
) -> tuple[Way, Way]:
    """Return the bare library calls that move the rows of `sent` out, and rows of the same shape back.

    A dispatcher that uses another library than torch.distributed has its own method `raw_ways`.
    """
    y_RD = torch.randn(sent.x_RD.shape, device=sent.x_RD.device).to(sent.x_RD.dtype)
    own = getattr(dispatcher, "raw_ways", None)
    if own is not None:
        ways: tuple[Way, Way] = own(inputs.x_TD, inputs.weights_TK, inputs.active_indices_TK, y_RD, sent)
        return ways
    if collective_of(name) == "all_gather":
        return lambda: all_gather_rows(inputs.x_TD, ranks.group), lambda: reduce_scatter_rows(y_RD, ranks.group)
    send, receive = rows_between_ranks(inputs.active_indices_TK, config.n_routed_experts, ranks)
    rows_ND = torch.randn(sum(send), _row_bytes(sent) // 2, device=y_RD.device).to(torch.bfloat16)
    received_ND = y_RD[: sum(receive)]  # a dispatcher may bring more rows, which nobody filled
    return (
        lambda: all_to_all_rows(rows_ND, send, receive, ranks.group),
        lambda: all_to_all_rows(received_ND, receive, send, ranks.group),
    )


def _row_bytes(sent: Dispatched) -> int:
    """Return the bytes of a row on its way to the experts."""
    return sent.row_bytes or sent.x_RD.shape[1] * sent.x_RD.itemsize


def measure_dispatcher(
    name: str, case: Case, device: torch.device, ranks: Ranks, fp8_rows: bool = False
) -> list[dict[str, Any]]:
    """Return one row for `dispatch` and one row for `combine`.

    A row has the bytes of the rank that gets most, also from itself, milliseconds and GB/s of the dispatcher and of the
    raw call, and the ratio of the two times.
    """
    config, inputs = moe_config(case), make_inputs(case, device, ranks.rank)
    dispatcher: Dispatcher = make_dispatcher(name, ranks.group, config, {"fp8_rows": True} if fp8_rows else None)
    arguments = inputs.x_TD, inputs.weights_TK, inputs.active_indices_TK
    sent = dispatcher.dispatch(*arguments)
    y_RD = torch.randn(sent.x_RD.shape, device=device).to(sent.x_RD.dtype)
    ours = (lambda: dispatcher.dispatch(*arguments), lambda: dispatcher.combine(y_RD, sent))
    raw = raw_ways(name, dispatcher, inputs, sent, config, ranks)
    policy = TimingPolicy.default(device)
    num_filled = int((sent.indices_RK >= 0).any(dim=1).sum())
    row_bytes = _row_bytes(sent), config.dim * config.dtype.itemsize
    rows: list[dict[str, Any]] = []
    for way, num_bytes, our_call, raw_call in zip(("dispatch", "combine"), row_bytes, ours, raw, strict=True):
        gigabytes = ranks.largest(num_filled * num_bytes) / 1e9
        our_ms, raw_ms = (_median_ms(call, device, policy, ranks) for call in (our_call, raw_call))
        speeds = {"gb_per_s": gigabytes / our_ms * 1e3, "raw_gb_per_s": gigabytes / raw_ms * 1e3}
        what = {"dispatcher": name, "fp8_rows": fp8_rows, "way": way, "model": case.model}
        what |= {"num_tokens": case.num_tokens, "num_bytes": round(gigabytes * 1e9)}
        rows.append({**what, "ms": our_ms, "raw_ms": raw_ms, **speeds, "fraction": raw_ms / our_ms})
    return rows


def _median_ms(call: Way, device: torch.device, policy: TimingPolicy, ranks: Ranks) -> float:
    for _ in range(3):
        call()
    return timing.time_stages([call], device, policy, ranks=ranks).time_ms


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="a preset of moebench.workload.models")] = "deepseek-v3",
    num_tokens: Annotated[list[int] | None, typer.Option(help="tokens per rank; repeatable")] = None,
    fp8_rows: Annotated[bool, typer.Option("--fp8-rows", help="also send rows in FP8, where a dispatcher can")] = False,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Compare each dispatcher with its library's raw call, as one of the ranks that torchrun starts."""
    if model not in MODELS:
        raise UsageError(f"--model {model}: it must be one of {', '.join(MODELS)}")
    on = places(device, out)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    ranks = join(on, timeout_s=120)
    rows = []
    for count in num_tokens or [4096]:
        case = Case(model=model, num_tokens=count, ep_size=ranks.size, **MODELS[model])  # type: ignore[arg-type]
        for entry in catalog.DISPATCHERS:
            if dispatcher_unsupported(entry.name, on, moe_config(case)) is not None:
                continue
            rows += measure_dispatcher(entry.name, case, on, ranks)
            if fp8_rows and "fp8_rows" in entry.options:
                rows += measure_dispatcher(entry.name, case, on, ranks, fp8_rows=True)
    if ranks.rank == 0:
        _tell(rows, on, out)
    leave(ranks)


def _tell(rows: list[dict[str, Any]], device: torch.device, out: Path | None) -> None:
    for row in rows:
        name = f"{row['dispatcher']}{' FP8' if row['fp8_rows'] else ''}"
        print(
            f"{name:<13} {row['way']:<9} {row['num_tokens']:>6} tokens  {row['num_bytes']:>12} bytes  "
            f"{row['ms']:8.3f} ms {row['gb_per_s']:7.1f} GB/s  "
            f"raw {row['raw_ms']:8.3f} ms {row['raw_gb_per_s']:7.1f} GB/s  {row['fraction']:.2f}"
        )
    if out is not None:
        described = environment.collect(device.type).model_dump(mode="json")
        out.write_text(json.dumps({"environment": described, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "moebench.measure.studies.bandwidth")
