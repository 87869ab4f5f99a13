"""`moebench parity` finds every planted fault, and what it prints shows the fault.

`make test` tries some faults on the covering cases, and the documented case of some others. `make certify` tries all
faults, searches where the covering cases do not suffice, and runs the printed lines.
"""

import random

import pytest
import torch

from moebench.parity.space.rules import misfits
from tests.moebench.faultbench import FAULTS, fails, find, not_shrunk, read, run_lines

#: `make test` draws faults with this seed: some of those that few covering cases find, because all cases take minutes.
SEED = 1
FOUND_SOON = [fault for fault, (where, _) in sorted(read().items()) if where.isdecimal() and int(where) <= 100]
FEW = set(random.Random(SEED).sample(FOUND_SOON, 12))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_document_lists_faults_that_there_are():
    assert read().keys() <= FAULTS.keys()
    assert len(read()) >= 50
    assert len(FAULTS) >= 200


def test_the_document_has_a_smallest_case_for_every_fault():
    for fault, (where, case) in read().items():
        assert case is not None, f"{fault}: {where}"
        assert not list(misfits(case)), fault


@pytest.mark.parametrize("fault", random.Random(SEED).sample(sorted(read()), len(read()) // 5))
def test_the_documented_case_fails(fault):
    _, case = read()[fault]
    assert fails(FAULTS[fault], case)


@pytest.mark.certify
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(certify, fault):
    if not certify and fault not in FEW:
        pytest.skip("some of the faults: `make certify` tries all")
    if not certify:
        with not_shrunk():
            assert find(FAULTS[fault], search_s=0.0) is not None
        return
    found = find(FAULTS[fault])
    assert found is not None
    done = run_lines(found.lines)
    assert done.returncode == 1, (found.reason, found.lines, done.stderr)
    assert len(found.lines) <= 25
