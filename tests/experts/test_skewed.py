"""Products whose experts have very different numbers of rows: experts with few rows get small tiles, others large ones.

test_gemm.py runs this file in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from experts.steps import Permutation, eager
from tests.experts.layers import (
    BF16,
    F64,
    assert_near,
    layer,
    moe_config,
    poisoned,
    random_batch,
    random_parameters,
    run,
)
from tests.experts.test_fp8 import hard_rows
from tests.experts.test_gemm import ACTIVATIONS, Given, on_every_setup, output_of

pytest.importorskip("triton")


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let also few tokens be split. Return a list that gets the name and the height of the tiles of each launch."""
    from experts.fp8 import products as fp8_products
    from experts.gemm import lists, products, tiling

    small = tiling.Tiling(16, 16, 16, stages=2, warps=4)
    monkeypatch.setattr(tiling, "FEW_TOKENS", 0)
    monkeypatch.setattr(tiling, "MOST_SMALL", 1)
    monkeypatch.setattr(tiling, "tiling_for", lambda rows_per_expert, pairs: small)
    if device == "cpu":  # smaller than on a GPU
        monkeypatch.setattr(products, "LARGE", tiling.Tiling(32, 32, 16, stages=2, warps=4, listed=True))
        monkeypatch.setattr(products, "PAIRS", tiling.Tiling(32, 16, 16, stages=2, warps=4, listed=True))
    names: list[tuple[str, int]] = []
    for module in (lists, products, fp8_products):
        monkeypatch.setattr(module, "launch", noting(module.launch, names))
    return names


def noting(launch: Any, names: list[tuple[str, int]]) -> Any:
    def launch_and_note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        names.append((getattr(kernel, "__name__", kernel.fn.__name__), constants["ROWS"]))
        launch(kernel, grid, *arguments, **constants)

    return launch_and_note


