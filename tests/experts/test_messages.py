"""The messages between ranks, with all ranks in one process.

The eager functions are compared with what they must do, and the fused functions with the same: on a GPU, and on a CPU
in Triton's interpreter, which needs its own process (see test_fused_steps.py). test_expert_parallel.py sends messages
between processes.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.activations import accumulation_dtype
from experts.messages import Form, Plan, eager, messages_on
from tests import interpreter
from tests.experts.compiled import compile_launches
from tests.experts.layers import BF16, F16, F32, F64, INTERPRETED

LOCAL = 2
#: Tokens of each rank, choices and columns. Rows of 5 columns are not aligned to the elements of the choices.
SIZES = [((5, 0, 9), 3, 20), ((1, 1), 1, 1), ((40, 18), 3, 5), ((8, 3, 5, 6), 2, 1030), ((0, 0), 2, 8)]


def setups(*dtypes: tuple[torch.dtype, torch.dtype], device: str, fused: bool) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if fused and device == "cpu":
        marks = [pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_tritons_interpreter")]
    name = "fused" if fused else "eager"
    return [
        pytest.param(name, device, *pair, id=f"{name}-{device}-{pair[0]}-{pair[1]}", marks=marks) for pair in dtypes
    ]


ALL = (F64, F64), (F32, F32), (F16, F32), (BF16, F32), (BF16, BF16), (F32, F16), (F16, F64)
on_every_setup = pytest.mark.parametrize(
    ("name", "device", "dtype", "weights_dtype"),
    [
        *setups(*ALL, device="cpu", fused=False),
        *setups((F64, F64), (F16, F32), (F16, F64), (F32, F16), device="cpu", fused=True),
        *setups(*ALL, device="cuda", fused=True),
    ],
)
of_every_size = pytest.mark.parametrize(("num_tokens", "num_choices", "dim"), SIZES, ids=str)


@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
@pytest.mark.certify
@pytest.mark.timeout(300)
def test_in_tritons_interpreter(certify: bool) -> None:
    pytest.importorskip("triton")
    chosen = "fused and cpu" if certify else "fused and cpu and float16-torch.float32 and not 1030"
    interpreter.assert_passes(["tests/experts/test_messages.py", "-k", chosen])


def functions(name: str) -> ModuleType:
    if name == "eager":
        return eager
    from experts.messages import fused

    return fused


class Given:
    """The tokens of all ranks, and the messages between them."""

    def __init__(
        self,
        num_tokens: tuple[int, ...],
        num_choices: int,
        dim: int,
        name: str,
        device: str,
        dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> None:
        self.num_ranks, self.messages = len(num_tokens), functions(name)
        self.form = Form(dim, num_choices, dtype, weights_dtype)
        self.generator, self.device = torch.Generator().manual_seed(6), device
        self.x = [self.random(count, dim, dtype) for count in num_tokens]
        self.weights = [self.random(count, num_choices, weights_dtype) for count in num_tokens]
        self.indices = [
            torch.randint(-1, self.num_ranks * LOCAL, (count, num_choices), generator=self.generator).to(device)
            for count in num_tokens
        ]
        self.sizes = [self.messages.plan(indices, self.num_ranks, LOCAL) for indices in self.indices]
        self.plans = [Plan(self.form, row_TP, sizes_2P[0], own) for own, (row_TP, sizes_2P) in enumerate(self.sizes)]

    def random(self, count: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count, width, generator=self.generator).to(self.device, dtype)

    def goes(self, source: int, to: int) -> list[int]:
        """Return the tokens of one rank that chose an expert of another."""
        chosen = self.indices[source].tolist()
        return [token for token, row in enumerate(chosen) if any(index // LOCAL == to for index in row if index >= 0)]

    def lengths(self, source: int) -> list[int]:
        """Return the length of the message of one rank to each rank."""
        return [self.form.length(len(self.goes(source, to))) for to in range(self.num_ranks)]

    def sent(self, source: int, with_choices: bool) -> list[Tensor]:
        """Return the messages of one rank to each rank."""
        choices = (self.weights[source], self.indices[source]) if with_choices else ()
        lengths, plan = self.lengths(source), self.plans[source]
        own = torch.full((lengths[source], self.form.dim), torch.nan, dtype=self.form.dtype, device=self.device)
        lengths[source] = 0
        packed = self.messages.pack(plan, self.x[source], *choices)
        messages = [*packed[: sum(lengths)].split(lengths)]
        self.messages.pack_own(plan, own, self.x[source], *choices)
        messages[source] = own
        return messages

    def arrived(self, sent: list[list[Tensor]], to: int) -> tuple[Tensor, Tensor, int]:
        """Return what a rank receives: the messages, their numbers of tokens, and the longest one's length."""
        sources = range(self.num_ranks)
        counts = torch.tensor([len(self.goes(source, to)) for source in sources], dtype=torch.int32)
        received = torch.cat([sent[source][to] for source in sources])
        return received, counts.to(self.device), max(self.lengths(source)[to] for source in sources)


