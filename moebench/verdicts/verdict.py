"""Define the verdicts of a gate. The severity of a verdict decides how it is shown and counted."""

from enum import Enum, StrEnum


class Severity(Enum):
    """How serious a verdict is. The worst severity is first."""

    FAILED = "failed"  # the gate ends with exit code 1; a failure in JUnit, an error on GitHub
    UNDECIDED = "undecided"  # exit code 3; skipped in JUnit, a warning on GitHub
    NOTED = "noted"  # listed; does not change the exit code; skipped in JUnit
    BETTER = "better"  # listed; does not change the exit code
    PASSED = "passed"  # counted, but not listed


class Verdict(StrEnum):
    """The verdict of a gate on a job or on one of the job's measures. The worst verdict is first."""

    severity: Severity

    def __new__(cls, name: str, severity: Severity) -> "Verdict":
        verdict = str.__new__(cls, name)
        verdict._value_ = name
        verdict.severity = severity
        return verdict

    REGRESSED = "REGRESSED", Severity.FAILED
    MISSING = "MISSING", Severity.FAILED
    INCOMPARABLE = "INCOMPARABLE", Severity.UNDECIDED
    INCONCLUSIVE = "INCONCLUSIVE", Severity.UNDECIDED
    NEW = "NEW", Severity.NOTED
    UNMEASURED = "UNMEASURED", Severity.NOTED
    IMPROVED = "IMPROVED", Severity.BETTER
    PASS = "PASS", Severity.PASSED

    @property
    def rank(self) -> int:
        """A sort key: 0 for the worst verdict."""
        return list(Verdict).index(self)
