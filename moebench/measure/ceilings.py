"""Measure the best times that a case could reach on this machine, in the same run. This module knows no backend.

It measures the matrix products of the case's own rows in two ways: as if one expert had all rows (dense), and by
torch's grouped GEMMs (grouped). It also measures a copy within memory and, with several ranks, the raw collective. No
layer is faster than its dense matrix products, than a copy of the bytes that it must move, or than the collective that
carries its tokens. The longest of these three times is the case's roofline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.measure import timing
from moebench.measure.timing import TimingPolicy
from moebench.workload.backends import collective_of
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import ALONE, Ranks, all_gather_rows, all_to_all_rows, reduce_scatter_rows

#: Precise enough for a bound, and cheap: all backends of a case share one measurement.
INTERVAL_TARGET, TIME_CAP_S = 0.01, 0.15
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
#: torch._scaled_mm accepts only dimensions that are multiples of this.
FP8_ALIGNMENT = 16

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """Milliseconds of the matrix products and of the collective, the least bytes to move, and the speed of a copy.

    `dense_ms` is None if no rank has rows, or if the products are in FP8 and torch cannot run them. `grouped_ms` is
    None if no rank has rows or torch has no kernel for the grouped GEMMs. `collective_ms` is None for a single rank.
    """

    dense_ms: float | None
    grouped_ms: float | None
    collective_ms: float | None
    copy_gb_per_s: float
    least_bytes: int

    @property
    def limits_ms(self) -> dict[str, float]:
        """Three times that no layer beats, by what takes the time; 0 for a time that is not known.

        Both bytes read and bytes written count, in the copy and in `least_bytes`.
        """
        return {
            "its matrix products": self.dense_ms or 0.0,
            "its collectives": self.collective_ms or 0.0,
            f"a copy of its {self.least_bytes:,} bytes": self.least_bytes / self.copy_gb_per_s / 1e6,
        }

    @property
    def roofline_ms(self) -> float:
        """The longest time of `limits_ms`."""
        return max(self.limits_ms.values())


@dataclass(frozen=True)
class ExpertWork:
    """The input of this rank's experts: rows from the tokens of all ranks, grouped by local expert."""

    case: Case
    rows_ND: Tensor
    tokens_per_expert_L: Tensor
    up_LDF: Tensor  # F: width of the first projection's output
    down_LID: Tensor
    bytes_of_expert: int  # of all parameters of one expert
    num_tokens: int
    num_active: int  # the tokens that have an expert
    is_frozen: bool  # whether the gradients of the projections are not computed, because only adapters are trained


