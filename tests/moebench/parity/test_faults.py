"""The checks that docs/faults.md names find every planted fault, in every dtype and FP8 recipe.

`make test` plants each fault in one kind of experts, under one of its checks. `make certify` uses all kinds and checks.
"""

import os
from pathlib import Path

import pytest
import torch

from moebench.results.record import Status
from moebench.run.audit import audit
from tests.moebench.faultbench import FAULTS, VARIANTS, examine, planted, read, variants_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_document_lists_the_faults_that_there_are():
    assert list(read()) == list(FAULTS)
    assert len(FAULTS) >= 50


@pytest.mark.certify
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_checks_that_the_document_names(certify, fault):
    named, variants = read()[fault], variants_of(fault)
    assert named
    if not certify:
        number = list(FAULTS).index(fault)
        variants, named = [variants[number % len(variants)]], [named[number % len(named)]]
    for variant in variants:
        found = dict(examine(planted(FAULTS[fault], variant), variant.dtype, named))
        assert all(worst > 1 for worst in found.values()), (variant.name, found)


def test_a_fault_that_is_one_nowhere_would_show():
    """This tests the bench itself: no check finds a fault in right experts, whatever their name."""
    build = planted(VARIANTS["float32"].experts, VARIANTS["float32"])
    assert all(worst <= 1 for _, worst in examine(build, "float32", ["one-hot", "layouts", "few-tokens"]))


@pytest.mark.certify
@pytest.mark.parametrize("fault", ["WrongRow", "OwnTokensOnly", "ForeignWeightsDetached"])
def test_a_fault_of_one_rank_is_found_between_ranks(certify, fault, monkeypatch):
    """The ranks are real processes. tests/moebench/measure/test_expert_parallel.py runs some of these faults."""
    if not certify:
        pytest.skip("groups of processes take long: `make certify`")
    folders = (ROOT / "tests" / "backends", ROOT, os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    found = audit([f"ranks:{fault}"], checks=["expert-parallel"], device="cpu")
    by_dtype = {row.dtype for row in found.records if row.status is Status.mismatch}
    assert by_dtype == {"float64", "float32", "bfloat16", "float16"}
