"""Sweep files: what jobs they mean, and that a wrong one gets every mistake and no false one."""

import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moebench.case import ACTIVATIONS, DTYPES, Case, Job
from moebench.models import MODELS
from moebench.spec import (
    Policy,
    SweepError,
    SweepSpec,
    available_sweeps,
    filter_jobs,
    find_sweep,
    load_sweep,
    parse_sweep,
    select_backends,
)

REPOSITORY = Path(__file__).parents[2]
SUITES = sorted((REPOSITORY / "suites").glob("*.toml"))

SHAPE = "n_routed_experts = 8\nn_activated_experts = 2\ndim = 16\nmoe_inter_dim = 32\n"
GRID = f'[[grid]]\n{SHAPE}num_tokens = 4\nbackend = "loop"\n'


def sweep(body: str = GRID) -> SweepSpec:
    return parse_sweep(f'name = "x"\n{body}', "x.toml")


def jobs(body: str) -> list[Job]:
    return sweep(body).jobs()


def mistakes(text: str, origin: str = "x.toml") -> list[str]:
    with pytest.raises(SweepError) as caught:
        parse_sweep(text, origin)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    assert not [line for line in caught.value.mistakes if "\n" in line or not line.startswith(f"{origin}: ")]
    return [line.removeprefix(f"{origin}: ") for line in caught.value.mistakes]


# What a right file means


def test_grid_is_the_product_of_its_axes_and_the_sweep_their_union() -> None:
    found = jobs(
        f'{GRID}mode = ["forward", "train"]\ndtype = ["float32", "float64"]\n'
        f'[[grid]]\n{SHAPE}num_tokens = [4, 16]\nbackend = ["loop", "torch_mm"]\ndtype = "float32"\n'
    )
    what = {(job.case.num_tokens, job.case.mode, job.case.dtype, job.backend) for job in found}
    assert what == {
        *((4, mode, dtype, "loop") for mode in ("forward", "train") for dtype in ("float32", "float64")),
        *((tokens, "forward", "float32", backend) for tokens in (4, 16) for backend in ("loop", "torch_mm")),
    }
    assert len(found) == len(what) == 7  # the one in both grids is there once


def test_defaults_hold_unless_a_grid_sets_the_axis() -> None:
    found = jobs(
        f'[defaults]\ndtype = "float32"\nseed = [1, 2]\n{SHAPE}backend = "loop"\n'
        '[[grid]]\nnum_tokens = 4\n[[grid]]\nnum_tokens = 5\ndtype = "float64"\nseed = 3\n'
    )
    assert {(job.case.num_tokens, job.case.dtype, job.case.seed) for job in found} == {
        (4, "float32", 1),
        (4, "float32", 2),
        (5, "float64", 3),
    }


@pytest.mark.parametrize("model", MODELS)
def test_model_gives_the_shape(model: str) -> None:
    (job,) = jobs(f'[[grid]]\nmodel = "{model}"\nnum_tokens = 4\nbackend = "loop"\n')
    assert job.case.model == model
    assert {name: getattr(job.case, name) for name in MODELS[model]} == dict(MODELS[model])


def test_an_axis_left_out_has_the_default_of_a_case() -> None:
    (job,) = jobs(GRID)
    assert job == Job(
        case=Case(num_tokens=4, n_routed_experts=8, n_activated_experts=2, dim=16, moe_inter_dim=32), backend="loop"
    )


def test_whole_numbers_may_be_written_for_floats() -> None:
    (job,) = jobs(f"{GRID}activation_limit = 7\nmasked_share = 0\n")
    assert job == jobs(GRID)[0]
    assert isinstance(job.case.activation_limit, float)


