"""The sentences of documents that quote figures, each with the function that computes its figures.

A sentence is a format string, and its figures are `{names}`. tests/test_figures.py fills in the figures and looks for
the sentence in the document. Line breaks do not matter. In README.md and docs/measured.md, the test also fails for a
number that is in none of these sentences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.figures import kernels, peers, quoted, ranks, scaled, training, two_gpus
from tests.figures.data import FOUR_GPUS, GPU, PEERS, PEERS_AGAIN, PROFILED, SYMM_MEM, TWO_GPUS, WAITING


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
        """A train step of NeMo AutoModel's layer takes {low} to {high} times as long as a train step of `triton`.""",
        peers.of_automodel,
    ),
    (
        """on a shape with {many} experts, a train step of SonicMoE took {train0} times as long as a train step of
        `triton`. On two shapes with {few} experts, the two differed by at most {train_close}. A forward of SonicMoE
        took up to {forward_most} times as long as a forward of `triton`, and its train step took {peak_low} to
        {peak_high} more memory.""",
        peers.of_sonicmoe,
    ),
    (
        """a train step of SonicMoE takes {ratio0}, {ratio1} and {ratio2} times as long as a train step of `triton` on
        three shapes, in two or three rounds.""",
        peers.of_sonicmoe_in_rounds,
    ),
    ("in one round of {measured} jobs.", lambda: quoted.counts(PEERS_AGAIN)),
    ("train steps of `triton` and SonicMoE in {done} of {asked} jobs of three rounds,", peers.in_rounds),
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

