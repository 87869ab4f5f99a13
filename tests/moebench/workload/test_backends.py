"""Groups of backends in sweeps, and the places that a new entry in the catalog of `experts` reaches by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experts import catalog
from moebench.errors import SweepError
from moebench.workload.backends import GROUPS, expanded
from moebench.workload.case import Job
from moebench.workload.selection import filter_jobs, select_backends
from moebench.workload.spec import parse_sweep

ROOT = Path(__file__).parents[3]
SHAPE = "n_routed_experts = 8\nn_activated_experts = 2\ndim = 16\nmoe_inter_dim = 32\n"
BF16 = ["torch_mm", "triton", "gmm", "te"]


def grid(backend: str, more: str = "") -> str:
    return f"[[grid]]\n{SHAPE}num_tokens = 4\nbackend = {backend}\n{more}"


def jobs(body: str) -> list[Job]:
    return parse_sweep(f'name = "x"\n{body}', "x.toml").jobs()


def backends(found: list[Job]) -> list[str]:
    return [job.backend for job in found]


def mistakes(body: str) -> tuple[str, ...]:
    with pytest.raises(SweepError) as caught:
        jobs(body)
    return tuple(caught.value.mistakes)


def test_the_groups_are_those_of_the_catalog_in_its_order() -> None:
    assert list(GROUPS["backend"]["@bf16"]) == BF16
    assert GROUPS["backend"]["@fp8"] == ("triton_fp8", "te_fp8_current", "te_fp8_delayed", "te_fp8_block")
    assert GROUPS["backend"]["@block_fp8"] == ("triton_fp8", "deep_gemm_fp8")
    assert GROUPS["backend"]["@cpu"] == ("loop", "torch_mm")
    assert GROUPS["dispatcher"] == {"@dispatchers": ("allgather", "alltoall", "deepep", "symm_mem")}
    of_some_group = {name for members in GROUPS["backend"].values() for name in members}
    assert of_some_group == {backend.name for backend in catalog.BACKENDS}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"@bf16"', BF16),
        ('["loop", "@bf16"]', ["loop", *BF16]),
        ('["@bf16", "loop"]', [*BF16, "loop"]),
        ('["@bf16", "@cpu"]', [*BF16, "loop"]),
        ('["@bf16", "gmm"]', ["torch_mm", "triton", "te", "gmm"]),
        ('["te", "@bf16"]', ["te", "torch_mm", "triton", "gmm"]),
    ],
)
def test_a_group_stands_for_its_members_each_once(written: str, read: list[str]) -> None:
    assert backends(jobs(grid(written))) == read


def test_a_group_in_the_defaults_and_of_dispatchers() -> None:
    body = f'[defaults]\ndispatcher = "@dispatchers"\nep_size = [1, 2]\n{grid(chr(34) + "loop" + chr(34))}'
    assert [(job.case.ep_size, job.dispatcher) for job in jobs(body)] == [
        (1, "local"),
        (2, "allgather"),
        (2, "alltoall"),
        (2, "deepep"),
        (2, "symm_mem"),
    ]


def test_an_exclude_of_a_group_leaves_out_its_members() -> None:
    assert backends(jobs(grid('["loop", "@bf16"]', '[[exclude]]\nbackend = "@bf16"\n'))) == ["loop"]
    assert backends(jobs(grid('["loop", "@bf16"]', '[[exclude]]\nbackend = ["@cpu", "gmm"]\n'))) == ["triton", "te"]


def test_an_unknown_group_is_one_mistake_that_lists_the_groups() -> None:
    known = "@cpu, @bf16, @mxfp8, @main_grad, @fp8, @own_fp8, @block_fp8, @save_time, @cached, @lora, @peers, @ep_peers"
    assert mistakes(grid('["loop", "@bf61"]')) == (
        f'x.toml: grid[0].backend[1] = "@bf61": there is no such group; the groups of backend are {known}',
    )
    assert mistakes(grid('"loop"', 'ep_size = 2\ndispatcher = "@bf16"\n')) == (
        'x.toml: grid[0].dispatcher = "@bf16": there is no such group; the groups of dispatcher are @dispatchers',
    )


def test_a_mistake_after_a_group_has_its_place_in_the_file() -> None:
    (mistake,) = mistakes(grid('["@bf16", "a b"]'))
    assert mistake.startswith('x.toml: grid[0].backend[1] = "a b": ')
    (mistake,) = mistakes(grid('["gmm", "@bf16", "gmm"]'))
    assert mistake == 'x.toml: grid[0].backend[2] = "gmm": is already in the list; remove it'


def test_other_axes_have_no_groups() -> None:
    assert expanded("routing", ["@bf16", "zipf"]) == [(0, "@bf16"), (1, "zipf")]


def test_groups_on_the_command_line() -> None:
    one = jobs(grid('["loop", "te"]'))
    assert backends(select_backends(one, ["@bf16", "gmm", "my_module:Mine"])) == [
        "torch_mm", "triton", "te", "gmm", "my_module:Mine"
    ]  # fmt: skip
    assert backends(filter_jobs(one, ["backend=@bf16"])) == ["te"]
    assert backends(filter_jobs(one, ["backend!=@bf16, @fp8"])) == ["loop"]
    with pytest.raises(SweepError, match="backend '@bf61': there is no such group; the groups are @cpu, "):
        select_backends(one, ["@bf61"])
    with pytest.raises(SweepError, match="'@bf61': there is no such group; the groups of backend are @cpu, "):
        filter_jobs(one, ["backend=@bf61"])


def test_the_documents_list_every_group_with_its_members() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text()
    for groups in GROUPS.values():
        for group, members in groups.items():
            (line,) = [line for line in text.splitlines() if line.startswith(f"| `{group}` |")]
            assert line.endswith(", ".join(f"`{member}`" for member in members) + " |")


def run(code: str, *path: Path) -> list[str]:
    """Run a process with these folders before the checkout on its path; return the lines it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


