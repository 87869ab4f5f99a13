"""The verdicts of a gate, and how much each weighs wherever verdicts are shown or counted."""

from enum import Enum, StrEnum


class Severity(Enum):
    """What a verdict means for whoever reads it, the worst first."""

    FAILED = "failed"  # the gate ends with exit code 1; a failure in JUnit, an error on GitHub
    UNDECIDED = "undecided"  # exit code 3; skipped in JUnit, a warning on GitHub
    NOTED = "noted"  # listed, and changes no exit code; skipped in JUnit
    BETTER = "better"  # listed, and changes no exit code
    PASSED = "passed"  # counted, not listed


class Verdict(StrEnum):
    """What a gate says about a case, the worst first."""

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
    IMPROVED = "IMPROVED", Severity.BETTER
    PASS = "PASS", Severity.PASSED

    @property
    def rank(self) -> int:
        """0 for the worst verdict. A sort key."""
        return list(Verdict).index(self)
