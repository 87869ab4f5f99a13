"""Parity errors as the text of a cell."""

import json
import math

import pytest

from moebench.results.bulk.errors import cell_of_errors
from moebench.results.columns import jsonable


@pytest.mark.parametrize(
    "errors",
    [
        {"output": 0.1, "x.grad": 1e-300, "100%": 3.0},
        {'a"b\\': 0.0, "ö": 1 / 3},
        {"output": math.inf, "x.grad": 0.5},
        {"output": 1e308, "x.grad": 1e308},
    ],
)
def test_the_text_is_what_json_makes_of_the_numbers(errors: dict[str, float]) -> None:
    assert cell_of_errors(errors) == json.dumps({name: jsonable(error) for name, error in errors.items()})


def test_no_errors_are_null() -> None:
    assert cell_of_errors(None) is None
    assert cell_of_errors({}) is None