NEW_ENTRIES = """
from experts import catalog

carrier = catalog.DispatcherEntry("carrier", "no.such.module", "all_gather")
catalog.DISPATCHERS = (*catalog.DISPATCHERS, carrier)
engine = catalog.EngineEntry("novel", "no.such.module", counts_rows=True)
catalog.BACKENDS = (*catalog.BACKENDS, catalog.BackendEntry("novel", engine, ("bf16", "fp8"), fp8="block"))

from moebench.parity.checks import covering_jobs
from moebench.run.memory.passes import pass_bytes
from moebench.workload.case import Case, Job
from moebench.workload.spec import find_sweep, load_sweep

print(*dict.fromkeys(job.dispatcher for job in covering_jobs("novel", None, ("float32",), on_ranks=True)))
jobs = load_sweep(find_sweep("gpu-ep4")).jobs()
print({job.dispatcher for job in jobs if job.backend == "novel"} == {d.name for d in catalog.DISPATCHERS})
case = Case(num_tokens=4096, model="olmoe", n_routed_experts=64, n_activated_experts=8, dim=2048, moe_inter_dim=1024,
            ep_size=4, mode="train")
def took(backend, dispatcher):
    return pass_bytes(Job(case=case, backend=backend, dispatcher=dispatcher))
print(took("gmm", "carrier") == took("gmm", "allgather") != took("gmm", "alltoall"))
print(took("novel", "alltoall") == took("te_fp8_block", "alltoall") != took("torch_mm", "alltoall"))
"""


def test_a_new_entry_of_the_catalog_is_in_suites_checks_and_estimates() -> None:
    """No other file has to name the entry."""
    dispatchers, *facts = run(NEW_ENTRIES)
    assert dispatchers == "allgather alltoall deepep symm_mem carrier"
    assert facts == ["True"] * 3


WITHOUT_A_CATALOG = """
from moebench.workload import axes, backends

print(*axes.DISPATCHERS)
print(backends.collective_of("allgather"), backends.collective_of("deepep"), backends.collective_of("local"))
print(backends.described("gmm"), backends.engine_of("gmm"))
"""


def test_an_older_experts_without_a_catalog_can_be_driven(tmp_path: Path) -> None:
    """A worker of `moebench ab` may drive such a revision; facts that it does not state have defaults."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "__init__.py").touch()
    assert run(WITHOUT_A_CATALOG, tmp_path) == [
        "local allgather alltoall deepep",
        "all_gather all_to_all None",
        "None None",
    ]
