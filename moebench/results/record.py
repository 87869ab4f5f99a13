"""One row of results, its outcomes, and what its columns declare. No torch here.

History of SCHEMA
1  2026-11  first version.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moebench.results.columns import Column, Rounds, columns_of
from moebench.results.measured import Measured
from moebench.workload.case import CaseFields, Job, JobKey

SCHEMA = 1
_NOT_SO_FAR = "did not get so far"


class Status(StrEnum):
    """How a job ended. Only `ok` carries a speed: a wrong backend has none."""

    ok = "ok"
    mismatch = "mismatch"  # ran, and its output or a gradient is wrong
    unsupported = "unsupported"  # cannot run this case here; `detail` says why
    oom = "oom"
    timeout = "timeout"
    crash = "crash"  # its process died
    error = "error"  # it raised


#: Statuses that are results about a backend rather than failures of it (exit code 0).
GOOD = frozenset({Status.ok, Status.unsupported, Status.oom})


IMPOSSIBLY_FAST = "impossibly_fast"
#: A time shorter than so much of the case's roofline is no speed but a measurement that went wrong.
IMPOSSIBLE = 0.8


def flags_of_speed(time_ms: float, roofline_ms: float | None) -> tuple[str, ...]:
    """IMPOSSIBLY_FAST, or none."""
    return (IMPOSSIBLY_FAST,) if roofline_ms is not None and time_ms < IMPOSSIBLE * roofline_ms else ()


class _Named(BaseModel):
    """The columns that name a row, before those of its case."""

    case_id: Annotated[
        str,
        Column(Rounds.SAME, "name of the case: readable parts, and a hash of every field that is not at its default"),
    ]
    backend: Annotated[str, Column(Rounds.SAME, "a name of `moebench list`, or `module:attribute`")]
    dispatcher: Annotated[str, Column(Rounds.SAME, "`allgather`, `alltoall` or `deepep`; `local` at EP size 1")]


class _Outcome(BaseModel):
    """The columns that say how a job ended, and on what it ran."""

    check: Annotated[
        str | None,
        Column(
            Rounds.SAME, "the check of `moebench parity` that the row is of; such rows are not timed", null="in a run"
        ),
    ] = None

    status: Annotated[Status, Column(Rounds.OF_WORST, "how the job ended, see below")]
    detail: Annotated[
        str | None, Column(Rounds.EVERY, "why it ended so; the first line is the reason", null="may be when ok")
    ] = None
    flags: Annotated[
        tuple[str, ...],
        Column(Rounds.EVERY, "what a reader of the times should know, see below; may be empty"),
    ] = ()
    executed: Annotated[
        str | None,
        Column(
            Rounds.EVERY,
            "what really ran: operator > kernel, or the kernel without operator, of the matrix product that took most "
            "of a profiled forward; in mode `train` the forward keeps what backward needs",
            null="not profiled",
        ),
    ] = None
    device: Annotated[str | None, Column(Rounds.EVERY, "`cpu` or `cuda`", null="not known")] = None
    gpu: Annotated[str | None, Column(Rounds.EVERY, "name of the GPU", null="on a CPU")] = None
    gpu_uuid: Annotated[
        str | None,
        Column(
            Rounds.EVERY,
            "which GPU, by the name that the driver gives it; all GPUs in the order of ranks",
            null="on a CPU",
        ),
    ] = None
    round: Annotated[
        int | None,
        Field(ge=0),
        Column(Rounds.COMPUTED, "the round that the row is of, from 0", null="the row is of several rounds"),
    ] = 0
    num_rounds: Annotated[
        int,
        Field(ge=1),
        Column(Rounds.COMPUTED, "how many rounds the row is of ([running.md](running.md#rounds))"),
    ] = 1
    l2: Annotated[
        Literal["cold", "warm"] | None,
        Column(
            Rounds.EVERY,
            "`cold`: the second-level cache was flushed before each sample; `warm`: it was not",
            null="on a CPU, unless ok",
        ),
    ] = None


class Record(Measured, _Outcome, CaseFields, _Named):
    """One row of results: a job, how it ended, and what was measured. What was not measured is None, never 0.

    Columns are in the order of these base classes, the last one first, then of the fields below. `make results` writes
    what they declare into docs/results.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", use_enum_values=False)

    job_s: Annotated[
        float | None, Column(Rounds.SUM, "wall-clock time that the job took in all", "s", null="process died")
    ] = None
    setup_s: Annotated[
        float | None, Column(Rounds.SUM, "part of `job_s`: making inputs and module", "s", _NOT_SO_FAR)
    ] = None
    parity_s: Annotated[
        float | None, Column(Rounds.SUM, "part of `job_s`: comparing with the reference", "s", _NOT_SO_FAR)
    ] = None
    timing_s: Annotated[float | None, Column(Rounds.SUM, "part of `job_s`: timing", "s", _NOT_SO_FAR)] = None
    ceilings_s: Annotated[
        float | None,
        Column(Rounds.SUM, "part of `job_s`: measuring ceilings, which the first job of a case does", "s", _NOT_SO_FAR),
    ] = None
    env_id: Annotated[str, Column(Rounds.EVERY, "fingerprint of `environment.json`")]
    run_id: Annotated[str, Column(Rounds.EVERY, "the run: when it began (UTC) and the sweep's name")]
    schema_version: Annotated[
        int,
        Field(alias="schema", serialization_alias="schema"),
        Column(Rounds.SAME, "version of these columns; `moebench/results/record.py` has the history"),
    ] = SCHEMA

    @model_validator(mode="after")
    def _status_agrees_with_contents(self) -> "Record":
        if self.status is Status.ok:
            if self.time_ms is None and self.check is None:
                raise ValueError("a record with status ok needs a time, unless it is of a check")
            if self.parity_worst is None or not self.parity_worst <= 1:  # nan is no pass
                raise ValueError("a record with status ok needs a parity error within its budget")
        else:
            carried = [name for name in SPEED_FIELDS if getattr(self, name) is not None]
            if carried:
                raise ValueError(f"a record with status {self.status.value} carries no speed, but has {carried}")
            if not self.detail:
                raise ValueError(f"a record with status {self.status.value} says why in detail")
        if self.status is Status.mismatch and self.parity_worst is None:
            raise ValueError("a record with status mismatch carries the error that was found")
        return self

    @property
    def key(self) -> JobKey:
        return JobKey(self.case_id, self.backend, self.dispatcher, self.check)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


#: What each column declares.
COLUMN_OF = columns_of(Record)
#: What only a status of `ok` may carry.
SPEED_FIELDS = tuple(name for name, column in COLUMN_OF.items() if column.is_speed)


def record(job: Job, status: Status, *, run_id: str, env_id: str, **measured: Any) -> Record:
    """The row of `job`, from the job's own fields and what was `measured`."""
    return Record(
        **job.key._asdict(),
        **job.case.model_dump(),
        status=status,
        run_id=run_id,
        env_id=env_id,
        **measured,
    )
