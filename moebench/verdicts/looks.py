"""Rounds are judged at a few fixed looks, and what is decided at one is measured no more. No torch here.

That is optional stopping, and stays valid: at every look the whole family is judged, decided members with the rounds
they have, and each look has its share of the false alarms and of the wrong passes that a gate may have (Bonferroni).
What is shown at one look stays shown, since the p-values that it rests on stay. The clock may end the rounds before a
look: it knows nothing of the results.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from moebench.verdicts.ranksum import blocks_needed
from moebench.verdicts.times import FALSE_ALARMS, WRONG_PASSES
from moebench.verdicts.verdict import Verdict

Key = TypeVar("Key", bound=Hashable)

NUM_LOOKS = 3
#: Processes of each side in a round. With two there are six orders of both sides in a round, with one there are two.
RUNS_A_SIDE = 2
#: Of one look.
LOOK_FALSE_ALARMS = FALSE_ALARMS / NUM_LOOKS
LOOK_WRONG_PASSES = WRONG_PASSES / NUM_LOOKS


def block_of(run: int) -> int:
    """The round that a process belongs to: its number is counted over all rounds, on each side."""
    return run // RUNS_A_SIDE


def schedule(family_size: int) -> tuple[int, ...]:
    """The rounds at each look, each with `RUNS_A_SIDE` processes of both sides.

    At the first look they are as few as can show anything in such a family, then twice and four times as many.
    """
    first = blocks_needed(LOOK_FALSE_ALARMS / max(1, family_size), RUNS_A_SIDE)
    return tuple(first * 2**look for look in range(NUM_LOOKS))


def until_decided(
    family: Sequence[Key],
    looks: Sequence[int],
    measure_rounds: Callable[[Sequence[Key], range], bool],
    judge: Callable[[], Mapping[Key, Verdict]],
) -> Iterator[int]:
    """Measure and judge until every member of the family is decided; yields the number of rounds after each look.

    `measure_rounds` is given what is undecided and the numbers of the rounds to measure, and says whether there is time
    for more. `judge` judges the whole family.
    """
    undecided, done = list(family), 0
    for rounds in looks:
        has_time = measure_rounds(undecided, range(done, rounds))
        done = rounds
        verdicts = judge()
        yield done
        undecided = [key for key in undecided if verdicts[key] is Verdict.INCONCLUSIVE]
        if not (undecided and has_time):
            return
