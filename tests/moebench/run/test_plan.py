"""The order of a round is random, and the run and the round reproduce it."""

import itertools

from moebench.run.plan import shuffled
from moebench.workload.case import Case, Job

SHAPE = {"n_routed_experts": 4, "n_activated_experts": 2, "moe_inter_dim": 8}


def jobs():
    """Return jobs with two EP sizes, three widths, four token counts and five backends."""
    return [
        Job(case=Case(num_tokens=tokens, dim=dim, ep_size=ep_size, **SHAPE), backend=backend)
        for dim, tokens, ep_size, backend in itertools.product((16, 32, 48), (1, 2, 3, 4), (1, 2), "abcde")
    ]


def changes(values):
    return sum(before != after for before, after in itertools.pairwise(values))


def test_a_round_has_every_job_once_in_an_order_that_run_and_round_decide():
    order = shuffled(jobs(), "a-run", 0)
    assert sorted(job.key for job in order) == sorted(job.key for job in jobs())
    assert order == shuffled(reversed(jobs()), "a-run", 0)
    others = [shuffled(jobs(), "a-run", 1), shuffled(jobs(), "b-run", 0)]
    assert order not in others
    assert others[0] != others[1]


def test_what_is_shared_stays_together():
    """The order starts each group of ranks once, and makes each set of weights and inputs once."""
    order = shuffled(jobs(), "a-run", 0)
    assert [job.case.ep_size for job in order] == [1] * 60 + [2] * 60
    assert changes([(job.case.ep_size, job.case.dim) for job in order]) == 5
    assert changes([job.case for job in order]) == 23


def test_every_level_is_shuffled():
    orders = [shuffled(jobs(), "a-run", number)[:60] for number in range(8)]
    assert len({tuple(job.backend for job in order[:5]) for order in orders}) > 4
    assert len({tuple(dict.fromkeys(job.case.num_tokens for job in order[:20])) for order in orders}) > 4
    assert len({tuple(dict.fromkeys(job.case.dim for job in order)) for order in orders}) > 2
    (of_one_order,) = {
        tuple(len({job.backend for job in order[i : i + 5]}) for i in range(0, 60, 5)) for order in orders
    }
    assert of_one_order == (5,) * 12
    first = [job.backend for job in orders[0]]
    assert any(first[:5] != first[i : i + 5] for i in range(5, 60, 5)), "cases have orders of their own"
