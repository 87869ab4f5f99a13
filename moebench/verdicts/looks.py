"""Schedule `moebench ab`: compare the revisions at a few fixed looks, and stop measuring a job once it is decided.

To stop early because of results so far (optional stopping) can raise the rate of false alarms. The schedule keeps the
rate within its limit, for these reasons:

- Every look tests the whole family, which is all jobs of the comparison. A job that is already decided takes part with
  the rounds that it has.
- Each look has an equal share of the false alarms and the wrong passes that a gate may have (Bonferroni).
- If a change of a job is shown at one look, it stays shown at later looks, because the job's p-values stay the same.
- The time budget may end the rounds before a look, because the budget does not depend on the results.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from moebench.verdicts.ranksum import blocks_needed
from moebench.verdicts.times import FALSE_ALARMS, WRONG_PASSES
from moebench.verdicts.verdict import Verdict

Key = TypeVar("Key", bound=Hashable)

NUM_LOOKS = 3
#: The number of processes of each revision in a round. With two processes of each revision, a round has six possible
#: orders. With one process of each, it would have two.
RUNS_A_SIDE = 2
#: The share of false alarms and of wrong passes that one look may have.
LOOK_FALSE_ALARMS = FALSE_ALARMS / NUM_LOOKS
LOOK_WRONG_PASSES = WRONG_PASSES / NUM_LOOKS


def block_of(run: int) -> int:
    """Return the round of process number `run`. Each revision numbers its processes from 0 over all rounds."""
    return run // RUNS_A_SIDE


def schedule(family_size: int) -> tuple[int, ...]:
    """Return the number of rounds at each look. A round has `RUNS_A_SIDE` processes of each revision.

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
    """Measure and compare until every member of the family is decided. Yield the number of rounds after each look.

    `looks` has the total number of rounds at each look. `measure_rounds` gets the undecided members and the numbers of
    the rounds to measure, and returns whether time for more rounds is left. `judge` returns the verdicts on the whole
    family.
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