def test_one_process_is_local_and_several_move_tokens() -> None:
    found = jobs(f'{GRID}ep_size = [1, 2]\ndispatcher = ["alltoall", "deepep"]\n')
    assert {(job.case.ep_size, job.dispatcher) for job in found} == {(1, "local"), (2, "alltoall"), (2, "deepep")}
    assert len(found) == 3
    assert {(job.case.ep_size, job.dispatcher) for job in jobs(f"{GRID}ep_size = [1, 2]\n")} == {
        (1, "local"),
        (2, "allgather"),
    }


def test_exclude_leaves_out_what_matches_all_its_keys() -> None:
    grid = f'[[grid]]\n{SHAPE}num_tokens = [4, 8, 16]\nbackend = ["loop", "torch_mm"]\n'
    found = jobs(f'{grid}[[exclude]]\nbackend = "torch_mm"\nnum_tokens = [4, 16]\n')
    assert {(job.case.num_tokens, job.backend) for job in found} == {
        (4, "loop"),
        (8, "loop"),
        (16, "loop"),
        (8, "torch_mm"),
    }


def test_exclude_matches_what_a_model_or_a_default_gives() -> None:
    grid = '[[grid]]\nmodel = ["olmoe", "gpt-oss-20b"]\nnum_tokens = 4\nbackend = "loop"\nep_size = [1, 2]\n'
    (job,) = jobs(f'{grid}[[exclude]]\nexpert_bias = true\nmode = "forward"\n[[exclude]]\ndispatcher = "allgather"\n')
    assert (job.case.model, job.dispatcher) == ("olmoe", "local")


def test_impossible_combination_that_is_excluded_is_no_mistake() -> None:
    grid = GRID.replace("n_routed_experts = 8", "n_routed_experts = [1, 8]")
    assert len(jobs(f"{grid}[[exclude]]\nn_routed_experts = 1\n")) == 1


def test_jobs_with_the_same_weights_stand_together_then_cases_then_backends() -> None:
    found = jobs(
        f'[[grid]]\n{SHAPE}num_tokens = [4, 8]\nbackend = ["loop", "torch_mm"]\ndtype = ["float32", "float64"]\n'
        f'seed = [0, 1]\nexpert_bias = [true, false]\n[[grid]]\n{SHAPE}num_tokens = [4, 8]\nbackend = "gmm"\n'
        'dtype = ["float32", "float64"]\nseed = [1, 0]\nexpert_bias = [false, true]\nmode = ["forward", "train"]\n'
    )
    runs = [(job.case.dtype, job.case.seed, job.case.expert_bias) for job in found]
    assert len(_without_repeats(runs)) == len(set(runs)) == 8
    cases = [job.case for job in found]
    assert len(_without_repeats(cases)) == len(set(cases))
    assert [job.backend for job in found if job.case == cases[0]] == ["loop", "torch_mm", "gmm"]


def _without_repeats(items: Sequence[object]) -> list[object]:
    return [item for index, item in enumerate(items) if index == 0 or item != items[index - 1]]


def test_policy_is_read_and_has_defaults() -> None:
    assert sweep().policy == Policy(interval_target=None, time_cap_s=None, timeout_s=300.0, l2="cold")
    spec = sweep(f'[policy]\ninterval_target = 0.02\ntime_cap_s = 1\ntimeout_s = 5.5\nl2 = "warm"\n{GRID}')
    assert spec.policy == Policy(interval_target=0.02, time_cap_s=1.0, timeout_s=5.5, l2="warm")


def test_trace_is_found_beside_the_sweep_and_can_be_opened_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "t.npy").touch()
    text = f'name = "x"\n{GRID}routing = ["trace:t.npy", "uniform"]\n[[exclude]]\nrouting = "uniform"\n'
    monkeypatch.chdir(tmp_path)
    for origin in ("suites/x.toml", str(tmp_path / "suites" / "x.toml")):
        (job,) = parse_sweep(text, origin).jobs()
        assert job.case.routing == "trace:suites/t.npy"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (job,) = parse_sweep(text, "../suites/x.toml").jobs()
    assert Path(job.case.routing.removeprefix("trace:")).is_file()


