"""The schedule of `moebench ab`: it judges at a few fixed looks, and stops measuring a job once it is decided.

This is optional stopping. It stays valid for these reasons:

- Every look judges the whole family. Members that are already decided take part with the rounds they have.
- Each look has an equal share of the false alarms and the wrong passes that a gate may have (Bonferroni).
- A change that is shown at one look stays shown, because its p-values stay the same.
- The time budget may end the rounds before a look, because it does not depend on the results.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from moebench.verdicts.ranksum import blocks_needed
from moebench.verdicts.times import FALSE_ALARMS, WRONG_PASSES
from moebench.verdicts.verdict import Verdict

Key = TypeVar("Key", bound=Hashable)

NUM_LOOKS = 3
#: Processes of each side in a round. Two processes a side have six possible orders in a round, one a side has two.
RUNS_A_SIDE = 2
#: The share of one look.
LOOK_FALSE_ALARMS = FALSE_ALARMS / NUM_LOOKS
LOOK_WRONG_PASSES = WRONG_PASSES / NUM_LOOKS


def block_of(run: int) -> int:
    """Return the round that a process belongs to. Each side numbers its processes over all rounds, from 0."""
    return run // RUNS_A_SIDE


def schedule(family_size: int) -> tuple[int, ...]:
    """Return the number of rounds at each look. A round has `RUNS_A_SIDE` processes of each side.

    The first look has the fewest rounds that can show a change in a family of this size. The next looks have twice and
    four times as many.
    """
    first = blocks_needed(LOOK_FALSE_ALARMS / max(1, family_size), RUNS_A_SIDE)
    return tuple(first * 2**look for look in range(NUM_LOOKS))


def until_decided(
    family: Sequence[Key],
    looks: Sequence[int],
    measure_rounds: Callable[[Sequence[Key], range], bool],
    judge: Callable[[], Mapping[Key, Verdict]],
) -> Iterator[int]:
    """Measure and judge until every member of the family is decided. Yield the number of rounds after each look.

    `measure_rounds` gets the undecided members and the numbers of the rounds to measure, and returns whether there is
    time for more. `judge` returns the verdicts on the whole family.
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
