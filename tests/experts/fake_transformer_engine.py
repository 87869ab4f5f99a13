"""A fake of Transformer Engine (2.20) in plain torch: the parts that experts/te uses, with TE's assertions.

FP8 rounds nothing here, but groups must be aligned. The fake keeps copies of the weights as long as TE keeps its
quantised weights, so that a test sees when a layer uses old weights.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from experts.autocast import without_autocast


@dataclass(frozen=True)
class Recipe:
    """A quantisation recipe. `mxfp8()` returns the kind, as in the real classes."""

    name: str

    def mxfp8(self) -> bool:
        return self.name == "MXFP8BlockScaling"

    @property
    def alignment(self) -> int:
        return 32 if self.mxfp8() else 16


class FP8GlobalStateManager:
    """Holds the recipe of each open autocast, the innermost last. None stands for FP8 off."""

    recipes: tuple[Recipe | None, ...] = ()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return bool(cls.recipes) and cls.recipes[-1] is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        recipe = cls.recipes[-1]
        assert recipe is not None
        return recipe


@contextlib.contextmanager
def autocast(enabled: bool = True, recipe: Recipe | None = None) -> Iterator[None]:
    """Turn FP8 with a recipe on, or FP8 off, inside of the block."""
    before = FP8GlobalStateManager.recipes
    FP8GlobalStateManager.recipes = (*before, (recipe or Recipe("DelayedScaling")) if enabled else None)
    try:
        yield
    finally:
        FP8GlobalStateManager.recipes = before


def _aligned(sizes: list[int], alignment: int) -> list[int]:
    return [-(-size // alignment) * alignment for size in sizes]


class Fp8Padding(nn.Module):
    """(rows, sizes) -> rows with zeros at the end of each group, and the padded sizes."""

    def __init__(self, num_gemms: int, align_size: int = 16) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        assert len(m_splits) == self.num_gemms
        padded = _aligned(m_splits, self.align_size)
        if padded == m_splits:
            return inp, m_splits
        groups = zip(inp.split(m_splits), m_splits, padded, strict=True)
        return torch.cat([nn.functional.pad(rows, (0, 0, 0, after - size)) for rows, size, after in groups]), padded


class Fp8Unpadding(nn.Module):
    """(padded rows, sizes before the padding) -> rows without the padding."""

    def __init__(self, num_gemms: int, align_size: int = 16) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        assert len(m_splits) == self.num_gemms
        padded = inp.split(_aligned(m_splits, self.align_size))
        return torch.cat([rows[:size] for rows, size in zip(padded, m_splits, strict=True)])


@dataclass(frozen=True)
class Call:
    """One forward of a GroupedLinear, recorded for tests."""

    m_splits: list[int]
    recipe: str | None
    is_first_microbatch: bool | None
    sizes_on_device: bool = False


class Gpu:
    """What the libraries of a test's GPU can do."""

    #: Whether cuBLASLt is as new as the native path of `use_grouped_tensor` needs it. A test sets it.
    multiplies_groups = False


def is_module_grouped_tensor_path_supported(recipe: Recipe | None, dtype: torch.dtype) -> bool:
    """The real function also looks at the GPU and at the version of cuBLASLt."""
    assert recipe is None
    return Gpu.multiplies_groups and dtype in (torch.bfloat16, torch.float16)


