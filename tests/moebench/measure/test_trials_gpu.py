"""On a GPU: faults that only a GPU shows are found, and right backends pass the covering cases."""

import pytest
import torch

from experts.registry import Backend
from moebench.measure import trials
from moebench.measure.cache import Workload
from moebench.measure.trials import Trier
from moebench.parity.checks import case_job
from moebench.parity.space.covering import covering
from moebench.parity.space.trial import Trial
from tests.backends import gpu_faults

pytestmark = pytest.mark.gpu


@pytest.fixture
def tried(monkeypatch):
    """Return a function that plays covering cases with a backend until one fails."""

    def play(build):
        backend = Backend("planted", build, lambda device, config: None)
        monkeypatch.setattr(trials, "get_backend", lambda name: backend)
        trier = Trier(case_job("planted", Trial()), Workload(torch.device("cuda", 0)))
        return trier.first_failure(covering()), trier

    return play


@pytest.mark.parametrize("fault", gpu_faults.FAULTS, ids=lambda one: one.__name__)
def test_a_fault_that_only_a_gpu_shows_is_found(tried, fault):
    failure, trier = tried(fault)
    assert failure is not None, trier.tried
    print(f"{fault.__name__}: case {trier.tried.num_ok + 1}: {failure.reason}: {failure.trial.text}")
