"""The functions that move rows between ranks, with the regions of all ranks in one process.

The eager functions are compared with what they must do, and the fused functions with the eager ones: on a GPU, and on
a CPU in Triton's interpreter, which needs its own process (see test_fused_steps.py). test_expert_parallel.py runs them
between processes.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.activations import accumulation_dtype
from experts.dispatch import symm_mem
from experts.exchange import Layout, Region, Slabs, eager
from tests import interpreter
from tests.experts.compiled import compile_launches
from tests.experts.layers import BF16, F16, F32, F64, INTERPRETED

CHOICES, DIM, LOCAL = 3, 20, 2
#: Tokens of each rank, and rows that fit into a slab.
SIZES = [((5, 0, 9), 16), ((1, 1), 1), ((4, 18), 18), ((8, 3, 5, 6), 3)]


def setups(*dtypes: torch.dtype, device: str, fused: bool) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if fused and device == "cpu":
        marks = [pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")]
    name = "fused" if fused else "eager"
    return [pytest.param(name, device, dtype, id=f"{name}-{device}-{dtype}", marks=marks) for dtype in dtypes]


on_every_setup = pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        *setups(F64, F32, F16, BF16, device="cpu", fused=False),
        *setups(F64, F16, device="cpu", fused=True),
        *setups(F64, F32, F16, BF16, device="cuda", fused=True),
    ],
)
of_every_size = pytest.mark.parametrize(("num_tokens", "rows_per_slab"), SIZES, ids=str)


@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
@pytest.mark.certify
@pytest.mark.timeout(300)
def test_in_tritons_interpreter(certify: bool) -> None:
    pytest.importorskip("triton")
    chosen = "fused and cpu" if certify else "fused and cpu and float16 and not all_ranks_see"
    interpreter.assert_passes(["tests/experts/test_exchange.py", "-k", chosen])


def functions(name: str) -> ModuleType:
    if name == "eager":
        return eager
    from experts.exchange import fused

    return fused


class Given:
    """The tokens of all ranks, and for each rank its view of all regions, which hold NaN and a valid index at first."""

    def __init__(self, num_tokens: tuple[int, ...], rows_per_slab: int, device: str, dtype: torch.dtype) -> None:
        self.num_ranks = len(num_tokens)
        generator = torch.Generator().manual_seed(6)
        weights_dtype = F64 if dtype is F64 else F32
        self.layout = Layout(self.num_ranks, rows_per_slab, DIM, CHOICES, dtype, weights_dtype)
        memories = [torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=device) for _ in num_tokens]
        self.regions = tuple(Region.over(memory, self.layout) for memory in memories)
        for region in self.regions:
            region.rows_RD.fill_(torch.nan), region.weights_RK.fill_(torch.nan)
            region.indices_RK.fill_(1), region.counts_PP.fill_(7)
        addresses_P = torch.tensor([memory.data_ptr() for memory in memories]).to(device)
        self.slabs = [
            Slabs(self.layout, rank, self.regions, addresses_P, lambda: None, memories)
            for rank in range(self.num_ranks)
        ]

        def random(count: int, width: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(count, width, generator=generator).to(device, dtype)

        self.x = [random(count, DIM, dtype) for count in num_tokens]
        self.weights = [random(count, CHOICES, weights_dtype) for count in num_tokens]
        experts = self.num_ranks * LOCAL
        self.indices = [
            torch.randint(-1, experts, (count, CHOICES), generator=generator).to(device) for count in num_tokens
        ]
        self.of_region = random(self.layout.num_rows, DIM, dtype), random(self.layout.num_rows, CHOICES, weights_dtype)

    def goes(self, source: int, to: int) -> list[int]:
        """Return the tokens of one rank that chose an expert of another, as many as fit into the slab."""
        chosen = self.indices[source].tolist()
        tokens = [token for token, row in enumerate(chosen) if any(index // LOCAL == to for index in row if index >= 0)]
        return tokens[: self.layout.rows_per_slab]

    def slab(self, rank: int) -> slice:
        return self.slabs[rank].own_slab

    def pushed(self, exchange: ModuleType) -> list[Tensor]:
        """Push the tokens of all ranks. Return each rank's `row_TP`."""
        rows = []
        for slabs, x_TD, weights_TK, indices_TK in zip(self.slabs, self.x, self.weights, self.indices, strict=True):
            row_TP = exchange.place(slabs, indices_TK, LOCAL)
            exchange.push(slabs, x_TD, row_TP, slabs.own.rows_RD, weights_TK, indices_TK)
            rows.append(row_TP)
        return rows

    def taken(self, exchange: ModuleType, slabs: Slabs, counts_P: Tensor) -> Tensor:
        """Return what a rank has after a push: its own rows where they are, and copies of the other ranks' rows."""
        x_RD = torch.full_like(slabs.own.rows_RD, torch.nan)
        x_RD[slabs.own_slab] = slabs.own.rows_RD[slabs.own_slab]
        exchange.take_rows(slabs, counts_P, x_RD)
        return x_RD