# What a wrong file is told: each of these has one mistake, and gets that one alone

OLMOE = GRID.replace(SHAPE, 'model = "olmoe"\n')
TWO_SEEDS = f"{GRID}seed = [0, 1]\n"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('name = "x"\ngrid = [1,\n[[grid]]\nfoo = 1', "line 3, column 3: '[[grid]]' is not TOML: "),
        ('name = "x"\ngrid = [1,', "end of document: is not TOML: "),
        ('name = "x"\nname = "y"\n', "line 2, column 11: 'name = \"y\"' is not TOML: Cannot overwrite a value; "),
        (GRID, 'name: is missing; add name = "quick"'),
        (f'name = "a b"\n{GRID}', 'name = "a b": must be letters, digits, ".", "_" and "-", a letter or digit first; '),
        (f'name = ".."\n{GRID}', 'name = "..": must be letters'),
        (f"name = 3\n{GRID}", "name = 3: must be letters"),
        (f'name = "x"\ndescription = "a\\nb"\n{GRID}', 'description = "a\\nb": must be one line of text; '),
        (f'name = "x"\ndescripton = ""\n{GRID}', 'descripton = "": there is no such key; did you mean "description"?'),
        (f'name = "x"\nfoo = 1\n{GRID}', "foo = 1: there is no such key; valid keys are name, description, policy, "),
        ('name = "x"', "grid: there is none; add [[grid]] with num_tokens, backend, and model or the shape axes"),
        ('name = "x"\ngrid = [1]', "grid = [1]: must be an array of tables; write [[grid]] above each one's keys"),
    ],
)
def test_wrong_top_level(text: str, mistake: str) -> None:
    (line,) = mistakes(text)
    assert line.startswith(mistake)


@pytest.mark.parametrize(
    ("body", "mistake"),
    [
        ("timeout = 3", 'policy.timeout = 3: there is no such key; did you mean "timeout_s"?'),
        ("interval_target = 2", "policy.interval_target = 2: must be less than 1; for example interval_target = 0.02"),
        ("interval_target = 0", "policy.interval_target = 0: must be greater than 0; "),
        ("time_cap_s = nan", "policy.time_cap_s = NaN: must be a"),
        ('timeout_s = "5"', 'policy.timeout_s = "5": must be a valid number; for example timeout_s = 300.0'),
        ('l2 = "cool"', 'policy.l2 = "cool": must be one of cold, warm; did you mean "cold"?'),
    ],
)
def test_wrong_policy(body: str, mistake: str) -> None:
    (line,) = mistakes(f'name = "x"\n[policy]\n{body}\n{GRID}')
    assert line.startswith(mistake)


def test_wrong_kind_of_table() -> None:
    assert mistakes(f'name = "x"\n[[policy]]\nl2 = "cold"\n{GRID}') == [
        'policy = [{"l2": "cold"}]: must be one table; write [policy] above its keys'
    ]
    (line,) = mistakes(f'name = "x"\n{GRID.replace("[[grid]]", "[grid]")}')
    assert line.endswith("must be an array of tables; write [[grid]] above each one's keys")


