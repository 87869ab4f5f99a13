"""Selecting jobs: filters keep the jobs they describe, backends replace the axis, and a wrong word is reported."""

from pathlib import Path

import pytest

from moebench.errors import SweepError
from moebench.workload.case import Job
from moebench.workload.selection import add_backends, filter_jobs, select, select_backends
from moebench.workload.spec import parse_sweep
from tests.moebench.planned import write_sweep

SHAPE = "n_routed_experts = 8\nn_activated_experts = 2\ndim = 16\nmoe_inter_dim = 32\n"
GRID = f'[[grid]]\n{SHAPE}num_tokens = 4\nbackend = "loop"\n'


def jobs(body: str) -> list[Job]:
    return parse_sweep(f'name = "x"\n{body}', "x.toml").jobs()


def some_jobs() -> list[Job]:
    return jobs(
        f'[[grid]]\n{SHAPE}num_tokens = [4, 8, 16]\nbackend = ["loop", "torch_mm"]\nmasked_share = [0.0, 0.5]\n'
        'expert_bias = [true, false]\n[[grid]]\nmodel = "olmoe"\nnum_tokens = 4\nbackend = "loop"\n'
    )


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ([], 25),
        (["num_tokens=4"], 9),
        (["num_tokens=4,16"], 17),
        (["num_tokens!=4,16"], 8),
        (["num_tokens!=4", "num_tokens!=16"], 8),
        (["num_tokens<8"], 9),
        (["num_tokens<=8"], 17),
        (["num_tokens>8"], 8),
        (["num_tokens>=8"], 16),
        ([" num_tokens > 4 ", "num_tokens<1e1"], 8),
        (["masked_share=0.5"], 12),
        (["masked_share=0"], 13),
        (["masked_share>.4"], 12),
        (["expert_bias=true"], 12),
        (["backend=torch_mm, my_module:Mine"], 12),
        (["model=olmoe"], 1),
        (["model!=olmoe"], 24),
        (["dispatcher=local"], 25),
        (["rank_load=even"], 25),
        (["rank_load=uneven,one-empty"], 0),
        (["dtype=float32"], 0),
    ],
)
def test_filter(filters: list[str], count: int) -> None:
    assert len(filter_jobs(some_jobs(), filters)) == count


def test_filter_keeps_the_order_and_the_jobs() -> None:
    found = some_jobs()
    assert filter_jobs(found, ["num_tokens=16,4"]) == [job for job in found if job.case.num_tokens in (4, 16)]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("num_token=4", "there is no key 'num_token'; did you mean \"num_tokens\"? keys are mode, num_tokens, "),
        ("foo=4", "there is no key 'foo'; keys are mode, num_tokens, "),
        ("num_tokens", "must be KEY=V1,V2, "),
        ("=4", "must be KEY=V1,V2, "),
        ("num_tokens=", "'': must be a valid integer"),
        ("num_tokens=4,", "'': must be a valid integer"),
        ("num_tokens==4", "'=4': must be a valid integer"),
        ("num_tokens=4.5", "'4.5': must be a valid integer"),
        ("num_tokens<4,8", "'4,8' is not a number"),
        ("num_tokens<nan", "'nan' is not a number"),
        ("dtype<float32", "dtype is not a number; use = or !=; numbers are num_tokens, "),
        ("expert_bias>0", "expert_bias is not a number; "),
        ("dtype=float23", "'float23': must be one of float64, float32, bfloat16, float16; did you mean"),
        ("routing=zip", "'zip': must be one of uniform, "),
    ],
)
def test_wrong_filter(text: str, mistake: str) -> None:
    with pytest.raises(SweepError) as caught:
        filter_jobs(some_jobs(), ["dim=16", text, "bar=1"])
    first, second = caught.value.mistakes
    assert first.startswith(f"filter {text!r}: {mistake}")
    assert second.startswith("filter 'bar=1': there is no key 'bar'")


def test_selected_backends_replace_the_axis() -> None:
    grid = GRID.replace('"loop"', '["loop", "torch_mm"]').replace("num_tokens = 4", "num_tokens = [4, 8]")
    found = select_backends(jobs(f'{grid}ep_size = [1, 2]\ndispatcher = ["allgather", "alltoall"]\n'), ["m.n:A", "gmm"])
    assert [(job.case.ep_size, job.case.num_tokens, job.backend, job.dispatcher) for job in found] == [
        (ep_size, num_tokens, backend, dispatcher)
        for ep_size, dispatchers in ((1, ["local"]), (2, ["allgather", "alltoall"]))
        for num_tokens in (4, 8)
        for backend in ("m.n:A", "gmm")
        for dispatcher in dispatchers
    ]
    assert select_backends(found, ["gmm", "gmm"]) == [job for job in found if job.backend == "gmm"]
    assert select_backends(found, []) == found


def test_selected_backends_need_names() -> None:
    with pytest.raises(SweepError) as caught:
        select_backends(some_jobs(), ["a b", "loop", "a:b:c", ""])
    assert [line.partition(": must")[0] for line in caught.value.mistakes] == [
        "backend 'a b'",
        "backend 'a:b:c'",
        "backend ''",
    ]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_sweep().name


def test_selections_are_combined(sweep: str) -> None:
    jobs = select(sweep, ["my:Own", "loop"], ["num_tokens>8"], [])
    assert [(job.case.num_tokens, job.backend) for job in jobs] == [(24, "loop"), (24, "torch_mm"), (24, "my:Own")]
    alone = select(sweep, [], ["num_tokens>8"], [], only=["my:Own", "loop"])
    assert [(job.case.num_tokens, job.backend) for job in alone] == [(24, "my:Own"), (24, "loop")]
    chosen = select(sweep, [], [], [jobs[0].case.case_id])
    assert [job.backend for job in chosen] == ["loop", "torch_mm"]
    with pytest.raises(SweepError, match="--backend and --only exclude each other"):
        select(sweep, ["loop"], [], [], only=["my:Own"])


def test_an_added_backend_gets_the_dispatchers_of_each_case_and_no_job_is_twice() -> None:
    jobs = some_jobs()
    more = add_backends(jobs, ["my:Own", "loop"])
    assert [job for job in more if job.backend != "my:Own" and job in jobs] == jobs
    assert len(set(more)) == len(more)
    for case in {job.case for job in jobs}:
        dispatchers = {job.dispatcher for job in jobs if job.case == case}
        assert {job.dispatcher for job in more if job.case == case and job.backend == "my:Own"} == dispatchers


def test_every_case_that_is_not_there_is_named(sweep: str) -> None:
    with pytest.raises(SweepError) as refusal:
        select(sweep, [], [], ["x", "y"])
    assert len(refusal.value.mistakes) == 2


def test_a_case_that_the_filters_leave_out_is_not_chosen(sweep: str) -> None:
    case_id = select(sweep, [], ["num_tokens=8"], [])[0].case.case_id
    with pytest.raises(SweepError, match=f"no job is left by --filter 'num_tokens=24' --case {case_id}; "):
        select(sweep, [], ["num_tokens=24"], [case_id])
