"""Limit how many experts the oracle runs together. The estimate of memory reads the limits, too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Together:
    """Limits for experts that run together.

    `elements` limits twice the number of elements of their up projections. `multiplications` limits the number of
    multiplications by these elements, divided by 32.
    """

    elements: int
    multiplications: int

    def most(self, most_rows: int, elements: int) -> int:
        """Return how many experts may run together of which each has `elements` and at most `most_rows` rows."""
        return min(self.elements // elements, self.multiplications // (most_rows * (elements // 64 + 8)))


#: A CPU is fastest with tensors that fit its caches. A GPU needs enough work for each kernel.
ON_CPU, ON_GPU = Together(1 << 21, 1 << 21), Together(1 << 26, 1 << 31)