@pytest.mark.parametrize(
    ("axis", "mistake"),
    [
        ("num_tokns = 3", 'num_tokns = 3: there is no such key; did you mean "num_tokens"?'),
        (
            'dtype = ["float32", "float23"]',
            'dtype[1] = "float23": must be one of float64, float32, bfloat16, float16; d',
        ),
        ('dtype = "te_fp8"', 'dtype = "te_fp8": must be one of float64, '),
        ("seed = -1", "seed = -1: must be greater than or equal to 0; for example seed = 0"),
        ('seed = "1"', 'seed = "1": must be a valid integer; for example seed = 0'),
        ("seed = true", "seed = true: must be a valid integer; "),
        ("seed = [[1]]", "seed[0] = [1]: must be a valid integer; "),
        ("seed = 2026-11-01", 'seed = "2026-11-01": must be a valid integer; '),
        ("seed = []", "seed = []: an axis has at least one value; for example seed = [0]"),
        ("seed = [0, 2, 0]", "seed[2] = 0: stands in the list already; remove it"),
        ("masked_share = [0, 0.0]", "masked_share[1] = 0.0: stands in the list already; "),
        ("masked_share = 1.5", "masked_share = 1.5: must be less than or equal to 1; "),
        ("masked_share = true", "masked_share = true: must be a valid number; "),
        ("activation_limit = inf", "activation_limit = Infinity: must be a finite number; "),
        ('expert_bias = "yes"', 'expert_bias = "yes": must be a valid boolean; for example expert_bias = false'),
        ("expert_bias = 1", "expert_bias = 1: must be a valid boolean; "),
        ('expert_activation = "swigluai"', 'expert_activation = "swigluai": must be one of swiglu, swigluoai, quick_'),
        ('mode = "backward"', 'mode = "backward": must be one of forward, train; '),
        ('routing = "zip"', 'routing = "zip": must be one of uniform, balanced, one-hot, zipf[:s], empty[:share], '),
        (
            'dispatcher = "alltoal"',
            'dispatcher = "alltoal": must be one of local, allgather, alltoall, deepep; did you ',
        ),
        ('model = ["olmo"]', 'model[0] = "olmo": must be one of qwen3-30b-a3b, '),
    ],
)
def test_wrong_axis(axis: str, mistake: str) -> None:
    """In a grid, in the defaults and in an exclude: there with its place, once, and nothing else."""
    grid = GRID.replace(SHAPE, "") if axis.startswith("model") else GRID
    for place, text in {
        "grid[1]": f"{OLMOE}{grid}{axis}\n",
        "defaults": f"[defaults]\n{axis}\n{grid}{grid}",
        "exclude[0]": f"{GRID}seed = [0, 3]\nmasked_share = [0, 0.5]\n[[exclude]]\n{axis}\n",
    }.items():
        (line,) = mistakes(f'name = "x"\n{text}')
        assert line.startswith(f"{place}.{mistake}")


@pytest.mark.parametrize(
    ("body", "mistake"),
    [
        (
            GRID.replace('"loop"', '"a b"'),
            'grid[0].backend = "a b": must be a name, or "module:attribute" for a backend',
        ),
        (GRID.replace("num_tokens = 4\n", ""), "grid[0].num_tokens: is missing; add num_tokens = 128, here or in [def"),
        (
            GRID.replace("num_tokens", "num_tokns"),
            'grid[0].num_tokns = 4: there is no such key; did you mean "num_tokens"',
        ),
        (GRID + GRID.replace('backend = "loop"', ""), 'grid[1].backend: is missing; add backend = "loop", here or in'),
        (GRID.replace("\ndim = 16", ""), "grid[0].dim: is missing; add dim = 2048, here or in [defaults]"),
        (
            GRID.replace(SHAPE, ""),
            "grid[0]: there is no shape; add model, or n_routed_experts, n_activated_experts, dim,",
        ),
        (f"{OLMOE}dim = 4\n", "grid[0].dim: grid[0].model fixes it; remove one of the two"),
        (f"{OLMOE}dim = 4\n[[exclude]]\ndim = 4\n", "grid[0].dim: grid[0].model fixes it"),
        (f"[defaults]\nexpert_bias = true\n{OLMOE}{OLMOE}seed = 1", "defaults.expert_bias: grid["),
        (f'{GRID}routing = "trace:no.npy"\n', 'grid[0].routing = "trace:no.npy": there is no file '),
        (
            GRID.replace("n_routed_experts = 8", "n_routed_experts = [1, 8]") + "seed = [0, 1]\n",
            "grid[0]: n_activated_experts = 2 exceeds n_routed_experts = 1: ",
        ),
        (f"{TWO_SEEDS}ep_size = 3\n", "grid[0]: n_routed_experts = 8 does not divide by ep_size = 3: "),
        (
            f'{TWO_SEEDS}ep_size = [1, 2]\ndispatcher = ["local", "alltoall"]\n',
            'grid[0]: dispatcher = "local" at ep_size = 2: tokens must move between ranks; take allgather, ',
        ),
        (
            f'{GRID}[[exclude]]\nbackend = "torch_mm"\n',
            "exclude[0]: matches no job of this sweep; correct it or remove it",
        ),
        (f'{TWO_SEEDS}[[exclude]]\nseed = 0\n[[exclude]]\nseed = 1\ndtype = "float32"\n', "exclude[1]: matches no job"),
        (f"{GRID}[[exclude]]\n", "exclude[0]: a table without keys leaves out every job; "),
        (f"{GRID}[[exclude]]\nfoo = 1\n", "exclude[0].foo = 1: there is no such key; valid keys are num_tokens, "),
        (f"{TWO_SEEDS}[[exclude]]\nseed = [0, 1]\n", "exclude: every job is left out, the sweep is empty; "),
    ],
)
def test_wrong_grid_or_exclude(body: str, mistake: str) -> None:
    found = mistakes(f'name = "x"\n{body}')
    assert all(line.startswith(mistake) for line in found)
    assert len(found) == body.count("olmoe") or len(found) == 1


