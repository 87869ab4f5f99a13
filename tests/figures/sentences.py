"""The sentences of documents that quote figures, each with the function that computes its figures.

A sentence is a format string, and its figures are `{names}`. tests/test_figures.py fills in the figures and looks for
the sentence in the document. Line breaks do not matter. In README.md and docs/measured.md, the test also fails for a
number that is in none of these sentences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.figures import peers, quoted, ranks, rounds, scaled, training, two_gpus
from tests.figures.data import FOUR_GPUS, GPU, PEERS, PEERS_AGAIN, PROFILED, SYMM_MEM, TWO_GPUS, WAITING
from tests.figures.measured import MEASURED


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document with its figures as `{names}`, and the function that computes them."""

    document: str
    text: str
    figures: Callable[[], Mapping[str, Any]] = dict

    def rendered(self) -> str:
        return " ".join(self.text.format(**self.figures()).split())


README = (
    ("for {backends} backends of the Qwen3-30B-A3B expert layer", quoted.lines_of_the_picture),
    ("on one NVIDIA H200 (torch {torch}, {date}).", quoted.environment),
    (
        "{measured} jobs on {models} model shapes, all within their parity budgets.",
        lambda: quoted.counts(GPU),
    ),
    (
        "This run has {measured} jobs on three shapes, also with the layers of other libraries.",
        lambda: quoted.counts(PEERS),
    ),
    ("holds {measured} of {jobs} jobs,", lambda: quoted.counts(TWO_GPUS)),
    ("holds all {measured} jobs,", lambda: quoted.counts(FOUR_GPUS)),
    ("This run holds all {measured} jobs in three rounds", lambda: quoted.counts(SYMM_MEM)),
    ("dispatchers with the same engines in {measured} jobs.", lambda: quoted.counts(WAITING)),
    (
        """With `symm_mem`, `triton` was faster than `torch_mm` in all {all} cases measured. In {cases} cases, other
        dispatchers were measured too. The fastest of them took {low} to {high} times as long.""",
        two_gpus.fastest,
    ),
    (
        """A train step of 4096 tokens of Qwen3-30B-A3B with `triton` and `symm_mem` takes {ratio} times as long as a
        train step of AutoModel's layer ({low} to {high} over the rounds).""",
        two_gpus.of_automodel,
    ),
    (
        """A train step of NeMo AutoModel's layer takes {peer_automodel_torch_mm_low} to {peer_automodel_torch_mm_high}
        times as long as a train step of `triton`.""",
        rounds.others,
    ),
    (
        """on a shape with {many} experts, a train step of SonicMoE took {train0} times as long as a train step of
        `triton`. On two shapes with {few} experts, the two differed by at most {train_close}. A forward of SonicMoE
        took up to {forward_most} times as long as a forward of `triton`, and its train step took {peak_low} to
        {peak_high} more memory.""",
        peers.of_sonicmoe,
    ),
    (
        """a train step of SonicMoE takes {least} to {most} times as long as a train step of `triton` on three shapes,
        and {qwen30b} and {qwen235b} times as long on the layers of two models, each in three rounds.""",
        rounds.sonicmoe,
    ),
    ("in one round of {measured} jobs.", lambda: quoted.counts(PEERS_AGAIN)),
    ("This run has {jobs} jobs of `peers`: many tokens in {done} of {asked} rounds of jobs,", rounds.counted),
    ("This run has {jobs} train steps of `peers`, measured {done} times in all,", rounds.counted_train),
    ("This run has {jobs} jobs of `peers`, measured {done} times in all:", rounds.counted_both),
    ("dispatchers in {measured} of {jobs} jobs, with profiles.", lambda: quoted.counts(PROFILED)),
    ("This run has train steps in {contexts} contexts of training,", training.run),
    (
        """`triton` was the fastest backend of this project in all {cases} cases in which another backend was measured
        beside it.""",
        quoted.fastest,
    ),
    (
        """For up to 2048 tokens of Qwen3-30B-A3B with uniform routing, the forward of `torch_mm` takes {low} to {high}
        times as long as the forward of `triton`. For 16384 tokens, the forward of `torch_mm` takes {forward} times as
        long and its train step {train} times as long.""",
        quoted.torch_mm_takes,
    ),
    (
        """With about a thousand tokens for each expert, `gmm` and `te` take {wide_low} to {wide_high} times as long as
        `triton` on shapes with few, wide experts, and {qwen_low} to {qwen_high} times as long on the 128 experts of
        Qwen3-30B-A3B. With fewer tokens for each expert, `gmm` and `te` take up to {fewer_most} times as long as
        `triton`.""",
        quoted.libraries_take,
    ),
    ("FP8 through Transformer Engine was slower than `torch_mm` in every case measured.", quoted.fp8_is_slower),
    (
        """On three shapes, the forward of `triton` took {forward_low} to {forward_high} times as long as the forward of
        these engines. A train step of `triton` took {train_low} to {train_high} times as long as theirs.""",
        quoted.own_fp8_takes,
    ),
    ("use `deepep` for a forward of up to {few} tokens per rank. |", ranks.dispatchers),
    (
        """`deepep` was the fastest in {fastest} of {cases} cases. With `te` and with `loop`, another dispatcher was
        the fastest. With `torch_mm` and {except} tokens, `allgather` and `deepep` are too close to call.""",
        ranks.dispatchers,
    ),
    ("use `alltoall` or `allgather` for a forward of {many} tokens per rank. |", ranks.dispatchers),
    ("`alltoall` and `allgather` were both faster than `deepep` in every case measured.", ranks.dispatchers),
    ("The fastest dispatcher depends on the case.", ranks.dispatchers_of_train_steps),
    (
        """`triton` took {low} to {high} times as long as `torch_mm` with the same dispatcher, and no other backend was
        faster than both by more than 0.1%.""",
        ranks.engines,
    ),
    ("on a GPU node the GPU suite, about {gpu}", quoted.minutes),
)

