"""Every setting of torch that a backend leaves changed is named, and none other."""

import contextlib

import pytest
import torch

from moebench.measure.state.torch_settings import SETTINGS, changed_settings, settings


class Switch:
    """Set something on entry and set it back on exit."""

    def __init__(self, set_to, changed, was):
        self._set_to, self._changed, self._was = set_to, changed, was

    def __enter__(self):
        self._set_to(self._changed)

    def __exit__(self, *error):
        self._set_to(self._was)


@contextlib.contextmanager
def hook_of_all_modules():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    yield
    handle.remove()


CHANGES = {
    "threads": Switch(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
    "default dtype": Switch(torch.set_default_dtype, torch.float64, torch.float32),
    "precision of float32 products": Switch(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic algorithms": Switch(torch.use_deterministic_algorithms, True, False),
    "denormal numbers or rounding": Switch(torch.set_flush_denormal, True, False),
    "mkldnn": Switch(lambda on: torch.backends.mkldnn.set_flags(on), False, True),
    "cudnn": Switch(lambda on: setattr(torch.backends.cudnn, "benchmark", on), True, False),
    "gradients": Switch(torch.set_grad_enabled, False, True),
    "autocast": torch.autocast("cpu", torch.bfloat16),
    "anomaly detection": Switch(torch.autograd.set_detect_anomaly, True, False),
    "hooks of all modules": hook_of_all_modules(),
    "hooks of saved tensors": torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_no_other(name):
    before = settings()
    with CHANGES[name]:
        assert changed_settings(before) == (name,)
    assert changed_settings(before) == ()


def test_this_torch_has_every_setting():
    assert settings().keys() == SETTINGS.keys()
    assert None not in settings().values()
