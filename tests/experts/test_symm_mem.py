"""The dispatcher symm_mem: what it refuses in one process, and facts of two GPUs, which gpu_ranks.py checks.

test_exchange.py tests how rows move, and test_expert_parallel.py runs whole layers between processes.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experts import BackendConfig, ConfigError, GroupedExperts, InputError, Unsupported, hosts
from experts.dispatch import symm_mem
from experts.exchange import Layout, memory
from tests.experts import gpu_ranks
from tests.experts.layers import BF16, F32, moe_config

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT = Layout(2, 16, 8, 2, BF16, F32)


def group(size: int) -> Any:
    """Return an object with the size and rank of a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def told(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    """Let every rank but the first tell one of these values, or what the first rank tells if it is None."""
    for module in (hosts, memory):
        monkeypatch.setattr(
            module, "tell", lambda _, value: [value, *(value if other is None else other for other in others)]
        )


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_unsupported_gives_the_reason() -> None:
    assert symm_mem.unsupported(CPU, moe_config()) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "memfd_create")
        assert symm_mem.unsupported(CPU, None).reason == "symm_mem needs Linux on a CPU; use alltoall"
    given = symm_mem.unsupported(torch.device("meta"), None)
    assert given.reason == "symm_mem runs on CUDA GPUs and on CPUs, the device is meta; use alltoall"


def test_without_triton_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    given = symm_mem.unsupported(CUDA, None)
    assert given.reason.startswith("triton does not import")
    assert symm_mem.unsupported(CPU, None) is None


def test_ranks_on_several_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, None, ("another", "boot"))
    with pytest.raises(Unsupported) as caught:
        symm_mem.SymmMem(group(3), moe_config(n_routed_experts=6))
    assert str(caught.value) == ("symm_mem needs all ranks on one host, the group's ranks are on 2; use alltoall")


def test_a_group_that_is_too_large_is_refused() -> None:
    with pytest.raises(Unsupported) as caught:
        symm_mem.SymmMem(group(128), moe_config(n_routed_experts=128))
    assert str(caught.value) == "symm_mem runs on at most 64 ranks, the group has 128; use alltoall"


def test_too_little_shared_memory_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that have enough memory are told, and no rank keeps a file open."""

    def full(descriptor: int, start: int, num_bytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    open_files = num_open_files()
    told(monkeypatch, (LAYOUT, "the second rank's reason", ""))
    with pytest.raises(Unsupported, match=r"^the second rank's reason$"):
        memory._on_cpu(group(2), CPU, LAYOUT)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Unsupported) as caught:
        memory._on_cpu(group(2), CPU, LAYOUT)
    assert str(caught.value) == (
        f"symm_mem needs {LAYOUT.num_bytes} bytes of shared memory on each rank: Cannot allocate memory; lower "
        "max_tokens_per_rank or capacity_factor, or use alltoall"
    )
    assert num_open_files() == open_files


@pytest.mark.parametrize(
    ("uuids", "reachable", "reason"),
    [
        (["a", "b"], True, None),
        (["a", "elsewhere"], False, None),  # not visible to this process
        (["a", "a"], True, "symm_mem needs one GPU per rank, but ranks 0 and 1 have the same; use alltoall"),
        (
            ["a", "b"],
            False,
            "the GPU of rank 0 cannot reach the memory of rank 1's (no P2P access); use alltoall",
        ),
    ],
)
def test_gpus_that_do_not_reach_each_other_are_refused(
    uuids: list[str], reachable: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ["a", "b"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=seen[getattr(device, "index", device)]),
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reachable)
    assert memory._unreachable(CUDA, 0, uuids) == reason


def test_the_memory_is_not_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="outside of a CUDA graph; run one, then capture"):
        memory._on_gpus(group(2), CUDA, LAYOUT)


def test_parts_of_a_region_do_not_overlap_and_are_aligned() -> None:
    layout = Layout(3, 5, 7, 3, BF16, F32)
    ends = 0
    for start, (height, width), dtype in layout.parts.values():
        assert start >= ends
        assert start % 256 == 0
        ends = start + height * width * dtype.itemsize
    assert ends == layout.num_bytes
    assert layout.parts["rows_RD"] == (0, (15, 7), BF16)


@pytest.mark.parametrize(
    ("num_tokens", "rounded"),
    [(0, 16), (1, 16), (16, 16), (17, 32), (250, 256), (1000, 1024), (1024, 1024), (1025, 1152), (4100, 4608)],
)
def test_the_agreed_number_of_tokens_is_rounded_up(num_tokens: int, rounded: int) -> None:
    assert symm_mem._rounded_up(num_tokens) == rounded


@pytest.mark.parametrize(
    ("factor", "size", "rows"),
    [(None, 8, 1024), (1.0, 8, 673), (1.25, 8, 841), (2.0, 8, 1024), (1.0, 2, 1020), (0.5, 64, 61)],
)
def test_a_capacity_factor_scales_the_rows_of_an_even_routing(
    factor: float | None, size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 choices of 1024 tokens over P ranks, an even routing brings 1024 · (1 − (1 − 1/P)^8) rows."""
    told(monkeypatch, *[None] * (size - 1))
    made = symm_mem.make(group(size), moe_config(n_routed_experts=128), capacity_factor=factor)
    assert made._rows_per_slab(1024, 8) == rows


@pytest.mark.parametrize("option", [{"max_tokens_per_rank": 8}, {"capacity_factor": 1.25}], ids=str)
def test_another_dispatcher_refuses_its_options(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ConfigError) as caught:
        GroupedExperts(moe_config(), BackendConfig(dispatcher="alltoall", **option))
    assert str(caught.value) == (
        f"{name} = {value!r}: the dispatcher alltoall does not take it; use symm_mem, or leave {name} out"
    )
    assert GroupedExperts(moe_config(), BackendConfig(dispatcher="symm_mem", **option)).dispatcher_options == option


# two GPUs


def launch(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "tests/experts/gpu_ranks.py"), str(folder), *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks on GPUs have written the outcome of every fact."""
    folder = tmp_path_factory.mktemp("gpus")
    done = launch(folder)
    (folder / "log.txt").write_text(f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return folder


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", gpu_ranks.FACTS)
def test_a_fact_holds_between_two_gpus(name: str, on_two_gpus: Path) -> None:
    for rank in range(2):
        file = on_two_gpus / f"{name}.rank{rank}.txt"
        assert file.exists(), (on_two_gpus / "log.txt").read_text()
        assert file.read_text() == "", f"rank {rank}"


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", gpu_ranks.BREAK)
def test_what_breaks_a_rank_ends_both(name: str, tmp_path: Path) -> None:
    """A slab that is too small, and a rank that never comes, end every rank that waits, with an error of CUDA."""
    ranks, part_of_error = gpu_ranks.BREAK[name]
    done = launch(tmp_path, name)
    assert done.returncode != 0
    ended = {file.name: file.read_text() for file in tmp_path.glob("*.txt")}
    assert [*sorted(ended)] == [f"{name}.rank{rank}.txt" for rank in ranks], done.stderr[-4000:]
    for text in ended.values():
        assert part_of_error in text, text
    if name == "overflow":
        assert "a rank sends more than 15 rows to a rank: capacity_factor = 0.25" in done.stdout + done.stderr
