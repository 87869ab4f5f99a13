"""Write and read the verdicts of a gate as one JSON document.

`moebench gate --json` writes the document, and `moebench report --gate` reads it. docs/gating.md explains the keys. A
number that is infinite or not known is null, because JSON has no infinity, and because a reader must not mistake a
limit for a measured number.
"""

from collections import Counter
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebench.errors import ResultsError, first_mistake
from moebench.verdicts.gate import GateResult, Judged, SelfComparison
from moebench.verdicts.times import TimeVerdict
from moebench.verdicts.verdict import Severity, Verdict

GATE_SCHEMA = 1

CellValue = str | int | float | None


class _Part(BaseModel):
    """The base class of all parts of the document. It ignores unknown keys, so that a later moebench may add keys."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True, ser_json_inf_nan="null")


class GateFinding(_Part):
    """The verdict on one measure of a job, with its reason."""

    measure: str
    verdict: Verdict
    reason: str


class GateTime(_Part):
    """A verdict on a time in numbers. The fields are those of `moebench.verdicts.times.TimeVerdict`."""

    ratio: float | None
    low: float | None
    high: float | None
    p_slower: float | None
    p_faster: float | None
    smallest_effect: float | None
    rounds: tuple[int, int]
    sessions: tuple[int, int] | None = None
    correlation: float | None = None

    @classmethod
    def of(cls, time: TimeVerdict | None) -> Self | None:
        if time is None:
            return None
        found = cls.model_validate(time)
        return found if found.low else found.model_copy(update={"low": None})  # 0 stands for an end that is not known

    def __str__(self) -> str:
        if self.ratio is None:
            return ""
        ends = ["?" if end is None else f"{end - 1:+.1%}" for end in (self.low, self.high)]
        return f"{self.ratio - 1:+.1%} ({' to '.join(ends)})"

    @property
    def sees(self) -> str:
        return "" if self.smallest_effect is None else f"{self.smallest_effect:.1%}"


class BothSides(_Part):
    """The value of one column in the baseline and in the candidate."""

    baseline: CellValue
    candidate: CellValue


#: A document that an older moebench wrote does not have the GPU's own time.
_NEITHER = BothSides(baseline=None, candidate=None)


class GateJob(_Part):
    """The verdict on one job, and the values that the baseline and the candidate measured."""

    case_id: str
    backend: str
    dispatcher: str
    verdict: Verdict
    findings: tuple[GateFinding, ...]
    time: GateTime | None
    busy: GateTime | None = None
    status: BothSides
    time_ms: BothSides
    busy_ms: BothSides = _NEITHER
    peak_memory_bytes: BothSides
    saved_memory_bytes: BothSides
    parity_worst: BothSides

    @classmethod
    def of(cls, job: Judged) -> Self:
        columns = ("status", "time_ms", "busy_ms", "peak_memory_bytes", "saved_memory_bytes", "parity_worst")
        return cls(
            case_id=job.key.case_id,
            backend=job.key.backend,
            dispatcher=job.key.dispatcher,
            verdict=job.verdict,
            findings=tuple(GateFinding.model_validate(finding) for finding in job.findings),
            time=GateTime.of(job.time),
            busy=GateTime.of(job.busy),
            **{name: BothSides(**dict(zip(BothSides.model_fields, job.cells(name), strict=True))) for name in columns},
        )

    @property
    def label(self) -> str:
        return self.backend if self.dispatcher == "local" else f"{self.backend}+{self.dispatcher}"

    @property
    def reasons(self) -> str:
        """The reasons of all findings that have the job's verdict."""
        return "; ".join(f"{one.measure}: {one.reason}" for one in self.findings if one.verdict is self.verdict)


class GateSelfComparison(_Part):
    """The false alarms of the gate's rules when they compare two sides between which nothing changed."""

    name: str
    num_compared: int
    num_alarms: int
    num_below: int
    false_alarm_rate: float | None

    @classmethod
    def of(cls, some: SelfComparison) -> Self:
        rate = some.num_alarms / some.num_compared if some.num_compared else None
        return cls(**vars(some), false_alarm_rate=rate)


class GateDifference(_Part):
    """A fact that differs between the environments of the baseline and the candidate."""

    what: str
    baseline: str
    candidate: str


class GateDocument(_Part):
    """All verdicts of a gate."""

    schema_version: int = Field(alias="schema", ge=GATE_SCHEMA, le=GATE_SCHEMA)
    exit_code: int
    threshold: float
    false_alarms: float
    counts: dict[Verdict, int]
    differences: tuple[GateDifference, ...]
    self_comparisons: tuple[GateSelfComparison, ...]
    notes: tuple[str, ...] = ()
    jobs: tuple[GateJob, ...]

    @classmethod
    def of(cls, result: GateResult) -> Self:
        return cls(
            schema=GATE_SCHEMA,
            exit_code=result.exit_code,
            threshold=result.threshold,
            false_alarms=result.false_alarms,
            counts=result.counts,
            differences=tuple(GateDifference.model_validate(difference) for difference in result.differences),
            self_comparisons=tuple(map(GateSelfComparison.of, result.self_comparisons)),
            notes=result.notes,
            jobs=tuple(map(GateJob.of, result.jobs)),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the document in a file. Raises ResultsError if the file cannot be read or holds something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ResultsError(f"--gate {path}: {error.strerror}; give what `moebench gate --json` printed") from error
        except ValidationError as error:
            message = f"--gate {path}: {first_mistake(error)}; give what `moebench gate --json` printed"
            raise ResultsError(message) from error

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)

    @property
    def remarkable(self) -> list[GateJob]:
        """The jobs that failed or are undecided, the worst verdict first."""
        open_ = [job for job in self.jobs if job.verdict.severity in (Severity.FAILED, Severity.UNDECIDED)]
        return sorted(open_, key=lambda job: job.verdict.rank)

    @property
    def verdict_counts(self) -> Counter[Verdict]:
        """How many jobs have each verdict, the worst first."""
        return Counter({verdict: self.counts[verdict] for verdict in Verdict if verdict in self.counts})
