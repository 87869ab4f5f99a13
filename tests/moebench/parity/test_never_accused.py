"""No case accuses a right backend.

`make test` tries right backends on a sample of the covering cases. `make certify` tries 300 random variants, which
differ in the order and the dtype of sums and in the place of the routing weight, for ten seconds each.
"""

import importlib
import inspect
import itertools
import random
import time

import pytest
import torch

from experts.registry import Backend
from moebench.measure import trials
from moebench.measure.cache import Workload
from moebench.measure.trials import Trier
from moebench.parity.checks import case_job
from moebench.parity.space.trial import Trial
from tests.moebench.faultbench import covering_cases

hooked, right, coarse = (importlib.import_module(name) for name in ("hooked", "right", "coarse"))
BUILT_IN = ("loop", "torch_mm", "loop_lora", "torch_mm_lora")
RIGHT = {**{name: name for name in BUILT_IN}, "Hooked": "hooked:Hooked"} | {
    name: f"{module.__name__}:{name}"
    for module in (coarse, right)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "stacked_grads")
}
#: The seconds for which `make certify` tries a variant, and the number of variants.
VARIANT_S, VARIANTS = 10.0, 300
SAMPLE = 10


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.certify(share=0.5)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_backend_passes_a_sample_of_the_covering_cases(name):
    """The sample is of the cheaper half of the cases. Each backend has a sample of its own."""
    cases = covering_cases()
    sample = random.Random(name).sample(cases[: len(cases) // 2], SAMPLE)
    failure = Trier(case_job(RIGHT[name], Trial()), Workload(torch.device("cpu"))).first_failure(sample)
    assert failure is None, f"{failure.trial.text}: {failure.reason}"


#: The steps that change, save or replace a layer's parameters. Their order decides what a state dict must hold.
PARAMETER_STEPS = (
    *("update", "update:data", "update:replace", "to", "load", "load:prefix", "load:assign", "load:dtype"),
    *("init", "save", "strict", "copy", "second", "switch", "backward"),
)


@pytest.mark.certify
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_passes_every_order_of_three_steps(certify, dtype):
    orders = list(itertools.product(PARAMETER_STEPS, repeat=3))
    if not certify:
        orders = [*random.Random(dtype).sample(orders, 150), ("to", "load", "save")]
    shape = {"num_tokens": 3, "n_routed_experts": 2, "dim": 3, "moe_inter_dim": 5, "dtype": dtype, "expert_bias": True}
    trials = (Trial(steps=(*steps, "save", "call", "backward"), **shape) for steps in orders)
    failure = Trier(case_job("loop", Trial()), Workload(torch.device("cpu"))).first_failure(trials)
    assert failure is None, f"{failure.trial.text}: {failure.reason}"


def variant(seed):
    """Return a right layer that differs from the loop in ways that the seed chooses."""
    draw = random.Random(seed)
    mixins = [
        draw.choice([None, right.ReversedExperts, right.SumLastChoiceFirst, hooked.Hooked]),
        draw.choice([None, right.RandomOrder]),
        draw.choice([None, right.WeightAfter]),
        draw.choice([None, right.PaddedTiles, right.RowChunks]),
        draw.choice([None, right.OwnGather]),
        draw.choice([None, right.SigmoidForms]),
        draw.choice([None, right.SplitKTwo, right.Float32Products, right.OwnProducts]),
    ]
    sizes = {"dim_chunk": draw.randint(1, 40), "inter_chunk": draw.randint(1, 40)}
    in_chunks = [_InChunks] if draw.random() < 0.5 else []
    chosen = [one for one in mixins if one not in (None, hooked.Hooked)]
    draw.shuffle(chosen)
    return type(f"Variant{seed}", (*chosen, *in_chunks, hooked.Hooked), sizes)


class _InChunks(hooked.Hooked):
    """Both projections are added up over chunks of the summed dimension, in float32 (float64 for float64)."""

    dim_chunk, inter_chunk = 8, 8

    def up(self, c, e, xr):
        """Return the first projection of the rows."""
        pairs = zip(xr.to(c.acc).split(self.dim_chunk, 1), c.gu[e].to(c.acc).split(self.dim_chunk, 0), strict=True)
        h = sum(x @ p for x, p in pairs).to(xr.dtype)
        return h if c.gub is None else h + c.gub[e]

    def down(self, c, e, a):
        """Return the second projection, without bias."""
        pairs = zip(a.to(c.acc).split(self.inter_chunk, 1), c.dn[e].to(c.acc).split(self.inter_chunk, 0), strict=True)
        return sum(x @ p for x, p in pairs)


@pytest.mark.certify
@pytest.mark.parametrize("seed", range(VARIANTS))
def test_a_random_variant_passes(certify, seed, monkeypatch):
    if not certify and seed >= 3:
        pytest.skip("three variants: `make certify` tries all")
    backend = Backend("variant", variant(seed), lambda device, config: None)
    monkeypatch.setattr(trials, "get_backend", lambda name: backend)
    cases = list(covering_cases())
    if not certify:
        cases = cases[: len(cases) // 2]
    random.Random(seed).shuffle(cases)
    trier, started = Trier(case_job("variant", Trial()), Workload(torch.device("cpu"))), time.monotonic()
    for trial in cases:
        if trier.tried.num_ok and time.monotonic() - started > (VARIANT_S if certify else 1.0):
            break
        failure = trier.play(trial)
        assert failure is None, f"{failure.trial.text}: {failure.reason}; {variant(seed).__mro__[1:]}"