def work_of(
    case: Case, inputs: Inputs, parameters: dict[str, Tensor], ranks: Ranks = ALONE, is_frozen: bool = False
) -> ExpertWork:
    """Return the rows that this rank's experts get, sorted by expert."""
    up_LDF, down_LID = parameters["gate_and_up_projs"], parameters["down_projs"]
    n_local_experts = up_LDF.shape[0]
    ranks = ranks.sharing
    local_RK = ranks.rows(inputs.active_indices_TK) - ranks.rank * n_local_experts
    expert_N = torch.where((local_RK >= 0) & (local_RK < n_local_experts), local_RK, n_local_experts).flatten()
    counts = expert_N.bincount(minlength=n_local_experts + 1)[:n_local_experts]
    slots_N = expert_N.argsort(stable=True)[: int(counts.sum())]
    rows_ND = ranks.rows(inputs.x_TD).index_select(0, slots_N // case.n_activated_experts)
    bytes_of_expert = sum(stacked[0].nbytes for stacked in parameters.values())
    num_active = int((inputs.active_indices_TK >= 0).any(dim=1).sum())
    num_tokens = inputs.x_TD.shape[0]
    return ExpertWork(case, rows_ND, counts, up_LDF, down_LID, bytes_of_expert, num_tokens, num_active, is_frozen)


def copy_gb_per_s(device: torch.device) -> float:
    """Return GB per second, bytes read plus bytes written, of a copy that is much larger than any cache."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    if device.type == "cuda":  # a GPU draws more power for changing bits; a CPU takes a second to draw the numbers
        source.random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_ms([lambda: target.copy_(source)], device, True, ALONE) / 1e6


def measure_ceilings(
    work: ExpertWork,
    inputs: Inputs,
    dispatcher: str,
    fp8: bool,
    copy: float,
    cold: bool,
    ranks: Ranks,
    fp8_rows: bool = False,
) -> Ceilings:
    """Return the ceilings of a case on this device. `copy` is the result of `copy_gb_per_s`.

    If `fp8` is true, the dense products are in E4M3. If `cold` is true, products and collective are measured with a
    cold cache, like the case. If `cold` is false, a cache may hold the bytes. The bytes then give no bound, and
    `least_bytes` is 0. If `fp8_rows` is true, the collective sends rows out in FP8 with their scales.
    """
    device = inputs.x_TD.device
    dense = (_dense_fp8 if fp8 else _dense)(work) if work.rows_ND.shape[0] else None
    grouped = _grouped(work) if work.rows_ND.shape[0] else None
    dense_ms, grouped_ms = (_slowest_ms(products, device, cold, ranks) for products in (dense, grouped))
    collective = _collective(work.case, inputs, dispatcher, ranks.sharing, fp8_rows)
    return Ceilings(
        dense_ms=dense_ms,
        grouped_ms=grouped_ms,
        collective_ms=None if collective is None else _median_ms(collective, device, cold, ranks),
        copy_gb_per_s=copy,
        least_bytes=int(ranks.largest(_least_bytes(work, fp8))) if cold else 0,
    )


def _slowest_ms(products: list[Call] | None, device: torch.device, cold: bool, ranks: Ranks) -> float | None:
    """Return the time of the slowest rank; None if no rank has any products."""
    return ranks.largest(_median_ms(products, device, cold, ALONE) if products else 0.0) or None


def _median_ms(calls: list[Call], device: torch.device, cold: bool, ranks: Ranks) -> float:
    for _ in range(2):
        for call in calls:
            call()
    return timing.time_stages(calls, device, TimingPolicy(INTERVAL_TARGET, TIME_CAP_S, cold), ranks=ranks).time_ms


def _least_bytes(work: ExpertWork, fp8: bool) -> int:
    """Return the least bytes that this rank must move.

    Forward reads each parameter of the experts with rows once, and the rows of x of tokens that have an expert. It
    writes every row of the output, also the zeros. Backward reads the gradient of the output of tokens that have an
    expert, and writes the gradients of all tokens and, if they are trained, of all parameters. Adapters do not count.
    Backward's second read of parameters and of x does not count either, because a cache may have kept them. A backend
    in FP8 may keep its parameters in one byte per number.
    """
    row_bytes = work.case.dim * work.rows_ND.itemsize
    touched = int((work.tokens_per_expert_L > 0).sum()) * work.bytes_of_expert
    forward = (touched // work.rows_ND.itemsize if fp8 else touched) + (work.num_active + work.num_tokens) * row_bytes
    if work.case.mode == "forward":
        return forward
    of_parameters = 0 if work.is_frozen else len(work.tokens_per_expert_L) * work.bytes_of_expert
    gradients = of_parameters + work.num_tokens * row_bytes
    return forward + work.num_active * row_bytes + gradients


def _dense(work: ExpertWork) -> list[Call]:
    """Return the products of all rows with the first expert's matrices; in mode train also those of the gradients."""
    x_ND, up_DF, down_ID = work.rows_ND, work.up_LDF[0], work.down_LID[0]
    h_NF, a_NI = _like_rows(work, up_DF.shape[1]), _like_rows(work, down_ID.shape[0])
    products: list[Call] = [lambda: x_ND @ up_DF, lambda: a_NI @ down_ID]
    if work.case.mode == "train":
        products += [lambda: x_ND @ down_ID.T, lambda: h_NF @ up_DF.T]
    if work.case.mode == "train" and not work.is_frozen:
        products += [lambda: a_NI.T @ x_ND, lambda: x_ND.T @ h_NF]
    return products


def _dense_fp8(work: ExpertWork) -> list[Call] | None:
    """Return the products of `_dense` in E4M3 with one scale per tensor; None if torch._scaled_mm cannot run them."""
    dim, inter, width = work.case.dim, work.down_LID.shape[1], work.up_LDF.shape[2]
    num_rows = -(-work.rows_ND.shape[0] // FP8_ALIGNMENT) * FP8_ALIGNMENT
    if work.rows_ND.device.type != "cuda" or any(size % FP8_ALIGNMENT for size in (dim, inter, width)):
        return None
    shapes = [(num_rows, dim, width), (num_rows, inter, dim)]
    if work.case.mode == "train":
        shapes += [(num_rows, dim, inter), (num_rows, width, dim), (inter, num_rows, dim), (dim, num_rows, width)]
    one = torch.ones((), device=work.rows_ND.device)

    def product(m: int, k: int, n: int) -> Call:
        a, b = (torch.randn(size, k, device=one.device).to(torch.float8_e4m3fn) for size in (m, n))
        return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return [product(*shape) for shape in shapes]


def _grouped(work: ExpertWork) -> list[Call] | None:
    """Return the grouped GEMMs of a pass; None if torch has no kernel for them and would loop with a host sync."""
    x_ND, up_LDF, down_LID = work.rows_ND, work.up_LDF, work.down_LID
    widths = (up_LDF.shape[1], up_LDF.shape[2], down_LID.shape[1])
    if x_ND.device.type != "cuda" or x_ND.dtype is not torch.bfloat16 or any(width % 8 for width in widths):
        return None
    offsets_L = work.tokens_per_expert_L.cumsum(0).int()
    h_NF, a_NI = _like_rows(work, up_LDF.shape[2]), _like_rows(work, down_LID.shape[1])

    def product(a: Tensor, b: Tensor) -> Call:
        return lambda: torch.nn.functional.grouped_mm(a, b, offs=offsets_L)

    products = [product(x_ND, up_LDF), product(a_NI, down_LID)]
    if work.case.mode == "train":
        products += [product(x_ND, down_LID.mT), product(h_NF, up_LDF.mT)]
    if work.case.mode == "train" and not work.is_frozen:
        products += [product(a_NI.T, x_ND), product(x_ND.T, h_NF)]
    return products


def _like_rows(work: ExpertWork, width: int) -> Tensor:
    return torch.randn(work.rows_ND.shape[0], width, dtype=work.rows_ND.dtype, device=work.rows_ND.device)


def _collective(case: Case, inputs: Inputs, dispatcher: str, ranks: Ranks, fp8_rows: bool = False) -> list[Call] | None:
    """Return the raw collectives that carry the case's tokens out and back; in mode train each one twice."""
    if ranks.size == 1:
        return None
    ways = 2 if case.mode == "train" else 1
    if collective_of(dispatcher) == "all_gather":
        most = int(ranks.largest(inputs.x_TD.shape[0]))
        x_TD, y_RD = (inputs.x_TD.new_zeros(rows, case.dim) for rows in (most, most * ranks.size))
        return [lambda: all_gather_rows(x_TD, ranks.group), lambda: reduce_scatter_rows(y_RD, ranks.group)] * ways
    send, receive = rows_between_ranks(inputs.active_indices_TK, case.n_routed_experts, ranks)
    out_ND, back_RD = (inputs.x_TD.new_zeros(sum(rows), case.dim) for rows in (send, receive))
    if fp8_rows:
        out_ND = inputs.x_TD.new_zeros(sum(send), fp8_row_bytes(case.dim), dtype=torch.uint8)
    return [
        lambda: all_to_all_rows(out_ND, send, receive, ranks.group),
        lambda: all_to_all_rows(back_RD, receive, send, ranks.group),
    ] * ways


def fp8_row_bytes(dim: int) -> int:
    """Return the bytes of a row in FP8: one for a value, and four for the scale of 128 values."""
    return dim + 4 * -(-dim // 128)


def rows_between_ranks(indices_TK: Tensor, n_routed_experts: int, ranks: Ranks) -> tuple[list[int], list[int]]:
    """Return the number of tokens that this rank sends to each rank, and the number that it receives from each rank.

    A token counts once per rank, also if it chose several experts of that rank.
    """
    rank_TK = indices_TK // (n_routed_experts // ranks.size)
    send = [int((rank_TK == rank).any(dim=1).sum()) for rank in range(ranks.size)]
    return send, [row[ranks.rank] for row in ranks.tell(send)]
