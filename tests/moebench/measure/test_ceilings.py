"""Ceilings on a CPU: which rows and bytes they count, and how a case is compared with them."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moebench.measure import ceilings
from moebench.measure.ceilings import Ceilings, copy_gb_per_s, work_of
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters
from moebench.workload.ranks import ALONE

CPU = torch.device("cpu")
SHAPE = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 24, "dtype": "float32"}


def work(mode="forward", **fields):
    case = Case(num_tokens=40, mode=mode, **(SHAPE | fields))
    inputs = make_inputs(case, CPU)
    return work_of(case, inputs, make_parameters(case, CPU)), inputs


def test_rows_are_those_of_active_choices_in_groups_by_expert():
    made, inputs = work(masked_share=0.25, routing="empty:0.5")
    chosen = inputs.indices_TK[inputs.token_mask_T]
    assert made.tokens_per_expert_L.tolist() == chosen.flatten().bincount(minlength=8).tolist()
    assert made.rows_ND.shape == (60, 16)
    assert made.rows_ND.isfinite().all(), "masked rows are NaN"
    first = int(chosen.min())
    tokens = ((inputs.indices_TK == first) & inputs.token_mask_T.unsqueeze(-1)).any(dim=1)
    assert torch.equal(made.rows_ND[: int(tokens.sum())], inputs.x_TD[tokens])


@pytest.mark.parametrize("bias", [False, True])
def test_least_bytes_are_parameters_of_experts_with_rows_and_rows_that_must_be_read_or_written(bias):
    """10 of 40 tokens are masked. Nobody needs their rows, but the zeros of their results must be written."""
    fields = {"routing": "empty:0.5", "masked_share": 0.25, "expert_bias": bias}
    made, _ = work(**fields)
    expert = (16 * 48 + 24 * 16 + bias * (48 + 16)) * 4
    token = 16 * 4
    assert int((made.tokens_per_expert_L > 0).sum()) == 4
    assert ceilings._least_bytes(made, fp8=False) == 4 * expert + (30 + 40) * token
    trained, _ = work(mode="train", **fields)
    assert ceilings._least_bytes(trained, fp8=False) == (4 + 8) * expert + 2 * (30 + 40) * token


def test_frozen_weights_have_no_gradients_to_compute_or_write():
    case = Case(num_tokens=40, mode="train", **SHAPE)
    inputs, parameters = make_inputs(case, CPU), make_parameters(case, CPU)
    trained, frozen = (work_of(case, inputs, parameters, is_frozen=is_frozen) for is_frozen in (False, True))
    assert (len(ceilings._dense(trained)), len(ceilings._dense(frozen))) == (6, 4)
    gradients = sum(tensor.nbytes for tensor in parameters.values())
    assert ceilings._least_bytes(trained, fp8=False) - ceilings._least_bytes(frozen, fp8=False) == gradients


def test_a_token_without_an_expert_need_not_be_read():
    case = Case(num_tokens=40, **SHAPE)
    inputs = make_inputs(case, CPU)
    inputs.indices_TK[:4] = -1
    made = work_of(case, inputs, make_parameters(case, CPU))
    assert (made.num_tokens, made.num_active) == (40, 36)


def test_an_fp8_backend_may_keep_its_parameters_in_one_byte_a_number():
    made, _ = work(routing="empty:0.5", mode="train", dtype="bfloat16")
    read = 4 * (16 * 48 + 24 * 16) * 2
    assert ceilings._least_bytes(made, fp8=False) - ceilings._least_bytes(made, fp8=True) == read // 2


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize(("mode", "count"), [("forward", 2), ("train", 6)])
def test_products_do_the_work_that_tflops_are_counted_by(mode, count, activation):
    made, _ = work(mode=mode, expert_activation=activation)
    with FlopCounterMode(display=False) as counter:
        products = ceilings._dense(made)
        for product in products:
            product()
    assert len(products) == count
    assert counter.get_total_flops() == made.case.flops()


def test_measured_on_a_cpu_there_is_no_grouped_kernel_nor_a_collective_and_warm_bytes_are_no_bound():
    made, inputs = work()
    found = ceilings.measure_ceilings(made, inputs, "local", fp8=False, copy=10.0, cold=False, ranks=ALONE)
    assert (found.grouped_ms, found.collective_ms, found.least_bytes) == (None, None, 0)
    assert found.dense_ms > 0
    assert found.roofline_ms == found.dense_ms


@pytest.mark.parametrize("cold", [True, False])
def test_ceilings_are_measured_with_a_cache_as_the_case_has_it(monkeypatch, cold):
    seen = []

    def time_stages(calls, device, policy, **options):
        seen.append(policy.cold_l2)
        return SimpleNamespace(time_ms=1.0)

    monkeypatch.setattr(ceilings.timing, "time_stages", time_stages)
    ceilings.measure_ceilings(*work(), "local", fp8=False, copy=10.0, cold=cold, ranks=ALONE)
    assert seen == [cold]


@pytest.mark.parametrize(("fp8_rows", "row_bytes"), [(False, 400 * 2), (True, 400 + 4 * 4)])
def test_the_collective_sends_rows_out_as_the_backend_does_and_back_in_16_bits(monkeypatch, fp8_rows, row_bytes):
    """A row of 400 values has four scales."""
    sent = []

    class Both:
        size, rank, group = 2, 0, None

        def tell(self, value):
            return [value, value]

    monkeypatch.setattr(ceilings, "all_to_all_rows", lambda rows, *way: sent.append(rows[0].nbytes))
    case = Case(num_tokens=40, mode="train", ep_size=2, **(SHAPE | {"dim": 400, "dtype": "bfloat16"}))
    for call in ceilings._collective(case, make_inputs(case, CPU), "symm_mem", Both(), fp8_rows):
        call()
    assert sent == [row_bytes, 800] * 2


def test_without_rows_there_is_no_product():
    made, inputs = work(masked_share=1.0)
    found = ceilings.measure_ceilings(made, inputs, "local", fp8=False, copy=10.0, cold=True, ranks=ALONE)
    assert found.dense_ms is None
    assert found.roofline_ms == pytest.approx(40 * 16 * 4 / 10e9 * 1e3), "the zeros of the output"


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"dense_ms": 3.0, "collective_ms": 2.0, "least_bytes": 1_000_000}, 3.0),
        ({"dense_ms": 1.0, "collective_ms": 2.0, "least_bytes": 1_000_000}, 2.0),
        ({"dense_ms": 1.0, "collective_ms": None, "least_bytes": 5_000_000_000}, 5.0),
    ],
)
def test_the_roofline_is_the_longest_of_what_cannot_be_avoided(fields, longest):
    assert Ceilings(grouped_ms=9.0, copy_gb_per_s=1000.0, **fields).roofline_ms == longest


def test_a_copy_has_a_speed():
    assert copy_gb_per_s(CPU) > 0.1
