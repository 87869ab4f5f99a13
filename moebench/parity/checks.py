"""Define the checks of `moebench parity`: parts of the space of trials, and what a worker is asked to try in them.

Without `--check`, the whole space is tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebench.parity.space.covering import Axes, covering
from moebench.parity.space.programs import PROGRAMS, Program
from moebench.parity.space.trial import AXES, RANK_AXES, Trial
from moebench.workload.backends import DISPATCHERS
from moebench.workload.case import DTYPES, Job

SEARCH = "search"


def _programs(*words: str) -> tuple[Program, ...]:
    """Return the programs that have a step which begins with one of the words."""
    return tuple(one for one in PROGRAMS if any(step.startswith(words) for step in one))


def _values(axis: str, *left_out: object) -> tuple[Any, ...]:
    return tuple(value for value in AXES[axis] if value not in left_out)


@dataclass(frozen=True)
class Check:
    """A part of the space: on the named axes, only these values are tried."""

    name: str
    looks_for: str
    axes: Mapping[str, Sequence[Any]]


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("activations", "a wrong activation or limit, also with large arguments", {
            "n_routed_experts": (2,), "routing": ("uniform",), "dim": (8, 64), "moe_inter_dim": (8, 64),
            "num_tokens": (3, 33), "n_activated_experts": (1, 2)}),
        Check("routing-weights", "a wrong result for weights that are zero, negative, or do not sum to one", {
            "weights": _values("weights", "positive")}),
        Check("unused-weights", "leaks of NaN from weights of masked tokens and of indices that are -1", {
            "unused_weights": ("nan",), "mask": ("some",), "choices": ("some-dropped", "token-dropped")}),
        Check("masked-tokens", "leaks of NaN from the rows of masked tokens", {"mask": _values("mask", "all-kept")}),
        Check("dropped-choices", "a wrong result if some or all indices of a token are -1", {
            "choices": _values("choices", "distinct", "duplicates")}),
        Check("duplicate-experts", "a wrong result if a token chooses the same expert twice", {
            "choices": ("duplicates",), "n_activated_experts": _values("n_activated_experts", 1)}),
        Check("routings", "a wrong result if all tokens choose the same experts, or if experts have no tokens", {
            "routing": _values("routing", "uniform")}),
        Check("few-tokens", "a wrong result for a call without tokens, and for one to four tokens", {
            "num_tokens": (0, 1, 2, 3, 4)}),
        Check("many-tokens", "offsets that overflow 16 bits", {
            "num_tokens": AXES["num_tokens"][-1:], "steps": (("call", "backward"), ("call:no_grad",))}),
        Check("many-experts", "experts in the wrong order, and limits on their number", {
            "n_routed_experts": (11, 65, 257, 1024)}),
        Check("dimensions", "a transposed weight, and sizes that are no powers of two", {
            "steps": (("call", "backward"),), "n_routed_experts": (2,), "num_tokens": (3,)}),
        Check("dtypes", "a wrong result or gradient if inputs, weights, indices and parameters differ in dtype", {
            "param_dtype": _values("param_dtype", "same"), "weights_dtype": _values("weights_dtype", "float32"),
            "index_dtype": _values("index_dtype", "int64")}),
        Check("layouts", "a wrong result for tensors that are not contiguous", {
            "x_layout": _values("x_layout", "contiguous"), "grad_layout": _values("grad_layout", "contiguous"),
            "weights_layout": _values("weights_layout", "contiguous"),
            "parameter_layout": _values("parameter_layout", "contiguous")}),
        Check("wanted-gradients", "a missing or unwanted gradient if only some tensors require one", {
            "wanted": _values("wanted", "all")}),
        Check("modes", "a wrong result under no_grad, inference_mode, eval and autocast", {
            "steps": _programs("call:no_grad", "call:inference", "eval", "call:autocast")}),
        Check("several-calls", "state that one call leaves to another, and outputs that a later call overwrites", {
            "steps": _programs("tokens", "backward:twice", "second", "copy")}),
        Check("changed-weights", "a call that ignores parameters that were updated, loaded, copied or replaced", {
            "steps": _programs("update", "load", "to", "copy", "init")}),
        Check("state-dict", "a state dict that does not hold the parameters, or does not load", {
            "steps": _programs("load", "save")}),
        Check("saved-tensors", "a wrong backward if hooks move saved tensors, or if activations are checkpointed", {
            "steps": _programs("call:hooks", "call:checkpoint", "call:reentrant", "backward:twice")}),
        Check("repeated", "a result that is wrong now and then, or after many calls", {
            "steps": (("repeat",),), "num_tokens": (1, 3, 33), "n_routed_experts": (1, 2, 4),
            "n_activated_experts": (1, 2), "dim": (1, 8, 33), "moe_inter_dim": (1, 8, 33), "wanted": ("all",)}),
    )
}  # fmt: skip


def axes_of(check: str | None, dtypes: Sequence[str], on_ranks: bool = False) -> Axes:
    """Return the axes of a check (None: of the whole space) in some dtypes, for one process or for ranks."""
    axes = dict(RANK_AXES if on_ranks else AXES) | {"dtype": tuple(dtypes)}
    return axes | (dict(CHECKS[check].axes) if check is not None else {})


@dataclass(frozen=True)
class Search:
    """A search at random in the axes of a check, for some seconds."""

    seconds: float
    seed: int
    check: str | None
    dtypes: tuple[str, ...]
    on_ranks: bool = False

    @property
    def text(self) -> str:
        """What a job's `check` says."""
        words = (SEARCH, f"{self.seconds:g}", str(self.seed), self.check or "-", ",".join(self.dtypes))
        return " ".join((*words, "ranks" if self.on_ranks else "alone"))

    @classmethod
    def parse(cls, text: str) -> "Search":
        """Return the search of a job's `check`."""
        _, seconds, seed, check, dtypes, where = text.split()
        named = None if check == "-" else check
        return cls(float(seconds), int(seed), named, tuple(dtypes.split(",")), where == "ranks")

    @property
    def axes(self) -> Axes:
        return axes_of(self.check, self.dtypes, self.on_ranks)


def covering_jobs(
    backend: str, check: str | None = None, dtypes: Sequence[str] = DTYPES, seed: int = 0, on_ranks: bool = False
) -> list[Job]:
    """Return a job for every covering case; on ranks, with every dispatcher."""
    cases = covering(axes_of(check, dtypes, on_ranks), seed)
    dispatchers = DISPATCHERS if on_ranks else ("local",)
    return [case_job(backend, trial, dispatcher) for trial in cases for dispatcher in dispatchers]


def case_job(backend: str, trial: Trial, dispatcher: str = "local") -> Job:
    """Return the job that tries one trial."""
    return Job(case=trial.case, backend=backend, dispatcher=dispatcher, check=trial.text)


def command(job: Job, trial: str) -> str:
    """Return the command that tries the trial of a text as the job tries it."""
    on = "" if job.dispatcher == "local" else f" --dispatcher {job.dispatcher}"
    return f"moebench parity {job.backend}{on} --case '{trial}'"


def search_job(backend: str, search: Search, dispatcher: str = "local") -> Job:
    """Return the job of a search."""
    trial = Trial(ep_size=2, n_routed_experts=2) if search.on_ranks else Trial()
    return Job(case=trial.case, backend=backend, dispatcher=dispatcher, check=search.text)
