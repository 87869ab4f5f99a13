"""Where FP8 pays: measured cases, and places between them on the map of rows per expert and moe_inter_dim."""

import pytest

from moebench.report.tables.precisiontable import markdown, precision_json, sentence
from moebench.results.advise import question
from moebench.results.frame import to_frame
from moebench.results.precision.ratios import cells, crossings, precision, rows_per_expert
from moebench.workload.case import Case
from tests.moebench.drawn import ok

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 256, "dtype": "bfloat16", "mode": "forward"}


def case(num_tokens, inter, **fields):
    return Case(num_tokens=num_tokens, moe_inter_dim=inter, **{**SIZES, **fields})


def measured(num_tokens, inter, ratio, **fields):
    """Return the rows of a case in which FP8 takes `ratio` times as long as 2 ms."""
    one = case(num_tokens, inter, **fields)
    return [ok(one, "triton", 2.0), ok(one, "torch_mm", 9.0), ok(one, "triton_fp8", 2.0 * ratio), ok(one, "te", 3.0)]


MAP = [
    *(*measured(64, 512, 2.0), *measured(256, 512, 0.5), *measured(1024, 512, 0.5)),
    *(*measured(64, 1024, 1.0), *measured(256, 1024, 0.25), *measured(1024, 1024, 0.2)),
]


def test_a_cell_has_the_fastest_backend_with_fp8_and_the_fastest_without():
    rows = [*measured(64, 512, 0.75), ok(case(64, 512), "te_fp8_block", 1.2), ok(case(256, 512), "triton_fp8", 1.0)]
    (one,) = cells(to_frame(rows))
    assert (one.fp8, one.other, one.ratio) == ("te_fp8_block", "triton", pytest.approx(0.6))
    assert (one.rows_per_expert, one.moe_inter_dim, one.dim, one.mode) == (16.0, 512, 256, "forward")


def test_rows_per_expert_count_the_tokens_of_all_ranks():
    assert rows_per_expert(case(64, 512, ep_size=4).model_dump()) == 64.0


def test_the_faster_engine_in_fp8_is_named_and_how_much_longer_the_others_take():
    one = case(256, 1024)
    times = {"deep_gemm_fp8": 0.4, "triton_fp8": 0.41, "triton_fp8_e5m2": 0.404, "te_fp8_block": 1.0, "triton": 2.0}
    (found,) = precision(to_frame([ok(one, name, ms) for name, ms in times.items()]), question("e8k2d256i1024", 256))
    assert sentence(found, "forward").partition(": ")[2] == (
        "FP8 takes 0.20 times the time of 16 bits in mode forward (deep_gemm_fp8 0.400 ms, triton 2.000 ms), measured; "
        "triton_fp8_e5m2 takes 1.01 times as long as deep_gemm_fp8 (0.404 ms), too close to call; "
        "te_fp8_block takes 2.50 times as long as deep_gemm_fp8 (1.000 ms)"
    )
    (cell,) = precision_json([found])[0]["cells"]
    assert [name for name, _ in cell["fp8_engines"]] == ["deep_gemm_fp8", "triton_fp8_e5m2", "te_fp8_block"]


def test_a_place_on_the_map_names_the_faster_engine_of_each_neighbour():
    rows = [*MAP, ok(case(256, 512), "deep_gemm_fp8", 0.8)]
    (found,) = precision(to_frame(rows), question("e8k2d256i512", 128))
    assert "16 × 512: 2.00 (triton_fp8), 64 × 512: 0.40 (deep_gemm_fp8)" in sentence(found, "forward")


def test_a_measured_workload_is_its_own_answer():
    (found,) = precision(to_frame(MAP), question("e8k2d256i1024", 256))
    assert (found.is_measured, found.ratio, found.pays) == (True, pytest.approx(0.25), True)
    assert "FP8 takes 0.25 times the time of 16 bits in mode forward (triton_fp8 0.500 ms" in sentence(found, "forward")


@pytest.mark.parametrize(
    ("shape", "num_tokens", "ratio"),
    [
        ("e8k2d256i512", 128, 1.0),  # half way between 2 and 0.5
        ("e8k2d256i512", 512, 0.5),
        ("e16k2d256i512", 256, 1.0),  # as many rows per expert as 8 experts have with 128 tokens
        ("e8k2d512i512", 128, 1.0),  # dim is not a direction of the map
    ],
)
def test_between_cells_logarithms_lie_on_a_line(shape, num_tokens, ratio):
    (found,) = precision(to_frame(MAP), question(shape, num_tokens))
    assert found.ratio == pytest.approx(ratio)
    assert not found.is_measured
    assert len(found.cells) == 2
    assert "interpolated between rows per expert × moe_inter_dim" in sentence(found, "forward")


def test_a_place_between_two_widths_has_four_neighbours():
    (found,) = precision(to_frame(MAP), question("e8k2d256i768", 128))
    assert len(found.cells) == 4
    assert 0.5 < found.ratio < 1.0
    (data,) = precision_json([found])
    assert (data["pays"], len(data["cells"])) == (True, 4)


@pytest.mark.parametrize(
    ("shape", "num_tokens"),
    [("e8k2d256i512", 32), ("e8k2d256i512", 2048), ("e8k2d256i256", 256), ("e8k2d256i2048", 256)],
)
def test_nothing_is_extrapolated(shape, num_tokens):
    assert precision(to_frame(MAP), question(shape, num_tokens)) == []


def test_another_mode_does_not_answer():
    assert precision(to_frame(MAP), question("e8k2d256i512", 256, mode="train")) == []


def test_the_line_of_1_is_found_where_the_ratio_falls_below_it_for_the_last_time():
    again = cells(to_frame([*measured(64, 256, 0.9), *measured(256, 256, 2.0), *measured(1024, 256, 0.5), *MAP]))
    never = cells(to_frame(measured(64, 128, 1.5)))
    always = cells(to_frame(measured(64, 128, 0.5)))
    assert crossings(again) == {256: pytest.approx(128.0), 512: pytest.approx(32.0), 1024: pytest.approx(16.0)}
    assert (crossings(never), crossings(always)) == ({128: None}, {128: 0.0})


def test_the_map_is_a_markdown_table_of_each_mode():
    lines = list(markdown(cells(to_frame([*MAP, *measured(64, 512, 1.0, mode="train")]))))
    assert [line for line in lines if line.startswith("|")] == [
        "| moe_inter_dim | 16 rows | 64 rows | 256 rows | FP8 pays from |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 512 | 2.00 | 0.50 | 0.50 | 32 rows |",
        "| 1024 | 1.00 | 0.25 | 0.20 | 16 rows |",
    ]
