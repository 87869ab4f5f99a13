"""Advice comes from measured results, and says so where the results have no data."""

import json
import math

import pandas as pd
import pytest
from typer.testing import CliRunner

from moebench.cli.app import app
from moebench.errors import UsageError
from moebench.report.tables.advisetable import sentence
from moebench.results.advise import Advice, Candidate, advise, elsewhere, matching, question
from moebench.results.frame import load, to_frame
from moebench.results.published import default_folders
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, family, ok

SHAPE = "e8k2d256i512"  # a model that tests.moebench.drawn defines


def ask(rows: list[Record], num_tokens: int, **more: object) -> Advice:
    (advice,) = advise(to_frame(rows), question(SHAPE, num_tokens, **more))
    return advice


def by_label(advice: Advice) -> dict[str, Candidate]:
    return {one.label: one for one in advice.candidates}


def test_what_was_measured_at_the_count_is_taken_as_it_is() -> None:
    rows = [ok(case(256), "gmm", 2.0, peak_memory_bytes=7), ok(case(256), "te", 5.0), ok(case(512), "te", 1.0)]
    advice = ask(rows, 256)
    assert [one.label for one in advice.candidates] == ["gmm", "te"]
    best = advice.candidates[0]
    assert (best.time_ms, best.time_ms_low, best.time_ms_high) == pytest.approx((2.0, 1.8, 2.4))
    assert (best.peak_memory_bytes, best.measured_at, best.is_interpolated) == (7, (256,), False)
    assert advice.times_the_next == pytest.approx(2.5)
    assert not advice.is_close
    assert (
        sentence(advice)
        == "Take gmm: it is 2.50 times as fast as te, the second fastest. It takes 2.000 ms, peak memory 7 B."
    )


def test_between_neighbours_times_follow_a_line_in_logarithms() -> None:
    rows = [ok(case(count), "gmm", count**0.5, peak_memory_bytes=count**2) for count in (64, 256, 1024)]
    found = by_label(ask(rows, 512))["gmm"]
    assert found.measured_at == (256, 1024)
    assert found.is_interpolated
    assert found.time_ms == pytest.approx(512**0.5)
    assert found.peak_memory_bytes == pytest.approx(512**2)


@pytest.mark.parametrize(
    ("counts", "asked"), [((128, 256), 257), ((128, 256), 64), ((16, 256), 64), ((0, 128), 64), ((512,), 64)]
)
def test_nothing_is_extrapolated_and_no_wide_gap_bridged(counts: tuple[int, ...], asked: int) -> None:
    advice = ask([ok(case(count), "gmm", 1.0) for count in counts], asked)
    assert advice.candidates == ()
    assert advice.left_out["gmm"] == f"measured at {' and '.join(map(str, counts))} tokens"


def test_who_is_wrong_or_cannot_is_left_out_with_the_reason() -> None:
    rows = [
        *(row for name in ("gmm", "te") for row in family(name)),
        bad(case(512), Status.oom, "te", detail="out of memory\nmore"),
    ]
    advice = ask(rows, 512)
    assert by_label(advice).keys() == {"gmm"}
    assert advice.left_out == {"te": "oom: out of memory"}
    assert sentence(advice).startswith("gmm is the only backend")


def test_the_newest_run_counts() -> None:
    old, new = (
        ok(case(256), "gmm", time).model_copy(update={"run_id": run})
        for time, run in ((1.0, "20260101-a"), (3.0, "20261101-a"))
    )
    (advice,) = advise(pd.concat([to_frame([new]), to_frame([old])]), question(SHAPE, 256))
    assert advice.candidates[0].time_ms == 3.0
    assert advice.candidates[0].run_ids == ("20261101-a",)


def test_dispatchers_and_settings_are_told_apart() -> None:
    rows = [
        ok(case(256, ep_size=2), "te", 2.0, "deepep"),
        ok(case(256, ep_size=2), "te", 1.0, "alltoall"),
        ok(case(256, ep_size=2, rank_load="uneven"), "te", 0.5, "deepep"),
        *(ok(case(256, **other), "te", 0.1) for other in ({}, {"mode": "train"}, {"routing": "zipf"})),
        *(ok(case(256, ep_size=2, **other), "te", 0.1) for other in ({"dtype": "float32"}, {"expert_bias": True})),
    ]
    advice = ask(rows, 256, ep_size=2)
    assert [(one.label, one.dispatcher, one.time_ms) for one in advice.candidates] == [
        ("te+alltoall", "alltoall", 1.0),
        ("te+deepep", "deepep", 2.0),
    ]


def test_a_small_advantage_is_none() -> None:
    tight = {"time_ms_low": 1.0, "time_ms_high": 1.0}
    for second, is_close in ((1.02, True), (1.05, False)):
        rows = [ok(case(256), "gmm", 1.0, **tight), ok(case(256), "te", second, time_ms_low=second, time_ms_high=2.0)]
        assert ask(rows, 256).is_close is is_close
    overlapping = [ok(case(256), "gmm", 1.0, time_ms_high=1.3), ok(case(256), "te", 1.25, time_ms_low=1.2)]
    assert ask(overlapping, 256).is_close
    assert "too close to call" in sentence(ask(overlapping, 256))


