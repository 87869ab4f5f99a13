"""A case replays a trace step by step, on each rank its own tokens, and its row says p50, p99, load and skew."""

import json
from pathlib import Path

import numpy as np
import pytest

from moebench.errors import InputsError
from moebench.results.frame import load
from moebench.run import request
from moebench.run.runfile import Asked
from moebench.run.start import start_run
from moebench.workload.case import Case
from moebench.workload.replay import MOST_STEPS, Replay, replay
from moebench.workload.traces import digest
from tests.moebench.captured import FORMATS, LAYERS, ROUTING, TOKENS
from tests.sampled import FILE, sample


def case(**fields: object) -> Case:
    shape = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 8, "num_tokens": 6}
    return Case.model_validate({**shape, **fields})


def of(folder: Path, routing: str = "", **fields: object) -> Replay:
    return replay(case(routing=f"trace:{FORMATS['npz'](folder)}{routing}", **fields))


HEAD = """
name = "captured"
[policy]
interval_target = 0.9
time_cap_s = 20.0
"""
GRID = """
[[grid]]
num_tokens = 6
n_routed_experts = 8
n_activated_experts = 2
dim = 8
moe_inter_dim = 8
dtype = "float32"
backend = "loop"
"""


def test_a_step_is_a_batch_of_one_layer(tmp_path: Path) -> None:
    made = of(tmp_path)
    assert sorted(made.steps) == [(layer, batch) for layer in range(LAYERS) for batch in range(TOKENS // 6)]
    for step, (layer, batch) in enumerate(made.steps):
        assert made.indices_of(step, 0).tolist() == ROUTING[0, 6 * batch : 6 * batch + 6, layer].tolist()


def test_a_layer_can_be_chosen(tmp_path: Path) -> None:
    assert {layer for layer, _ in of(tmp_path, "#layer=2").steps} == {2}
    with pytest.raises(InputsError, match="has no layer 7; it has 0, 1, 2"):
        of(tmp_path, "#layer=7")


def test_a_rank_reads_its_own_tokens_and_more_ranks_share_them(tmp_path: Path) -> None:
    """Four ranks on a trace of two: ranks 0 and 2 take turns on the tokens of the trace's rank 0."""
    made = of(tmp_path, ep_size=4)
    for step, (layer, batch) in enumerate(made.steps):
        for rank in range(4):
            first = (2 * batch + rank // 2) * 6
            assert made.indices_of(step, rank).tolist() == ROUTING[rank % 2, first : first + 6, layer].tolist()
    assert len(made.steps) == LAYERS * (TOKENS // 12)
    assert sum(made.rows().sum(axis=1)) == len(made.steps) * 4 * 6 * 2


def test_a_short_trace_repeats(tmp_path: Path) -> None:
    made = of(tmp_path, num_tokens=2 * TOKENS + 1)
    assert len(made.steps) == LAYERS
    layer = made.steps[0][0]
    rows = [*range(TOKENS), *range(TOKENS), 0]
    assert made.indices_of(0, 1).tolist() == ROUTING[1, rows, layer].tolist()


def test_many_steps_are_spread_evenly(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.tile([[0, 1], [2, 3]], (5 * MOST_STEPS, 1)))
    made = replay(case(routing=f"trace:{tmp_path / 'long.npy'}", num_tokens=1))
    batches = sorted(batch for _, batch in made.steps)
    assert len(batches) == MOST_STEPS
    assert (batches[0], batches[-1]) == (0, 10 * MOST_STEPS - 1)
    assert max(np.diff(batches)) - min(np.diff(batches)) <= 1


def test_the_step_with_the_fewest_experts_is_first(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", [[0, 1], [2, 3], [4, 5], [4, 5], [6, 7], [0, 1]])
    made = replay(case(routing=f"trace:{tmp_path / 'a.npy'}", num_tokens=2))
    assert made.steps == ((0, 1), (0, 2), (0, 0))


def test_the_columns_are_those_of_the_steps(tmp_path: Path) -> None:
    """Two steps on two ranks. The second has all rows on expert 3, of rank 1; a marked sample does not count."""
    np.save(tmp_path / "a.npy", [[3, 3], [0, 1]])
    made = replay(case(routing=f"trace:{tmp_path / 'a.npy'}", num_tokens=1, n_routed_experts=4, ep_size=1))
    assert made.rows().tolist() == [[0, 0, 0, 2], [1, 1, 0, 0]]
    found = made.columns([1, 0, 1, 0, 0], [1.0, 3.0, 2.0, 4.0, 90.0], [False, False, False, False, True])
    assert (found["num_steps"], found["expert_rows"], found["rank_rows"]) == (2, (1, 1, 0, 2), (4,))
    assert found["step_p50_ms"] == 2.5  # of the medians 3.5 and 1.5
    assert found["step_p99_ms"] == pytest.approx(1.5 + 0.99 * 2)
    assert found["expert_skew"] == pytest.approx((4 + 2) / 2)
    spread = replay(case(routing=f"trace:{tmp_path / 'a.npy'}", num_tokens=1, n_routed_experts=4, ep_size=2))
    assert spread.columns([0], [1.0], [True])["rank_rows"] == (2, 2)  # rank 0 reads [3, 3], rank 1 reads [0, 1]


def test_a_rank_without_a_layer_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", layer0_rank0=ROUTING[0, :, 0], layer0_rank1=ROUTING[1, :, 0], layer1=ROUTING[0, :, 1])
    with pytest.raises(InputsError, match="has no layer 1 of rank 1"):
        replay(case(routing=f"trace:{tmp_path / 'a.npz'}"))
    named = case(routing=f"trace:{digest(tmp_path / 'a.npz')}#layer=0")
    assert replay(named, str(tmp_path / "a.npz")).steps
    np.savez(tmp_path / "a.npz", layer0=ROUTING[0, :, 0])
    with pytest.raises(InputsError, match="changed since the run was planned"):
        replay(named, str(tmp_path / "a.npz"))


def test_the_sample_is_what_its_script_draws() -> None:
    with np.load(FILE) as shipped:
        assert {name: shipped[name].tolist() for name in shipped.files} == {
            name: array.tolist() for name, array in sample().items()
        }
    assert FILE.stat().st_size < 100_000


@pytest.mark.certify
def test_every_format_is_measured_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certify: bool
) -> None:
    """A run on a CPU: all formats agree on what was routed, and `#layer` leaves out the rest.

    `make test` measures one format on two ranks, `make certify` all: a group of two processes takes seconds a job.
    """
    monkeypatch.chdir(tmp_path)
    routings = []
    for number, make in enumerate(FORMATS.values()):
        (tmp_path / str(number)).mkdir()
        routings.append(f"trace:{make(tmp_path / str(number)).relative_to(tmp_path)}")
    layer = [f"{routings[0]}#layer=1"]
    on_ranks = (routings if certify else routings[3:4]) + layer
    grids = [
        f"{GRID}routing = {json.dumps(some)}\nep_size = {ep_size}\n"
        for ep_size, some in ((1, routings + layer), (2, on_ranks))
    ]
    (tmp_path / "x.toml").write_text("".join([HEAD, *grids]))
    plan = request.plan("x.toml", Asked(device="cpu"), out=Path("r"))
    assert not start_run(plan, lambda row: None).num_left
    frame = load(tmp_path / "r")
    assert len(frame) == len(routings) + 1 + len(on_ranks)
    of_layer = frame["routing"].str.endswith("#layer=1")
    assert set(frame["num_steps"]) == {4, 12}
    assert set(frame.loc[of_layer, "num_steps"]) == {4}
    for (ep_size, is_layer), rows in frame.groupby(["ep_size", of_layer]):
        routed = ROUTING[:ep_size, :, 1:2] if is_layer else ROUTING[:ep_size]
        load_E = np.bincount(routed.flatten(), minlength=8)
        assert {tuple(some) for some in rows["expert_rows"]} == {tuple(load_E)}
        assert {tuple(some) for some in rows["rank_rows"]} == {tuple(load_E.reshape(ep_size, -1).sum(axis=1))}
        assert (rows["step_p99_ms"] >= rows["step_p50_ms"]).all()
        assert rows["expert_skew"].nunique() == 1
    assert set(frame["status"]) == {"ok"}, set(frame["detail"])
