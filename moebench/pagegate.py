"""The verdicts of a gate in a report, from the JSON document that `moebench gate --json` printed. No torch here."""

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebench.frame import ResultsError
from moebench.gatejson import SCHEMA
from moebench.verdicts import Verdict

#: Verdicts that a reader need not look at.
FINE = (Verdict.PASS, Verdict.IMPROVED, Verdict.NEW)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class GateFinding(_Part):
    """What was found of one measure of a job."""

    measure: str
    verdict: Verdict
    reason: str


class GateTime(_Part):
    """Candidate over baseline, with its interval; shares of the baseline. Null: not known."""

    ratio: float | None
    low: float | None
    high: float | None
    smallest_effect: float | None

    def __str__(self) -> str:
        if self.ratio is None:
            return ""
        ends = ["?" if end is None else f"{end - 1:+.1%}" for end in (self.low, self.high)]
        return f"{self.ratio - 1:+.1%} ({' to '.join(ends)})"

    @property
    def sees(self) -> str:
        return "" if self.smallest_effect is None else f"{self.smallest_effect:.1%}"


class GateJob(_Part):
    """The verdict on one job."""

    case_id: str
    backend: str
    dispatcher: str
    verdict: Verdict
    findings: tuple[GateFinding, ...]
    time: GateTime | None

    @property
    def label(self) -> str:
        return self.backend if self.dispatcher == "local" else f"{self.backend}+{self.dispatcher}"

    @property
    def reasons(self) -> str:
        """Why the verdict is what it is."""
        return "; ".join(f"{one.measure}: {one.reason}" for one in self.findings if one.verdict is self.verdict)


class GateSelfComparison(_Part):
    """Two sides between which nothing changed, judged alike."""

    name: str
    num_compared: int
    num_alarms: int


class GateDocument(_Part):
    """The document of moebench.gatejson, as far as a report shows it."""

    schema_version: int = Field(alias="schema", ge=SCHEMA, le=SCHEMA)
    exit_code: int
    threshold: float
    self_comparisons: tuple[GateSelfComparison, ...]
    jobs: tuple[GateJob, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many jobs have each verdict, the worst first."""
        found = Counter(job.verdict for job in self.jobs)
        return {verdict: found[verdict] for verdict in Verdict if verdict in found}

    @property
    def remarkable(self) -> list[GateJob]:
        """The jobs to look at, the worst first."""
        order = list(Verdict)
        return sorted((job for job in self.jobs if job.verdict not in FINE), key=lambda job: order.index(job.verdict))


def read_gate(path: Path) -> GateDocument:
    """The gate's document in a file. Raises ResultsError for anything else."""
    try:
        return GateDocument.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"--gate {path}: {error.strerror}; give what `moebench gate --json` printed") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        message = f"--gate {path}: {place}: {first['msg']}; give what `moebench gate --json` printed"
        raise ResultsError(message) from error
