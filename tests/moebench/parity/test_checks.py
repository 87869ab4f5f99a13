"""Checks are parts of the space, and their jobs say what a worker tries."""

import pytest

from moebench.parity.checks import CHECKS, Search, axes_of, case_job, covering_jobs, search_job
from moebench.parity.space.covering import covering
from moebench.parity.space.rules import fitting
from moebench.parity.space.trial import AXES, RANK_AXES, Trial
from moebench.workload.backends import DISPATCHERS

QUICK = ("dimensions", "few-tokens", "repeated")


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_names_axes_and_values_that_there_are(name):
    check = CHECKS[name]
    assert check.name == name
    assert check.looks_for[0].islower()
    for axis, values in check.axes.items():
        assert values, axis
        known = AXES[axis]
        assert all(value in known or axis == "steps" for value in values), axis
    row = {}
    for axis, values in axes_of(name, ("float32",)).items():
        row[axis] = (fitting(row, axis, values) or [None])[0]
    assert None not in row.values(), row


@pytest.mark.parametrize("name", QUICK)
def test_the_covering_cases_of_a_check_lie_in_its_axes(name):
    cases = covering(axes_of(name, ("float32", "bfloat16")))
    assert {one.dtype for one in cases} == {"float32", "bfloat16"}
    for axis, values in CHECKS[name].axes.items():
        assert {getattr(one, axis) for one in cases} <= set(values), axis


def test_a_job_has_the_trial_and_its_case():
    trial = Trial(num_tokens=3, dtype="bfloat16", seed=5)
    job = case_job("loop", trial)
    assert (job.backend, job.dispatcher, job.case) == ("loop", "local", trial.case)
    assert Trial.parse(job.check) == trial


def test_the_covering_jobs_are_the_covering_cases():
    jobs = covering_jobs("loop", "repeated", ("float32",), seed=2)
    assert [Trial.parse(job.check) for job in jobs] == covering(axes_of("repeated", ("float32",)), 2)
    assert {job.dispatcher for job in jobs} == {"local"}
    assert len({job.key for job in jobs}) == len(jobs)


def test_on_ranks_every_dispatcher_is_tried():
    assert axes_of(None, ("float32",), on_ranks=True) == dict(RANK_AXES) | {"dtype": ("float32",)}
    job = search_job("loop", Search(1.0, 0, None, ("float32",), on_ranks=True), DISPATCHERS[0])
    assert (job.case.ep_size, job.dispatcher) == (2, DISPATCHERS[0])


@pytest.mark.parametrize("check", [None, "dimensions"])
@pytest.mark.parametrize("on_ranks", [False, True])
def test_a_search_is_what_its_job_says(check, on_ranks):
    search = Search(12.5, 3, check, ("float32", "float64"), on_ranks)
    assert Search.parse(search.text) == search
    assert search.axes == axes_of(check, ("float32", "float64"), on_ranks)
