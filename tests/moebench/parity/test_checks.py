"""The checks as data: each has cases, each job has its own key, and the required categories exist."""

from moebench.measure.probes import PROBES
from moebench.parity.checks import CHECKS, suite_jobs
from moebench.workload.case import ACTIVATIONS, DTYPES


def cases_of(name):
    return [job.case for job in suite_jobs(["loop"], [name], ["float32"])]


def test_every_check_has_cases_and_a_probe_and_says_what_it_looks_for():
    for name, check in CHECKS.items():
        assert suite_jobs(["loop"], [name]), name
        assert check.probe in PROBES
        assert check.name == name
        assert check.looks_for
    assert {check.probe for check in CHECKS.values()} == PROBES.keys()


def test_no_two_jobs_are_the_same():
    jobs = suite_jobs(["loop", "torch_mm"])
    assert len({job.key for job in jobs}) == len(jobs)


def test_jobs_are_those_of_the_checks_dtypes_backends_and_seed_asked_for():
    jobs = suite_jobs(["loop", "gmm"], ["layouts", "one-hot"], ["bfloat16"], seed=7)
    assert {(job.backend, job.check, job.case.dtype, job.case.seed) for job in jobs} == {
        (backend, check, "bfloat16", 7) for backend in ("loop", "gmm") for check in ("layouts", "one-hot")
    }
    assert {job.case.dtype for job in suite_jobs(["loop"], ["layouts"])} == set(DTYPES)
    assert not suite_jobs(["loop"], ["large-offsets"], ["float32"])


def test_every_activation_is_there_with_and_without_bias():
    found = {(case.expert_activation, case.expert_bias) for case in cases_of("activations")}
    assert found == {(name, bias) for name in ACTIVATIONS for bias in (True, False)}
    assert any(case.swiglu_limit for case in cases_of("activations"))


def test_weights_that_a_transpose_fits_are_there():
    cases = cases_of("equal-dimensions")
    assert any(case.dim == case.moe_inter_dim for case in cases)
    assert any(case.dim == case.moe_inter_dim * (2 if case.is_gated else 1) for case in cases)


def test_sizes_at_which_faults_begin_are_there():
    assert all(case.n_routed_experts > 10 for name in ("many-experts", "state-dict") for case in cases_of(name))
    (many,) = cases_of("many-tokens")
    assert many.num_tokens > 10_000
    assert {case.num_tokens for case in cases_of("few-tokens")} == {0, 1}
    (large,) = (job.case for job in suite_jobs(["loop"], ["large-offsets"]))
    assert large.num_tokens * large.n_activated_experts * large.dim > 2**31
    assert large.num_tokens * large.dim < 2**31 / 4  # the reference keeps these tensors in float64


def test_expert_parallelism_has_every_load_and_dispatcher():
    jobs = suite_jobs(["loop"], ["expert-parallel"], ["float32"])
    assert {(job.dispatcher, job.case.rank_load) for job in jobs} == {
        (dispatcher, load)
        for dispatcher in ("allgather", "alltoall", "deepep")
        for load in ("even", "uneven", "one-empty")
    }
