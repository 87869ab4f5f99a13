"""Sweeps: which jobs a file means, which files exist, and what the files of this repository contain."""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from experts.registry import backend_names
from moebench.errors import SweepError
from moebench.workload.axes import DISPATCHERS
from moebench.workload.case import ACTIVATIONS, DTYPES, Case, Job, RankLoad
from moebench.workload.models import MODELS
from moebench.workload.spec import Policy, SweepSpec, available_sweeps, find_sweep, load_sweep, parse_sweep

REPOSITORY = Path(__file__).parents[3]
SUITES = sorted((REPOSITORY / "suites").glob("*.toml"))
OF_RANKS = sorted((REPOSITORY / "suites").glob("gpu-ep*.toml"))

SHAPE = "n_routed_experts = 8\nn_activated_experts = 2\ndim = 16\nmoe_inter_dim = 32\n"
GRID = f'[[grid]]\n{SHAPE}num_tokens = 4\nbackend = "loop"\n'


def sweep(body: str = GRID) -> SweepSpec:
    return parse_sweep(f'name = "x"\n{body}', "x.toml")


def jobs(body: str) -> list[Job]:
    return sweep(body).jobs()


# What a correct file means


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
    assert len(found) == len(what) == 7  # the job in both grids appears once


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


def test_ranks_differ_only_where_there_are_some() -> None:
    loads = 'ep_size = [1, 4]\nrank_load = ["even", "uneven", "one-empty"]\n'
    found = jobs(f'{GRID}{loads}[[exclude]]\nep_size = 1\nrank_load = ["uneven", "one-empty"]\n')
    assert {(job.case.ep_size, job.case.rank_load) for job in found} == {
        (1, "even"),
        *((4, load) for load in ("even", "uneven", "one-empty")),
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
    with pytest.raises(
        SweepError,
        match=r'quik: no such file.*did you mean "quick"\? the sweeps are fp8, fp8-ep2, gpu, .*mine, .*quick',
    ):
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
    ids = {job.case.case_id for job in found}
    assert 0 < len(found) <= 250 or path.stem.endswith("-wide"), "the others end within minutes"
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


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_a_suite_of_ranks_has_every_engine_with_every_dispatcher_and_unkind_ranks(ep_size: int) -> None:
    found = load_sweep(REPOSITORY / "suites" / f"gpu-ep{ep_size}.toml").jobs()
    assert {job.case.ep_size for job in found} == {ep_size}
    engines = {(job.backend, job.dispatcher, job.case.mode) for job in found if "fp8" not in job.backend}
    assert engines == {
        (backend, dispatcher, mode)
        for backend in ("loop", "torch_mm", "triton", "gmm", "te")
        for dispatcher in ("allgather", "alltoall", "deepep", "symm_mem")
        for mode in ("forward", "train")
    }
    assert {job.backend for job in found} >= {"te_fp8_current", "te_fp8_delayed", "te_fp8_block"}
    assert {job.case.rank_load for job in found} == {"even", "uneven", "one-empty"}
    assert {job.case.routing for job in found} == {"uniform", "zipf"}
    assert {job.case.model for job in found} >= {"deepseek-v3", "kimi-k2"}
    most = max(job.case.n_routed_experts // ep_size for job in found if job.dispatcher == "deepep")
    assert most <= 128, "deep_ep takes no more experts a rank"


@pytest.mark.parametrize("path", OF_RANKS, ids=lambda path: path.stem)
def test_a_suite_of_ranks_has_triton_beside_torch_mm_with_every_dispatcher(path: Path) -> None:
    ways: dict[tuple[str, Case], set[str]] = {}
    for job in load_sweep(path).jobs():
        ways.setdefault((job.backend, job.case), set()).add(job.dispatcher)
    cases = {case for backend, case in ways if backend == "torch_mm"}
    assert cases == {case for backend, case in ways if backend == "triton"}
    for case in cases:
        everyone = {"local"} if case.ep_size == 1 else set(DISPATCHERS) - {"local"}
        if path.stem == "gpu-ep2" and case.model == "kimi-k2":
            everyone -= {"deepep"}  # deep_ep takes no more than 128 experts a rank, and here a rank has 192
        assert ways["torch_mm", case] == ways["triton", case] == everyone


def test_two_gpus_have_the_load_of_a_rank_of_eight() -> None:
    """A GPU has as many experts, of the same shape, for as many rows, of DeepSeek-V3, Kimi-K2 and gpt-oss-20b."""
    of_two, of_eight = (
        {
            (job.case.n_routed_experts // size, job.case.n_activated_experts, job.case.dim, job.case.moe_inter_dim)
            for job in load_sweep(REPOSITORY / "suites" / f"{name}.toml").jobs()
            if job.case.ep_size == size
        }
        for name, size in (("gpu-ep2-as-ep8", 2), ("gpu-ep8", 8))
    )
    assert of_two == {(32, 8, 7168, 2048), (48, 8, 7168, 2048), (4, 4, 2880, 2880)}
    assert of_two < of_eight


def test_the_suite_of_ep_sizes_has_as_many_tokens_a_rank_at_each() -> None:
    found = load_sweep(REPOSITORY / "suites" / "gpu-ep-scaling.toml").jobs()
    assert {(job.case.num_tokens, job.case.rank_load) for job in found} == {(4096, "even")}
    sizes: dict[object, set[int]] = {}
    for job in found:
        sizes.setdefault((job.case.model, job.case.mode, job.backend), set()).add(job.case.ep_size)
    assert set(map(frozenset, sizes.values())) == {frozenset({1, 2, 4, 8}), frozenset({4, 8})}


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_have_rows_that_torch_mm_takes(path: Path) -> None:
    for case in {job.case for job in load_sweep(path).jobs()}:
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[case.dtype]
        assert case.dim * itemsize % 16 == 0
        assert case.moe_inter_dim * itemsize % 16 == 0


# The reference


def test_documented_example_is_right_and_every_axis_and_model_is_documented() -> None:
    text = (REPOSITORY / "docs" / "sweeps.md").read_text()
    first, of_groups, of_ranks, of_contexts = (block.partition("```")[0] for block in text.split("```toml\n")[1:])
    assert len(parse_sweep(first, "docs").jobs()) == 2 * 2 * 2 - 1
    layer = 'name = "groups"\n[[grid]]\nmodel = "olmoe"\nnum_tokens = 16\nep_size = 2\n'
    groups = parse_sweep(layer + of_groups, "docs").jobs()
    assert list(dict.fromkeys(job.backend for job in groups)) == ["loop", "torch_mm", "triton", "gmm", "te"]
    assert list(dict.fromkeys(job.dispatcher for job in groups)) == ["allgather", "alltoall", "deepep", "symm_mem"]
    assert len(parse_sweep(f'name = "ranks"\n{of_ranks}', "docs").jobs()) == 1 + 3 * 2
    contexts = parse_sweep(f'name = "contexts"\n{of_contexts}', "docs").jobs()
    assert [(job.case.context, job.case.processes) for job in contexts] == [
        (context, (4, 2)) for context in ("fsdp2", "fsdp2+checkpoint")
    ]
    values = [*MODELS, *ACTIVATIONS, *DTYPES, *get_args(RankLoad), *DISPATCHERS, *backend_names()]
    words = [*Case.model_fields, "backend", "dispatcher", *Policy.model_fields, *values, "plain", "accumulate:N"]
    assert [word for word in words if f"`{word}`" not in text] == []


# Imports

READS = """
import sys
from pathlib import Path
for name in {blocked!r}:
    sys.modules[name] = None
import moebench.results.journal, moebench.workload.selection, moebench.workload.spec
for path in Path("suites").glob("*.toml"):
    assert moebench.workload.spec.load_sweep(path).jobs()
assert moebench.results.journal.Journal(Path("no such file")).read() == ([], 0)
assert not [name for name in ("torch", "numpy") if sys.modules.get(name)], "imported"
"""


@pytest.mark.parametrize("blocked", [(), ("torch", "transformer_engine", "grouped_gemm", "deep_ep")])
def test_sweeps_and_records_are_read_without_torch(blocked: tuple[str, ...]) -> None:
    """In a fresh process, torch is not imported where it is installed, and not missed where it is absent."""
    code = READS.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
