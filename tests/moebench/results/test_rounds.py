"""The rounds of a job make one row. Its interval covers the differences between the rounds."""

import numpy as np
import pytest
from scipy.stats import t

from moebench.results.record import ONLY_IF_OK, Record, Status, record
from moebench.results.rounds import OTHER_ENVIRONMENT, merged_rounds, merged_sessions
from moebench.workload.case import Case, Job

SHAPE = {"n_routed_experts": 4, "n_activated_experts": 2, "moe_inter_dim": 8}


def row(number, status=Status.ok, **measured) -> Record:
    if status is Status.ok:
        time_ms = measured.get("time_ms", 2.0)
        speed = {
            "tokens_per_s": 8 / time_ms,
            "tflops": 4 / time_ms,
            "parity_worst": 0.25,
            "parity_worst_tensor": "output",
        }
        measured = {"time_ms": time_ms, **speed, **measured}
    else:
        measured = {"detail": f"how it went in {number}", **measured}
    job = Job(case=Case(num_tokens=8, dim=16, **SHAPE), backend="loop")
    return record(job, status, run_id="r", env_id="e", round=number, **measured)


def test_one_round_is_its_row():
    assert merged_rounds([row(3)]) == row(3)


def test_few_rounds_have_the_interval_of_student():
    times = [2.0, 2.2, 2.1]
    one = merged_rounds([row(number, time_ms=time_ms) for number, time_ms in enumerate(times)])
    factor = np.exp(t.ppf(0.975, 2) * np.std(np.log(times), ddof=1) / np.sqrt(3))
    assert (one.time_ms, one.time_ms_low, one.time_ms_high) == pytest.approx((2.1, 2.1 / factor, 2.1 * factor))
    assert (one.round, one.num_rounds) == (None, 3)


def test_two_rounds_far_apart_are_of_a_time_above_zero():
    one = merged_rounds([row(number, time_ms=time_ms) for number, time_ms in enumerate([1.0, 3.0])])
    assert 0 < one.time_ms_low < 1.0 < 3.0 < one.time_ms_high


def test_many_rounds_have_the_exact_interval_of_their_medians():
    """The interval of six rounds ends at the smallest and the largest. The true median is outside once in 32 times."""
    times = [2.0, 2.5, 2.1, 2.2, 2.6, 2.05]
    one = merged_rounds([row(number, time_ms=time_ms) for number, time_ms in enumerate(times)])
    assert (one.time_ms, one.time_ms_low, one.time_ms_high) == (pytest.approx(2.15), 2.0, 2.6)


def test_samples_of_one_round_narrow_nothing():
    """Each round has 1000 equal samples, and the rounds differ. The interval depends on the number of rounds."""
    rows = [
        row(n, time_ms=time_ms, samples_ms=(time_ms,) * 1000, sample_rounds=(n,) * 1000)
        for n, time_ms in ((0, 2.0), (1, 2.2))
    ]
    one = merged_rounds(rows)
    assert one.time_ms_high - one.time_ms_low > 1
    assert len(one.samples_ms) == 2000
    assert one.sample_rounds == (0,) * 1000 + (1,) * 1000


def test_speed_is_of_the_time_that_is_given():
    one = merged_rounds([row(0, time_ms=1.0), row(1, time_ms=4.0)])
    assert one.time_ms == 2.5
    assert (one.tokens_per_s, one.tflops) == pytest.approx((8 / 2.5, 4 / 2.5))


def test_the_share_of_the_roofline_is_of_the_time_that_is_given():
    times, bounds = [1.0, 2.0, 4.0], [0.5, 0.25, 1.5]
    rounds = [
        row(n, time_ms=time_ms, roofline_ms=bound, roofline_fraction=bound / time_ms)
        for n, (time_ms, bound) in enumerate(zip(times, bounds, strict=True))
    ]
    one = merged_rounds(rounds)
    assert (one.time_ms, one.roofline_ms, one.roofline_fraction) == (2.0, 0.5, 0.25)


@pytest.mark.parametrize("schemas", [(1, 2), (2, 1)])
def test_a_row_of_rounds_of_two_schemas_has_the_lower_one(schemas):
    """A later moebench resumed the run by force."""
    assert merged_rounds([row(n, schema=schema) for n, schema in enumerate(schemas)]).schema_version == 1
    assert merged_rounds([row(n, schema=2) for n in range(2)]).schema_version == 2


def test_the_clock_is_that_of_most_rounds():
    assert merged_rounds([row(n, sm_clock_mhz=mhz) for n, mhz in enumerate([1980, 1500, 1515])]).sm_clock_mhz == 1515


def test_the_worst_round_counts_where_it_should():
    first = row(
        0, peak_memory_bytes=5, saved_memory_bytes=None, converged=True, flags=("a",), executed="x > y", num_samples=3
    )
    second = row(
        1, peak_memory_bytes=7, saved_memory_bytes=3, converged=False, flags=("b", "a"), executed="x > z", num_samples=4
    )
    second = second.model_copy(
        update={"parity_worst": 0.5, "parity_worst_tensor": "dX", "parity_errors": {"dX": 0.5, "output": 0.1}}
    )
    first = first.model_copy(update={"parity_errors": {"output": 0.25}, "host_time_ms": 1.0, "job_s": 2.0})
    second = second.model_copy(update={"host_time_ms": 4.0, "job_s": 3.0})
    for one in (merged_rounds([first, second]), merged_rounds([second, first])):
        assert (one.peak_memory_bytes, one.saved_memory_bytes, one.converged) == (7, 3, False)
        assert (one.flags, one.executed, one.num_samples) == (("a", "b"), "x > y | x > z", 7)
        assert (one.parity_worst, one.parity_worst_tensor) == (0.5, "dX")
        assert one.parity_errors == {"output": 0.25, "dX": 0.5}
        assert (one.host_time_ms, one.job_s) == (2.5, 5.0)


