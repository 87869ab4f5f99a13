"""The cases of expert parallelism. Every rank knows the tokens of all ranks and takes its own share.

With any dispatcher and number of ranks, the results of all ranks together must equal those of one process.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from experts import MoEConfig
from tests.experts.layers import BF16, F16, F32, F64, Batch, moe_config, random_batch

SIZES = (1, 2, 4)  # numbers of ranks with the same scenarios
LAUNCHED = (*SIZES, 8)


def _shares(*counts: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {len(count): count for count in counts}


#: Tokens of each rank, by the number of ranks. UNEVEN gives every rank a different number.
UNEVEN = _shares((13,), (9, 4), (6, 1, 4, 2))
EVEN = _shares((12,), (6, 6), (3, 3, 3, 3))
FIRST_WITHOUT = _shares((13,), (0, 13), (0, 5, 0, 8))
LAST_WITHOUT = _shares((13,), (13, 0), (7, 2, 4, 0))
ALL_WITHOUT = _shares((0,), (0, 0), (0, 0, 0, 0))

Change = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Scenario:
    """A layer of 12 experts, which each of SIZES divides, the tokens of all ranks, and each rank's number of tokens."""

    counts: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=lambda: UNEVEN)
    change: Change = lambda batch: batch
    lay_out: Change = lambda batch: batch  # gives a rank's share other strides, with the same values
    fields: tuple[tuple[str, Any], ...] = ()

    def config(self, dtype: torch.dtype) -> MoEConfig:
        fields = {"n_routed_experts": 12, "expert_bias": True, "dtype": dtype, "moe_inter_dim": 16}
        return moe_config(**{**fields, **dict(self.fields)})

    def batch(self, dtype: torch.dtype) -> Batch:
        return self.change(random_batch(self.config(dtype), num_tokens=sum(self.counts[1])))

    def share(self, dtype: torch.dtype, rank: int, size: int) -> Batch:
        """Return the tokens of one rank out of `size` ranks."""
        first, count = sum(self.counts[size][:rank]), self.counts[size][rank]
        return self.lay_out(self.batch(dtype).map(lambda tensor: tensor[first : first + count]))


def _masked(batch: Batch) -> Batch:
    """Mask some rows and fill them with NaN. With four ranks, the second rank has only masked rows."""
    mask = torch.ones_like(batch.token_mask)
    mask[[0, 3, 6, 12]] = False
    nan = {name: getattr(batch, name).masked_fill(~mask[:, None], torch.nan) for name in ("x", "weights", "grad")}
    return batch.with_(token_mask=mask, **nan)


def _all_masked(batch: Batch) -> Batch:
    nan = {name: torch.full_like(getattr(batch, name), torch.nan) for name in ("x", "weights", "grad")}
    return batch.with_(token_mask=torch.zeros_like(batch.token_mask), **nan)


def _to_the_experts(*experts: int) -> Change:
    def change(batch: Batch) -> Batch:
        chosen, tokens = torch.tensor(experts), torch.arange(len(batch.indices))
        indices = torch.stack([chosen[tokens % len(experts)], chosen[(tokens + 1) % len(experts)]], 1)
        return batch.with_(indices=indices)

    return change


def _some_of_none(batch: Batch) -> Batch:
    """Set −1 as the first choice, the last choice or all choices of some tokens. The weights of −1 are NaN."""
    indices = batch.indices.clone()
    indices[::3, 0] = -1
    indices[[1, 6, 9], 1] = -1
    indices[[1, 6]] = -1
    return batch.with_(indices=indices, weights=batch.weights.masked_fill(indices < 0, torch.nan))


def _twice(batch: Batch) -> Batch:
    indices = batch.indices.clone()
    indices[::2, 1] = indices[::2, 0]
    return batch.with_(indices=indices)


