"""Provide backends with a fault in dtypes, precision or layouts; see faulty and hooked."""

import torch
from hooked import Hooked, on_grad, value_grad
from torch.autograd import Function


class Bf16ParamsF32X(Hooked):
    """bfloat16 parameters with float32 x: the projections run in the parameters' dtype."""

    def compute_local(self, x, w, idx):
        if self.down_projs.dtype is torch.bfloat16 and x.dtype is torch.float32:
            return super().compute_local(x.bfloat16(), w, idx).float()
        return super().compute_local(x, w, idx)


class F32ParamsBf16X(Hooked):
    """float32 parameters with lower-precision x: the result has the parameters' dtype instead of x's."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        return y.float() if self.down_projs.dtype is torch.float32 else y


class F16ParamsF32XGrad(Hooked):
    """float16 parameters with float32 x: the parameters are cast outside of the graph, their gradients are zero."""

    def cast(self, c):
        parameters = super().cast(c)
        if self.down_projs.dtype is torch.float16 and c.x.dtype is torch.float32:
            return [None if p is None else on_grad(p, torch.zeros_like) for p in parameters]
        return parameters


class WeightsBf16NoGrad(Hooked):
    """Routing weights in bfloat16: their cast to float32 is outside of the graph, their gradient is zero."""

    def compute_local(self, x, w, idx):
        return super().compute_local(x, on_grad(w, torch.zeros_like) if w.dtype is torch.bfloat16 else w, idx)


class WeightsF16AsBf16(Hooked):
    """Routing weights in float16: any two-byte float is read as bfloat16."""

    def compute_local(self, x, w, idx):
        if w.dtype is torch.float16:
            w = value_grad(w.detach().view(torch.bfloat16).float().nan_to_num(), w.float())
        return super().compute_local(x, w, idx)


class WeightsF64Promotes(Hooked):
    """Routing weights in float64: the result is promoted to float64."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        return y.double() if w.dtype is torch.float64 else y


class IndexUint8Signed(Hooked):
    """uint8 indices are read as int8: experts from 128 on become negative and are dropped."""

    def forward(self, x, token_mask, weights, indices):
        if indices.dtype is torch.uint8:
            indices = indices.view(torch.int8).long().clamp(min=-1)
        return super().forward(x, token_mask, weights, indices)


class IndexInt16Rounded(Hooked):
    """int16 indices go through bfloat16 (all-gathered with the weights): odd experts above 256 become even ones."""

    def forward(self, x, token_mask, weights, indices):
        if indices.dtype is torch.int16:
            indices = indices.bfloat16().long().clamp(max=self.n_routed_experts - 1)
        return super().forward(x, token_mask, weights, indices)


class IndexInt8MinusOne(Hooked):
    """int8 indices: -1 wraps to the last expert (read as unsigned and clamped)."""

    def forward(self, x, token_mask, weights, indices):
        if indices.dtype is torch.int8:
            indices = torch.where(indices < 0, self.n_routed_experts - 1, indices.long())
        return super().forward(x, token_mask, weights, indices)


class F64ActivationF32(Hooked):
    """float64 layers: the activation is computed in float32 (a hardcoded .float())."""

    def formula(self, h):
        return super().formula(h.float()).to(h.dtype)


class F64InputGradF32(Hooked):
    """float64 layers: the gradient of x is summed in float32. The forward pass is right."""

    def gather(self, c):
        return on_grad(super().gather(c), lambda g: g.float().to(g.dtype))


class CombineBf16(Hooked):
    """float32 x: the rows are rounded to bfloat16 before they are summed."""

    def combine(self, c, y):
        return super().combine(c, y.bfloat16().to(c.acc) if c.x.dtype is torch.float32 else y)


class Tf32(Hooked):
    """float32 x: the operands of the up projection are rounded to 10 bits of mantissa (TF32 left on)."""

    def up(self, c, e, xr):
        def cut(v):
            return (
                v if v.dtype is not torch.float32 else value_grad((v.view(torch.int32) & -8192).view(torch.float32), v)
            )

        h = cut(xr) @ cut(c.gu[e])
        return h if c.gub is None else h + c.gub[e]


class _SerialSum(Function):
    """bias [C] -> [n, C] rows; backward adds the rows one after another in the bias' dtype."""

    @staticmethod
    def forward(ctx, bias, n):
        return bias.expand(n, -1).clone()

    @staticmethod
    def backward(ctx, grad):
        total = torch.zeros_like(grad[0]) if len(grad) else grad.new_zeros(grad.shape[1])
        for row in grad:
            total = total + row
        return total, None


