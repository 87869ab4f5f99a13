"""Expert parallelism over gloo gives the same results as one process, for all ranks, dispatchers and engines.

Each number of ranks is launched once. The ranks (ranks.py) run every case and write their results. The tests here
concatenate the results of the ranks and compare them, case by case.
"""

import contextlib
import fcntl
import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import forked
from tests.experts import parallel
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    Named,
    assert_near,
    assert_same,
    expected,
    layer,
    random_parameters,
)
from tests.experts.layers import run as run_alone
from tests.experts.parallel import Case

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 200
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)  # the first test with a number of ranks waits for all cases
OF_TOKENS = ("output", "x", "weights")

Launched = Callable[[int], Path]


#: Numbers of ranks that only `make certify` launches.
CERTIFIED = dict.fromkeys((4, 8), pytest.mark.certify(share=0))


def _param(size: int, what: Case | str) -> Any:
    return pytest.param(
        size, what, id=f"{size}-{what if isinstance(what, str) else what.name}", marks=CERTIFIED.get(size, ())
    )


CASES = [_param(size, case) for size in parallel.LAUNCHED for case in parallel.cases(size)]
FACTS = [_param(size, name) for size, names in parallel.FACTS.items() for name in names]


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Return a function that launches a number of ranks once for all test processes, and returns their folder."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def launch_once(num_ranks: int) -> Path:
        folder = shared / f"ranks{num_ranks}"
        with (shared / "ranks.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                launch(num_ranks, folder)
        return folder

    return launch_once


def launch(num_ranks: int, folder: Path) -> None:
    """Run the ranks. End all of them after TIMEOUT_S seconds or when this process is interrupted."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::FutureWarning"}
    variables["TRITON_INTERPRET"] = "1"
    ended = f"still running after {TIMEOUT_S} s"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            forked.command(num_ranks, ROOT / "tests/experts/ranks.py", folder),
            cwd=ROOT,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = f"exit status {process.wait(TIMEOUT_S)}"
        finally:
            if process.poll() is None:
                for each in (process, *psutil.Process(process.pid).children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
            (folder / "ended.json").write_text(json.dumps(ended))


def outcomes(folder: Path, name: str, num_ranks: int) -> list[Named]:
    """Return the results of each rank, in the order of the ranks. Fail if a rank has no result."""
    found = []
    for rank in range(num_ranks):
        file = folder / f"{name}.rank{rank}.pt"
        if not file.exists():
            log = (folder / "log.txt").read_text()
            pytest.fail(
                f"rank {rank} did not run {name}: {json.loads((folder / 'ended.json').read_text())}\n{log[-4000:]}"
            )
        outcome = torch.load(file)
        assert not outcome["error"], f"rank {rank}: {outcome['error']}"
        found.append(outcome["found"])
    return found


def together(ranks: list[Named]) -> Named:
    """Concatenate the tokens and experts of the ranks in the order of the ranks."""
    return {name: torch.cat([found[name] for found in ranks]) for name in ranks[0]}


@functools.cache
def right(scenario: str, dtype: torch.dtype) -> Named:
    case = Case(scenario, "loop", "allgather", dtype)
    return expected(case.config, random_parameters(case.config), case.batch())


@functools.cache
def alone(scenario: str, dtype: torch.dtype) -> Named:
    """Return the results of the loop in one process, with one thread like the ranks.

    Products computed by several threads may differ in their last bits.
    """
    case = Case(scenario, "loop", "allgather", dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_alone(layer("loop", case.config), case.batch())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("num_ranks", [pytest.param(size, marks=CERTIFIED.get(size, ())) for size in parallel.LAUNCHED])
def test_the_ranks_end_without_an_error_or_a_warning(num_ranks: int, launched: Launched) -> None:
    """The log has no warning, for example none of torch about its renamed collectives."""
    folder = launched(num_ranks)
    assert json.loads((folder / "ended.json").read_text()) == "exit status 0"
    assert "Warning" not in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("num_ranks", "case"), CASES)
def test_all_ranks_together_give_the_results_of_one_process(num_ranks: int, case: Case, launched: Launched) -> None:
    """Output and every gradient match the oracle on all tokens. The loop gives the same bits as in one process.

    The bits are the same because an expert's rows come in the same order, and a token's two parts have the same sum in
    either order. In 16 bits each rank rounds its part, so the outputs and gradients of tokens are only near.
    """
    ranks = outcomes(launched(num_ranks), case.name, num_ranks)
    size = case.ep_size(num_ranks)
    for first in range(0, num_ranks, size):
        found = together(ranks[first : first + size])
        assert_near(found, right(case.scenario, case.dtype), case.dtype)
        if case.engine == "loop":
            rounded = ("output", "x") if case.dtype in (BF16, F16) else ()
            same = {name: tensor for name, tensor in alone(case.scenario, case.dtype).items() if name not in rounded}
            assert_same({name: found[name] for name in same}, same)


@pytest.mark.parametrize("scenario", ["uneven", "masked"])
@pytest.mark.parametrize("num_ranks", [2])
def test_deepep_gives_the_bits_of_alltoall(num_ranks: int, scenario: str, launched: Launched) -> None:
    """Both dispatchers sum a token's parts in float32, in the order of the ranks."""
    cases = [Case(scenario, "loop", dispatcher, BF16) for dispatcher in ("deepep", "alltoall")]
    deepep, alltoall = (together(outcomes(launched(num_ranks), case.name, num_ranks)) for case in cases)
    assert_same(deepep, alltoall)


@pytest.mark.parametrize("scenario", ["uneven", "masked", "one-expert-twice"])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=CERTIFIED[4])])
def test_symm_mem_gives_the_bits_of_alltoall(num_ranks: int, scenario: str, launched: Launched) -> None:
    """An expert gets its rows in the same order, and rows that nobody filled change nothing."""
    cases = [Case(scenario, "loop", dispatcher) for dispatcher in ("symm_mem", "alltoall")]
    symm_mem, alltoall = (together(outcomes(launched(num_ranks), case.name, num_ranks)) for case in cases)
    assert_same(symm_mem, alltoall)


@pytest.mark.parametrize(("num_ranks", "name"), FACTS)
def test_a_fact_that_the_ranks_check_holds(num_ranks: int, name: str, launched: Launched) -> None:
    outcomes(launched(num_ranks), name, num_ranks)


def test_the_cases_have_masked_and_uneven_tokens() -> None:
    """Every number of ranks has scenarios with masked tokens and with uneven numbers of tokens."""
    for name, scenario in parallel.SCENARIOS.items():
        assert {sum(counts) for counts in scenario.counts.values()} == {sum(scenario.counts[1])}, name
    for size in parallel.SIZES:
        assert len(set(parallel.UNEVEN[size])) == size
        names = [case.name for case in parallel.cases(size)]
        assert len(set(names)) == len(names)
        for dtype in (F32, F64):
            shares = [parallel.SCENARIOS["masked"].share(dtype, rank, size) for rank in range(size)]
            assert torch.equal(torch.cat([share.x for share in shares]).isnan().any(1), masked := nan_rows(dtype))
            assert 0 < masked.sum() < 13
    assert not parallel.SCENARIOS["masked"].share(F32, 1, 4).token_mask.any()


def nan_rows(dtype: torch.dtype) -> torch.Tensor:
    return ~parallel.SCENARIOS["masked"].batch(dtype).token_mask