def test_machines_are_advised_apart() -> None:
    rows = [ok(case(256), "gmm", 1.0), ok(case(256), "te", 1.0, device="cpu", gpu=None)]
    found = advise(to_frame(rows), question(SHAPE, 256))
    assert {one.machine.partition(",")[0]: one.candidates[0].label for one in found} == {
        "NVIDIA H200": "gmm",
        "CPU": "te",
    }


def test_a_preset_is_a_shape() -> None:
    frame = load("results/published/h200-2026-11-23")
    named, shaped = (matching(frame, question(name, 1)) for name in ("qwen3-30b-a3b", "e128k8d2048i768"))
    assert len(named) == len(shaped) > 10
    assert set(named["model"]) == {"qwen3-30b-a3b"}
    assert len(matching(frame, question("gpt-oss-20b", 1))) == 10, "bias and activation come with the preset"


def test_elsewhere_names_what_there_is() -> None:
    frame = to_frame([*family("gmm", mode="train"), *family("gmm", dim=64)])
    assert elsewhere(frame, question(SHAPE, 256, dtype="float32")) == [
        "bfloat16 train uniform EP 1 even",
    ]
    assert elsewhere(frame, question("olmoe", 256)) == ["e8k2d256i512", "e8k2d64i512"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "qwen3-30b"}, 'did you mean "qwen3-30b-a3b"'),
        ({"model": "e2k4d8i8"}, "n_activated_experts = 4 exceeds n_routed_experts = 2"),
        ({"model": SHAPE, "num_tokens": -1}, "--num-tokens -1: "),
        ({"model": SHAPE, "mode": "fwd"}, "--mode fwd: "),
        ({"model": SHAPE, "ep_size": 3}, "does not divide by ep_size = 3"),
    ],
)
def test_what_cannot_be_asked(asked: dict, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        question(**{"num_tokens": 8, **asked})
    assert message in str(refusal.value)


# The command reads the committed results


def run(*arguments: str):
    return CliRunner().invoke(app, ["advise", *arguments])


def test_the_committed_results_are_asked_by_default() -> None:
    assert "h200-2026-11-23" in {path.name for path in default_folders()}
    done = run("--model", "qwen3-30b-a3b", "--num-tokens", "4096", "--json")
    assert done.exit_code == 0, done.output
    (advice,) = json.loads(done.output)["advice"]
    frame = load("results/published/h200-2026-11-23")
    rows = matching(frame, question("qwen3-30b-a3b", 1)).query("num_tokens in (2048, 8192)")
    times = rows.pivot_table(index="backend", columns="num_tokens", values="time_ms").dropna()
    expected = (times[2048] * times[8192]).map(math.sqrt).sort_values()
    assert advice["backend"] == expected.index[0]
    between = {one["backend"]: one["time_ms"] for one in advice["candidates"] if one["backend"] in expected.index}
    assert list(between) == list(expected.index)
    assert between == pytest.approx(dict(expected))
    assert all(one["is_interpolated"] for one in advice["candidates"])
    assert advice["times_the_next"] == pytest.approx(expected.iloc[1] / expected.iloc[0])


def test_four_ranks_are_asked_like_one() -> None:
    """The answer is the fastest backend and dispatcher that was measured at just this count, on four GPUs."""
    done = run("--model", "qwen3-30b-a3b", "--num-tokens", "4096", "--ep-size", "4", "--json")
    assert done.exit_code == 0, done.output
    (advice,) = json.loads(done.output)["advice"]
    frame = load("results/published/h200-ep4-2026-11-28").query("num_tokens == 4096 and model == 'qwen3-30b-a3b'")
    first, second, *_ = frame.query("mode == 'forward'").sort_values("time_ms").to_dict("records")
    assert advice["backend"] == f"{first['backend']}+{first['dispatcher']}"
    assert advice["times_the_next"] == pytest.approx(second["time_ms"] / first["time_ms"])
    assert {tuple(one["measured_at"]) for one in advice["candidates"]} == {(4096,)}
    assert advice["left_out"] == {}


def test_of_two_runs_of_one_workload_the_newer_answers() -> None:
    """Both runs of `peers` measured it. A backend that only the older run measured stays in the answer."""
    done = run("--model", "e128k8d2048i768", "--num-tokens", "16384", "--mode", "train", "--json")
    (advice,) = json.loads(done.output)["advice"]
    runs = {one["backend"]: one["run_ids"] for one in advice["candidates"]}
    assert runs["triton"] == runs["peer_sonicmoe"] == ["20261128-172013-peers"]
    assert [name.partition("-")[0] for name in runs["loop"]] == ["20261123"]


def test_the_table_is_read_in_80_columns() -> None:
    done = run("--model", "qwen3-30b-a3b", "--num-tokens", "4096", "--ep-size", "2", "--mode", "train")
    assert done.exit_code == 0
    for word in ("torch_mm+deepep", "H200", "GiB", "te+allgather"):
        assert word in done.output.replace("\n", "") or word in "".join(done.output.split())
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--model", "deepseek-v3", "--num-tokens", "100"], 3),
        (["--model", "glm-4.5-air", "--num-tokens", "4096"], 3),
        (["--model", "kimi-k2", "--num-tokens", "2048", "--mode", "train"], 0),
    ],
)
def test_no_data_near_is_an_exit_code(arguments: list[str], code: int) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    assert ("no data near" in done.stderr) == (code == 3)