@on_every_setup
@of_every_size
def test_every_rank_gets_the_tokens_that_chose_its_experts(
    num_tokens: tuple[int, ...], num_choices: int, dim: int, name: str, device: str, dtype: Any, weights_dtype: Any
) -> None:
    """With their weights and indices, bit by bit. A row that is no token has indices of −1 and weights of zero."""
    given = Given(num_tokens, num_choices, dim, name, device, dtype, weights_dtype)
    sent = [given.sent(source, with_choices=True) for source in range(given.num_ranks)]
    for to in range(given.num_ranks):
        received, counts_P, longest = given.arrived(sent, to)
        weights_RK, indices_RK = given.messages.take_choices(received, counts_P, longest, given.form)
        assert (weights_RK.dtype, indices_RK.dtype) == (weights_dtype, torch.int64)
        assert weights_RK.shape[0] == indices_RK.shape[0] == received.shape[0]
        first = 0
        for source in range(given.num_ranks):
            tokens, length = given.goes(source, to), given.lengths(source)[to]
            rows, rest = slice(first, first + len(tokens)), slice(first + len(tokens), first + length)
            assert torch.equal(received[rows], given.x[source][tokens])
            assert torch.equal(weights_RK[rows], given.weights[source][tokens])
            assert torch.equal(indices_RK[rows], given.indices[source][tokens])
            assert (indices_RK[rest] == -1).all()
            assert (weights_RK[rest] == 0).all()
            first += length
        assert first == received.shape[0]


@on_every_setup
@of_every_size
def test_a_plan_numbers_the_tokens_of_each_message(
    num_tokens: tuple[int, ...], num_choices: int, dim: int, name: str, device: str, dtype: Any, weights_dtype: Any
) -> None:
    given = Given(num_tokens, num_choices, dim, name, device, dtype, weights_dtype)
    for source, (row_TP, sizes_2P) in enumerate(given.sizes):
        assert (row_TP.dtype, sizes_2P.dtype, sizes_2P.shape) == (torch.int32, torch.int32, (2, given.num_ranks))
        for to in range(given.num_ranks):
            tokens = given.goes(source, to)
            right = torch.full((num_tokens[source],), -1, dtype=torch.int32)
            right[tokens] = torch.arange(len(tokens), dtype=torch.int32)
            assert torch.equal(row_TP[:, to].cpu(), right)
            assert sizes_2P[0, to] == len(tokens)


