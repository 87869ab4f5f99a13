"""Each difference between two environments has a name, and exactly the facts that env_id hashes count."""

import pytest

from moebench.machine.comparability import CHANGES, Difference, differences, facts
from tests.moebench.gated import H200, changed

DIFFERENT = {
    "device": changed(device="cpu", gpus=(), num_threads=4),
    "gpu": changed(gpu={"name": "NVIDIA B200"}),
    "driver": changed(gpu={"driver_version": "590.1"}),
    "power": changed(gpu={"power_limit_w": 500.0}),
    "clocks": changed(gpu={"max_sm_clock_mhz": 1500}),
    "cpu": changed(cpu_model="another"),
    "python": changed(python="3.11.9"),
    "tiles": changed(tiles="0123456789ab"),
    "torch": changed(versions={"torch": "2.13.0"}),
    "deep_ep": changed(versions={"deep_ep": None}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_has_its_name(what):
    found = differences(H200, DIFFERENT[what])
    assert what in [difference.what for difference in found]
    if what != "device":
        assert len(found) == 1
    assert DIFFERENT[what].comparable() != H200.comparable()


@pytest.mark.parametrize(
    "same",
    [
        changed(num_threads=99),
        changed(python="3.12.9"),
        changed(git_revision="other"),
        changed(gpu={"sm_clock_mhz": 1}),
        changed(device="cuda"),
    ],
)
def test_what_does_not_count_is_no_difference(same):
    assert differences(H200, same) == ()
    assert same.comparable() == H200.comparable()


def test_threads_count_on_a_cpu():
    one = changed(device="cpu", gpus=())
    (difference,) = differences(one, changed(one, num_threads=99))
    assert difference == Difference("threads", "4", "99")


def test_every_fact_may_be_allowed_to_change():
    assert tuple(facts(H200)) == CHANGES
