"""Advice comes from measured results, and says so where the results have no data."""

import json
import math

import pandas as pd
import pytest
from typer.testing import CliRunner

from experts import catalog
from moebench.cli.app import app
from moebench.errors import UsageError
from moebench.report.tables.advisetable import memory_lines, sentence, without_answer
from moebench.results.advise import Advice, Candidate, advise, elsewhere, matching, question
from moebench.results.frame import load, to_frame
from moebench.results.published import default_folders
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, family, ok

SHAPE = "e8k2d256i512"  # a model that tests.moebench.drawn defines


def ask(rows: list[Record], num_tokens: int, **more: object) -> Advice:
    (advice,) = advise(to_frame(rows), question(SHAPE, num_tokens, **more)).advices
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
    assert sentence(advice) == "Take gmm: 2.000 ms. te, the second fastest, takes 2.50 times as long (1.88 to 3.33)."


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
    assert advice.left_out == {}
    assert advice.unmeasured == {"gmm": f"{' and '.join(map(str, counts))} tokens"}


@pytest.mark.parametrize(
    ("status", "detail", "reason"),
    [
        (Status.oom, "17 GiB\nmore", "not supported: out of memory: 17 GiB"),
        (Status.unsupported, "needs SM100, this is SM90", "not supported: needs SM100, this is SM90"),
        (Status.unsupported, catalog.missing("torchao"), f"not installed: {catalog.missing('torchao')}"),
        (Status.unsupported, catalog.missing("deep_ep", OSError("x")), "not installed: deep_ep does not import (x)"),
        (Status.mismatch, "output", "wrong: mismatch: output"),
        (Status.crash, "SIGSEGV", "wrong: crash: SIGSEGV"),
    ],
)
def test_who_is_left_out_has_one_of_three_words(status: Status, detail: str, reason: str) -> None:
    measured = {"parity_worst": 2.0} if status is Status.mismatch else {}
    rows = [*(row for name in ("gmm", "te") for row in family(name)), bad(case(512), status, "te", **measured)]
    rows[-1] = rows[-1].model_copy(update={"detail": detail})
    advice = ask(rows, 512)
    assert by_label(advice).keys() == {"gmm"}
    assert advice.left_out["te"].startswith(reason)
    assert advice.unmeasured == {}
    assert sentence(advice).startswith("gmm is the only backend")
    first, *_ = without_answer(advice, question(SHAPE, 512))
    assert first == f"left out, {reason.partition(':')[0]}: te"


def test_who_took_too_long_is_not_called_wrong() -> None:
    advice = ask([*family("gmm"), bad(case(512), Status.timeout, "te", detail="no result in 3 s")], 512)
    assert advice.left_out == {}
    assert advice.unmeasured == {"te": "no result within the time: no result in 3 s"}


def test_places_are_shared_by_who_is_too_close_to_the_first_of_the_place() -> None:
    times = {"a": 1.0, "b": 1.02, "c": 1.04, "d": 2.0, "e": 2.05}
    rows = [ok(case(256), name, time_ms, time_ms_low=time_ms, time_ms_high=time_ms) for name, time_ms in times.items()]
    assert ask(rows, 256).places == (1, 1, 3, 4, 4)
    assert "Take a or b: about 1.000 ms, too close to call." in sentence(ask(rows, 256))


def test_memory_is_a_sum_of_weights_pass_and_optimizer() -> None:
    """A layer of 8 experts with dim 256 and inter 512 has 8·3·256·512 = 3 Mi weights: 6 MiB in bfloat16."""
    mib = 2**20
    rows = [ok(case(256), "gmm", 1.0, peak_memory_bytes=2 * mib)]
    rows += [ok(case(256, mode="train"), "gmm", 3.0, peak_memory_bytes=9 * mib)]
    (one,) = ask(rows, 256).candidates
    assert (one.weight_bytes, one.pass_bytes, one.adam_bytes, one.step_bytes) == (6 * mib, 8 * mib, 36 * mib, 51 * mib)
    assert list(memory_lines(one)) == [
        "memory with gmm: weights 6.00 MiB + 2.00 MiB for the pass = 8.00 MiB",
        (
            "a train step with Adam in float32: weights 6.00 MiB + 9.00 MiB for forward, backward and gradients + "
            "36.0 MiB for Adam = 51.0 MiB"
        ),
    ]
    (alone,) = ask(rows[:1], 256).candidates
    assert len(list(memory_lines(alone))) == 1, "no train step was measured, so nothing is said of one"


def test_the_train_step_is_that_of_the_same_machine() -> None:
    rows = [ok(case(256), "gmm", 1.0), ok(case(256, mode="train"), "gmm", 3.0, device="cpu", gpu=None)]
    (one,) = ask(rows, 256).candidates
    assert math.isnan(one.train_peak_bytes)


def test_the_newest_run_counts() -> None:
    old, new = (
        ok(case(256), "gmm", time).model_copy(update={"run_id": run})
        for time, run in ((1.0, "20260101-a"), (3.0, "20261101-a"))
    )
    (advice,) = advise(pd.concat([to_frame([new]), to_frame([old])]), question(SHAPE, 256)).advices
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
    found = advise(to_frame(rows), question(SHAPE, 256)).advices
    assert {one.machine.partition(",")[0]: one.candidates[0].label for one in found} == {
        "NVIDIA H200": "gmm",
        "CPU": "te",
    }


def test_a_backend_that_trains_adapters_is_no_candidate() -> None:
    """Its train step is another one, which is shorter."""
    rows = [ok(case(256, mode="train"), "torch_mm", 2.0), ok(case(256, mode="train"), "torch_mm_lora", 1.0)]
    assert [one.backend for one in ask(rows, 256, mode="train").candidates] == ["torch_mm"]


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
    frames = [load(f"results/published/{name}") for name in ("h200-2026-11-23", "h200-lora-2026-11-30")]
    found = pd.concat([matching(frame, question("qwen3-30b-a3b", 1)) for frame in frames])
    rows = found.query("num_tokens in (2048, 8192)")
    times = rows.pivot_table(index="backend", columns="num_tokens", values="time_ms", aggfunc="last").dropna()
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
    """Several runs measured it. A backend that only an older run measured stays in the answer."""
    done = run("--model", "e128k8d2048i768", "--num-tokens", "16384", "--mode", "train", "--json")
    (advice,) = json.loads(done.output)["advice"]
    runs = {one["backend"]: one["run_ids"] for one in advice["candidates"]}
    assert runs["triton"] == runs["peer_sonicmoe"] == ["20261201-023841-peers"]
    assert runs["triton_fp8"] == ["20261201-022602-fp8"]
    assert runs["gmm"] == ["20261201-021543-peers"]
    assert [name.partition("-")[0] for name in runs["loop"]] == ["20261123"]


def test_the_table_is_read_in_80_columns() -> None:
    done = run("--model", "qwen3-30b-a3b", "--num-tokens", "4096", "--ep-size", "2", "--mode", "train")
    assert done.exit_code == 0
    for word in ("torch_mm", "+deepep", "te", "+allgather", "H200,", "GiB"):
        assert word in done.output.split(), "no name is broken"
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


def test_a_block_says_nothing_about_experts() -> None:
    rows = [ok(case(256, subject="block:olmoe"), "gmm", 1.0), ok(case(256), "te", 5.0)]
    assert [one.label for one in ask(rows, 256).candidates] == ["te"]
    assert [one.label for one in ask(rows, 256, subject="block:olmoe").candidates] == ["gmm"]