OTHERS = (
    (
        "docs/sweeps.md",
        """{two_low} to {two_high} GiB on each of two H200s (2026-11-23) and {four_low} to {four_high} GiB on each of
        four (2026-11-28).""",
        ranks.outside_torch,
    ),
    (
        "docs/sweeps.md",
        """The estimate for one call was {low} to {high} times the measured peak, and {median} times in the median,
        over {jobs} jobs on H200s (2026-11-23 and 2026-11-28).""",
        quoted.estimates,
    ),
    (
        "docs/running.md",
        "two H200s by up to {apart} (2026-11-23",
        quoted.gpus_differ,
    ),
    (
        "docs/concepts.md",
        "{alone} cases on one process, and {ranks} cases on two ranks for each dispatcher.",
        quoted.parity_cases,
    ),
    (
        "docs/gating.md",
        """(AMD EPYC, 2026-11-23) processes of the same code differ by {deviation}. That is the standard
        deviation in the median job; estimated from the quartiles it is {quartiles}. The simulation
        assumes nothing about processes: {rounds} rounds of the {jobs} jobs of `suites/quick.toml`""",
        quoted.spread_apart,
    ),
    (
        "docs/gating.md",
        "the processes of one round differ by {deviation} ({quartiles} by the quartiles).",
        lambda: quoted.spread([rounds.ravel() for rounds in quoted.recorded_together()]),
    ),
    (
        "docs/gating.md",
        "drawn from the {few} or {many} rounds of each job that `moebench ab HEAD HEAD quick` recorded",
        quoted.rounds_together,
    ),
)

SCALING = (
    (
        """From {small} to {large} records, five times as many, `show` takes {show} times as long, `report` {report},
        and `gate` {gate}. `list` takes {list} times as long, and `run --dry-run` {dry_run}.""",
        scaled.growth,
    ),
    ("each row needs {cost} ms of the supervisor's CPU time when {workers} workers answer at once", scaled.saturated),
    ("A supervisor that has a core for itself would therefore be saturated at {most} jobs/s.", scaled.saturated),
    ("For {jobs} jobs it needs {gib} GiB", scaled.saturated),
    (
        """In the results `h200-2026-11-23`, a job takes {mean} s on average, so 1,000 GPUs end {rate} such jobs in a
        second.""",
        scaled.thousand_gpus,
    ),
    (
        """The last line of the table has 1,000 workers with such jobs: the machine managed {measured} jobs/s, and the
        supervisor needed {cost} ms of CPU time for each, which is {share} of a core at {rate} jobs/s.""",
        scaled.thousand_gpus,
    ),
    ("So one supervisor is enough for 1,000 GPUs, if", dict),
    ("### What 1,000 GPUs need", dict),
)

SENTENCES = tuple(
    Sentence(*fields)
    for fields in (
        *(("README.md", *rest) for rest in README),
        *(("docs/measured.md", *rest) for rest in MEASURED),
        *(("docs/scaling.md", *rest) for rest in SCALING),
        *(("docs/training.md", *rest) for rest in training.SENTENCES),
        *OTHERS,
    )
)
