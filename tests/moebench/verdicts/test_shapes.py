"""Gates keep their promises for noise of every shape. docs/gating.md has the figures.

`make certify` simulates the figures again: 1000 gates of each shape and number of rounds.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from moebench.verdicts.shapes import HEADER, NOT_COVERED, ROUNDS, SHAPES, Shape, log_normal, main, simulate, upper_bound
from moebench.verdicts.simulate import Rate
from moebench.verdicts.verdict import Verdict

ROOT = Path(__file__).parents[3]
GATING = (ROOT / "docs" / "gating.md").read_text()
COMMAND, FIGURES = re.search(
    r"^ {4}python -m moebench\.verdicts\.shapes(.*)\n\n((?:\|.*\n)+)", GATING, re.MULTILINE
).groups()
ROWS = [
    dict(zip(HEADER, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    for line in FIGURES.splitlines()[2:]
]


def rate(cell):
    return Rate(*map(int, re.search(r"\((\d+) of (\d+)\)", cell).groups()))


def percent(cell):
    return float(cell.removesuffix("%")) / 100


def test_the_table_has_every_shape_and_number_of_rounds():
    names = [(row["noise"], int(row["rounds a side"])) for row in ROWS]
    assert names == [(name, rounds) for name in (*SHAPES, *NOT_COVERED) for rounds in ROUNDS]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["noise"] in SHAPES], ids=lambda row: " ".join(list(row.values())[:2])
)
def test_the_figures_keep_the_promises(row):
    """With 95% confidence, at most 1% of gates raise a false alarm, and at most 1% of jobs slower by 3% pass."""
    alarms, passes = rate(row["false alarms"]), rate(row["slower by 3%: PASS"])
    assert alarms.total >= 1000
    assert upper_bound(alarms) <= 0.01
    assert upper_bound(passes) <= 0.01
    assert 0 <= percent(row["unchanged: PASS"]) + percent(row["unchanged: INCONCLUSIVE"]) <= 1.002


def test_twenty_quiet_rounds_decide():
    (row,) = (row for row in ROWS if (row["noise"], row["rounds a side"]) == ("log-normal, 0.3%", "20"))
    assert percent(row["unchanged: PASS"]) >= 0.95
    assert percent(row["slower by 6%: REGRESSED"]) >= 0.95


def test_what_is_not_covered_is_shown_as_it_is():
    (row,) = (row for row in ROWS if row["noise"] in NOT_COVERED and row["rounds a side"] == "20")
    assert rate(row["slower by 3%: PASS"]).share > 0.1


@pytest.mark.certify
@pytest.mark.parametrize("name", SHAPES)
def test_a_share_of_the_figures_is_simulated_again(certify, name):
    """With `certify`, the test also simulates gates of a single job, which the table does not have."""
    num_gates, num_jobs = (4000, 1) if certify else (10, 8)
    found = simulate(SHAPES[name], 20, num_gates, num_jobs, seed=11)
    if certify:
        assert upper_bound(found.false_alarms) <= 0.01, found.false_alarms
        assert upper_bound(found.wrong_passes) <= 0.01, found.wrong_passes
    else:
        assert found.false_alarms.count == 0, found.false_alarms
        assert found.wrong_passes.count <= 1, found.wrong_passes


@pytest.mark.certify(share=0)  # 24 simulations take minutes
def test_the_figures_are_what_the_program_prints(capsys):
    main(shlex.split(COMMAND))
    assert capsys.readouterr().out == FIGURES


def test_a_broken_gate_is_seen(monkeypatch):
    """If the gate took the order of rounds for chance, slowdowns in rounds that depend on one another would pass."""
    monkeypatch.setattr("moebench.verdicts.dependence.STANDARD_ERRORS", -99.0)
    assert simulate(SHAPES["neighbours correlate by 0.8, 1%"], 20, 10, seed=3).wrong_passes.share > 0.1


def test_shapes_are_what_they_say():
    random = np.random.default_rng(0)
    series = SHAPES["neighbours correlate by 0.8, 1%"].draw(random, (400, 50))
    assert np.std(series) == pytest.approx(0.01, rel=0.1)
    assert np.corrcoef(series[:, 1:].ravel(), series[:, :-1].ravel())[0, 1] == pytest.approx(0.8, abs=0.03)
    (sides,) = Shape(log_normal(0.0), 0.003, sessions=3).family(random, 5, 1)
    assert sides.sessions == ((0, 0, 1, 2, 2), (0,) * 5)
    assert len(set(sides.baseline_ms)) == 3


def test_the_upper_bound_of_a_rate():
    """If nothing happened in n cases, a rate of r has the probability (1 − r) to the power of n."""
    assert (1 - upper_bound(Rate(0, 1000))) ** 1000 == pytest.approx(0.05)
    assert upper_bound(Rate(4, 1000)) < 0.01 < upper_bound(Rate(5, 1000))
    assert upper_bound(Rate(3, 3)) == 1
    assert simulate(SHAPES["heavy tails"], 5, 2, 2).share(Verdict.INCONCLUSIVE) == 1
