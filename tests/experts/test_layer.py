"""Every expert layer refuses wrong inputs before it computes, with a message of one line."""

import pytest
import torch

from experts import ConfigError, InputError
from tests.experts.layers import layer, moe_config, on_every_engine, random_batch

WRONG_INPUTS = {
    "x-batch": ({"x": (1, 7, 16)}, "x has shape [1, 7, 16], but needs [tokens, dim = 16]"),
    "x-dim": ({"x": (7, 8)}, "x has shape [7, 8], but needs [tokens, dim = 16]"),
    "x-flat": ({"x": (16,)}, "x has shape [16], but needs [tokens, dim = 16]"),
    "x-tokens": ({"x": (6, 16)}, "must have shape [tokens, n_activated_experts] = [6, 2]"),
    "x-int": ({"x": torch.int64}, "x is torch.int64, but must be one of float64, float32, bfloat16, float16"),
    "x-float8": ({"x": torch.float8_e4m3fn}, "x is torch.float8_e4m3fn, but must be one of"),
    "mask-tokens": ({"token_mask": (6,)}, "token_mask is torch.bool [6], but must be torch.bool [tokens] = [7]"),
    "mask-2d": ({"token_mask": (7, 1)}, "token_mask is torch.bool [7, 1], but must be torch.bool [tokens] = [7]"),
    "mask-int": ({"token_mask": torch.int64}, "token_mask is torch.int64 [7], but must be torch.bool"),
    "weights-tokens": ({"weights": (6, 2)}, "weights [6, 2] and indices [7, 2] must have shape"),
    "weights-choices": ({"weights": (7, 1)}, "n_activated_experts] = [7, 2]"),
    "weights-flat": ({"weights": (14,)}, "weights [14] and indices [7, 2] must have shape"),
    "weights-int": ({"weights": torch.int64}, "weights (torch.int64) must be floats"),
    "indices-choices": ({"indices": (7, 3)}, "weights [7, 2] and indices [7, 3] must have shape"),
    "indices-tokens": ({"indices": (8, 2)}, "weights [7, 2] and indices [8, 2] must have shape"),
    "indices-float": ({"indices": torch.float32}, "indices (torch.float32) must be int64, int32, int16, int8 or uint8"),
    "indices-uint16": ({"indices": torch.uint16}, "indices (torch.uint16) must be int64, int32, int16, int8 or uint8"),
    "indices-bool": ({"indices": torch.bool}, "indices (torch.bool) must be int64"),
    "indices-complex": ({"indices": torch.complex64}, "indices (torch.complex64) must be int64"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
@on_every_engine
def test_the_error_for_a_wrong_input_is_one_line(engine: str, wrong: str) -> None:
    changes, message = WRONG_INPUTS[wrong]
    made = layer(engine, moe_config())
    batch = random_batch(made.config)
    for name, change in changes.items():
        tensor = getattr(batch, name)
        tensor = tensor.to(change) if isinstance(change, torch.dtype) else torch.ones(change, dtype=tensor.dtype)
        batch = batch.with_(**{name: tensor})
    with pytest.raises(InputError) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(("index", "span"), [(4, "0 to 4"), (-2, "-2 to 3"), (1 << 40, "0 to 1099511627776")])
@on_every_engine
def test_an_index_out_of_range_is_refused(engine: str, index: int, span: str) -> None:
    made = layer(engine, moe_config())
    batch = random_batch(made.config, num_tokens=20)
    batch.indices[11, 1] = index
    with pytest.raises(InputError) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert str(caught.value) == (
        f"indices run from {span}, but must be from -1 (no expert) to 3 (n_routed_experts - 1); correct the routing"
    )


@pytest.mark.parametrize("name", ["x", "token_mask", "weights", "indices", "the parameters"])
@on_every_engine
def test_tensors_on_two_devices_are_refused(engine: str, name: str) -> None:
    """Parameters on the meta device are also refused. With them, the loop would return zeros."""
    made = layer(engine, moe_config())
    batch = random_batch(made.config)
    if name == "the parameters":
        made.to("meta")
    else:
        batch = batch.with_(**{name: getattr(batch, name).to("meta")})
    with pytest.raises(InputError) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    devices = dict.fromkeys(("x", "token_mask", "weights", "indices", "the parameters"), "cpu") | {name: "meta"}
    where = ", ".join(f"{one} on {device}" for one, device in devices.items())
    assert str(caught.value) == (
        f"{where}: all must be on one device; move them, and parameters on meta with init_weights"
    )
