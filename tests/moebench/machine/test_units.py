"""Sizes are rounded, not truncated."""

import pytest

from moebench.machine.units import size, size_change


@pytest.mark.parametrize(
    ("num_bytes", "spec", "text"),
    [
        (0, None, "0 B"),
        (1023, None, "1023 B"),
        (1024, None, "1.00 KiB"),
        (int(9.996 * 2**20), None, "10.0 MiB"),
        (int(99.96 * 2**30), None, "100 GiB"),
        (3 * 2**40, None, "3.00 TiB"),
        (2**34, "g", "16 GiB"),
        (int(139.81 * 2**30), ".1f", "139.8 GiB"),
        (int(139.81 * 2**30), ".0f", "140 GiB"),
    ],
)
def test_size(num_bytes: int, spec: str | None, text: str) -> None:
    assert size(num_bytes, spec) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2**20, 2**21, "1.00 MiB -> 2.00 MiB"),
        (2**20, 2**20 + 64, "1.00 MiB, 64 B more"),
        (2**20 + 64, 2**20, "1.00 MiB, 64 B less"),
    ],
)
def test_a_change_is_visible_however_small(before: int, after: int, text: str) -> None:
    assert size_change(before, after) == text
