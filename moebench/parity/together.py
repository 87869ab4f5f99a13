"""Limit how many experts the oracle runs together. The estimate of memory reads the limits, too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Together:
    """Experts run together as long as all of them have at most so many elements and multiplications.

    `elements` counts twice the elements of the up projections, and `multiplications` those with them, divided by 32.
    """

    elements: int
    multiplications: int

    def most(self, most_rows: int, elements: int) -> int:
        """Return how many experts may run together of which each has `elements` and at most `most_rows` rows."""
        return min(self.elements // elements, self.multiplications // (most_rows * (elements // 64 + 8)))


#: A CPU is fastest with tensors that fit its caches. A GPU needs enough work for each kernel.
ON_CPU, ON_GPU = Together(1 << 21, 1 << 21), Together(1 << 26, 1 << 31)
