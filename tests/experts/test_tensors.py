"""Corner cases of tensors: strides, dtypes, and tensors without gradients. test_corners.py has those of the routing."""

import pytest
import torch

from experts.compute.grouped_mm import _readable, products
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    Setup,
    assert_near,
    check,
    expected,
    misaligned,
    on_cpu_and_gpu,
    on_every_setup,
    random_batch,
    random_parameters,
    run,
    some_masked,
    takes,
)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in a tensor that has its dimensions reversed in memory, with gaps."""
    spread = torch.zeros([3 * size for size in reversed(tensor.shape)], dtype=tensor.dtype, device=tensor.device)
    view = spread.permute(*reversed(range(tensor.ndim)))[(slice(1, None, 3),) * tensor.ndim]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


@on_every_setup
@pytest.mark.parametrize("which", ["x", "token_mask", "weights", "indices", "grad", "all"])
def test_inputs_may_be_non_contiguous(setup: Setup, which: str) -> None:
    config = setup.config(expert_bias=True)
    batch = some_masked(random_batch(config)).map(lambda tensor: tensor.to(setup.device))
    names = ("x", "token_mask", "weights", "indices", "grad") if which == "all" else (which,)
    check(setup, config, batch.with_(**{name: strided(getattr(batch, name)) for name in names}))


@on_every_setup
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_gradient_of_the_output_may_be_expanded(setup: Setup, bias: bool) -> None:
    """`out.sum().backward()` gives such a gradient."""
    config = setup.config(expert_bias=bias)
    batch = random_batch(config)
    ones = torch.ones((), dtype=config.dtype, device=setup.device).expand(batch.grad.shape)
    check(setup, config, batch.with_(grad=ones))


@on_every_setup
def test_parameters_may_be_transposed_views(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    parameters = {name: p.to(setup.device) for name, p in random_parameters(config).items()}
    transposed = {
        name: p.transpose(1, 2).contiguous().transpose(1, 2) if p.ndim == 3 else p for name, p in parameters.items()
    }
    batch = random_batch(config)
    made = setup.layer(config)
    made.load_state_dict(transposed, assign=True)
    assert not made.down_projs.is_contiguous()
    assert_near(run(made, batch), expected(config, parameters, batch), config.dtype)


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the first columns of a tensor with one more column: rows start at odd places."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    wide[..., :-1] = tensor
    return wide[..., :-1]


def _every_other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def _columns_with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    return _with_gaps(tensor.transpose(-2, -1)).transpose(-2, -1)


LAYOUTS = {"rows-with-gaps": _with_gaps, "columns-with-gaps": _columns_with_gaps, "reversed": strided}
LAYOUTS["every-other-column"] = _every_other


@on_every_setup
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [("x", "grad"), ("gate_and_up_projs",), ("down_projs",)], ids=str)
def test_tensors_may_be_sliced_from_larger_ones(setup: Setup, layout: str, names: tuple[str, ...]) -> None:
    """grouped_mm refuses rows, columns and matrices that do not start at a multiple of 16 bytes."""
    config = setup.config(expert_bias=True)
    sliced = LAYOUTS[layout]
    batch = random_batch(config).map(lambda tensor: tensor.to(setup.device))
    batch = batch.with_(**{name: sliced(getattr(batch, name)) for name in names if hasattr(batch, name)})
    parameters = {name: p.to(setup.device) for name, p in random_parameters(config).items()}
    made = setup.layer(config)
    given = {name: sliced(p) if name in names else p for name, p in parameters.items()}
    made.load_state_dict(given, assign=True)
    assert_near(run(made, batch), expected(config, parameters, batch), config.dtype)


def test_products_of_grouped_mm_take_operands_of_any_layout() -> None:
    """Every product, with each operand in each layout, equals that of contiguous operands. Others are not copied."""
    offsets = torch.tensor([3, 3, 7, 8], dtype=torch.int32)
    rows, others = torch.randn(8, 8), torch.randn(8, 16)
    matrices = torch.randn(4, 8, 16)
    multiply = products(offsets)
    for sliced in (*LAYOUTS.values(), misaligned):
        for change_a, change_b in ((sliced, torch.clone), (torch.clone, sliced)):
            for product, a, b in (
                (multiply.rows, rows, matrices),
                (multiply.rows_back, others, matrices),
                (multiply.outer, rows, others),
            ):
                assert torch.equal(product(change_a(a), change_b(b)), product(a, b))
    for taken in (rows, matrices, matrices.transpose(-2, -1), rows[2:5], matrices[1:]):
        assert _readable(taken) is taken


@on_every_setup
def test_memory_may_start_anywhere(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, grouped_mm refuses matrices that do not start at a multiple of 16 bytes."""
    multiply = torch.nn.functional.grouped_mm

    def checked(a: torch.Tensor, b: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        assert not any(operand.data_ptr() % 16 for operand in (a, b))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", checked)
    config = setup.config(expert_bias=True)
    parameters = {name: p.to(setup.device) for name, p in random_parameters(config).items()}
    batch = some_masked(random_batch(config)).map(lambda tensor: tensor.to(setup.device))
    made = setup.layer(config)
    made.load_state_dict({name: misaligned(p) for name, p in parameters.items()}, assign=True)
    assert_near(run(made, batch.map(misaligned)), expected(config, parameters, batch), config.dtype)


@pytest.mark.parametrize(
    ("parameters", "activations"),
    [(F32, BF16), (F32, F16), (BF16, F32)],
    ids=["float32-bfloat16", "float32-float16", "bfloat16-float32"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@on_cpu_and_gpu
def test_parameters_may_have_another_dtype_than_x(
    setup: Setup, parameters: torch.dtype, activations: torch.dtype, bias: bool
) -> None:
    """The output and x's gradient have x's dtype. Every parameter's gradient has the parameter's dtype."""
    if not takes(setup.engine, setup.device, activations):
        pytest.skip(f"{setup.engine} does not take {activations}")
    config = setup.config(dtype=parameters, expert_bias=bias)
    batch = random_batch(config)
    found = check(setup, config, batch.with_(x=batch.x.to(activations), grad=batch.grad.to(activations)))
    assert found["output"].dtype is found["x"].dtype is activations
    assert found["gate_and_up_projs"].dtype is parameters


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@on_cpu_and_gpu
def test_routing_weights_may_have_any_float_dtype(setup: Setup, dtype: torch.dtype) -> None:
    config = setup.config(expert_bias=True)
    batch = random_batch(config)
    found = check(setup, config, batch.with_(weights=batch.weights.to(dtype)))
    assert found["weights"].dtype is dtype


@on_cpu_and_gpu
def test_gradients_accumulate(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    batch = random_batch(config).map(lambda tensor: tensor.to(setup.device))
    made = setup.layer(config)
    once = {name: g.clone() for name, g in run(made, batch).items()}
    made(batch.x, batch.token_mask, batch.weights, batch.indices).backward(batch.grad)
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name])


@on_cpu_and_gpu
@pytest.mark.parametrize("frozen", ["parameters", "x", "weights", "x and weights"])
def test_tensors_that_need_no_gradient_get_none(setup: Setup, frozen: str) -> None:
    config = setup.config(expert_bias=True)
    batch = random_batch(config).map(lambda tensor: tensor.to(setup.device))
    made = setup.layer(config).requires_grad_(frozen != "parameters")
    x = batch.x.requires_grad_("x" not in frozen)
    weights = batch.weights.requires_grad_("weights" not in frozen)
    made(x, batch.token_mask, weights, batch.indices).backward(batch.grad)
    right = expected(config, random_parameters(config), batch)
    tensors = {"x": x, "weights": weights, **dict(made.named_parameters())}
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            assert_near({name: tensor.grad}, {name: right[name]}, config.dtype)


@on_every_setup
def test_inference_gives_the_same_output(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    batch = some_masked(random_batch(config)).map(lambda tensor: tensor.to(setup.device))
    made = setup.layer(config)
    trained = run(made, batch)["output"]
    inputs = [tensor.detach() for tensor in (batch.x, batch.token_mask, batch.weights, batch.indices)]
    with torch.no_grad():
        output = made(*inputs)
    with torch.inference_mode():
        assert torch.equal(made(*inputs), output)
    if setup.engine == "triton":  # without gradients it activates values that are not yet rounded to x's dtype
        assert_near({"output": output}, {"output": trained}, setup.dtype)
    else:
        assert torch.equal(output, trained)


@on_every_setup
def test_inputs_are_left_as_they_are(setup: Setup) -> None:
    config = setup.config(expert_bias=True)
    batch = some_masked(random_batch(config)).map(lambda tensor: tensor.to(setup.device))
    before = batch.map(torch.clone)
    made = setup.layer(config)
    parameters = {name: p.detach().clone() for name, p in made.named_parameters()}
    run(made, batch)
    for name in ("x", "token_mask", "weights", "indices", "grad"):
        assert torch.equal(getattr(batch, name), getattr(before, name)), name
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
