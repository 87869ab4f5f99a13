"""Run the steps in Triton. Importing this package imports triton, so `experts.steps` imports it at its first use."""

from experts.steps.fused.activation import activate, activate_backward
from experts.steps.fused.reduce import dot_rows, sum_by_expert
from experts.steps.fused.rows import gather_rows, sum_rows
from experts.steps.fused.sort import mask_choices, sort_by_expert

__all__ = [
    "activate",
    "activate_backward",
    "dot_rows",
    "gather_rows",
    "mask_choices",
    "sort_by_expert",
    "sum_by_expert",
    "sum_rows",
]