def misaligned(tensor: Tensor) -> Tensor:
    """Return a copy that does not start at a multiple of 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


@on_every_setup
@of_every_size
def test_a_push_fills_each_slab_from_its_first_row_on(
    name: str, device: str, dtype: torch.dtype, num_tokens: tuple[int, ...], rows_per_slab: int
) -> None:
    """A rank gets the rows, weights and indices of the tokens that chose its experts, and −1 for all other rows."""
    given, exchange = Given(num_tokens, rows_per_slab, device, dtype), functions(name)
    rows = given.pushed(exchange)
    for to, slabs in enumerate(given.slabs):
        weights_RK, indices_RK, counts_P = exchange.take_choices(slabs)
        x_RD = given.taken(exchange, slabs, counts_P)
        assert (weights_RK.dtype, indices_RK.dtype) == (given.layout.weights_dtype, torch.int64)
        for source in range(given.num_ranks):
            tokens, slab = given.goes(source, to), given.slab(source)
            num_rows = len(tokens)
            assert counts_P[source] == num_rows
            assert torch.equal(x_RD[slab][:num_rows], given.x[source][tokens])
            assert torch.equal(weights_RK[slab][:num_rows], given.weights[source][tokens])
            assert torch.equal(indices_RK[slab][:num_rows], given.indices[source][tokens])
            assert (indices_RK[slab][num_rows:] == -1).all()
            assert (weights_RK[slab][num_rows:] == 0).all()
            assert rows[source][tokens, to].tolist() == list(range(num_rows))


@on_every_setup
@of_every_size
def test_all_ranks_see_how_many_rows_each_rank_wants_to_send(
    name: str, device: str, dtype: torch.dtype, num_tokens: tuple[int, ...], rows_per_slab: int
) -> None:
    """The numbers are those before a slab is full, so that every rank sees that a slab is too small."""
    given, exchange = Given(num_tokens, rows_per_slab, device, dtype), functions(name)
    rows = given.pushed(exchange)
    wanted_PP = torch.stack([(row_TP >= 0).sum(dim=0) for row_TP in rows]).int()
    chosen = [torch.where(indices < 0, -1, indices // LOCAL) for indices in given.indices]
    assert wanted_PP.tolist() == [
        [int((rank_TK == to).any(dim=1).sum()) for to in range(given.num_ranks)] for rank_TK in chosen
    ]
    assert (int(wanted_PP.max()) > rows_per_slab) == (rows_per_slab == 3)
    for region in given.regions:
        assert torch.equal(region.counts_PP, wanted_PP)


@on_every_setup
@of_every_size
def test_what_is_pushed_back_is_summed_in_the_order_of_the_ranks(
    name: str, device: str, dtype: torch.dtype, num_tokens: tuple[int, ...], rows_per_slab: int
) -> None:
    """Only filled rows are pushed back, and only those are summed. Unfilled rows are NaN.

    The sums have a rank's own rows from what the rank has pushed back, wherever it is in memory. The region's rows of
    the rank itself are not used.
    """
    given, exchange = Given(num_tokens, rows_per_slab, device, dtype), functions(name)
    rows = given.pushed(exchange)
    y_RD, weights_RK = given.of_region
    taken = [exchange.take_choices(slabs) for slabs in given.slabs]
    for region in given.regions:
        region.rows_RD[:], region.weights_RK[:] = torch.nan, torch.nan
    put = []
    for slabs, (_, indices_RK, counts_P) in zip(given.slabs, taken, strict=True):
        unfilled = (indices_RK == -1).all(dim=1)
        mine = [(t * (slabs.rank + 1)).masked_fill(unfilled.unsqueeze(-1), torch.nan) for t in (y_RD, weights_RK)]
        exchange.push_back(slabs, mine[0], counts_P, mine[1])
        put.append([misaligned(tensor) for tensor in mine])
    for source, slabs in enumerate(given.slabs):
        assert slabs.own.rows_RD[slabs.own_slab].isnan().all()
        found = exchange.sum_rows(slabs, rows[source], *put[source])
        assert exchange.sum_rows(slabs, rows[source], put[source][0])[1] is None
        for sums, whole in zip(found, (y_RD, weights_RK), strict=True):
            right = torch.zeros_like(sums, dtype=accumulation_dtype(whole.dtype))
            for to in range(given.num_ranks):
                tokens = given.goes(source, to)
                right[tokens] += (whole * (to + 1))[given.slab(source)][: len(tokens)].to(right.dtype)
            assert torch.equal(sums, right.to(whole.dtype))


@on_every_setup
def test_the_rows_of_a_rank_itself_do_not_go_through_its_region(name: str, device: str, dtype: torch.dtype) -> None:
    """A push writes them to the given memory, and no copy of the other ranks' rows touches them."""
    given, exchange = Given((5, 3, 9), 16, device, dtype), functions(name)
    for rank, (slabs, x_TD, indices_TK) in enumerate(zip(given.slabs, given.x, given.indices, strict=True)):
        row_TP, tokens = exchange.place(slabs, indices_TK, LOCAL), given.goes(rank, rank)
        x_RD = torch.full_like(slabs.own.rows_RD, torch.nan)
        exchange.push(slabs, x_TD, row_TP, x_RD)
        assert x_RD[slabs.own_slab].isnan().logical_not().sum() == len(tokens) * DIM
        assert torch.equal(x_RD[slabs.own_slab][: len(tokens)], x_TD[tokens])
        assert slabs.own.rows_RD[slabs.own_slab].isnan().all()
        exchange.take_rows(slabs, slabs.own.counts_PP[:, rank].clamp(max=16), x_RD)
        assert torch.equal(x_RD[slabs.own_slab][: len(tokens)], x_TD[tokens])


