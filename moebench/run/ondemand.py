"""Measure a workload that no result answers, within a time that the user gives, and keep the result.

The results stand in `moebench.results.published.KEPT`. `moebench advise` reads them beside the published results.
"""

import json
import math
from collections.abc import Iterable

from experts import catalog
from moebench.errors import UsageError
from moebench.machine import nvml
from moebench.machine.gpus import visible_gpus
from moebench.results.advise import Answer
from moebench.results.published import KEPT
from moebench.run.plan import new_run_id
from moebench.run.request import RunPlan, plan_text
from moebench.run.runfile import Asked
from moebench.workload.case import Case
from moebench.workload.models import shape_name

#: A run may take this many minutes at most. It is the time that a sweep's policy allows a job, rounded down.
MOST_MINUTES = 10_000.0
#: No job starts after this share of the time, and no job may take longer than the rest of it.
_STARTS = 2 / 3
#: The groups of backends, those first that tend to be fast. A backend comes with its first group.
_GROUPS = (
    *("bf16", "main_grad", "save_time", "cpu", "fp8", "block_fp8", "own_fp8", "mxfp8", "cached", "peers", "ep_peers"),
)


def gpu_here() -> str | None:
    """Return the name of the first GPU that CUDA sees on this machine; None if it sees no GPU."""
    try:
        visible = {one.name for one in visible_gpus()}
        found = [gpu.name for index, (gpu, _) in enumerate(nvml.read_all()) if (gpu.uuid or str(index)) in visible]
    except nvml.NvmlUnavailable:
        return None
    return found[0] if found else None


def missing(answer: Answer, gpu: str | None) -> list[str]:
    """Return the backends that no result of this machine answers, those first that tend to be fast.

    `gpu` is the GPU of this machine; None stands for its CPU.
    """
    here = [advice for advice in answer.advices if advice.gpu == gpu]
    known = {one.backend for advice in here for one in advice.candidates}
    known |= {label.partition("+")[0] for advice in here for label in advice.left_out}
    ranked = sorted(
        (one for one in catalog.BACKENDS if one.lora is None),
        key=lambda one: min(map(_GROUPS.index, one.groups), default=len(_GROUPS)),
    )
    fitting = [one for one in ranked if answer.asked.mode == "train" or one.save is None]
    if answer.asked.surroundings.num_micro_batches == 1:
        fitting = [one for one in fitting if not one.gradient_accumulation_fusion]
    return [one.name for one in fitting if one.name not in known]


def sweep_text(asked: Case, backends: Iterable[str], minutes: float) -> str:
    """Return a sweep file that measures the case with these backends, and with every dispatcher above EP size 1."""
    fields = asked.model_dump(exclude_defaults=True)
    if asked.ep_size > 1:
        fields["dispatcher"] = ["@dispatchers"]
    lines = [f"{name} = {json.dumps(value)}" for name, value in ({"backend": list(backends)} | fields).items()]
    limit_s = round(minutes * 60 * (1 - _STARTS), 3)
    return "\n".join(['name = "advise"', "[policy]", f"timeout_s = {limit_s}", "[[grid]]", *lines, ""])


def plan_missing(answer: Answer, minutes: float, gpu: str | None) -> RunPlan | None:
    """Plan a run of what no result of this machine answers; None if every backend has an answer.

    The run takes `minutes` at most, apart from the start of its last worker. Raises UsageError for minutes that are
    not positive, and for more than MOST_MINUTES.
    """
    if math.isnan(minutes) or not 0 < minutes <= MOST_MINUTES:
        rule = f"it must be a number of minutes, more than 0, at most {MOST_MINUTES:g}; for example --measure 5"
        raise UsageError(f"--measure {minutes:g}: {rule}")
    backends = missing(answer, gpu)
    if not backends:
        return None
    name = new_run_id(f"advise-{answer.asked.model or shape_name(dict(answer.asked))}")
    text = sweep_text(answer.asked, backends, minutes)
    asked = Asked(device="cpu" if gpu is None else None)
    return plan_text(text, "advise --measure", "advise", asked, out=KEPT / name, time_budget_min=minutes * _STARTS)
