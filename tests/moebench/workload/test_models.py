"""A shape is written in one notation, and read in that notation and the earlier one."""

import pytest

from moebench.workload.models import MODELS, SHAPE_AXES, shape_fields, shape_name


@pytest.mark.parametrize("text", ["e64k6d1024i512", "64/6/1024/512"])
def test_both_notations_are_read(text: str) -> None:
    assert shape_fields(text) == dict(zip(SHAPE_AXES, (64, 6, 1024, 512), strict=True))


@pytest.mark.parametrize(
    "text",
    ["", "olmoe", "64/6/1024", "e64k6d1024", "e64k6d1024i512-t8", "64/6/1024/512/1", "e64/6/1024/512"],
)
def test_any_other_text_is_no_shape(text: str) -> None:
    assert shape_fields(text) is None


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_is_read_again(model: str) -> None:
    shape = {name: MODELS[model][name] for name in SHAPE_AXES}
    assert shape_fields(shape_name(MODELS[model])) == shape