@on_every_setup
@of_every_size
@pytest.mark.parametrize("with_weights", [False, True])
def test_rows_that_come_back_are_summed_in_the_order_of_the_ranks(
    with_weights: bool,
    num_tokens: tuple[int, ...],
    num_choices: int,
    dim: int,
    name: str,
    device: str,
    dtype: Any,
    weights_dtype: Any,
) -> None:
    """Rows that are no tokens are NaN here, and are not summed. A token without rows has zeros."""
    given = Given(num_tokens, num_choices, dim, name, device, dtype, weights_dtype)
    for source, plan in enumerate(given.plans):
        right, both = [], []
        for width, its_dtype in ((dim, dtype), (num_choices, weights_dtype)):
            sums = torch.zeros(num_tokens[source], width, dtype=accumulation_dtype(its_dtype), device=device)
            messages = [given.random(length, width, its_dtype) for length in given.lengths(source)]
            for to, message in enumerate(messages):
                tokens = given.goes(source, to)
                sums[tokens] += message[: len(tokens)].to(sums.dtype)
                message[len(tokens) :] = torch.nan
            own = messages.pop(source)
            right.append(sums.to(its_dtype))
            both.append((torch.cat([*messages, own[:0]]), own))
        sums_TD, weights_TK = given.messages.sum_rows(plan, both[0], both[1] if with_weights else None)
        assert torch.equal(sums_TD, right[0])
        assert (weights_TK is None) == (not with_weights)
        assert weights_TK is None or torch.equal(weights_TK, right[1])


