"""The kernels for Hopper GPUs: their results on such a GPU, and their code for one, which is compiled without a GPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation, eager
from tests.experts.compiled import assemble, compile_launches
from tests.experts.grouped import GROUPS, WIDTHS, Grouped, assert_sums
from tests.experts.layers import BF16, F16, INTERPRETED, layer, misaligned, moe_config, poisoned, random_batch

pytest.importorskip("triton")

PRODUCTS = [
    *("outer", "gathered_outer", "outer_gathered"),
    *("product", "product_back", "gathered_product", "gathered_product_back", "activated_product"),
]
dtypes = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture
def hopper() -> Any:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (SM90)")
    from experts import gemm

    return gemm


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", GROUPS, ids=str)
def test_weight_gradients_are_the_sums_of_each_group(
    rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, hopper: Any
) -> None:
    given = Grouped(rows, widths, dtype)
    a, b, permutation = given.a_NP, given.b_NQ, given.permutation
    tokens = eager.gather_rows(given.x_TP, permutation)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        found = hopper.outer(a, b, permutation)
        gathered = hopper.gathered_outer(given.x_TP, b, permutation)
        turned = hopper.outer_gathered(b, given.x_TP, permutation)
    assert_sums(found, given.right(a, b), dtype)
    assert_sums(gathered, given.right(tokens, b), dtype)
    assert_sums(turned, given.right(b, tokens), dtype)
    assert torch.equal(hopper.outer(misaligned(a), misaligned(b), permutation), found)
    for _ in range(3):
        assert torch.equal(hopper.gathered_outer(given.x_TP, b, permutation), gathered)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", GROUPS, ids=str)
def test_products_are_each_row_times_its_matrix(
    rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, hopper: Any
) -> None:
    given = Grouped(rows, widths, dtype)
    b_LPQ = torch.randn(len(rows), *widths, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    exact = given.a_NP.double().split([*rows, 70])
    right = torch.cat([a @ b for a, b in zip(exact, b_LPQ.double(), strict=False)])
    many = 1000.0  # rows per expert, so that the kernel for Hopper is chosen
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        found = hopper.product(given.a_NP, b_LPQ, given.permutation, many)
        turned = hopper.product_back(given.a_NP, b_LPQ.mT.contiguous(), given.permutation, many)
        gathered = hopper.gathered_product(given.x_TP, b_LPQ, given.permutation, many)
        gathered_back = hopper.gathered_product_back(given.x_TP, b_LPQ.mT.contiguous(), given.permutation, many)
    tokens = eager.gather_rows(given.x_TP, given.permutation)[: sum(rows)].double().split(rows)
    right_of_tokens = torch.cat([x @ b for x, b in zip(tokens, b_LPQ.double(), strict=True)])
    for result, wanted in zip(
        (found, turned, gathered, gathered_back), (right, right, right_of_tokens, right_of_tokens), strict=True
    ):
        assert result[sum(rows) :].isnan().all()
        assert_sums(result[: sum(rows)][None], wanted[None], dtype)
    assert torch.equal(found[: sum(rows)], turned[: sum(rows)])
    assert torch.equal(gathered[: sum(rows)], gathered_back[: sum(rows)])


@pytest.mark.gpu
def test_each_of_many_tiles_is_stored_at_its_place(hopper: Any) -> None:
    """Products store a tile while they compute the next one. Here, programs have several tiles, some without rows."""
    rows = tuple(150 if expert % 3 else 0 for expert in range(60))
    given = Grouped(rows, (128, 2048), BF16)
    b_LPQ = torch.randn(len(rows), 128, 2048, generator=torch.Generator().manual_seed(1)).to("cuda", BF16)
    tokens = eager.gather_rows(given.x_TP, given.permutation)
    found = hopper.gathered_product(given.x_TP, b_LPQ, given.permutation, 1000.0)[: sum(rows)]
    ordered = hopper.product(tokens, b_LPQ, given.permutation, 1000.0)[: sum(rows)]
    parts = zip(tokens.double().split([*rows, 70]), b_LPQ.double(), strict=False)
    assert_sums(found[None], torch.cat([x @ b for x, b in parts])[None], BF16)
    assert torch.equal(found, ordered)
    sums = hopper.gathered_outer(given.x_TP, given.b_NQ, given.permutation)
    assert_sums(sums, given.right(tokens, given.b_NQ), BF16)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("widths", [(128, 128), (136, 96), (2880, 512)], ids=str)
@pytest.mark.parametrize("rows", GROUPS, ids=str)
def test_the_activated_product_is_silu_of_gate_times_up(
    rows: tuple[int, ...], widths: tuple[int, int], weighted: bool, dtype: torch.dtype, hopper: Any
) -> None:
    given = Grouped(rows, widths, dtype)
    dim, inter = widths
    config = moe_config(
        n_routed_experts=len(rows), n_activated_experts=1, dim=dim, moe_inter_dim=inter, dtype=dtype, expert_bias=False
    )
    generator = torch.Generator().manual_seed(1)
    b_LDH = (torch.randn(len(rows), dim, 2 * inter, generator=generator) * dim**-0.5).to("cuda", dtype)
    weights_TK = torch.rand(given.x_TP.shape[0], 1, generator=generator).cuda() if weighted else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        found = hopper.activated_product(given.x_TP, b_LDH, given.permutation, 1000.0, weights_TK, None, config)
    assert found[sum(rows) :].isnan().all()
    tokens = eager.gather_rows(given.x_TP, given.permutation)[: sum(rows)].double().split(rows)
    gate, up = torch.cat([x @ b for x, b in zip(tokens, b_LDH.double(), strict=True)]).chunk(2, dim=1)
    right = torch.nn.functional.silu(gate) * up
    if weights_TK is not None:
        right *= weights_TK[given.permutation.row_to_token_N[: sum(rows)]]
    error = (found[: sum(rows)].double() - right).abs()
    assert (error <= torch.finfo(dtype).eps * right.abs() + 1e-4 * right.square().mean().sqrt()).all()


@pytest.mark.gpu
def test_an_expert_is_not_touched_by_anothers_nan(hopper: Any) -> None:
    """A step reads 64 rows, so the last step of a group reaches into the next group."""
    given = Grouped((70, 70), (128, 256), BF16)
    given.a_NP[70:140], given.b_NQ[70:140] = torch.nan, torch.inf
    found = hopper.outer(given.a_NP, given.b_NQ, given.permutation)
    assert_sums(found[:1], given.right(given.a_NP, given.b_NQ)[:1], BF16)
    assert found[1].isnan().all()


@pytest.mark.gpu
def test_a_graph_replays_with_another_routing(hopper: Any) -> None:
    config = moe_config(n_routed_experts=8, n_activated_experts=2, dim=256, moe_inter_dim=128, dtype=BF16)
    made = layer("triton", config, device="cuda")
    inputs = [random_batch(config, 700, seed=seed).map(lambda tensor: tensor.cuda()) for seed in (1, 2)]
    held = inputs[0].map(torch.clone)

    def step() -> dict[str, Tensor]:
        made.zero_grad(set_to_none=True)
        made(held.x, held.token_mask, held.weights, held.indices).float().square().sum().backward()
        return {name: parameter.grad for name, parameter in made.named_parameters()}

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for chosen in inputs:
        for name in ("x", "token_mask", "weights", "indices"):
            getattr(held, name).copy_(getattr(chosen, name))
        graph.replay()
        found = {name: tensor.clone() for name, tensor in captured.items()}
        again = step()
        assert found
        assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.certify(share=0.25)
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("which", PRODUCTS)
def test_kernels_compile_for_sm90_without_spilling(
    which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One group of warps loads: by the TMA, and for gathered rows by copies of 16 bytes. The others multiply."""
    from experts import gemm
    from experts.gemm import lists, products
    from experts.gemm.hopper import launching, rows

    monkeypatch.setattr(products, "runs_on_hopper", lambda device, num_rows: True)
    ptx = compile_launches(monkeypatch, tmp_path, lists, products, launching, rows)
    num_rows, k, experts, dim, inter = 512, 8, 128, 2048, 512
    maps = [torch.zeros(num_rows, dtype=torch.int64) for _ in range(3)]
    permutation = Permutation(*maps, torch.zeros(experts, dtype=torch.int32), k)
    x_TD, a_NI = torch.zeros(num_rows // k, dim, dtype=dtype), torch.zeros(num_rows, inter, dtype=dtype)
    y_ND, b_LID = torch.zeros(num_rows, dim, dtype=dtype), torch.zeros(experts, inter, dim, dtype=dtype)
    config, b_LDH = moe_config(dtype=dtype), torch.zeros(experts, dim, 2 * inter, dtype=dtype)
    calls = {
        "outer": lambda: gemm.outer(a_NI, y_ND, permutation),
        "gathered_outer": lambda: gemm.gathered_outer(x_TD, a_NI, permutation),
        "outer_gathered": lambda: gemm.outer_gathered(a_NI, x_TD, permutation),
        "product": lambda: gemm.product(a_NI, b_LID, permutation, 1000.0),
        "product_back": lambda: gemm.product_back(y_ND, b_LID, permutation, 1000.0),
        "gathered_product": lambda: gemm.gathered_product(x_TD, b_LID.mT, permutation, 1000.0),
        "gathered_product_back": lambda: gemm.gathered_product_back(x_TD, b_LID, permutation, 1000.0),
        "activated_product": lambda: gemm.activated_product(
            x_TD, b_LDH, permutation, 1000.0, torch.zeros(num_rows // k, k), None, config
        ),
    }
    calls[which]()
    code = ptx["multiply_rows" if "product" in which else "sum_outer_products"]
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in code
    assert "cp.async.bulk.tensor.4d" in code
    assert ("cp.async.cg.shared.global" in code) == (not which.startswith("product"))
    said = assemble(code, tmp_path)
    assert "wgmma" not in said, "the assembler says that products wait for each other"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"cp\.async\.ca|(st|ld)\.local", code)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code)
    assert max(map(int, waits)) > 0, "a step waits for its own products, and nothing runs meanwhile"