def test_every_mistake_is_in_one_answer() -> None:
    found = mistakes(
        'name = "a b"\n[policy]\nl2 = "hot"\n[defaults]\ndtpye = "float32"\n'
        f'{GRID}seed = [1, "2", -3]\nmode = "both"\n'
        '[[grid]]\nn_routed_experts = 6\nn_activated_experts = 8\ndim = "x"\nep_size = 4\n'
        f'{OLMOE}dim = 4\n[[exclude]]\nbackend = "gmm"\n[[exclude]]\ndtype = "float64"\n[[exclude]]\nseed = 1\n'
        "mod = 1\n"
    )
    assert [re.split(": must|;|: a token|: every", line)[0] for line in found] == [
        'name = "a b"',
        'policy.l2 = "hot"',
        'defaults.dtpye = "float32": there is no such key',
        'grid[0].seed[1] = "2"',
        "grid[0].seed[2] = -3",
        'grid[0].mode = "both"',
        'grid[1].dim = "x"',
        "grid[1].num_tokens: is missing",
        "grid[1].backend: is missing",
        "grid[1].moe_inter_dim: is missing",
        "grid[2].dim: grid[2].model fixes it",
        "exclude[2].mod = 1: there is no such key",
        "grid[1]: n_activated_experts = 8 exceeds n_routed_experts = 6",
        "grid[1]: n_routed_experts = 6 does not divide by ep_size = 4",
        # exclude[0] may mean grid[1]'s backend, exclude[1] the misspelled dtype: not yet known to be dead
    ]


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(SweepError(["a", "b"])))
    assert (error.mistakes, str(error)) == (["a", "b"], "a\nb")


# Finding files


def test_sweep_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_sweep("quick") == REPOSITORY / "suites" / "quick.toml"
    (tmp_path / "suites").mkdir()
    for name in ("suites/quick.toml", "suites/mine.toml", "other.toml"):
        (tmp_path / name).write_text(f'name = "x"\n{GRID}')
    assert find_sweep("quick") == Path("suites/quick.toml")
    assert find_sweep("mine") == Path("suites/mine.toml")
    assert find_sweep("other.toml") == Path("other.toml")
    assert {"quick", "mine", "gpu"} <= available_sweeps().keys()
    with pytest.raises(SweepError, match=r'quik: no such file.*did you mean "quick"\?; there are gpu, mine, quick'):
        find_sweep("quik")