MEASURED = (
    (
        """on NVIDIA H200 GPUs on {first}, {second}, {third} or {fourth}, with torch {torch}, CUDA {cuda} and Python
        {python}.""",
        quoted.environments,
    ),
    (
        """A train step of `torch_mm` takes {torch_mm0}, {torch_mm1} and {torch_mm2} of AutoModel's time on the three
        shapes. A train step of `triton` takes {triton0}, {triton1} and {triton2} of AutoModel's time.""",
        peers.of_automodel,
    ),
    (
        """A train step of SonicMoE takes {train0}, {train1} and {train2} of the time of `triton` on the three shapes,
        and a forward {forward0}, {forward1} and {forward2}. The peak of its train step is {peak_low} to {peak_high}
        higher.""",
        peers.of_sonicmoe,
    ),
    (
        """The times of `torch_mm` and `peer_transformers` differ by up to {close} between the runs, and AutoModel's
        times by up to {automodel}.""",
        peers.earlier_peers,
    ),
    (
        """In this run, the forward and the train step of SonicMoE together took {s0} s, {s1} s and {s2} s before they
        were timed""",
        peers.warmup_of_sonicmoe,
    ),
    (
        """after {measured} of {asked} jobs, so this is one round and not three. Two shapes have all five layers. Of
        the third shape, only {few} jobs were measured, and the table leaves it out. All {measured} jobs were `ok`. The
        worst parity error was {worst} of its budget.""",
        peers.again,
    ),
    (
        """a train step of SonicMoE takes {train0} and {train1} times as long as a train step of `triton`, and a
        forward {forward0} and {forward1} times as long. One round does not say how much of this the next process would
        repeat: unchanged layers differed by up to {close} between earlier runs.""",
        peers.of_sonicmoe_again,
    ),
    (
        """the peak of a train step of `triton` is {lower} MiB lower than two days before, which is the size of the
        gathered copy of the rows""",
        peers.no_copy,
    ),
    ("after {done} of {asked} jobs, so the last shape has two rounds.", peers.in_rounds),
    (
        """A train step of SonicMoE takes {ratio0}, {ratio1} and {ratio2} times as long as a train step of `triton`. On
        the last shape""",
        peers.of_sonicmoe_in_rounds,
    ),
    (
        """measured {train0}, {train1} and {train2} for train steps, and {forward0}, {forward1} and {forward2} for
        forwards""",
        peers.of_sonicmoe_once,
    ),
    ("The table has all kernels that take {shortest} ms or more,", lambda: {"shortest": kernels.SHORTEST_MS}),
    (
        """The products keep the tensor cores busy for {tensor_low} to {tensor_high}% of the cycles, and the gradients
        of the weights for {gradients_low} to {gradients_high}%. Under the products, the GPU lowers its clock to
        {clock_low} to {clock_high} GHz, as it does at its power limit. Under the other kernels of the table, the clock
        is {fast_low} to {fast_high} GHz. These other kernels, the activation with its backward and the sums over the
        experts of a token, reach {dram_low} to {dram_high}% of the bandwidth of DRAM.""",
        kernels.reached,
    ),
    (
        """A multiprocessor does at most {flops} operations per cycle, which gives the cycles that a tile keeps the
        tensor cores busy. `multiply_rows` leaves them without work for {low} to {high} further cycles per tile. These
        are nearly the same for a tile with {short} terms and for a tile with {long} terms, so they lie between the
        tiles. A tile with more terms hides them better: with {short} terms, the tensor cores are busy for
        {short_share}% of the cycles, and with {long} terms for {long_share}%. `grouped_gemm`, which gathers its rows,
        leaves the tensor cores without work for {gathered_low} to {gathered_high} cycles per tile.""",
        kernels.between_tiles,
    ),
    (
        """measured {measured} of {jobs} jobs on two other H200s in one round, and wrote a profile of each""",
        lambda: quoted.counts(PROFILED),
    ),
    ("The table has one train step of 4096 tokens of Qwen3-30B-A3B with `triton`, on rank 0:",),
    (
        """a timed step takes {low} to {high} times as long as its kernels without barriers. The rest is time in which
        the GPU waits for the host or for the other rank. With `symm_mem`, the step takes {after} times as
        long as its kernels: nothing waits for the host, so the host launches the kernels ahead. `symm_mem`
        has the most kernels, {kernels}, and `deepep` the fewest, {fewest},""",
        kernels.before_and_after,
    ),
    (
        """`all_to_all_vdev` takes {nccl_low} to {nccl_high} times as long as NCCL. Sort and `all_to_all_vdev` together
        take {ours_low} to {ours_high} times as long as the dispatch of `symm_mem`, although they do not send weights
        and choices. `all_to_all_vdev_2d` takes {flat_low} to {flat_high} times as long as `all_to_all_vdev`.""",
        kernels.of_vdev,
    ),
    (
        "measured all {measured} jobs, and all were `ok`. The worst parity error was {worst} of its budget.",
        lambda: quoted.counts(FOUR_GPUS),
    ),
    (
        """measured all {measured} jobs in three rounds of fresh processes. All jobs were `ok`, and the worst parity
        error was {worst} of its budget.""",
        lambda: quoted.counts(SYMM_MEM),
    ),
    (
        """None of the {jobs} jobs with `symm_mem` waits for the GPU. {reach} of them reached the target for the width
        of the interval ([how precise](#how-precise)), and the three rounds of a job differ by at most {apart}.""",
        two_gpus.precision,
    ),
    (
        """A train step of 4096 tokens of Qwen3-30B-A3B with `triton` and `symm_mem` takes {ratio} times as long as a
        train step of NeMo AutoModel's layer on DeepEP ({low} to {high} over the rounds). AutoModel's layer on
        Transformer Engine takes {slow} times as long as its other layer.""",
        two_gpus.of_automodel,
    ),
    (
        """for 4096 tokens, four forwards with a quarter of the tokens take {few} ms longer than one forward with all
        tokens, and for 16384 tokens {many} ms longer. Each part reads all weights again. The exposed communication,
        which is all that could be hidden, is {few_exposed} and {many_exposed} ms.""",
        two_gpus.pieces,
    ),
    (
        """With 1024 tokens of Qwen3-30B-A3B, its dispatch takes {dispatch} times as long as the raw call, and its
        combine {combine} times as long.""",
        two_gpus.small_messages,
    ),
    (
        """All {jobs} jobs wait for the GPU (flag `synchronises`), and only {reach} of them reached the target for
        the width of the interval""",
        ranks.waits,
    ),
    (
        "measured the matrix products of some cases {times}, and the two times differ by up to {apart} where the GPU",
        quoted.products_twice,
    ),
    ("From {rows} rows per expert on, each multiprocessor keeps one program", quoted.listed_from),
    (
        """With 128 experts, launching kernels on the host limits the speed of `te`: a forward of Qwen3-30B-A3B takes
        {t512} ms for 512 tokens and {t16384} ms for 16384.""",
        quoted.te_forward,
    ),
    (
        """its dispatch takes {two_low} to {two_high} ms longer than the raw call on two GPUs, and {four_low} to
        {four_high} ms longer on four.""",
        ranks.allgather_waits,
    ),
    (
        """measured {measured} of {jobs} jobs before its time budget ended. All {measured} were `ok`. The worst parity
        error was {worst} of its budget.""",
        lambda: quoted.counts(GPU),
    ),
    (
        """A job took {job_s} s on average: {timing_s} s of timing, {parity_s} s of parity, {ceilings_s} s of
        ceilings""",
        quoted.seconds_of_a_job,
    ),
    ("until half the width of the 95% confidence interval of its median time is at most 0.5% of the median,",),
    ("By that rule, {jobs} jobs that do not wait for the GPU did not converge.", quoted.not_converged),
    (
        """the middle half of the samples of the `gmm` forward of 16384 tokens of Qwen3-30B-A3B lies between {low}
        and {high} ms.""",
        quoted.speeds_of_the_host,
    ),
    ("for all jobs that take 0.1 ms or more:",),
    ("the first {jobs} jobs of a random order", quoted.two_rounds),
    (
        "differed between the two H200s by up to {apart}. Differences of at most 1 MiB are left out of this figure.",
        quoted.peaks_apart,
    ),
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
