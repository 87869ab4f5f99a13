"""What a worker does with a job of `moebench parity`: play, find the nearest supported case, search, and shrink."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from experts import GroupedExperts, Unsupported, activations
from experts.registry import Backend
from moebench.measure import trials
from moebench.measure.cache import Workload
from moebench.measure.trials import Trier, examine
from moebench.parity.checks import Search, case_job, search_job
from moebench.parity.judge import Unfit
from moebench.parity.space.trial import Trial
from moebench.results.record import Status
from tests.moebench import faultbench

CPU = torch.device("cpu")
TRIAL = Trial(num_tokens=5, n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=4, expert_bias=True)
BIG = Trial(
    steps=("call", "tokens:other", "call", "backward", "backward"),
    num_tokens=17, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="bfloat16", seed=2,
)  # fmt: skip


def use(monkeypatch, build, unsupported=lambda device, config: None):
    backend = Backend("planted", build, unsupported)
    monkeypatch.setattr(trials, "get_backend", lambda name: backend)


def test_a_right_backend_is_ok():
    found = examine(case_job("loop", TRIAL), Workload(CPU))
    assert found["status"] is Status.ok
    assert 0 < found["parity_worst"] <= 1
    assert found["detail"] == "1 cases; 0 overflow, 0 are unsupported"


def test_a_wrong_backend_has_the_smallest_case_its_command_and_its_lines():
    told = []
    workload = Workload(CPU, tell=told.append)
    found = examine(case_job("faulty:DroppedToken", BIG), workload)
    assert found["status"] is Status.mismatch
    reason, command, *lines = found["detail"].splitlines()
    assert reason.startswith("output (token 0): error 1, budget ")
    assert command == "moebench parity faulty:DroppedToken --case 'steps=call seed=2'"
    assert "from faulty import DroppedToken as Layer" in lines[1]
    assert lines[-1].startswith("v = y0[0, 0].item(); assert ")
    assert told[0] == BIG.text


def test_an_error_of_the_backend_is_an_error_with_a_case():
    found = examine(case_job("faulty_rows:FailsWithoutTokens", Trial(num_tokens=0)), Workload(CPU))
    assert found["status"] is Status.error
    reason, command, *lines = found["detail"].splitlines()
    assert reason.startswith("IndexError: ")
    assert "--case 'steps=call" in command
    assert lines


def test_a_backend_that_cannot_be_built_is_an_error(monkeypatch):
    def fail(config):
        raise ZeroDivisionError("no layer")

    use(monkeypatch, fail)
    found = examine(case_job("planted", TRIAL), Workload(CPU))
    assert found["status"] is Status.error
    assert found["detail"].startswith("ZeroDivisionError: no layer")


def only_multiples_of_16(device, config):
    if config is not None and (config.dim % 16 or config.moe_inter_dim % 16):
        return "needs multiples of 16"
    return None


def test_a_trial_moves_to_the_nearest_dimensions_that_the_backend_takes(monkeypatch):
    use(monkeypatch, GroupedExperts, only_multiples_of_16)
    moved = Trier(case_job("planted", TRIAL), Workload(CPU)).supported(TRIAL)
    assert (moved.dim, moved.moe_inter_dim, moved.num_tokens, moved.dtype) == (16, 16, 5, "float32")


def test_a_trial_moves_to_a_dtype_that_the_backend_takes(monkeypatch):
    def only_16_bits(device, config):
        return None if config is None or config.dtype.itemsize == 2 else "needs 16 bits"

    use(monkeypatch, GroupedExperts, only_16_bits)
    trier = Trier(case_job("planted", TRIAL), Workload(CPU))
    assert trier.supported(TRIAL).dtype == "bfloat16"
    mixed = Trial(dtype="float16", param_dtype="float32")
    assert trier.supported(mixed) == Trial(dtype="float16")


def test_a_trial_that_nothing_near_makes_possible_is_unsupported(monkeypatch):
    use(monkeypatch, GroupedExperts, lambda device, config: "needs another GPU")
    with pytest.raises(Unsupported, match="needs another GPU"):
        examine(case_job("planted", TRIAL), Workload(CPU))


def test_a_search_counts_its_cases_until_its_time_is_over(monkeypatch):
    """Each look at the clock takes a second here."""
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    found = examine(search_job("loop", Search(3.5, 0, "dimensions", ("float32",))), Workload(CPU))
    assert (found["status"], found["detail"]) == (Status.ok, "3 cases; 0 overflow, 0 are unsupported")


def test_a_search_finds_a_fault():
    found = examine(search_job("faulty:DroppedToken", Search(20.0, 0, "few-tokens", ("float32",))), Workload(CPU))
    assert found["status"] is Status.mismatch


def test_a_case_that_overflows_is_unfit_and_nobody_is_accused(monkeypatch):
    def overflow(play):
        raise Unfit("float16 cannot hold this case")

    monkeypatch.setattr(trials.Play, "run", overflow)
    trier = Trier(case_job("loop", TRIAL), Workload(CPU))
    assert trier.play(TRIAL) is None
    assert (trier.tried.num_ok, trier.tried.num_unfit) == (0, 1)


def test_the_lines_of_a_counterexample_run():
    found = examine(case_job("faulty:DroppedToken", BIG), Workload(CPU))
    done = faultbench.run_lines(found["detail"].splitlines()[2:])
    assert (done.returncode, done.stderr.splitlines()[-1].partition(":")[0]) == (1, "AssertionError")


@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
def test_a_wrong_activation_of_all_built_in_engines_is_found(backend, monkeypatch):
    """The oracle shares no code with `experts`, so a fault that all engines share is a fault of each of them."""
    case = Trial.parse("num_tokens=2 dim=16 moe_inter_dim=16")

    def status():
        return examine(case_job(backend, case), Workload(CPU))["status"]

    assert status() is Status.ok
    gelu = activations.geglu_deepep
    monkeypatch.setattr(activations, "swiglu_deepep", lambda x, probs, limit=0.0: 1.1 * gelu(x, probs))
    assert status() is Status.mismatch
