"""A backend that is not built in changes no row of another, and no result, whatever it does to its process and files.

Each kind of tests/backends/hostile.py runs between two honest backends, in real workers.
"""

import json
import random
from pathlib import Path

import pytest

from moebench.results.journal import Journal
from moebench.run.runner import execute
from tests.backends.hostile import KINDS
from tests.moebench.executed import jobs_of, plan_of, python_path

ROOT = Path(__file__).parents[3]
#: Columns that differ between two runs of the same job.
OF_A_RUN = (
    "_ms",
    "_s",
    "samples",
    "converged",
    "tflops",
    "_fraction",
    "sample_",
    "run_id",
    "untracked",
    "deterministic",
)
#: `make test` has so many kinds, drawn by the number of kinds.
SHARE = 1

pytestmark = pytest.mark.timeout(900)


def fixed(row):
    """Return what a row has in every run."""
    told = json.loads(row.to_json())
    return {name: value for name, value in told.items() if not any(part in name for part in OF_A_RUN)}


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, certify):
    """The rows of a run without hostile backends, and those of a run with one after the other, between honest ones."""
    kinds = list(KINDS) if certify else random.Random(len(KINDS)).sample(list(KINDS), SHARE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(tmp_path_factory.mktemp("somewhere"))
        alone = execute(plan_of(Path("alone"), jobs_of("loop", "torch_mm")))
        jobs = jobs_of("loop", *(f"hostile:{name}" for name in kinds), "torch_mm")
        among = execute(plan_of(Path("among"), jobs))
        return kinds, alone, among, Journal(Path("among/journal.jsonl")).read()


@pytest.mark.certify
def test_the_rows_of_honest_backends_are_those_of_a_run_without_hostile_ones(hostile_run):
    _, alone, among, _ = hostile_run
    honest = [row for row in among.records if row.backend in ("loop", "torch_mm")]
    assert [fixed(row) for row in honest] == [fixed(row) for row in alone.records]
    assert all(row.status.value == "ok" and row.flags == () for row in honest)


@pytest.mark.certify
def test_no_row_is_lost_or_twice(hostile_run):
    _, _, among, (rows, torn) = hostile_run
    assert (rows, torn) == (list(among.records), 0)
    assert among.num_left == 0


@pytest.mark.certify
def test_each_kind_ends_as_it_must(hostile_run):
    kinds, _, among, _ = hostile_run
    for name in kinds:
        (row,) = [row for row in among.records if row.backend == f"hostile:{name}"]
        status, words = KINDS[name]
        assert status in ("", row.status.value), (name, row.status, row.detail)
        assert words in f"{row.detail} {row.flags}", (name, row.detail, row.flags)
        assert len(row.detail or "") < 5000