@on_every_setup
def test_rows_travel_without_choices(name: str, device: str, dtype: torch.dtype) -> None:
    """The gradient of a combine is pushed to the rows that dispatch has chosen. The choices stay as they are."""
    given, exchange = Given((5, 0, 9), 16, device, dtype), functions(name)
    rows = given.pushed(exchange)
    before = [exchange.take_choices(slabs) for slabs in given.slabs]
    for slabs, x_TD, row_TP in zip(given.slabs, given.x, rows, strict=True):
        exchange.push(slabs, -2 * x_TD, row_TP, slabs.own.rows_RD)
    for to, (slabs, taken) in enumerate(zip(given.slabs, before, strict=True)):
        x_RD = given.taken(exchange, slabs, taken[2])
        for source in range(given.num_ranks):
            tokens = given.goes(source, to)
            assert torch.equal(x_RD[given.slab(source)][: len(tokens)], -2 * given.x[source][tokens])
        assert all(torch.equal(now, then) for now, then in zip(exchange.take_choices(slabs), taken, strict=True))


@on_every_setup
def test_tokens_are_numbered_through_all_blocks(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row of one block and the first row of the next are neighbours. Here a fused block has 16 tokens."""
    exchange = functions(name)
    if name == "fused":
        monkeypatch.setattr(exchange, "MAX_INDICES", 64)
    given = Given((50, 0, 32), 64, device, dtype)
    rows = given.pushed(exchange)
    for source, to in itertools.product(range(3), range(3)):
        tokens = given.goes(source, to)
        right = torch.full((given.x[source].shape[0],), -1, dtype=torch.int32)
        right[tokens] = torch.arange(len(tokens), dtype=torch.int32)
        assert torch.equal(rows[source][:, to].cpu(), right)
        assert [int(region.counts_PP[source, to]) for region in given.regions] == [len(tokens)] * 3


@on_every_setup
def test_an_index_that_is_no_expert_stays_no_expert(name: str, device: str, dtype: torch.dtype) -> None:
    """On a GPU nothing checks the indices."""
    given, exchange = Given((2, 2), 16, device, dtype), functions(name)
    wrong = torch.tensor([[1 << 40, 0, (1 << 32) + 2], [-(1 << 40), -7, 5]], device=device)
    given.indices = [wrong, wrong]
    rows = given.pushed(exchange)
    assert rows[0].tolist() == [[0, -1], [-1, -1]]  # only index 0 is an expert of the four
    _, indices_RK, counts_P = exchange.take_choices(given.slabs[0])
    assert counts_P.tolist() == [1, 1]
    assert indices_RK[0].tolist() == [2**31 - 1, 0, 2**31 - 1]


class Accesses:
    """Functions that move no rows. They keep what a rank does to memory, and how many barriers it has passed before."""

    def __init__(self) -> None:
        self.num_barriers = 0
        self.reads: set[int] = set()
        self.writes: set[int] = set()

    def barrier(self) -> None:
        self.num_barriers += 1

    def writes_to_all(self, *results: Tensor) -> Callable[..., Any]:
        return lambda *_: (self.writes.add(self.num_barriers), *map(torch.clone, results))[1:]

    def reads_its_own(self, *results: Tensor) -> Callable[..., Any]:
        return lambda *_: (self.reads.add(self.num_barriers), *map(torch.clone, results))[1:]


@pytest.mark.parametrize("grad", [False, True])
def test_no_rank_writes_into_a_region_while_its_owner_may_read_it(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks pass the same barriers. So if no rank reads and writes behind the same one, all accesses are in order.

    Without gradients, the experts read the rows in the region itself.
    """
    seen, layout = Accesses(), Layout(1, 4, DIM, CHOICES, F32, F32)
    region = Region.over(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout)
    slabs = Slabs(layout, 0, (region,), torch.empty(0), seen.barrier)
    x_RD, weights_RK, indices_RK = torch.zeros(4, DIM), torch.zeros(4, CHOICES), torch.full((4, CHOICES), -1)
    moves = SimpleNamespace(
        place=seen.writes_to_all(torch.zeros(4, 1)),
        push=seen.writes_to_all(),
        push_back=seen.writes_to_all(),
        take_choices=seen.reads_its_own(weights_RK, indices_RK, torch.zeros(1)),
        take_rows=seen.reads_its_own(),
        sum_rows=seen.reads_its_own(x_RD, weights_RK),
    )
    monkeypatch.setattr(symm_mem, "exchange_on", lambda device: moves)
    for _ in range(2):
        x_TD, weights_TK = x_RD.clone().requires_grad_(grad), weights_RK.clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            *sent, route = symm_mem._Dispatch.apply(x_TD, weights_TK, indices_RK, symm_mem._Way(slabs, 1, grad, False))
            seen.reads_its_own()()
            y_TD = symm_mem._Combine.apply(sent[0] * sent[1].sum(), route)
        if grad:
            y_TD.sum().backward()
    assert seen.num_barriers == (16 if grad else 8)
    assert not seen.reads & seen.writes


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Return a dict that gets the PTX of each kernel that is launched from now on. No kernel runs."""
    pytest.importorskip("triton")
    from experts.exchange import fused

    return compile_launches(monkeypatch, tmp_path, fused)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_the_kernels_compile_for_sm90_and_move_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    from experts.exchange import fused

    layout = Layout(8, 64, 2048, 8, BF16, F32)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    slabs = Slabs(layout, 3, (Region.over(memory, layout),) * 8, torch.zeros(8, dtype=torch.int64), lambda: None)
    x_TD, rows_RD, weights_TK = torch.zeros(64, 2048, dtype=BF16), slabs.own.rows_RD, torch.zeros(64, 8)
    indices_TK, row_TP = torch.zeros(64, 8, dtype=torch.int64), torch.zeros(64, 8, dtype=torch.int32)
    calls: list[Callable[[], Any]] = [
        lambda: fused.place(slabs, indices_TK, 16),
        lambda: fused.push(slabs, x_TD, row_TP, rows_RD, weights_TK, indices_TK),
        lambda: fused.take_choices(slabs),
        lambda: fused.take_rows(slabs, row_TP[0], rows_RD),
        lambda: fused.push_back(slabs, rows_RD, row_TP[0], torch.zeros(512, 8)),
        lambda: fused.sum_rows(slabs, row_TP, rows_RD, torch.zeros(512, 8)),
    ]
    for call in calls:
        call()
    assert {*ptx} == {"place", "push", "take_choices", "take_rows", "push_back", "sum_rows"}
    for kernel in ("push", "take_rows", "push_back", "sum_rows"):
        moves = set(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16\b", ptx[kernel]))
        assert not moves, f"{kernel} moves single elements: {moves}"
    assert ptx["push"].count("st.global.v4.b32") >= 8  # one per rank
    assert ptx["push_back"].count("st.global.v4.b32") >= 1
    assert ptx["sum_rows"].count("ld.global.v4.b32") >= 8
