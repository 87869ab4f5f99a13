"""A column declares which rows may have it, how the values of rounds combine, and whether the CSV leaves it out."""

import types
from typing import Annotated

import pytest
from pydantic import BaseModel

from moebench.results.columns import COMBINE, Column, Rounds, columns_of
from moebench.results.frame import SAMPLE_COLUMNS
from moebench.results.record import COLUMN_OF, ONLY_IF_OK, Record
from moebench.workload.case import CaseFields


def test_only_these_need_the_status_ok() -> None:
    times = ("time_ms", "time_ms_low", "time_ms_high", "converged", "host_time_ms", "graph_time_ms")
    busy = ("busy_ms", "busy_ms_low", "busy_ms_high")
    parts = ("backward_ms", "dispatch_ms", "compute_ms", "combine_ms", "dispatch_bytes", "skew_ms")
    samples = ("samples_ms", "sample_rounds", "sample_marked", "busy_samples_ms", "busy_sample_rounds")
    steps = ("num_steps", "step_p50_ms", "step_p99_ms", "expert_rows", "rank_rows", "expert_skew", "rank_skew")
    speeds = ("sm_clock_mhz", *steps, "tokens_per_s", "tflops")
    ceilings = ("roofline_fraction", "roofline_ms", "dense_ms", "grouped_ms", "collective_ms", "copy_gb_per_s")
    memory = ("peak_memory_bytes", "saved_memory_bytes", "cached_weight_bytes", "reserved_memory_bytes")
    sizes = (*memory, "outside_torch_bytes", "untracked_memory_bytes")
    compiler = ("compiled_graphs", "graph_breaks", "recompiled_graphs")
    measured = (*times, *busy, *parts, "num_samples", *samples, *speeds, *ceilings, *sizes, *compiler)
    assert ("sample_sessions", "l2", *measured) == ONLY_IF_OK
    assert ("sample_sessions", *samples) == SAMPLE_COLUMNS


def test_every_column_says_what_it_means() -> None:
    assert [name for name, column in COLUMN_OF.items() if not column.means] == []


def test_what_may_be_missing_has_a_default() -> None:
    """A file that was written before the column existed can be opened because of the default."""
    optional = {name for name, field in Record.model_fields.items() if isinstance(field.annotation, types.UnionType)}
    assert [name for name in optional if Record.model_fields[name].is_required()] == []


def test_the_fields_of_a_case_are_the_same_in_all_rounds() -> None:
    assert {COLUMN_OF[name].rounds for name in CaseFields.model_fields} == {Rounds.SAME}


def test_sums_are_these() -> None:
    sums = {name for name, column in COLUMN_OF.items() if column.rounds is Rounds.SUM}
    assert sums == {"num_samples", "job_s", "setup_s", "ceilings_s", "parity_s", "timing_s"}


@pytest.mark.parametrize(
    ("kind", "values", "one"),
    [
        (Rounds.SUM, [1, 2, 4], 7),
        (Rounds.WORST, [1, 4, 2], 4),
        (Rounds.WORST, [{"a": 1.0, "b": 5.0}, {"a": 2.0}], {"a": 2.0, "b": 5.0}),
        (Rounds.MEDIAN, [1.0, 2.0, 5.0, 9.0], 3.5),
        (Rounds.LOWER_MEDIAN, [1500, 1980, 1515, 1980], 1515),
        (Rounds.ALL, [True, False], False),
        (Rounds.ALL, [True, True], True),
        (Rounds.EVERY, ["x", "y", "x"], "x | y"),
        (Rounds.EVERY, [("a",), ("b", "a")], ("a", "b")),
        (Rounds.SAMPLES, [(1.0,), (2.0, 1.0)], (1.0, 2.0, 1.0)),
    ],
)
def test_values_of_rounds_make_one(kind: Rounds, values: list, one: object) -> None:
    assert COMBINE[kind](values) == one


def test_every_way_to_combine_is_one_or_leaves_the_row_as_it_is() -> None:
    assert set(Rounds) - COMBINE.keys() == {Rounds.SAME, Rounds.OF_WORST, Rounds.COMPUTED}


def test_a_new_column_needs_its_declaration_and_nothing_else() -> None:
    class Longer(BaseModel):
        energy_j: Annotated[float | None, Column(Rounds.SUM, "energy of a call", "J")] = None

    assert columns_of(Longer) == {"energy_j": Column(Rounds.SUM, "energy of a call", "J", "unless ok")}
