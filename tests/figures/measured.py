"""The sentences of docs/measured.md that quote figures. See tests/figures/sentences.py."""

from tests.figures import gmm, kernels, peers, quoted, ranks, rounds, skewed, two_gpus
from tests.figures.data import FOUR_GPUS, GPU, PROFILED, SYMM_MEM

MEASURED = (
    (
        """on NVIDIA H200 GPUs from {first} to {last}, with torch {torch}, CUDA {cuda} and Python {python}.""",
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
        """A train step of SonicMoE takes {train0}, {train1} and {train2} times as long as a train step of `triton` on
        the three shapes, and a forward {forward0}, {forward1} and {forward2} times as long as a forward. In the run of
        the day before, a train step of SonicMoE took {before0}, {before1} and {before2} times as long. With 4096
        tokens, it took {qwen30b} times as long on the layer of Qwen3-30B-A3B and {qwen235b} times as long on that of
        Qwen3-235B-A22B.""",
        rounds.sonicmoe,
    ),
    (
        """In the train steps of the third shape, the clock of the GPU was at {triton} MHz under `triton` and at
        {peer_sonicmoe} MHz under SonicMoE, and at {before_triton} and {before_peer_sonicmoe} MHz in the run before.""",
        rounds.clocks,
    ),
    (
        """A train step of `torch_mm` takes {torch_mm_low} to {torch_mm_high} times as long as a train step of `triton`,
        one of AutoModel's layer {peer_automodel_torch_mm_low} to {peer_automodel_torch_mm_high} times, and one of
        transformers' layer {peer_transformers_low} to {peer_transformers_high} times.""",
        rounds.others,
    ),
    (
        """The products take {products_low} to {products_high} of the time of all kernels and copies. But in a timed
        call of `gmm`, the GPU works for only {forward_low} to {forward_high} of the time in a forward and {train_low}
        to {train_high} in a train step.""",
        gmm.waits,
    ),
    (
        """In the traces, {early_low} to {early_high} of the idle time comes before the first product. If the GPU were
        never idle, the products would take {products_low} to {products_high} of the call.""",
        gmm.waits,
    ),
    (
        """With one token, `triton` takes {now} instead of {before} ms, which is {over} times the time to read the
        weights.""",
        rounds.one_token,
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
        """the layer of `te` reaches {train} of the speed of its products in a train step of both shapes, and {forward0}
        and {forward1} in a forward. In a train step, its products reach {products0} and {products1} TFLOP/s, and the
        whole layer {layer0} and {layer1}. On another H200, the whole layer of `triton` reached {triton0} and
        {triton1} TFLOP/s""",
        peers.products_of_te,
    ),
    (
        """On the first shape, the products of `te` take {first_forward} (forward) and {first_train} (train) times as
        long with the sizes on the device as on the host, and on the second shape {second_forward} and {second_train}
        times.""",
        peers.by_place,
    ),
    (
        """In a forward, the other steps of the layer take {rest0} and {rest1} ms by the same study, and the products
        with sizes on the device {products0} and {products1} ms. Their sums are {sum0} and {sum1} ms, and the layer
        takes {layer0} and {layer1} ms. So nothing waits there. The steps that move rows run at {least} to {most} of
        the speed of a copy.""",
        peers.forward_of_te,
    ),
    (
        "Its layer reaches {train} in a train step of both shapes, and {forward0} and {forward1} in a forward.",
        peers.products_of_gmm,
    ),
    (
        """the times of `te` differ by at most {apart} from those of another process on the same GPU, which had `te`
        alone.""",
        peers.of_two_processes,
    ),
    (
        """timed `triton` and `torch_mm` in turns in one process on an H200, with {few}, {middle} and {many} tokens and
        three kinds of skewed routing""",
        skewed.counted,
    ),
    ("It measured all {cases} cases of the sweep.", skewed.counted),
    (
        """None of the {ratios} ratios is wholly above 1. The largest is {largest}, of a train step of gpt-oss-20b with
        {tokens} tokens and one-hot routing. The median is {forward} for forwards and {train} for train steps.""",
        skewed.ratios,
    ),
    ("the whole 95% interval of the ratio is above 1,",),
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