@on_every_setup
def test_few_large_tiles_become_narrow_ones(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from experts import gemm
    from experts.gemm import products

    given = Given(device, dtype)
    launched: list[tuple[str, int]] = []
    monkeypatch.setattr(products, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(products, "launch", noting(products.launch, launched))
    given.assert_near(gemm.gathered_product(given.x_TD, given.b_LDH, given.permutation, 60.0), given.right_h())
    assert launched == [("grouped_gemm", 128)], "a tile of 256 columns has a list of tiles"


@pytest.mark.parametrize(
    ("rows_per_expert", "num_rows", "width", "narrow"),
    [(64, 512, 4096, 1), (64, 513, 4096, 0), (64, 512, 4352, 0), (127, 512, 4096, 1), (128, 512, 4096, 0)],
)
def test_tiles_are_narrow_if_large_ones_leave_half_of_the_gpu_idle(
    rows_per_expert: float, num_rows: int, width: int, narrow: bool
) -> None:
    """512 rows and 4096 columns have 64 large tiles, and an H200 has 132 multiprocessors."""
    from experts.gemm import tiling

    spread = tiling.spread(tiling.LARGE, rows_per_expert, num_rows, width, 132)
    assert spread == (tiling.NARROW if narrow else tiling.LARGE)
    other = tiling.Tiling(64, 128, 64, 4, 4)
    assert tiling.spread(other, rows_per_expert, num_rows, width, 132) == other


@on_every_setup
def test_a_product_of_small_and_large_tiles_is_right(
    device: str, dtype: torch.dtype, launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 3 has few rows, and expert 1 many. Each row has a tile of one launch, and rows of nobody have none."""
    from experts import gemm
    from experts.gemm import lists, tiling

    given = Given(device, dtype)
    counts = given.permutation.tokens_per_expert_L.tolist()
    given.permutation = cut_expert_3(given.permutation, 16)
    given.num_local = counts[0] + 16
    right = given.right_h()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        given.assert_near(gemm.gathered_product(given.x_TD, given.b_LDH, given.permutation, 4.0), right)
    if device == "cpu":
        assert launched == [("list_tiles", 32), ("grouped_gemm", 16), ("grouped_gemm", 32)]
        for small, blocks in ((16, 1), (8, 2), (7, 3)):
            tiles = lists.list_of_tiles(given.permutation, 32, 1, tiling.Limits(over=16, small=small))
            assert tiles[:2].tolist() == [-(-counts[0] // 32), blocks], "16 rows are not more than 16"
    x_ND = eager.gather_rows(given.x_TD, given.permutation)
    x_ND[given.num_local :] = torch.nan
    given.assert_near(gemm.product(x_ND, given.b_LDH, given.permutation, 4.0), right)
    b_LHD = given.b_LDH.transpose(1, 2).contiguous()
    given.assert_near(gemm.product_back(x_ND, b_LHD, given.permutation, 4.0), right)
    given.assert_near(gemm.gathered_product_back(given.x_TD, b_LHD, given.permutation, 4.0), right)


def cut_expert_3(permutation: Permutation, rows: int) -> Permutation:
    """Return the permutation with so few rows for its last expert. The rows after them are of nobody."""
    offsets_L = permutation.offsets_L.clone()
    offsets_L[-1] = offsets_L[-2] + rows
    row_to_expert_N = permutation.row_to_expert_N.clone()
    row_to_expert_N[int(offsets_L[-1]) :] = len(offsets_L)
    return Permutation(
        permutation.row_to_slot_N,
        permutation.slot_to_row_S,
        row_to_expert_N,
        offsets_L,
        permutation.n_activated_experts,
    )


@on_every_setup
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("launched")
def test_an_activated_product_of_small_and_large_tiles_is_right(
    device: str, dtype: torch.dtype, activation: str
) -> None:
    from experts import gemm

    given = Given(device, dtype, expert_activation=activation, swiglu_limit=1.0, activation_limit=1.0)
    exactly = given.weights_TK.double(), given.bias_LH.double()
    right = eager.activate(given.right_h(), given.permutation.cut(given.num_local), *exactly, given.config)
    operands = given.x_TD, given.b_LDH, given.permutation, 4.0, given.weights_TK, given.bias_LH, given.config
    given.assert_near(gemm.activated_product(*operands), right)


@on_every_setup
def test_a_product_in_fp8_of_small_and_large_tiles_is_right(
    device: str, dtype: torch.dtype, launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts.fp8 import quantise
    from experts.fp8.products import product
    from experts.gemm import tiling

    given = Given(device, dtype)
    matrices = quantise.quantise_weights(given.random(3, 144, 288), 2)
    rows = quantise.quantise_tokens(hard_rows(given.permutation.num_rows, 144, dtype).to(device) / 64)
    found = product(rows, matrices, given.permutation, 4.0, dtype)[: given.num_local]
    if device == "cpu":  # on Hopper GPUs, another module launches the large tiles
        assert [name for name, _ in launched] == ["list_tiles", "fp8_gemm", "fp8_gemm"]
    monkeypatch.setattr(tiling, "FEW_TOKENS", given.permutation.num_tokens)
    whole = product(rows, matrices, given.permutation, 4.0, dtype)[: given.num_local]
    assert (found.float() - whole.float()).abs().max() <= 2 * torch.finfo(dtype).eps * whole.float().abs().max()


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_each_expert_belongs_to_one_launch(rows: int) -> None:
    from experts.gemm.tiling import FEW_ROWS, FEW_TOKENS, NO_LIMITS, limits_for

    for one in ((True, FEW_ROWS, 5000), (False, FEW_ROWS, FEW_TOKENS), (False, FEW_ROWS + 1, 5000)):
        assert limits_for(rows, *one) == (NO_LIMITS,)
    small, large = limits_for(rows, False, FEW_ROWS, FEW_TOKENS + 1)
    for count in range(1, 5 * rows):
        assert (-(-count // rows) <= small.most) is not (count > large.over), count


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize("engine", ["triton", "triton_fp8"])
def test_a_layer_with_skewed_routing_is_right_on_a_gpu(engine: str, activation: str) -> None:
    """One expert of 64 has half of the 400 tokens. The average of 19 rows chooses small tiles."""
    sizes = {"n_routed_experts": 64, "n_activated_experts": 3, "dim": 272, "moe_inter_dim": 144}
    config = moe_config(dtype=BF16, expert_activation=activation, **sizes)
    batch = random_batch(config, 400)
    batch.indices[::2, 0] = 5
    batch.indices[::2, 1:] = torch.where(batch.indices[::2, 1:] == 5, 6, batch.indices[::2, 1:])
    in_float64 = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    right = run(layer("loop", config.with_dtype(F64), random_parameters(config)), in_float64)
    made = layer(engine, config, device="cuda")
    if engine == "triton":
        assert_near({"output": output_of(engine, config, batch, "cuda")}, {"output": right["output"]}, BF16)
        assert_near(run(made, batch), right, BF16)
    else:
        for name, found in run(made, batch).items():
            assert relative(found, right[name]) < 0.07, name


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.cpu().double() - right).norm() / right.norm())