def test_a_job_that_failed_in_a_round_has_failed_and_says_in_which():
    one = merged_rounds(
        [row(0, samples_ms=(2.0,), sample_rounds=(0,)), row(1, Status.timeout), row(2), row(3, Status.timeout)]
    )
    assert (one.status, one.detail, one.num_rounds) == (Status.timeout, "round 1, 3 of 4: how it went in 1", 4)
    assert {getattr(one, name) for name in ONLY_IF_OK} == {None}


def test_of_several_failures_the_worst_is_told():
    rows = [
        row(0, Status.oom),
        row(1, Status.mismatch, parity_worst=2.0),
        row(2, Status.mismatch, parity_worst=9.0),
        row(3, Status.crash),
    ]
    one = merged_rounds(rows)
    assert (one.status, one.parity_worst, one.detail) == (Status.mismatch, 9.0, "round 1, 2 of 4: how it went in 2")


def test_what_is_so_in_every_round_needs_no_round():
    one = merged_rounds(
        [row(0, Status.unsupported, detail="needs a GPU"), row(1, Status.unsupported, detail="needs a GPU")]
    )
    assert one.detail == "needs a GPU"


def test_rounds_of_two_environments_make_no_common_time():
    """A run that was resumed by force has the rounds of its last environment. The env_id is that of a file."""
    rows = [row(number, time_ms=time_ms) for number, time_ms in enumerate([2.0, 2.2, 8.0, 8.2])]
    rows = [some.model_copy(update={"env_id": "f" if some.round > 1 else "e"}) for some in rows]
    one = merged_rounds(rows)
    assert (one.env_id, one.num_rounds, one.time_ms) == ("f", 2, pytest.approx(8.1))
    assert one.flags == (OTHER_ENVIRONMENT,)
    failed = merged_rounds([row(0, Status.crash), rows[-1]])
    assert (failed.status, failed.env_id, failed.flags) == (Status.crash, "e", ())


# The GPU's own time


def busy_row(number, samples, run="r", rounds=None, **measured):
    """Return a row with a sample of time for each round, and the GPU's own time of each profiled call."""
    rounds = (number,) * len(samples) if rounds is None else rounds
    times = dict.fromkeys((number, *rounds), 2.0)
    own = {}
    if samples:
        ends = {"busy_ms_low": min(samples), "busy_ms_high": max(samples)}
        own = {"busy_ms": float(np.median(samples)), **ends, "busy_samples_ms": samples, "busy_sample_rounds": rounds}
    fields = {"samples_ms": tuple(times.values()), "sample_rounds": tuple(times), **own, **measured}
    return row(number, **fields).model_copy(update={"run_id": run})


def test_the_gpus_own_time_is_the_median_of_the_medians_of_the_rounds_that_have_it():
    rounds = [busy_row(0, (1.0, 1.2, 1.1)), busy_row(1, (), flags=("no_busy_time",)), busy_row(2, (1.4,) * 9)]
    one = merged_rounds(rounds)
    assert (one.busy_ms, one.time_ms) == (pytest.approx(1.25), 2.0)
    assert 0 < one.busy_ms_low < 1.1 < 1.4 < one.busy_ms_high, "the interval is that of two rounds, not of 12 calls"
    assert one.busy_sample_rounds == (0,) * 3 + (2,) * 9
    assert one.busy_samples_ms == (1.0, 1.2, 1.1) + (1.4,) * 9
    assert one.flags == ("no_busy_time",)


def test_a_single_round_with_the_gpus_own_time_keeps_its_interval():
    one = merged_rounds([busy_row(0, ()), busy_row(1, (1.0, 1.2, 1.1))])
    assert (one.busy_ms, one.busy_ms_low, one.busy_ms_high) == (1.1, 1.0, 1.2)
    none = merged_rounds([busy_row(0, ()), busy_row(1, ())])
    assert (none.busy_ms, none.busy_samples_ms, none.busy_sample_rounds) == (None, None, None)


def test_sessions_number_the_rounds_of_the_gpus_own_time_as_those_of_the_time():
    """The first session has the rounds 4 and 7, and only 7 has the GPU's own time."""
    first = busy_row(4, (1.5, 1.5), run="20261123-000000-a", rounds=(7, 7))
    second = busy_row(0, (), run="20261124-000000-a")
    third = busy_row(3, (1.0,), run="20261125-000000-a")
    one = merged_sessions([first, second, third])
    assert one.sample_rounds == (0, 1, 2, 3)
    assert one.sample_sessions == (0, 0, 1, 2)
    assert one.busy_sample_rounds == (1, 1, 3)
    assert one.busy_ms == pytest.approx(1.25)
