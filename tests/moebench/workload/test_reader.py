"""Reading a sweep file: it finds traces, and it reports every mistake in a wrong file and no false ones."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from moebench.errors import SweepError
from moebench.workload.selection import select_of
from moebench.workload.spec import load_sweep, parse_sweep
from tests.moebench.families import FAMILIES

SHAPE = "n_routed_experts = 8\nn_activated_experts = 2\ndim = 16\nmoe_inter_dim = 32\n"
GRID = f'[[grid]]\n{SHAPE}num_tokens = 4\nbackend = "loop"\n'
OLMOE = GRID.replace(SHAPE, 'model = "olmoe"\n')
TWO_SEEDS = f"{GRID}seed = [0, 1]\n"


def mistakes(text: str, origin: str = "x.toml") -> list[str]:
    with pytest.raises(SweepError) as caught:
        parse_sweep(text, origin)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    assert not [line for line in caught.value.mistakes if "\n" in line or not line.startswith(f"{origin}: ")]
    return [line.removeprefix(f"{origin}: ") for line in caught.value.mistakes]


def test_trace_is_found_beside_the_sweep_and_can_be_opened_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "t.npy").write_bytes(b"content")
    text = f'name = "x"\n{GRID}routing = ["trace:t.npy", "uniform"]\n[[exclude]]\nrouting = "uniform"\n'
    monkeypatch.chdir(tmp_path)
    for origin in ("suites/x.toml", str(tmp_path / "suites" / "x.toml")):
        (job,) = parse_sweep(text, origin).jobs()
        assert job.case.routing == f"trace:{hashlib.sha256(b'content').hexdigest()[:16]}"
        assert job.routing_file == "suites/t.npy"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (job,) = parse_sweep(text, "../suites/x.toml").jobs()
    assert Path(str(job.routing_file)).is_file()


# Each of these texts has one mistake, and the reader reports only that mistake


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('name = "x"\ngrid = [1,\n[[grid]]\nfoo = 1', "line 3, column 3: '[[grid]]' is not TOML: "),
        ('name = "x"\ngrid = [1,', "end of document: is not TOML: "),
        ('name = "x"\nname = "y"\n', "line 2, column 11: 'name = \"y\"' is not TOML: Cannot overwrite a value; "),
        (GRID, 'name: is missing; add name = "quick"'),
        (f'name = "x"\nkey = {"[" * 1000}{"]" * 1000}\n{GRID}', "lists or tables are nested too deeply"),
        (f'name = "x"\nkey = {"9" * 6000}\n{GRID}', "a number has too many digits"),
        (f'name = "x"\nkey = 0x{"f" * 6000}\n{GRID}', "key = ...: there is no such key"),
        (f'name = "x"\n{"k" * 6000} = 1\n{GRID}', f"{'k' * 77}... = 1: there is no such key"),
        (f'name = "{"x" * 101}"\n{GRID}', f'name = "{"x" * 76}...: must be letters, digits, '),
        (f'name = "x"\n[policy]\ntimeout_s = 1e15\n{GRID}', "policy.timeout_s = 1000000000000000.0: must be less than"),
        (f'name = "x"\n[policy]\ntime_cap_s = 1e15\n{GRID}', "policy.time_cap_s = 1000000000000000.0: must be less"),
        (
            f'name = "a b"\n{GRID}',
            'name = "a b": must be letters, digits, ".", "_" and "-", a letter or digit first, at most ',
        ),
        (f'name = ".."\n{GRID}', 'name = "..": must be letters'),
        (f"name = 3\n{GRID}", "name = 3: must be letters"),
        (f'name = "x"\ndescription = "a\\nb"\n{GRID}', 'description = "a\\nb": must be one line of text; '),
        (f'name = "x"\ndescripton = ""\n{GRID}', 'descripton = "": there is no such key; did you mean "description"?'),
        (f'name = "x"\nfoo = 1\n{GRID}', "foo = 1: there is no such key; valid keys are name, description, policy, "),
        (
            'name = "x"',
            "grid: the sweep has no grid; add [[grid]] with num_tokens, backend, and model or the shape axes",
        ),
        (
            'name = "x"\ngrid = [1]',
            "grid = [1]: must be an array of tables; write [[grid]] above the keys of each table",
        ),
    ],
)
def test_wrong_top_level(text: str, mistake: str) -> None:
    (line,) = mistakes(text)
    assert line.startswith(mistake)
    assert len(line) < 500


def test_a_byte_order_mark_is_not_a_part_of_the_sweep(tmp_path: Path) -> None:
    text = f'name = "x"\n{GRID}'
    (tmp_path / "x.toml").write_text(text, encoding="utf-8-sig")
    assert load_sweep(tmp_path / "x.toml") == parse_sweep(text, str(tmp_path / "x.toml"))


@pytest.mark.parametrize("written", ["x" * 300, "a/" * 3000, "\\u0000", "x"])
def test_a_trace_that_no_path_can_be(written: str) -> None:
    (line,) = mistakes(f'name = "x"\n{GRID}\nrouting = "trace:{written}"')
    assert "there is no file" in line


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
    assert line.endswith("must be an array of tables; write [[grid]] above the keys of each table")


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
        ("seed = []", "seed = []: an axis needs at least one value; for example seed = [0]"),
        ("seed = [0, 2, 0]", "seed[2] = 0: is already in the list; remove it"),
        ("masked_share = [0, 0.0]", "masked_share[1] = 0.0: is already in the list; "),
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
            'dispatcher = "alltoal": must be one of local, allgather, alltoall, deepep, symm_mem; did you ',
        ),
        ('rank_load = "unevn"', 'rank_load = "unevn": must be one of even, uneven, one-empty; did you mean "uneven"'),
        ('model = ["olmo"]', 'model[0] = "olmo": must be a model of moebench, or a shape '),
    ],
)
def test_wrong_axis(axis: str, mistake: str) -> None:
    """In a grid, the defaults or an exclude, the reader reports the mistake once, with its place, and nothing else."""
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
            "grid[0]: the grid has no shape; add model, or n_routed_experts, n_activated_experts, dim,",
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
            f'{TWO_SEEDS}ep_size = [1, 2]\nrank_load = ["even", "uneven"]\n',
            "grid[0]: rank_load = uneven needs several ranks, but ep_size = 1; raise ep_size, or exclude the pair",
        ),
        (
            f'{TWO_SEEDS}ep_size = [1, 2]\ndispatcher = ["local", "alltoall"]\n',
            'grid[0]: dispatcher = "local" at ep_size = 2: tokens must move between ranks; take allgather, ',
        ),
        (
            f'{GRID}[[exclude]]\nbackend = "torch_mm"\n',
            "exclude[0]: matches no job of this sweep; correct it or remove it",
        ),
        (f'{TWO_SEEDS}[[exclude]]\nseed = 0\n[[exclude]]\nseed = 1\ndtype = "float32"\n', "exclude[1]: matches no job"),
        (f"{GRID}[[exclude]]\n", "exclude[0]: an exclude without keys leaves out every job; "),
        (
            f"{GRID}[[exclude]]\nfoo = 1\n",
            "exclude[0].foo = 1: there is no such key; valid keys are mode, num_tokens, ",
        ),
        (f"{TWO_SEEDS}[[exclude]]\nseed = [0, 1]\n", "exclude: the excludes leave out every job; "),
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
        # exclude[0] may mean grid[1]'s backend, exclude[1] the misspelled dtype: neither is yet known to match nothing
    ]


def test_a_configuration_is_found_beside_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a sweep may be the path of a config.json or its folder; excludes and filters know it."""
    monkeypatch.chdir(tmp_path)
    config = {**FAMILIES["gpt-oss"].config, "swiglu_limit": 5.0}
    (tmp_path / "suites" / "oss").mkdir(parents=True)
    (tmp_path / "suites" / "oss" / "config.json").write_text(json.dumps(config))
    text = (
        'name = "x"\n[[grid]]\nbackend = "loop"\nnum_tokens = [1, 2]\nmodel = ["oss/config.json", "olmoe"]\n'
        '[[exclude]]\nmodel = "oss"\nnum_tokens = 1\n'
    )
    spec = parse_sweep(text, "suites/x.toml")
    name = "gpt_oss-e128k4d2880i2880"
    assert [(job.case.model, job.case.num_tokens) for job in spec.jobs()] == [("olmoe", 1), ("olmoe", 2), (name, 2)]
    assert spec.jobs()[2].case.activation_limit == 5.0
    assert [job.case.model for job in select_of(spec, "x", [], [f"model={name}"], [])] == [name]
    with pytest.raises(SweepError, match="did you mean"):
        select_of(spec, "x", [], ["model=gpt_oss-e128k4"], [])
    with pytest.raises(SweepError, match=r"activation_limit: grid\[0\].model fixes it"):
        parse_sweep(text.replace("[[exclude]]", "activation_limit = 7.0\n[[exclude]]"), "suites/x.toml")
