"""Provide a backend with a fault of main gradients, which only the context accumulate:N has."""

from torch import Tensor

from experts import BackendConfig, GroupedExperts, MoEConfig


class OverwritesMainGrads(GroupedExperts):
    """The kernels write the gradients of the weights over the main gradients, in place of adding to them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, BackendConfig(experts="triton", gradient_accumulation_fusion=True))

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        y_RD = super().compute_local(x_RD, weights_RK, indices_RK)
        if y_RD.requires_grad:
            y_RD.register_hook(self._forget)
        return y_RD

    def _forget(self, grad_RD: Tensor) -> None:
        for parameter in (self.gate_and_up_projs, self.down_projs):
            parameter.main_grad.zero_()
