"""Provide backends with a fault in kept weights, shared buffers, inputs or the state dict; see faulty and hooked."""

from typing import ClassVar

import torch
from hooked import NAMES, Hooked, value_grad


class Cached(Hooked):
    """Right; `key` says when the packed copy of the down projection is renewed."""

    packed = None

    def key(self):
        raise NotImplementedError

    def active(self, c):
        return True

    def cast(self, c):
        p = super().cast(c)
        if not self.active(c):
            return p
        key = (self.key(), c.x.dtype)
        if self.packed is None or self.packed[0] != key:
            self.packed = key, p[1].detach().clone()
        p[1] = value_grad(self.packed[1], p[1]) if p[1].requires_grad else self.packed[1]
        return p


class CacheByVersion(Cached):
    """The packed weights are renewed by the parameter's version: a change through .data is not seen."""

    def key(self):
        return id(self.down_projs), self.down_projs._version


class CacheByPointer(Cached):
    """The packed weights are renewed if the parameter's address changes, so that a step in place is not seen."""

    def key(self):
        return self.down_projs.data_ptr()


class CacheEval(Cached):
    """In eval mode the packed weights are made once; training and evaluating again uses the old ones."""

    def key(self):
        return 0

    def active(self, c):
        return not self.training


class CacheNoGrad(Cached):
    """Without gradients the packed weights are made once and kept."""

    def key(self):
        return 0

    def active(self, c):
        return not torch.is_grad_enabled()


class CacheCast(Cached):
    """With x of another dtype than the parameters, the cast copy is made once and never renewed."""

    def key(self):
        return 0

    def active(self, c):
        return c.x.dtype is not self.down_projs.dtype


class CacheAssign(Hooked):
    """The layer keeps its own reference to the first parameter object: load_state_dict(assign=True) is not seen."""

    def cast(self, c):
        p = super().cast(c)
        first = self.__dict__.setdefault("first", [self.down_projs])[0]
        if first is not self.down_projs and first.shape == p[1].shape:
            p[1] = value_grad(first.detach().to(c.x.dtype), p[1])
        return p


class CacheReplaced(Hooked):
    """A replaced bias (layer.down_proj_bias = nn.Parameter(...)) is not seen: the old object is used for its value."""

    def cast(self, c):
        p = super().cast(c)
        if p[3] is None:
            return p
        first = self.__dict__.setdefault("first", [self.down_proj_bias])[0]
        if first is not self.down_proj_bias and first.shape == p[3].shape:
            p[3] = value_grad(first.detach().to(c.x.dtype), p[3])
        return p


class CacheDtypeMove(Hooked):
    """After layer.to(another dtype), the packed weights of the old precision are used, cast up."""

    def cast(self, c):
        p = super().cast(c)
        kept = self.__dict__.setdefault("kept", {})
        old = kept.get("dtype")
        if old is not None and old is not self.down_projs.dtype:
            p[1] = value_grad(kept["p"].to(p[1].dtype), p[1])
        else:
            kept.update(dtype=self.down_projs.dtype, p=self.down_projs.detach().clone())
        return p


class CacheDeepcopy(Hooked):
    """The packed weights are kept under an id that deepcopy copies, so that the copy uses the original's."""

    def __init__(self, config):
        super().__init__(config)
        self.uid = object.__hash__(self)

    def __deepcopy__(self, memo):
        new = type(self)(self.config)
        new.load_state_dict(self.state_dict())
        new.train(self.training)
        for name, p in self.named_parameters():
            getattr(new, name).requires_grad_(p.requires_grad)
        new.uid = self.uid
        new.__dict__["original"] = self  # not a submodule
        return new

    def cast(self, c):
        p = super().cast(c)
        original = self.__dict__.get("original")
        if original is None:
            return p
        return [p[0], value_grad(original.down_projs.detach().to(p[1].dtype), p[1]), *p[2:]]


