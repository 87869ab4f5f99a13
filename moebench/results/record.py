"""One row of results, its outcomes, and the append-only journal that holds rows as they are finished. No torch here.

History of SCHEMA
1  2026-11  first version.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moebench.workload.case import Job

SCHEMA = 1


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

#: What only a status of `ok` may carry.
SPEED_FIELDS = (
    "time_ms",
    "time_ms_low",
    "time_ms_high",
    "host_time_ms",
    "graph_time_ms",
    "backward_ms",
    "dispatch_ms",
    "compute_ms",
    "combine_ms",
    "skew_ms",
    "samples_ms",
    "sample_rounds",
    "sample_marked",
    "tokens_per_s",
    "tflops",
    "roofline_fraction",
)


IMPOSSIBLY_FAST = "impossibly_fast"
#: A time shorter than so much of the case's roofline is no speed but a measurement that went wrong.
IMPOSSIBLE = 0.8


def flags_of_speed(time_ms: float, roofline_ms: float | None) -> tuple[str, ...]:
    """IMPOSSIBLY_FAST, or none."""
    return (IMPOSSIBLY_FAST,) if roofline_ms is not None and time_ms < IMPOSSIBLE * roofline_ms else ()


class Record(BaseModel):
    """One row of results: a job, how it ended, and what was measured. What was not measured is None, never 0.

    Units are in the names. docs/results.md explains every column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", use_enum_values=False)

    case_id: str
    backend: str
    dispatcher: str
    mode: str
    num_tokens: int
    n_routed_experts: int
    n_activated_experts: int
    dim: int
    moe_inter_dim: int
    model: str | None
    dtype: str
    expert_activation: str
    expert_bias: bool
    activation_alpha: float
    activation_limit: float
    swiglu_limit: float
    apply_router_weight_after_down: bool
    routing: str
    masked_share: float
    ep_size: int
    rank_load: str
    seed: int
    check: str | None = None

    status: Status
    detail: str | None = None
    flags: tuple[str, ...] = ()
    executed: str | None = None
    device: str | None = None
    gpu: str | None = None
    gpu_uuid: str | None = None
    round: Annotated[int, Field(ge=0)] | None = 0
    num_rounds: Annotated[int, Field(ge=1)] = 1
    l2: Literal["cold", "warm"] | None = None

    time_ms: Annotated[float, Field(gt=0)] | None = None
    time_ms_low: float | None = None
    time_ms_high: float | None = None
    converged: bool | None = None
    host_time_ms: float | None = None
    graph_time_ms: float | None = None
    backward_ms: float | None = None
    dispatch_ms: float | None = None
    compute_ms: float | None = None
    combine_ms: float | None = None
    skew_ms: float | None = None
    warmup_ms: float | None = None
    num_samples: int | None = None
    samples_ms: tuple[float, ...] | None = None
    sample_rounds: tuple[int, ...] | None = None
    sample_marked: tuple[bool, ...] | None = None
    sm_clock_mhz: int | None = None

    tokens_per_s: float | None = None
    tflops: float | None = None
    roofline_fraction: float | None = None
    roofline_ms: float | None = None
    dense_ms: float | None = None
    grouped_ms: float | None = None
    collective_ms: float | None = None
    copy_gb_per_s: float | None = None
    peak_memory_bytes: int | None = None
    saved_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    outside_torch_bytes: int | None = None

    parity_worst: float | None = None
    parity_worst_tensor: str | None = None
    parity_errors: dict[str, float] | None = None
    deterministic: bool | None = None

    job_s: float | None = None
    setup_s: float | None = None
    parity_s: float | None = None
    timing_s: float | None = None
    ceilings_s: float | None = None
    env_id: str
    run_id: str
    schema_version: int = Field(default=SCHEMA, alias="schema", serialization_alias="schema")

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
    def key(self) -> tuple[str, str, str, str | None]:
        return self.case_id, self.backend, self.dispatcher, self.check

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


def record(job: Job, status: Status, *, run_id: str, env_id: str, **measured: Any) -> Record:
    """The row of `job`, from the job's own fields and what was `measured`."""
    workload = job.case.model_dump()
    return Record(
        case_id=job.case.case_id,
        backend=job.backend,
        dispatcher=job.dispatcher,
        check=job.check,
        **workload,
        status=status,
        run_id=run_id,
        env_id=env_id,
        **measured,
    )