def test_file_that_cannot_be_read_is_one_mistake(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'name = "\xe9"')
    for path in (tmp_path / "none.toml", tmp_path, latin):
        with pytest.raises(SweepError, match="cannot be read") as caught:
            load_sweep(path)
        assert len(caught.value.mistakes) == 1


# The suites of this repository


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suite_loads(path: Path) -> None:
    spec = load_sweep(path)
    found = spec.jobs()
    assert spec.name == path.stem
    assert spec.description
    assert 0 < len(found) <= 150
    ids = {job.case.case_id for job in found}
    assert len(ids) == len({job.case for job in found})


def test_quick_covers_what_a_first_look_needs() -> None:
    found = load_sweep(REPOSITORY / "suites" / "quick.toml").jobs()
    cases = {job.case for job in found}
    assert 40 <= len(found) <= 60
    assert {(case.mode, case.dtype) for case in cases} == {
        (mode, dtype) for mode in ("forward", "train") for dtype in ("float32", "bfloat16")
    }
    assert len({case.expert_activation for case in cases if case.expert_bias}) >= 3
    assert {case.routing.partition(":")[0] for case in cases} >= {"uniform", "zipf", "empty"}
    assert any(case.masked_share > 0 for case in cases)
    assert all({job.backend for job in found if job.case == case} == {"loop", "torch_mm"} for case in cases)
    main = {case.num_tokens for case in cases if (case.dim, case.mode) == (256, "train")}
    assert len(main) >= 4


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_have_rows_that_torch_mm_takes(path: Path) -> None:
    for case in {job.case for job in load_sweep(path).jobs()}:
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[case.dtype]
        assert case.dim * itemsize % 16 == 0
        assert case.moe_inter_dim * itemsize % 16 == 0


# The reference


def test_documented_example_is_right_and_every_axis_and_model_is_documented() -> None:
    text = (REPOSITORY / "docs" / "sweeps.md").read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    assert len(parse_sweep(example, "docs").jobs()) == 2 * 3 * 2 + 2 * 2 * 2 * 2 - 2
    words = [*Case.model_fields, "backend", "dispatcher", *Policy.model_fields, *MODELS, *ACTIVATIONS, *DTYPES]
    assert [word for word in words if f"`{word}`" not in text] == []


# Selecting jobs


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
        ("num_token=4", "there is no key 'num_token'; did you mean \"num_tokens\"? keys are num_tokens, "),
        ("foo=4", "there is no key 'foo'; keys are num_tokens, "),
        ("num_tokens", "must be KEY=V1,V2, "),
        ("=4", "must be KEY=V1,V2, "),
        ("num_tokens=", "'': must be a valid integer"),
        ("num_tokens=4,", "'': must be a valid integer"),
        ("num_tokens==4", "'=4': must be a valid integer"),
        ("num_tokens=4.5", "'4.5': must be a valid integer"),
        ("num_tokens<4,8", "'4,8' is not a number"),
        ("num_tokens<nan", "'nan' is not a number"),
        ("dtype<float32", "dtype has no order; use = or !=; numbers are num_tokens, "),
        ("expert_bias>0", "expert_bias has no order; "),
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


# Imports

READS = """
import sys
from pathlib import Path
for name in {blocked!r}:
    sys.modules[name] = None
import moebench.record, moebench.spec
for path in Path("suites").glob("*.toml"):
    assert moebench.spec.load_sweep(path).jobs()
assert moebench.record.Journal(Path("no such file")).read() == ([], 0)
assert not [name for name in ("torch", "numpy", "experts") if sys.modules.get(name)], "imported"
"""


@pytest.mark.parametrize("blocked", [(), ("torch", "transformer_engine", "grouped_gemm", "deep_ep")])
def test_sweeps_and_records_are_read_without_torch(blocked: tuple[str, ...]) -> None:
    """In a fresh process: not imported where it is there, not missed where it is not."""
    code = READS.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