def _strided(batch: Batch) -> Batch:
    """Make every tensor strided: transposed with gaps, and the indices transposed without gaps."""

    def stride(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.int64:
            return tensor.t().contiguous().t()
        wide = torch.zeros(*(2 * size for size in reversed(tensor.shape)), dtype=tensor.dtype)
        view = wide.permute(*reversed(range(tensor.ndim)))[(slice(None, None, 2),) * tensor.ndim]
        return view.copy_(tensor)

    return batch.map(stride)


def _summed(batch: Batch) -> Batch:
    """Replace the gradient by the expanded one of `output.sum()`."""
    return batch.with_(grad=torch.ones((), dtype=batch.grad.dtype).expand(batch.grad.shape))


def _activation(name: str) -> Scenario:
    limits = (("activation_alpha", 1.3), ("activation_limit", 0.83), ("swiglu_limit", 0.71))
    return Scenario(fields=(("expert_activation", name), *limits))


ROUTINGS = {
    "even": Scenario(EVEN),
    "uneven": Scenario(UNEVEN),
    "first-rank-without-tokens": Scenario(FIRST_WITHOUT),
    "last-rank-without-tokens": Scenario(LAST_WITHOUT),
    "all-ranks-without-tokens": Scenario(ALL_WITHOUT),
    "all-to-the-first-rank": Scenario(change=_to_the_experts(0, 2, 1)),
    "all-to-the-last-rank": Scenario(change=_to_the_experts(11, 9, 10)),
    "all-to-one-expert": Scenario(LAST_WITHOUT, _to_the_experts(10)),
    "masked": Scenario(change=_masked),
    "all-masked": Scenario(change=_all_masked),
    "some-indices-minus-one": Scenario(change=_some_of_none),
    "one-expert-twice": Scenario(change=_twice),
    "strided": Scenario(lay_out=_strided),
    "gradient-of-a-sum": Scenario(change=_summed),
}
ACTIVATIONS = {name: _activation(name) for name in ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")}
OTHERS = {
    "without-bias": Scenario(fields=(("expert_bias", False),)),
    "weight-after-down": Scenario(fields=(("apply_router_weight_after_down", True),)),
}
#: Sizes at which a layout in memory could go wrong.
SIZED = {
    "one-choice": Scenario(fields=(("n_activated_experts", 1),)),
    "odd-dim": Scenario(fields=(("dim", 7),)),
}


def _of_eight(*counts: int, change: Change = lambda batch: batch, n_routed_experts: int = 16) -> Scenario:
    """Return a scenario of eight ranks. With 8 experts, each rank has one."""
    fields = (("n_routed_experts", n_routed_experts),)
    return Scenario({1: (sum(counts),), 8: counts}, change, fields=fields)


#: Scenarios that need eight ranks: most ranks have no tokens, or only one rank has rows.
OF_EIGHT = {
    "eight-uneven": _of_eight(3, 1, 0, 5, 2, 7, 4, 6),
    "eight-one-expert-per-rank": _of_eight(3, 1, 0, 5, 2, 7, 4, 6, n_routed_experts=8),
    "eight-fewer-tokens-than-ranks": _of_eight(0, 1, 0, 0, 1, 0, 1, 0, n_routed_experts=8),
    "eight-one-rank-with-tokens": _of_eight(0, 0, 0, 0, 0, 0, 13, 0),
    "eight-all-to-the-last-rank": _of_eight(0, 2, 1, 0, 4, 0, 3, 0, change=_to_the_experts(15, 14)),
    "eight-all-to-a-rank-without-tokens": _of_eight(1, 2, 0, 4, 0, 3, 5, 6, change=_to_the_experts(5, 4)),
    "eight-masked": _of_eight(1, 2, 0, 3, 1, 2, 3, 1, change=_masked),
    "eight-all-ranks-without-tokens": _of_eight(0, 0, 0, 0, 0, 0, 0, 0),
}
SCENARIOS = ROUTINGS | ACTIVATIONS | OTHERS | SIZED | OF_EIGHT


@dataclass(frozen=True)
class Case:
    """A scenario, its engine and dispatcher, and how the layer gets its weights (a name in parallel_layers.MAKERS)."""

    scenario: str
    engine: str
    dispatcher: str
    dtype: torch.dtype = F32
    made: str = "sharded"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.scenario, self.dispatcher, self.engine, dtype, self.made])

    @property
    def config(self) -> MoEConfig:
        return SCENARIOS[self.scenario].config(self.dtype)

    def batch(self) -> Batch:
        return SCENARIOS[self.scenario].batch(self.dtype)

    def share(self, rank: int, size: int) -> Batch:
        return SCENARIOS[self.scenario].share(self.dtype, rank, size)

    def ep_size(self, world_size: int) -> int:
        """Return how many ranks share the experts: all ranks, half of them, or 1 if each rank has all experts."""
        return {"halves": world_size // 2, "one": 1}.get(self.made.rpartition("-")[2], world_size)


LOADED = (
    *("named-by-dtensors", "dtensors", "from-meta", "assigned-to-meta"),
    *("plain-checkpoint", "assigned-checkpoint", "dtensor-checkpoint"),
)
SAVED = ("saved-by-loop", "saved-by-te", "saved-by-one", "saved-for-one", "saved-for-halves")


def cases(world_size: int) -> list[Case]:
    """Return the cases of a number of ranks, in the order in which they run."""
    if world_size == 1:
        return [
            Case(name, engine, "allgather") for name in ("uneven", "masked") for engine in ("loop", "torch_mm", "te")
        ]
    two = ("allgather", "alltoall")
    if world_size == 8:
        return [
            *(Case(name, engine, way) for name in OF_EIGHT for way in two for engine in ("loop", "torch_mm")),
            *(Case("eight-uneven", "loop", way, dtype) for way in two for dtype in (F64, BF16)),
            *(Case(name, "loop", "deepep", BF16) for name in OF_EIGHT),
            *(Case(name, "loop", "symm_mem") for name in OF_EIGHT),
            Case("eight-uneven", "torch_mm", "alltoall", made="saved-by-one"),
        ]
    grid = [
        Case(name, engine, way)
        for name in ROUTINGS | ACTIVATIONS | OTHERS
        for way in two
        for engine in ("loop", "torch_mm")
        # with four ranks, one engine and dispatcher is enough for the activations
        if not (world_size == 4 and name in ACTIVATIONS and (engine, way) != ("loop", "alltoall"))
    ]
    exact = [Case(name, "loop", way, F64) for name in ("uneven", "masked", "one-expert-twice") for way in two]
    coarse = [Case(name, e, way, BF16) for name in ("uneven", "masked") for way in two for e in ("loop", "torch_mm")]
    # the dispatchers are tested above; new here is a rank without rows, which does not call the library
    fakes = [
        Case(name, engine, way)
        for name in ("uneven", "all-ranks-without-tokens", "all-to-one-expert", "masked")
        for way in two
        for engine in ("gmm", "te")
    ]
    deep_ep = [Case(name, engine, "deepep", BF16) for name in ROUTINGS for engine in ("loop", "gmm", "te")]
    symm_mem = [
        *(Case(name, "loop", "symm_mem") for name in ROUTINGS),
        *(Case(name, engine, "symm_mem") for name in ("uneven", "masked") for engine in ("torch_mm", "gmm", "te")),
        *(Case("masked", "loop", "symm_mem", dtype) for dtype in (F64, BF16, F16)),
        *(Case(name, "torch_mm", "symm_mem") for name in ("all-to-one-expert", "weight-after-down", "without-bias")),
        *(Case(name, "loop", "symm_mem") for name in ("one-choice", "odd-dim")),
    ]
    loaded = [
        Case("uneven", engine, way, made=made)
        for made in LOADED + SAVED
        for engine, way in (("loop", "alltoall"), ("torch_mm", "allgather"), ("te", "alltoall"))
        if not (engine == "te" and made in ("named-by-dtensors", "dtensors"))  # its parameters are not DTensors
        and not (made == "saved-for-halves" and world_size < 4)
    ]
    return grid + exact + coarse + fakes + symm_mem + (deep_ep if world_size == 2 else []) + loaded


#: Facts of parallel_checkpoints.py that hold for any number of ranks.
CHECKPOINTS = (
    *("resharded", "trains_from_a_checkpoint", "loaded_from_other_layouts", "of_a_layer_on_another_mesh"),
    *("set_as_attributes", "state_dict_options"),
)

#: Facts of parallel_optimizer.py.
OPTIMIZER = ("clips_and_steps", "optimizer_resharded", "optimizer_of_te_resharded")

#: Facts that the ranks check themselves, by number of ranks: functions of parallel_facts.py, parallel_training.py,
#: parallel_memory.py, parallel_lora.py, parallel_checkpoints.py and parallel_optimizer.py.
FACTS = {
    1: ("refusals", "fresh_weights"),
    2: (
        "refusals",
        "without_deep_ep",
        "fresh_weights",
        "state_dict_tools",
        "frozen_parameters",
        "buffers",
        "replaced_buffer",
        "num_sms",
        "parameters_of_others",
        "equal_tokens",
        "autocast",
        "memory_may_start_anywhere",
        *("interleaved", "shared_buffer", "too_many_tokens", "overflow", "buffers_made_again", "other_layouts"),
        *("checkpointed", "copied", "gradients_on_one_rank", "frozen_in_inference", "fully_sharded"),
        *("with_adapters", "adapters_of_ranks", "adapters_under_fsdp"),
        *CHECKPOINTS,
        *OPTIMIZER,
    ),
    4: (
        "refusals",
        "fresh_weights",
        "state_dict_tools",
        "two_meshes",
        "fully_sharded_experts",
        "subgroups",
        "overflow",
        *CHECKPOINTS,
        *OPTIMIZER,
        *("spread_over_two_meshes", "replicas_are_saved_once"),
    ),
    8: (),
}
