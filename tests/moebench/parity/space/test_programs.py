"""Programs are made of steps, and a Play can take every step."""

import pytest

from moebench.parity.play.play import Play
from moebench.parity.space.programs import PROGRAMS, RANK_PROGRAMS, STEPS


@pytest.mark.parametrize("step", STEPS)
def test_a_play_takes_every_step(step):
    method = getattr(Play, f"_{step.partition(':')[0]}")
    assert callable(method)


def test_every_program_is_of_known_steps():
    for program in (*PROGRAMS, *RANK_PROGRAMS):
        assert program
        assert set(program) <= STEPS.keys()
    assert len(set(PROGRAMS)) == len(PROGRAMS)


def test_the_simplest_program_comes_first():
    assert PROGRAMS[0] == RANK_PROGRAMS[0] == ("call", "backward")


def test_every_step_says_what_it_does():
    for step, text in STEPS.items():
        assert text[0].islower(), step
        assert not text.endswith("."), step