class GlobalLimit(Hooked):
    """The activation's limit is in a global that the last built layer sets: an earlier layer uses the wrong one."""

    limit: ClassVar[list[float]] = [7.0]

    def __init__(self, config):
        super().__init__(config)
        self.limit[0] = config.activation_limit

    def glu(self, g, u):
        if self.config.expert_activation in ("swiglu", "geglu"):
            return super().glu(g, u)
        g, u = g.clamp(max=self.limit[0]), u.clamp(-self.limit[0], self.limit[0])
        return g * torch.sigmoid(self.config.activation_alpha * g) * (u + 1)


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, out):
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class OutputReused(Hooked):
    """The output is a buffer of the layer: the next call of the same shape writes over it."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        buffers = self.__dict__.setdefault("buffers", {})
        key = (y.shape, y.dtype)
        if key not in buffers:
            buffers[key] = torch.empty_like(y)
        buffers[key].data.copy_(y.detach())
        out = buffers[key]
        return _Into.apply(y, out)


class OutputReusedNoGrad(Hooked):
    """Without gradients, the output is a buffer that the next call of the same shape writes over."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        if torch.is_grad_enabled():
            return y
        buffers = self.__dict__.setdefault("buffers", {})
        out = buffers.setdefault((y.shape, y.dtype), y.clone())
        return out.copy_(y)


class ChangesX(Hooked):
    """Masked rows of the caller's x are set to zero in place."""

    def forward(self, x, token_mask, weights, indices):
        y = super().forward(x, token_mask, weights, indices)
        x.data.masked_fill_(~token_mask.unsqueeze(-1), 0)
        return y


class ChangesIndices(Hooked):
    """Masked tokens' indices are set to -1 in the caller's tensor (int64 only)."""

    def forward(self, x, token_mask, weights, indices):
        if indices.dtype is torch.int64:
            indices.masked_fill_(~token_mask.unsqueeze(-1), -1)
        return super().forward(x, token_mask, weights, indices)


class ChangesWeights(Hooked):
    """The routing weights of -1 choices are set to zero in the caller's tensor."""

    def forward(self, x, token_mask, weights, indices):
        weights.data.masked_fill_(indices.long() < 0, 0)
        return super().forward(x, token_mask, weights, indices)


class Loads(Hooked):
    """Right; `change` sees each tensor that is loaded."""

    def change(self, name, tensor):
        return tensor

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in NAMES:
            if prefix + name in state_dict:
                state_dict[prefix + name] = self.change(name, state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LoadsNoPrefix(Hooked):
    """Inside another module (with a prefix) the parameters are not found and silently not loaded."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if not prefix:
            return super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
        return None


class LoadsMissing(Hooked):
    """strict=True does not report a missing parameter."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, [], unexpected, errors)


class LoadsUnexpected(Hooked):
    """strict=True does not report an unknown key."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, False, missing, unexpected, errors)


class LoadsBf16Bits(Loads):
    """A bfloat16 state dict in a float32 layer: its values are taken for float16 bits."""

    def change(self, name, tensor):
        if tensor.dtype is torch.bfloat16 and getattr(self, name).dtype is torch.float32:
            return tensor.view(torch.float16).nan_to_num()
        return tensor


class SavesBuffer(Hooked):
    """The state dict holds a workspace buffer besides the parameters; other layers refuse it."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("workspace", torch.zeros(1))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.setdefault(prefix + "workspace", self.workspace)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SavesNoPrefix(Hooked):
    """Inside another module the keys of the state dict lack the prefix."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, "", keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in NAMES:
            if prefix and name in state_dict:
                state_dict[prefix + name] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LoadAliases(Hooked):
    """load_state_dict keeps the given tensors as the parameters' memory: later updates change the caller's tensors."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in NAMES:
            tensor, p = state_dict.get(prefix + name), getattr(self, name)
            if tensor is not None and p is not None and tensor.dtype == p.dtype and tensor.shape == p.shape:
                p.data = tensor.data
