"""Numbers fit their columns, and a measured time is never shown as missing."""

import math

import pytest

from moebench.report.tables.cells import human, milliseconds, part_milliseconds, rate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00321, "0.0032"),
        (0.9, "0.90"),
        (1, "1.00"),
        (42.12, "42.1"),
        (999.9, "1.00K"),
        (105_432, "105K"),
        (9.99e8, "999M"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert human(value) == text


def test_a_rate_that_was_not_measured_is_a_dash() -> None:
    assert (rate(math.nan), rate(1500.0)) == ("-", "1.50K")


@pytest.mark.parametrize("time_ms", [0.0123, 0.099999, 0.1, 0.99999, 9.99999, 99.9999, 999.99, 9999.9, 99_999.4])
def test_times_keep_to_their_width(time_ms: float) -> None:
    assert len(milliseconds(time_ms)) <= 6
    assert float(milliseconds(time_ms)) == pytest.approx(time_ms, rel=0.01)
    assert len(part_milliseconds(time_ms)) <= 6 - (time_ms < 99_999)
    assert float(part_milliseconds(time_ms)) == pytest.approx(time_ms, abs=0.0005, rel=0.001)


@pytest.mark.parametrize(("time_ms", "text"), [(math.nan, "-"), (0.0, "0.000"), (0.0002, "<.001"), (0.0123, "0.012")])
def test_a_short_part_is_neither_nothing_nor_unmeasured(time_ms: float, text: str) -> None:
    assert part_milliseconds(time_ms) == text


def test_an_infinite_end_of_an_interval_is_said():
    assert milliseconds(math.inf) == "inf"
