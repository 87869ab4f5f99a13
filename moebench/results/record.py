"""Define a row of results: how a job can end, and the columns of a row with the declaration of each.

History of SCHEMA
1  2026-11  first version.
2  2026-11  x, routing weights and the output's gradient change from sample to sample, samples drawn at random are
            judged, and L2 cannot keep persisting data. The same columns; times differ from those of schema 1 by a few
            percent. A time that is impossibly short is a mismatch. Schema 1 had the flag `impossibly_fast` for it.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moebench.names import Name, Names
from moebench.results.columns import Column, Count, Error, Part, Rounds, columns_of
from moebench.results.measured import Measured
from moebench.workload.case import CaseFields, Job, JobKey

SCHEMA = 2
#: The schemas that this moebench reads. Times of two schemas were measured differently and are not comparable.
READABLE = (1, 2)
_NOT_SO_FAR = "if the job ended before this step"


class Status(StrEnum):
    """How a job ended. Only a row with status `ok` has times, because the time of a wrong result means nothing."""

    ok = "ok"
    mismatch = "mismatch"  # the backend ran, and its output or a gradient is wrong, or its times must not be believed
    unsupported = "unsupported"  # the backend cannot run this case here; `detail` says why
    oom = "oom"  # the job ran out of memory
    timeout = "timeout"
    crash = "crash"  # the process that ran the job died
    error = "error"  # the job raised an exception


#: Statuses that do not count as a failure of the backend. If all rows have one of them, the exit code is 0.
GOOD = frozenset({Status.ok, Status.unsupported, Status.oom})

#: A time below this share of the longest time that no layer beats on the machine is not believed.
IMPOSSIBLE = 0.8


class _Named(BaseModel):
    """The columns that name a row. They come before the columns of the case."""

    case_id: Annotated[
        Name,
        Column(
            Rounds.SAME, "name of the case: readable parts, then a hash of all fields that are not at their defaults"
        ),
    ]
    backend: Annotated[
        str, Column(Rounds.SAME, "name of the backend: one that `moebench list` prints, or `module:attribute`")
    ]
    dispatcher: Annotated[
        str,
        Column(
            Rounds.SAME, "name of the dispatcher: `allgather`, `alltoall`, `deepep` or `symm_mem`; `local` at EP size 1"
        ),
    ]


class _Outcome(BaseModel):
    """The columns that say how a job ended and where it ran."""

    check: Annotated[
        str | None,
        Column(
            Rounds.SAME,
            "the case or search of `moebench parity` that the row is about; moebench does not time such a job",
            null="in rows of `moebench run`",
        ),
    ] = None

    status: Annotated[Status, Column(Rounds.OF_WORST, "how the job ended; the next table explains the values")]
    detail: Annotated[
        str | None,
        Column(
            Rounds.EVERY, "why the job ended with this status; the first line is the reason", null="allowed when ok"
        ),
    ] = None
    flags: Annotated[
        tuple[str, ...],
        Column(Rounds.EVERY, "warnings about the times of the row, explained in the table of flags; may be empty"),
    ] = ()
    executed: Annotated[
        str | None,
        Column(
            Rounds.EVERY,
            "the matrix product that took most time in a profiled forward pass, as `operator > kernel`, or only the "
            "kernel if no operator launched it; in mode `train` the forward pass also saves tensors for backward",
            null="not profiled",
        ),
    ] = None
    device: Annotated[str | None, Column(Rounds.EVERY, "`cpu` or `cuda`", null="not known")] = None
    gpu: Annotated[str | None, Column(Rounds.EVERY, "name of the GPU", null="on a CPU")] = None
    gpu_uuid: Annotated[
        str | None,
        Column(
            Rounds.EVERY,
            "the driver's identifier of the GPU; at an EP size above 1, of all GPUs in the order of ranks",
            null="on a CPU",
        ),
    ] = None
    node: Annotated[
        str | None,
        Column(
            Rounds.EVERY,
            "name of the node of a cluster that measured the row; of all nodes, if the ranks ran on several",
            null="if no cluster measured it",
        ),
    ] = None
    round: Annotated[
        Count | None,
        Column(Rounds.COMPUTED, "number of the row's round, from 0", null="if several rounds make the row"),
    ] = 0
    num_rounds: Annotated[
        int,
        Field(ge=1, lt=2**63),
        Column(Rounds.COMPUTED, "number of rounds that make the row ([running.md](running.md#rounds))"),
    ] = 1
    sample_sessions: Annotated[
        tuple[Count, ...] | None,
        Column(
            Rounds.SAMPLES,
            "session of each sample, from 0; each session is a run of its own ([gating.md](gating.md#sessions))",
            null="if all samples are of one run; unless ok",
        ),
    ] = None
    l2: Annotated[
        Annotated[str, Field(pattern=r"^(cold|warm)( \| (cold|warm))*$")] | None,
        Column(
            Rounds.EVERY,
            "`cold`: moebench flushed the L2 cache before each sample; `warm`: it did not",
            null="on a CPU; unless ok",
        ),
    ] = None


class _Parity(BaseModel):
    """The columns that say how far the results are from the reference."""

    parity_worst: Annotated[
        Error | None,
        Column(
            Rounds.WORST,
            "the largest error divided by its budget; at most 1 is a pass; `inf` if a value is not finite, "
            "or if a value must be zero and is not",
            null="not compared",
        ),
    ] = None
    parity_worst_tensor: Annotated[
        str | None,
        Column(
            Rounds.OF_WORST,
            "the tensor that has the error `parity_worst`: `output`, or the gradient of an input or a parameter",
            null="not compared",
        ),
    ] = None
    parity_errors: Annotated[
        dict[str, Error] | None,
        Column(
            Rounds.WORST,
            "JSON object: for each tensor, its error divided by its budget; "
            "`moebench.results.frame.parity_errors(cell)` reads it",
            null="not compared",
        ),
    ] = None
    deterministic: Annotated[
        bool | None,
        Column(
            Rounds.ALL,
            "whether the two runs that moebench compared with the reference gave the same bits on every rank; on a "
            "CPU, moebench switches torch's deterministic algorithms on; `false` is a property of the backend and "
            "not a fault",
            null="not compared; if memory holds the results of only one run",
        ),
    ] = None


_NOT_COMPILED = "without `compile` in the context; unless ok"


class _Compiled(BaseModel):
    """The columns about the context `compile`."""

    compiled_graphs: Annotated[
        Count | None, Column(Rounds.WORST, "graphs that `torch.compile` made in the first pass", "", _NOT_COMPILED)
    ] = None
    graph_breaks: Annotated[
        Count | None, Column(Rounds.WORST, "places where it went back to Python in that pass", "", _NOT_COMPILED)
    ] = None
    recompiled_graphs: Annotated[
        Count | None,
        Column(Rounds.WORST, "graphs that it made in timed calls, and for one token less", "", _NOT_COMPILED),
    ] = None


class Record(_Compiled, _Parity, Measured, _Outcome, CaseFields, _Named):
    """One row of results: a job, how it ended, and its measured values. A value that was not measured is None, not 0.

    The columns are in this order: the fields of the base classes, the last base class first, and then the fields below.
    `python -m moebench.report.columntable docs/results.md` writes the declarations into the tables of that document.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_enum_values=False)

    job_s: Annotated[
        Part | None, Column(Rounds.SUM, "wall-clock time of the whole job", "s", null="if the process died")
    ] = None
    setup_s: Annotated[
        Part | None, Column(Rounds.SUM, "part of `job_s`: creating the inputs and the module", "s", _NOT_SO_FAR)
    ] = None
    parity_s: Annotated[
        float | None, Column(Rounds.SUM, "part of `job_s`: comparing with the reference", "s", _NOT_SO_FAR)
    ] = None
    timing_s: Annotated[Part | None, Column(Rounds.SUM, "part of `job_s`: timing the backend", "s", _NOT_SO_FAR)] = None
    ceilings_s: Annotated[
        Part | None,
        Column(
            Rounds.SUM, "part of `job_s`: measuring the ceilings; the first job of a case does this", "s", _NOT_SO_FAR
        ),
    ] = None
    env_id: Annotated[Names, Column(Rounds.EVERY, "fingerprint of the environment in `environment.json`")]
    run_id: Annotated[
        Names, Column(Rounds.EVERY, "name of the run: the time at which it began (UTC) and the sweep's name")
    ]
    schema_version: Annotated[
        int,
        Field(alias="schema", serialization_alias="schema"),
        Column(Rounds.SAME, "version of the columns; `moebench/results/record.py` has the history"),
    ] = SCHEMA

    @model_validator(mode="after")
    def _status_agrees_with_contents(self) -> "Record":
        if self.status is Status.ok:
            if self.time_ms is None and self.check is None:
                raise ValueError("a record with status ok needs a time, unless it belongs to a check")
            if self.parity_worst is None or not self.parity_worst <= 1:  # nan fails this comparison
                raise ValueError("a record with status ok needs a parity error within its budget")
        else:
            carried = [name for name in ONLY_IF_OK if getattr(self, name) is not None]
            if carried:
                raise ValueError(
                    f"a record with status {self.status.value} must have no speed and no memory, but has {carried}"
                )
            if not self.detail:
                raise ValueError(f"a record with status {self.status.value} needs a reason in detail")
        if self.status is Status.mismatch and self.parity_worst is None:
            raise ValueError("a record with status mismatch needs its parity_worst")
        return self

    @model_validator(mode="after")
    def _times_agree(self) -> "Record":
        for name in ("time_ms", "busy_ms"):
            time_ms, low, high = (getattr(self, name + end) for end in ("", "_low", "_high"))
            if time_ms is not None and not ((low is None or low <= time_ms) and (high is None or time_ms <= high)):
                raise ValueError(f"{name} {time_ms} does not lie between {name}_low {low} and {name}_high {high}")
        samples = ("samples_ms", "sample_rounds", "sample_marked")
        for names in (samples, ("busy_samples_ms", "busy_sample_rounds")):
            if len({len(some) for name in names if (some := getattr(self, name)) is not None}) > 1:
                raise ValueError(f"{', '.join(names[:-1])} and {names[-1]} must have one entry for each sample")
        unknown = sorted(set(self.busy_sample_rounds or ()) - set(self.sample_rounds or (0,)))
        if unknown:
            raise ValueError(f"busy_sample_rounds has the round {unknown[0]}, which sample_rounds does not have")
        return self

    @property
    def key(self) -> JobKey:
        return JobKey(self.case_id, self.backend, self.dispatcher, self.check)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


#: The declaration of each column.
COLUMN_OF = columns_of(Record)
#: The columns that only a row with status `ok` may have.
ONLY_IF_OK = tuple(
    name for name, column in COLUMN_OF.items() if column.only_if_ok and Record.model_fields[name].default is None
)


def record(job: Job, status: Status, *, run_id: str, env_id: str, **measured: Any) -> Record:
    """Return the row of `job`: the fields of the job, how it ended, and the `measured` columns."""
    return Record(
        **job.key._asdict(),
        **job.case.model_dump(),
        status=status,
        run_id=run_id,
        env_id=env_id,
        **measured,
    )