class GroupedLinear(nn.Module):
    """y = x·weight{i}ᵀ (+ bias{i}) for the rows of group i. Its weights are [out, in]."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        use_grouped_tensor: bool = False,
    ) -> None:
        super().__init__()
        self.use_grouped_tensor = use_grouped_tensor
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.calls: list[Call] = []
        self._kept: dict[int, Tensor] = {}
        for index in range(num_gemms):
            empty = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{index}", nn.Parameter(empty))
            if bias:
                self.register_parameter(f"bias{index}", nn.Parameter(empty.new_empty(out_features)))
            else:
                setattr(self, f"bias{index}", empty.new_empty(0))
        self.reset_parameters(defer_init=torch.device(device).type == "meta")

    @torch.no_grad()
    def reset_parameters(self, defer_init: bool = False) -> None:
        """Set new Parameters: normal weights, zero biases. Parameters on the meta device move to the CPU."""
        for name, parameter in [] if defer_init else list(self.named_parameters()):
            real = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter
            nn.init.zeros_(real) if name.startswith("bias") else nn.init.normal_(real, std=0.023)
            setattr(self, name, nn.Parameter(real))

    def forward(self, inp: Tensor, m_splits: list[int] | Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Return [N, out]. With `return_bias`, the biases are not added but returned as a list beside it.

        A tensor `m_splits` stands for sizes on the device. Then `inp` may have more rows than the groups.
        """
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        recipe = FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None
        on_device = isinstance(m_splits, Tensor)
        if self.use_grouped_tensor and is_module_grouped_tensor_path_supported(None, inp.dtype):
            assert isinstance(m_splits, Tensor), "The native grouped_tensor path requires CUDA m_splits"
            assert recipe is None, "not in this fake"
            assert self.num_gemms <= 64, f"A_list supports up to 64 tensors per kernel, got {self.num_gemms}"
            assert m_splits.dtype is torch.int64
            m_splits = m_splits.tolist()
            self._check(inp[: sum(m_splits)], m_splits, weights, recipe)
        else:
            assert isinstance(m_splits, list)
            assert sum(m_splits) == inp.shape[0] > 0
            self._check(inp, m_splits, weights, recipe)
        self.calls.append(Call(m_splits, recipe.name if recipe else None, is_first_microbatch, on_device))
        used = [weight.detach() for weight in weights]
        if recipe is not None:
            used = [self._quantized(i, weight, is_first_microbatch) for i, weight in enumerate(used)]
        out = _MultiplyGroups.apply(inp, m_splits, used, *weights)
        if self.use_bias and not self.return_bias:
            groups = zip(out.split(m_splits), biases, strict=True)
            out = torch.cat([rows + bias for rows, bias in groups])
        return (out, biases) if self.return_bias else out

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def _quantized(self, index: int, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        if is_first_microbatch is None:
            return weight.clone()
        if is_first_microbatch or index not in self._kept:
            self._kept[index] = weight.clone()
        return self._kept[index]

    def _check(self, inp: Tensor, m_splits: list[int], weights: list[Tensor], recipe: Recipe | None) -> None:
        assert all(type(size) is int for size in m_splits)
        assert len(m_splits) == self.num_gemms
        assert inp.shape[1:] == (self.in_features,)
        assert all(tensor.is_contiguous() for tensor in (inp, *weights)), (
            "tensors must be contiguous: TE ignores strides"
        )
        assert {weight.dtype for weight in weights} == {inp.dtype}, "dtypes must match outside of torch.autocast"
        if recipe is not None:
            assert not any(size % recipe.alignment for size in m_splits)
            assert not self.in_features % recipe.alignment
            assert not self.out_features % recipe.alignment


class _MultiplyGroups(Function):
    """Rows past the last group are NaN in the result and in the gradient: TE does not write them."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, m_splits: list[int], used: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(inp)
        ctx.m_splits, ctx.used = m_splits, used
        return _groups_times(inp, m_splits, [weight.t() for weight in used])

    @staticmethod
    @without_autocast  # TE's kernels take the dtypes that forward chose
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (inp,) = ctx.saved_tensors
        grad_inp = _groups_times(grad, ctx.m_splits, ctx.used)
        groups = zip(_groups(grad, ctx.m_splits), _groups(inp, ctx.m_splits), strict=True)
        return grad_inp, None, None, *(g.t() @ rows for g, rows in groups)


def _groups(rows: Tensor, m_splits: list[int]) -> tuple[Tensor, ...]:
    return rows[: sum(m_splits)].split(m_splits)


def _groups_times(rows: Tensor, m_splits: list[int], matrices: list[Tensor]) -> Tensor:
    products = [group @ matrix for group, matrix in zip(_groups(rows, m_splits), matrices, strict=True)]
    past = rows.new_full((len(rows) - sum(m_splits), matrices[0].shape[1]), torch.nan)
    return torch.cat([*products, past])


def modules() -> dict[str, ModuleType]:
    """Return the fake modules by the name that `import` uses."""
    names = (
        *("", ".pytorch", ".pytorch.quantization", ".pytorch.module", ".pytorch.module.grouped_linear"),
        *(".common", ".common.recipe"),
    )
    made = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    for thing in (GroupedLinear, Fp8Padding, Fp8Unpadding, autocast):
        setattr(made["transformer_engine.pytorch"], thing.__name__, thing)
    linears = made["transformer_engine.pytorch.module.grouped_linear"]
    linears.is_module_grouped_tensor_path_supported = is_module_grouped_tensor_path_supported  # type: ignore[attr-defined]
    made["transformer_engine.pytorch.quantization"].FP8GlobalStateManager = FP8GlobalStateManager  # type: ignore[attr-defined]
    for name in ("Float8CurrentScaling", "DelayedScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        setattr(made["transformer_engine.common.recipe"], name, lambda name=name: Recipe(name))
    return made
