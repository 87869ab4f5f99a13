"""Every backend in every context of training has the reference's results: `make test` has a share of the matrix.

The cells run as users run them: in groups of ranks over gloo, which `moebench run` starts. `make certify` runs all.
"""

import pytest

from moebench.results.record import Record, Status
from tests.moebench.measure.contextcells import (
    BLOCKS,
    CELLS,
    FAULTS,
    NEEDS_GPUS,
    RIGHT_ELSEWHERE,
    Cell,
    cell_of,
    run,
    some,
    summary,
)

pytestmark = pytest.mark.timeout(0)  # groups start slowly where processes share few cores

#: `make test` measures as many cells of each size. Four ranks start too slowly for it.
FEW = {(1, 1): 2, (2, 1): 1, (1, 2): 1}
#: The cells of a block that `make test` measures.
FEW_BLOCKS = [
    one
    for one in BLOCKS
    if (one.ep_size, one.dp_size, one.context) in ((1, 1, "checkpoint_experts"), (2, 1, "accumulate:3"))
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, certify: bool) -> dict[Cell, Record]:
    cells = [*(CELLS if certify else some(FEW)), *(BLOCKS if certify else FEW_BLOCKS), *FAULTS, *RIGHT_ELSEWHERE]
    return {cell_of(row): row for row in run(cells, tmp_path_factory.mktemp("run"))}


@pytest.fixture
def rows(measured: dict[Cell, Record]) -> dict[Cell, Record]:
    """Return the rows of the matrix."""
    return {cell: row for cell, row in measured.items() if cell in CELLS}


@pytest.mark.certify
def test_every_cell_that_ran_is_right(rows: dict[Cell, Record], certify: bool) -> None:
    assert len(rows) == (len(CELLS) if certify else sum(FEW.values()))
    wrong = {str(cell): (row.status, row.detail) for cell, row in rows.items() if row.status is not Status.ok}
    assert wrong == {}


def test_what_a_cell_recomputes_has_the_rows_of_forward(rows: dict[Cell, Record]) -> None:
    recomputed = {cell for cell in rows if "checkpoint" in cell.context and "compile" not in cell.context}
    assert recomputed
    for cell, row in rows.items():
        assert row.parity_errors is not None
        names = {"rows", "weights of rows", "indices of rows"}
        assert names & row.parity_errors.keys() == (names if cell in recomputed else set()), cell
        assert all(row.parity_errors[name] == 0 for name in names & row.parity_errors.keys())


def test_a_cell_has_times_and_memory_of_its_step(rows: dict[Cell, Record]) -> None:
    for cell, row in rows.items():
        assert row.time_ms is not None
        is_step = "accumulate" in cell.context
        assert (row.backward_ms is None) == is_step
        assert (row.dispatch_ms is None) == (cell.ep_size == 1 or is_step or "compile" in cell.context)
        assert (row.peak_memory_bytes is None) == (row.compiled_graphs is not None) == ("compile" in cell.context)


@pytest.mark.certify
def test_a_block_is_right_in_its_contexts(measured: dict[Cell, Record], certify: bool) -> None:
    blocks = {cell: row for cell, row in measured.items() if cell.subject != "experts"}
    assert len(blocks) == (len(BLOCKS) if certify else len(FEW_BLOCKS))
    wrong = {str(cell): (row.status, row.detail) for cell, row in blocks.items() if row.status is not Status.ok}
    assert wrong == {}
    for cell, row in blocks.items():
        assert row.parity_errors is not None
        assert {"router.weight.grad", "shared_experts.down_proj.grad", "down_projs.grad"} <= row.parity_errors.keys()
        assert ("rows" in row.parity_errors) == ("checkpoint" in cell.context and "compile" not in cell.context)


@pytest.mark.certify
def test_what_did_not_run_is_listed(rows: dict[Cell, Record], record_property) -> None:
    lines = summary(list(rows.values()))
    record_property("summary", "\n".join(lines))
    not_run = [line for line in lines if line.startswith("  not run: ")]
    of_cells = dict(line.removeprefix("  not run: ").split(": ") for line in not_run[: -len(NEEDS_GPUS)])
    listed = [f"{where} {context}" for where, contexts in of_cells.items() for context in contexts.split(", ")]
    assert sorted(listed) == sorted(str(cell) for cell in CELLS if cell not in rows)
    assert len(not_run) == len(of_cells) + len(NEEDS_GPUS)


@pytest.mark.parametrize("cell", FAULTS, ids=str)
def test_a_fault_is_found_in_the_context_that_shows_it(measured: dict[Cell, Record], cell: Cell) -> None:
    row = measured[cell]
    assert (row.status, row.time_ms) == (Status.mismatch, None), row.detail
    assert row.parity_errors is not None
    wrong = {name for name, error in row.parity_errors.items() if error > 1}
    endings = {"gradients": ("projs.grad", "bias.grad"), "gradients of weights": ("projs.grad",)}
    parameters = {name for name in row.parity_errors if name.endswith(endings.get(FAULTS[cell], ()))}
    assert wrong == parameters if parameters else "rows" in wrong


@pytest.mark.parametrize("cell", RIGHT_ELSEWHERE, ids=str)
def test_the_fault_of_a_context_passes_elsewhere(measured: dict[Cell, Record], cell: Cell) -> None:
    assert measured[cell].status is Status.ok, measured[cell].detail
