"""Simulations on recorded samples check the gate's false alarms and power.

`make certify` simulates more gates: 1000 per setting for the false alarms of a whole gate.
"""

import re
import shlex
from pathlib import Path

import pytest

from moebench.results.frame import load
from moebench.results.stats import THRESHOLD
from moebench.verdicts.noise import noises
from moebench.verdicts.simulate import (
    ASSUMED_BETWEEN,
    EFFECTS,
    HEADER,
    Rate,
    Setting,
    detection_rate,
    false_alarms,
    main,
    of_results,
    plant,
    seen,
    smallest_found,
)
from moebench.verdicts.times import POWER
from tests.moebench.verdicts.test_noise import noise

ROOT = Path(__file__).parents[3]
H200 = load(ROOT / "results" / "published" / "earlier" / "h200-2026-11-23")


# The gate on simulated rounds


@pytest.mark.certify
@pytest.mark.parametrize("rounds", [(10, 10), (20, 5)])
@pytest.mark.parametrize("between", ASSUMED_BETWEEN)
def test_false_alarms_of_a_whole_gate_are_1_percent_or_less(certify, between, rounds):
    found = false_alarms(noises(H200, between), Setting(rounds), num_gates=1000 if certify else 25)
    assert found.share <= 0.01, found


@pytest.mark.certify
def test_what_the_gate_says_it_can_see_it_finds(certify):
    found = plant(noises(H200, 0.003), Setting((20, 20)), [THRESHOLD], num_gates=4000 if certify else 600)
    assert len(seen(found)) > len(found) / 3
    assert detection_rate(seen(found)).share >= POWER


@pytest.mark.certify
def test_3_percent_is_found_in_what_keeps_the_gpu_busy(certify):
    """The slowdown is planted in jobs of torch_mm, one at a time."""
    quiet = noises(H200[H200["backend"] == "torch_mm"], 0.003)
    found = plant(quiet, Setting((20, 20)), [THRESHOLD], num_gates=4000 if certify else 400)
    assert detection_rate(found).share >= POWER, detection_rate(found)


def test_nothing_planted_is_not_found():
    assert detection_rate(plant(noises(H200, 0.003), Setting((10, 10)), [0.0], num_gates=100)).count == 0


def test_the_smallest_effect_found_grows_with_the_noise():
    quiet, loud = (smallest_found([noise(between=some)], Setting((20, 20), 20), 40) for some in (0.003, 0.03))
    assert 0.005 < quiet < 0.03 < loud < max(EFFECTS)


def test_a_session_that_shifts_alarms_although_nothing_changed():
    """A stored baseline of one session has this limit: rounds of one day cannot show how much two days differ."""
    quiet = [noise(between=0.001)]
    assert false_alarms(quiet, Setting((20, 20), 50, session=0.003), 10).share == 0
    assert false_alarms(quiet, Setting((20, 20), 50, session=0.03), 10).share == 1


def test_the_table_is_markdown():
    rows = list(of_results(H200, [0.003], num_gates=2, setting=Setting(num_jobs=9)))
    assert [row.count("|") for row in rows] == [len(HEADER) + 1] * 3
    assert "0.3%, assumed" in rows[0]


GATING = (ROOT / "docs" / "gating.md").read_text()
SIMULATED = re.findall(r"^ {4}python -m moebench\.verdicts\.simulate (.*)\n\n((?:\|.*\n)+)", GATING, re.MULTILINE)


def test_the_docs_have_figures():
    assert len(SIMULATED) == 4


def percent(cell):
    return float(cell.partition("%")[0])


@pytest.mark.certify
@pytest.mark.parametrize(("arguments", "figures"), SIMULATED, ids=[arguments for arguments, _ in SIMULATED])
def test_the_figures_of_the_docs(certify, capsys, monkeypatch, arguments, figures):
    """The figures keep the promised rates. With `certify`, the test compares them with what the simulation prints."""
    header, _, *rows = figures.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(HEADER)
    assert len(rows) >= 3
    for row in rows:
        cells = dict(zip(HEADER, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
        assert percent(cells["false alarms"]) <= 1
        if percent(cells["jobs that can"]):
            assert percent(cells["slower by the threshold found, of jobs that say they can see it"]) >= 95
    if certify:
        monkeypatch.chdir(ROOT)
        main(shlex.split(arguments))
        assert capsys.readouterr().out == figures


def test_what_is_no_result_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "nowhere")])
    assert end.value.code == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_rate_says_of_how_many():
    assert str(Rate(3, 200)) == "1.5% (3 of 200)"
    assert str(Rate(0, 0)) == "-"
