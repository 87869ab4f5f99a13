"""Decide whether rows of two results may be compared, from the environments in which they were measured."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from moebench.machine.comparability import Difference, differences
from moebench.machine.environment import Environment


@dataclass(frozen=True)
class Comparability:
    """The rule that decides whether rows of two results may be compared.

    `baseline` and `candidate` have the environments of the two results by `env_id`. `allowed` has the facts that may
    differ, by their names in `CHANGES`.
    """

    baseline: Mapping[str, Environment]
    candidate: Mapping[str, Environment]
    allowed: Collection[str] = ()

    def between(self, baseline_id: str, candidate_id: str) -> tuple[Difference, ...]:
        """Return what differs between two environments.

        The facts decide, not the ids: somebody may have edited a file or copied it from another machine. Ids count only
        where a file is missing, or where the facts of both files are equal. If the ids then differ, this returns one
        difference named `env_id`.
        """
        one, two = self.baseline.get(baseline_id), self.candidate.get(candidate_id)
        found = differences(one, two) if one is not None and two is not None else ()
        if found or baseline_id == candidate_id:
            return found
        return (Difference("env_id", baseline_id, candidate_id),)

    def forbidding(self, differences: Iterable[Difference]) -> tuple[Difference, ...]:
        """Return the differences that are not allowed."""
        return tuple(difference for difference in differences if difference.what not in self.allowed)
