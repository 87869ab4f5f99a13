"""How the backlog hands out jobs: a whole case goes to one worker.

Two workers get different weights while enough weights are left.
"""

from moebench.run.backlog import Backlog, parts
from moebench.workload.case import Case, Job


def unit(dim, tokens):
    case = Case(num_tokens=tokens, n_routed_experts=4, n_activated_experts=2, dim=dim, moe_inter_dim=8)
    return tuple(Job(case=case, backend=name) for name in "ab")


UNITS = [unit(16, 1), unit(16, 2), unit(32, 1), unit(32, 2)]
NARROW, WIDE = UNITS[0][0].case.weights, UNITS[2][0].case.weights


def full():
    return Backlog(job for some in UNITS for job in some)


def test_one_worker_gets_the_jobs_in_their_order_case_by_case():
    backlog = full()
    assert [backlog.take() for _ in range(4)] == UNITS
    assert (backlog.take(), len(backlog)) == ((), 0)


def test_a_worker_stays_with_its_weights():
    backlog = full()
    assert backlog.take(WIDE) == UNITS[2]
    assert len(backlog) == 6
    assert backlog.take(WIDE) == UNITS[3]
    assert backlog.take(WIDE) == UNITS[0], "and helps the others when there are no more"


def test_a_new_worker_takes_weights_that_no_other_has():
    backlog = full()
    assert backlog.take(None, [NARROW]) == UNITS[2]
    assert backlog.take(None, [NARROW, WIDE]) == UNITS[0], "or any"


def test_what_a_worker_left_comes_next():
    backlog = full()
    taken = backlog.take()
    backlog.put_back(taken[1:])
    backlog.put_back(())
    assert len(backlog) == 7
    assert backlog.take() == taken[1:]
    assert backlog.take() == UNITS[1]


def test_a_case_is_in_parts_for_one_worker_each():
    case = UNITS[0][0].case
    jobs = [Job(case=case, backend=name) for name in ("loop", "torch_mm", "my:A", "my:A", "my:B", "gmm")]
    assert [[job.backend for job in part] for part in parts(jobs)] == [
        ["loop", "torch_mm"],
        ["my:A", "my:A"],
        ["my:B"],
        ["gmm"],
    ]
    checks = [Job(case=case, backend="my:A", check="a"), Job(case=case, backend="my:A", check="b")]
    assert len(parts(checks)) == 1, "moebench parity runs one backend at a time"