@on_every_setup
def test_rows_travel_without_choices(name: str, device: str, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    """The gradient of a combine goes to the rows that dispatch has chosen."""
    given = Given((5, 0, 9), 3, 20, name, device, dtype, weights_dtype)
    for source, x_TD in enumerate(given.x):
        for to, message in enumerate(given.sent(source, with_choices=False)):
            tokens = given.goes(source, to)
            assert torch.equal(message[: len(tokens)], x_TD[tokens])


@on_every_setup
def test_tokens_are_numbered_through_all_blocks(
    name: str, device: str, dtype: torch.dtype, weights_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a fused block has 16 tokens."""
    if name == "fused":
        monkeypatch.setattr(functions(name), "MAX_INDICES", 64)
    given = Given((50, 32), 3, 5, name, device, dtype, weights_dtype)
    for source, (row_TP, sizes_2P) in enumerate(given.sizes):
        for to in range(2):
            tokens = given.goes(source, to)
            assert row_TP[tokens, to].tolist() == list(range(len(tokens)))
            assert sizes_2P[0, to] == len(tokens)


@on_every_setup
def test_an_index_that_is_no_expert_stays_no_expert(
    name: str, device: str, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    """On a GPU nothing checks the indices."""
    given = Given((2, 2), 3, 20, name, device, dtype, weights_dtype)
    wrong = torch.tensor([[1 << 40, 0, (1 << 32) + 2], [-(1 << 40), -7, 5]], device=device)
    row_TP, sizes_2P = given.messages.plan(wrong, 2, LOCAL)
    assert row_TP.tolist() == [[0, -1], [-1, -1]]  # only index 0 is an expert of the four
    plan, length = Plan(given.form, row_TP, sizes_2P[0], 1), given.form.length(1)
    packed = given.messages.pack(plan, given.x[0], given.weights[0], wrong)
    _, indices_RK = given.messages.take_choices(packed[:length], sizes_2P[0, :1], length, given.form)
    assert indices_RK[0].tolist() == [2**31 - 1, 0, 2**31 - 1]


@on_every_setup
@pytest.mark.parametrize(
    ("counts", "num_choices"), [((0, 0), 2), ((4, 4), 1), ((3, 5), 3), ((5, 0), 64), ((700, 701), 2)], ids=str
)
def test_choices_arrive_without_rows(
    counts: tuple[int, int], num_choices: int, name: str, device: str, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    """A rank with fewer tokens than another fills up with choices of no expert."""
    messages, most = functions(name), max(counts)
    weights = [torch.rand(count, num_choices).to(device, weights_dtype) for count in counts]
    indices = [torch.randint(-1, 9, (count, num_choices)).to(device) for count in counts]
    packed = [messages.pack_choices(*both, most) for both in zip(weights, indices, strict=True)]
    assert packed[0].shape == packed[1].shape
    found = messages.unpack_choices(torch.cat(packed), most, num_choices, weights_dtype)
    for rank, count in enumerate(counts) if most else ():
        mine = [part[rank * most : (rank + 1) * most] for part in found]
        assert torch.equal(mine[0][:count], weights[rank])
        assert torch.equal(mine[1][:count], indices[rank])
        assert (mine[0][count:] == 0).all()
        assert (mine[1][count:] == -1).all()
    assert [part.shape for part in found] == [(2 * most, num_choices)] * 2
    assert (found[0].dtype, found[1].dtype) == (weights_dtype, torch.int64)
    wrong = torch.tensor([[1 << 40, 3], [-(1 << 40), (1 << 32) + 2]], device=device)
    _, clamped = messages.unpack_choices(messages.pack_choices(torch.rand(2, 2).to(wrong.device), wrong, 2), 2, 2, F32)
    assert clamped.tolist() == [[2**31 - 1, 3], [-1, 2**31 - 1]]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 8, 20, 7168])
@pytest.mark.parametrize("num_choices", [1, 8, 64])
def test_a_buffer_has_room_for_any_routing(num_choices: int, dim: int, dtype: torch.dtype) -> None:
    """A token goes to at most as many ranks as it has choices. Most rows are needed where counts round up worst."""
    for weights_dtype in (F64, F32, BF16):
        form = Form(dim, num_choices, dtype, weights_dtype)
        for num_ranks in (1, 2, 3, 64):
            for num_tokens in (0, 1, 2, 9, 1000):
                copies = num_tokens * min(num_ranks, num_choices)
                spread = [copies // num_ranks + (rank < copies % num_ranks) for rank in range(num_ranks)]
                for counts in (spread, [num_tokens] * min(num_ranks, num_choices)):
                    lengths = [form.length(count) for count in counts]
                    assert sum(lengths) <= form.most_rows(num_tokens, num_ranks)
                    assert form.length(torch.tensor(counts)).tolist() == lengths
                    assert all(length * form.row_bytes % 16 == 0 for length in lengths)
    form = Form(7168, 8, BF16, F32)
    assert form.length(4096) == 4096 + 19  # 64 bytes of choices a row
    assert form.length(0) == 0


def test_the_environment_chooses_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTS_STEPS", "eager")
    assert messages_on(torch.device("cuda")) is eager
    monkeypatch.delenv("EXPERTS_STEPS")
    assert messages_on(torch.device("cpu")) is eager
    pytest.importorskip("triton")
    assert messages_on(torch.device("cuda")) is functions("fused")


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Return a dict that gets the PTX of each kernel that is launched from now on. No kernel runs."""
    pytest.importorskip("triton")
    from experts.messages import fused

    return compile_launches(monkeypatch, tmp_path, fused)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_the_kernels_compile_for_sm90_and_move_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    messages, form = functions("fused"), Form(2048, 8, BF16, F32)
    x_TD, weights_TK = torch.zeros(64, 2048, dtype=BF16), torch.zeros(64, 8)
    indices_TK = torch.zeros(64, 8, dtype=torch.int64)
    row_TP, sizes_2P = messages.plan(indices_TK, 8, 16)
    plan = Plan(form, row_TP, sizes_2P[0], 3)
    packed = messages.pack(plan, x_TD, weights_TK, indices_TK)
    messages.take_choices(packed, sizes_2P[1], 64, form)
    messages.sum_rows(plan, (packed, packed), (torch.zeros(packed.shape[0], 8),) * 2)
    messages.unpack_choices(messages.pack_choices(weights_TK, indices_TK, 64), 64, 8, F32)
    assert {*ptx} == {"plan", "pack", "take_choices", "sum_rows", "pack_choices", "unpack_choices"}
    for kernel in ("pack", "sum_rows"):
        moves = set(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16\b", ptx[kernel]))
        assert not moves, f"{kernel} moves single elements: {moves}"
    assert ptx["pack"].count("st.global.v4.b32") >= 8  # one per rank
    assert ptx["sum_rows"].count("ld.global.v4.b32") >= 8