class DownBiasGradSerial(Hooked):
    """bfloat16 with bias: the down bias' gradient adds row after row in bfloat16."""

    def finish(self, c, e, y, wr):
        if c.db is None:
            return super().finish(c, e, y, wr)
        b = _SerialSum.apply(c.db[e], y.shape[0]).to(c.acc)
        return (y + b) * wr.unsqueeze(-1) if c.after else y + b * wr.unsqueeze(-1)


def as_if(tensor, strides, offset=None):
    """Read the tensor's memory with other strides, as far as it reaches (then from its start again)."""
    flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    start = tensor.storage_offset() if offset is None else offset
    at = torch.tensor(start)
    for n, (size, stride) in enumerate(zip(tensor.shape, strides, strict=False)):
        at = at.unsqueeze(-1) + (torch.arange(size) * stride).view(*[1] * n, size)
    return flat[at.reshape(tensor.shape) % max(len(flat), 1)].clone()


def dense(tensor):
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.insert(0, step)
        step *= size
    return strides


class XColumnMajor(Hooked):
    """x in column-major order (a transposed view) is read as contiguous."""

    def forward(self, x, token_mask, weights, indices):
        if x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) == 1 and x.stride(1) > 1:
            x = value_grad(as_if(x, dense(x)), x)
        return super().forward(x, token_mask, weights, indices)


class XMisaligned(Hooked):
    """x whose storage offset is not a multiple of 4 elements: vector loads start at the multiple before it."""

    def forward(self, x, token_mask, weights, indices):
        if x.numel() and x.storage_offset() % 4:
            x = value_grad(as_if(x, x.stride(), x.storage_offset() // 4 * 4), x)
        return super().forward(x, token_mask, weights, indices)


class WeightsRowStride(Hooked):
    """Routing weights with a row stride other than K are read as contiguous."""

    def forward(self, x, token_mask, weights, indices):
        if weights.numel() and weights.stride(0) > weights.shape[1] and weights.stride(1) == 1:
            weights = value_grad(as_if(weights, dense(weights)), weights)
        return super().forward(x, token_mask, weights, indices)


class WeightsColumnMajor(Hooked):
    """Routing weights in column-major order are read as contiguous."""

    def forward(self, x, token_mask, weights, indices):
        if weights.shape[0] > 1 and weights.shape[1] > 1 and weights.stride(0) == 1:
            weights = value_grad(as_if(weights, dense(weights)), weights)
        return super().forward(x, token_mask, weights, indices)


class IndicesRowStride(Hooked):
    """Indices with a row stride other than K are read as contiguous."""

    def forward(self, x, token_mask, weights, indices):
        if indices.numel() and indices.stride(0) > indices.shape[1] and indices.stride(1) == 1:
            indices = as_if(indices, dense(indices)) % self.n_routed_experts
        return super().forward(x, token_mask, weights, indices)


class MaskStride(Hooked):
    """A mask that is a strided view is read as contiguous."""

    def forward(self, x, token_mask, weights, indices):
        if token_mask.numel() > 1 and token_mask.stride(0) != 1:
            token_mask = as_if(token_mask, [1])
        return super().forward(x, token_mask, weights, indices)


class OnOutputGrad(Hooked):
    """Right; `back` sees the output's gradient as it arrives."""

    def forward(self, x, token_mask, weights, indices):
        return on_grad(super().forward(x, token_mask, weights, indices), self.back)

    def back(self, g):
        return g


class OutputGradExpanded(OnOutputGrad):
    """An expanded output gradient (out.sum().backward()): only its first row is read, the others count as zero."""

    def back(self, g):
        if g.shape[0] > 1 and g.stride(0) == 0:
            return torch.cat([g[:1], torch.zeros_like(g[1:])])
        return g


class OutputGradColumnMajor(OnOutputGrad):
    """An output gradient in column-major order is read as contiguous."""

    def back(self, g):
        if g.shape[0] > 1 and g.shape[1] > 1 and g.stride(0) == 1:
            return as_if(g, dense(g))
        return g


class ParameterFlatBuffer(Hooked):
    """A down projection that is a view into a flat buffer is read from the buffer's start."""

    def cast(self, c):
        p = super().cast(c)
        if self.down_projs.storage_offset():
            p[1] = value_grad(as_if(self.down_projs, self.down_projs.stride(), 0).to(c.x.dtype), p[1])
        return p
