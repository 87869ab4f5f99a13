"""Define the runs of the oracle that show what rounding costs in a dtype. None of them runs code of a backend.

* The plain run computes in the dtype itself. A layer with adapters has two: they add matrices, or they add rows.
* The perturbed runs change every operand by a random amount, up to the dtype's rounding unit, and compute in a wider
  dtype. Such a change has the same effect as another right order of a sum, or as another right place of rounding.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.parity.oracle import Formula, Product, wide

#: The reference rounds too, in float64. A right float64 backend may differ from it by this many times what the runs
#: show.
REFERENCE_ROUNDS = 4.0
#: The perturbed runs of a dtype of 16 bits change operands by up to this share of a unit: its plain run already rounds
#: every product, and a factor of 1.02 on one expert should not hide.
UNIT_OF_16_BITS = 0.5
#: The perturbed runs move limits down and up by this many rounding units. Rounding may carry a value that is so near to
#: a limit over it, and the gradient jumps there.
LIMIT_UNITS = 2.0


@dataclass(frozen=True)
class Operands:
    """What the oracle reads for the rows of some experts; see `moebench.parity.oracle.experts_values`."""

    x_GMD: Tensor
    weights_GM: Tensor
    experts: Mapping[str, Tensor]
    grad_GMD: Tensor


@dataclass(frozen=True)
class Rounding:
    """One run: its formula, its dtype and its matrix product.

    `unit` is how far the run changes its operands, relative to each; 0 for a run that changes nothing. An error of the
    run counts as `share` of its size. `travel` rounds tokens and the output's gradients as they travel between ranks;
    None if they travel in their own dtype.
    """

    formula: Formula
    dtype: torch.dtype
    product: Product = torch.matmul
    unit: float = 0.0
    share: float = 1.0
    travel: Callable[[Tensor], Tensor] | None = None

    def operands(self, exact: Operands, generator: torch.Generator) -> Operands:
        """Return the operands as this run reads them. Routing weights keep the wide dtype."""
        experts = {name: self.changed(stacked, generator) for name, stacked in exact.experts.items()}
        # a layer may also add up the routing weights of one expert in their own dtype
        unit = max(self.unit, torch.finfo(exact.weights_GM.dtype).eps / 2)
        weights_GM = self.changed(exact.weights_GM, generator, wide(self.dtype), unit)
        rows = [self.changed(tensor, generator) for tensor in (exact.x_GMD, exact.grad_GMD)]
        x_GMD, grad_GMD = rows if self.travel is None else [self.travel(tensor) for tensor in rows]
        return Operands(x_GMD, weights_GM, experts, grad_GMD)

    def changed(
        self, tensor: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None, unit: float | None = None
    ) -> Tensor:
        """Return an operand as this run reads it, in `dtype` (default: the run's), changed by up to `unit`."""
        values, unit = tensor.to(dtype or self.dtype), self.unit if unit is None else unit
        if not self.unit:
            return values
        noise = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
        return values * (1 + unit * (2 * noise - 1))


def roundings(
    formula: Formula,
    dtype: torch.dtype,
    product: Product,
    num_perturbed: int,
    longest: int,
    travel: Callable[[Tensor], Tensor] | None = None,
) -> list[Rounding]:
    """Return the runs for a dtype: the plain run (with adapters two), then the perturbed runs.

    `longest` is the number of terms of the longest dot product. The sum of its terms, one after the other, rounds as if
    each operand was changed by about √longest/2 units of the sum's dtype.

    FP8 has the plain run alone, with `travel` (see `Rounding`), because FP8 rounds much more coarsely than its
    operands' dtype. In float64 the plain run is the reference itself and is left out. Its perturbed runs change
    operands by the rounding unit of float32, so that the change exceeds the reference's own rounding, and their errors
    are scaled down to float64.
    """
    if product is not torch.matmul:
        return [Rounding(formula, dtype, product, travel=travel)]
    single, double = torch.float32, torch.float64
    unit = torch.finfo(single if dtype is double else dtype).eps / 2
    share = REFERENCE_ROUNDS * torch.finfo(double).eps / torch.finfo(single).eps if dtype is double else 1.0
    sums = torch.finfo(single if dtype.itemsize <= 4 else double).eps / 2
    unit = unit * (UNIT_OF_16_BITS if dtype.itemsize == 2 else 1.0)
    unit += (unit if dtype is double else sums) * math.sqrt(longest) / 2
    moved = (1 - LIMIT_UNITS * unit, 1 + LIMIT_UNITS * unit)
    perturbed = [
        Rounding(
            dataclasses.replace(formula, limit=formula.limit * moved[number % 2]),
            single if dtype.itemsize == 2 else double,
            unit=unit,
            share=share,
        )
        for number in range(num_perturbed)
    ]
    plain = [Rounding(formula, dtype)]
    if formula.lora_scale:
        plain.append(Rounding(dataclasses.replace(formula, adds_rows=True), dtype))
    return perturbed if dtype is double else [*plain, *perturbed]
