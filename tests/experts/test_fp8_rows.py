"""Rows that travel in FP8: how tokens are packed and moved, and what holds between two ranks (fp8_ranks.py).

test_fp8.py runs the tests of kernels in Triton's interpreter.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsTE, Unsupported, get_backend
from experts.exchange import Layout, Region, Slabs
from experts.fp8.blocks import E4M3
from experts.fp8.tokens import PACKED, Fp8Tokens, in_16_bits, packed_width, unpacked
from tests.experts import fp8_ranks
from tests.experts.compiled import compile_launches
from tests.experts.layers import BF16, F16, F32, INTERPRETED, moe_config, poisoned
from tests.experts.test_exchange import CHOICES, LOCAL, Given, functions
from tests.experts.test_fp8 import exact_rows, hard_rows, permutation_of, same

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, id="cpu-float16", marks=in_interpreter),
        pytest.param("cuda", BF16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)


def tokens_in_fp8(x_TD: Tensor) -> Fp8Tokens:
    from experts.fp8.quantise import quantise_packed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        packed_TW = quantise_packed(x_TD)
    return unpacked(packed_TW, x_TD.shape[1], E4M3, x_TD.dtype)


@pytest.mark.parametrize(("dim", "num_bytes"), [(16, 32), (128, 144), (208, 224), (2048, 2112), (7168, 7392)])
def test_a_packed_token_has_a_byte_for_a_value_and_four_for_a_scale(dim: int, num_bytes: int) -> None:
    """It starts at a multiple of 16 bytes, and takes no more bytes than the token in 16 bits."""
    assert packed_width(dim) * PACKED.itemsize == num_bytes <= 2 * dim


@on_every_setup
def test_packed_tokens_have_the_numbers_of_rows(device: str, dtype: torch.dtype) -> None:
    from experts.fp8 import quantise

    x_TD, permutation = hard_rows(9, 208, dtype).to(device), permutation_of(9, device)
    tokens, rows = tokens_in_fp8(x_TD), quantise.quantise_tokens(x_TD)
    assert (tokens.dtype, tokens.shape) == (dtype, x_TD.shape)
    assert same(tokens.quantised, rows.values)
    assert same(tokens.scales, rows.scales.t())
    assert same(in_16_bits(tokens), exact_rows(rows).float().to(dtype))
    num_local = int(permutation.offsets_L[-1])
    found, right = (quantise.quantise_and_gather(x, permutation) for x in (tokens, x_TD))
    assert same(found.values[:num_local], right.values[:num_local])
    assert same(found.scales[:, :num_local], right.scales[:, :num_local])


@on_every_setup
def test_autograd_and_torch_take_tokens_in_fp8_for_a_tensor_of_16_bits(device: str, dtype: torch.dtype) -> None:
    x_TD = hard_rows(5, 144, dtype).to(device)

    class Travel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_TD: Tensor) -> Tensor:
            return tokens_in_fp8(x_TD)

        @staticmethod
        def backward(ctx: Any, grad_TD: Tensor) -> Tensor:
            return grad_TD

    x_TD.requires_grad_()
    tokens = Travel.apply(x_TD)
    right = in_16_bits(tokens.detach())
    assert isinstance(tokens.detach(), Fp8Tokens)
    assert type(tokens * 2) is Tensor
    assert torch.equal(tokens * 2, right * 2)
    (tokens * right).sum().backward()
    assert torch.equal(x_TD.grad, right)


@on_every_setup
@pytest.mark.parametrize("name", ["eager", "fused"])
def test_packed_tokens_travel_as_rows_do(name: str, device: str, dtype: torch.dtype) -> None:
    """A push and a copy move them through regions whose rows are in 16 bits, and not a byte more."""
    if (name, device) == ("eager", "cuda"):
        pytest.skip("runs on a CPU")
    exchange, given = functions(name), Given((5, 0, 9), 16, device, dtype)
    layout = Layout(3, 16, 208, CHOICES, dtype, F32)
    memories = [torch.full((layout.num_bytes,), 0x5A, dtype=torch.uint8, device=device) for _ in range(3)]
    regions = tuple(Region.over(memory, layout) for memory in memories)
    addresses_P = torch.tensor([memory.data_ptr() for memory in memories]).to(device)
    all_slabs = [Slabs(layout, rank, regions, addresses_P, lambda: None, memories) for rank in range(3)]
    x = [hard_rows(max(count, 5), 208, dtype).to(device)[:count] for count in (5, 0, 9)]
    packed = [tokens_in_fp8(x_TD) for x_TD in x]
    sent = [tokens.quantised.untyped_storage() for tokens in packed]
    sent = [torch.tensor([], dtype=PACKED, device=device).set_(one).view(-1, packed_width(208)) for one in sent]
    own = [torch.full_like(slabs.own.rows_as(sent[0]), -7) for slabs in all_slabs]
    for rank, slabs in enumerate(all_slabs):
        row_TP = exchange.place(slabs, given.indices[rank], LOCAL)
        exchange.push(slabs, sent[rank], row_TP, own[rank], given.weights[rank], given.indices[rank])
    for to, slabs in enumerate(all_slabs):
        weights_RK, _, counts_P = exchange.take_choices(slabs)
        exchange.take_rows(slabs, counts_P, own[to])
        for source in range(3):
            tokens, slab = given.goes(source, to), slabs.slab(source)
            assert torch.equal(own[to][slab][: len(tokens)], sent[source][tokens])
            assert (own[to][slab][len(tokens) :] == -7).all()
            assert torch.equal(weights_RK[slab][: len(tokens)], given.weights[source][tokens])
        untouched = slabs.own.rows_RD.view(-1).view(torch.uint8)[layout.num_rows * packed_width(208) * 4 :]
        assert (untouched == 0x5A).all()
        arrived = unpacked(own[to], 208, E4M3, dtype)
        assert same(arrived.scales[slabs.slab(2)][: len(given.goes(2, to))], packed[2].scales[given.goes(2, to)])


# what is refused


def test_rows_in_fp8_need_an_engine_and_a_dispatcher_that_take_them() -> None:
    def made(**options: Any) -> GroupedExperts:
        return GroupedExperts(moe_config(dtype=BF16), BackendConfig(fp8_rows=True, **options))

    assert made(experts="triton_fp8", dispatcher="symm_mem").dispatcher_options == {"fp8_rows": True}
    assert made(experts="triton_fp8", dispatcher="deepep", num_sms=24).dispatcher_options["fp8_rows"] is True
    with pytest.raises(ConfigError, match="fp8_rows = True: the dispatcher alltoall does not take it; use deepep, sy"):
        made(experts="triton_fp8", dispatcher="alltoall")
    with pytest.raises(
        ConfigError, match="fp8_rows = True: the engine triton cannot choose what is in FP8; use triton_fp8"
    ):
        made(experts="triton", dispatcher="symm_mem")
    with pytest.raises(ConfigError, match="fp8_rows = True sends gradients of rows in E4M3, not in 'e5m2'"):
        made(experts="triton_fp8", dispatcher="symm_mem", fp8_gradients="e5m2")
    with pytest.raises(ConfigError, match="fp8_rows = True: te does not take rows in FP8"):
        GroupedExpertsTE(moe_config(), BackendConfig(fp8_rows=True))


def test_the_backend_runs_only_where_rows_travel_in_fp8() -> None:
    backend = get_backend("triton_fp8_rows")
    assert backend.dispatchers == ("deepep", "symm_mem")
    with pytest.raises(Unsupported, match="runs on two or more ranks only; use ep_size = 2 or more, with the dispatch"):
        backend.build(moe_config(dtype=BF16))
    with pytest.raises(Unsupported, match="not alltoall; use the dispatcher deepep or symm_mem"):
        backend.build(moe_config(dtype=BF16), dispatcher="alltoall")
    made = backend.build(moe_config(dtype=BF16), dispatcher="symm_mem")
    assert (made.engine_name, made.dispatcher_options) == ("triton_fp8", {"fp8_rows": True})


# code for an H200


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_the_kernels_compile_for_sm90_and_move_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from experts.exchange import fused
    from experts.fp8 import dequantise, quantise

    layout = Layout(8, 64, 2048, 8, BF16, F32)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    slabs = Slabs(layout, 3, (Region.over(memory, layout),) * 8, torch.zeros(8, dtype=torch.int64), lambda: None)
    permutation = permutation_of(64, "cpu", 8)
    x_TD, row_TP = torch.zeros(64, 2048, dtype=BF16), torch.zeros(64, 8, dtype=torch.int32)
    ptx = compile_launches(monkeypatch, tmp_path, fused, quantise, dequantise)
    packed_TW = quantise.quantise_packed(x_TD)
    assert re.search(r"ld\.global\.\S*v4", ptx["quantise_rows"])
    tokens = unpacked(packed_TW, 2048, E4M3, BF16)
    quantise.quantise_and_gather(tokens, permutation)
    in_16_bits(tokens)
    fused.push(slabs, packed_TW, row_TP, slabs.own.rows_as(packed_TW))
    fused.take_rows(slabs, row_TP[0], slabs.own.rows_as(packed_TW))
    for kernel in ("quantise_rows", "dequantise_rows", "push", "take_rows"):
        assert re.search(r"ld\.global\.\S*v[24]", ptx[kernel]), kernel
        assert not re.search(r"(st|ld)\.local", ptx[kernel]), kernel
    assert ptx["push"].count("st.global.v4.b32") >= 8  # one per rank


# two ranks


def launch(folder: Path, on_gpus: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not on_gpus:
        environment |= {"TRITON_INTERPRET": "1", "EXPERTS_STEPS": "fused", "OMP_NUM_THREADS": "1"}
    elif torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "tests/experts/fp8_ranks.py"), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["gloo", "gpus"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """Return the folder in which two ranks have written the outcome of every fact, and whether they ran on GPUs."""
    folder = tmp_path_factory.mktemp("fp8")
    done = launch(folder, request.param)
    (folder / "log.txt").write_text(f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return folder, request.param


def check(name: str, ran: tuple[Path, bool]) -> None:
    for rank in range(2):
        file = ran[0] / f"{name}.rank{rank}.txt"
        assert file.exists(), (ran[0] / "log.txt").read_text()
        outcome = file.read_text()
        if outcome.startswith(fp8_ranks.SKIPPED):
            pytest.skip(outcome)
        assert outcome == "", f"rank {rank}"


@pytest.mark.certify(share=0)
@pytest.mark.timeout(600)
@pytest.mark.skipif(INTERPRETED, reason="it starts the processes itself")
@pytest.mark.parametrize("ran", [False], ids=["gloo"], indirect=True)
@pytest.mark.parametrize("name", fp8_ranks.FACTS)
def test_a_fact_holds_between_two_processes(name: str, ran: tuple[Path, bool]) -> None:
    check(name, ran)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ran", [True], ids=["gpus"], indirect=True)
@pytest.mark.parametrize("name", [*fp8_ranks.FACTS, *fp8_ranks.ON_GPUS])
def test_a_fact_holds_between_two_gpus(name: str, ran: tuple[Path, bool]) -> None:
    check(name, ran)
