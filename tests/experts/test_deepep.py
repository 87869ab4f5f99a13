"""DeepEP refuses what it does not support before a rank waits for another. test_expert_parallel.py sends tokens."""

from types import SimpleNamespace

import pytest
import torch

from experts import BackendConfig, ConfigError, GroupedExperts, Unsupported, catalog
from experts.dispatch import deepep
from tests.experts import fakes
from tests.experts.layers import BF16, F16, F32, moe_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def group(size: int) -> SimpleNamespace:
    """Return an object with the size and rank of a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


@pytest.mark.parametrize(
    ("device", "fields", "reason"),
    [
        (CPU, {}, "deep_ep moves tokens between CUDA GPUs, the device is cpu; use alltoall"),
        (CUDA, {"dtype": F32}, "deep_ep dispatches bfloat16, not float32; use alltoall"),
        (CUDA, {"dtype": F16}, "deep_ep dispatches bfloat16, not float16; use alltoall"),
        (
            CUDA,
            {"dim": 12},
            "deep_ep takes rows that are a multiple of 16 bytes, but dim = 12 is 24; use alltoall",
        ),
        (CUDA, {"dim": 8}, None),
    ],
    ids=str,
)
def test_unsupported_gives_the_reason(
    device: torch.device, fields: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = deepep.unsupported
    fakes.install(monkeypatch)
    given = real(device, moe_config(**{"dtype": BF16, **fields}))
    assert (given and given.reason) == reason
    if device is CUDA:
        assert real(device, None) is None


@pytest.mark.usefixtures("no_libraries")
def test_without_the_library_the_reason_says_what_to_install() -> None:
    given = deepep.unsupported(CUDA, moe_config(dtype=BF16))
    assert given.reason.startswith("deep_ep does not import")
    assert given.reason.endswith(catalog.LIBRARIES["deep_ep"])


@pytest.mark.usefixtures("fake_libraries")
def test_more_than_128_experts_per_rank_are_refused() -> None:
    with pytest.raises(Unsupported) as caught:
        deepep.DeepEP(group(2), moe_config(n_routed_experts=384, dtype=BF16))
    assert caught.value.reason == (
        "deep_ep dispatches to at most 128 experts per rank, but n_routed_experts = 384 on 2 ranks is 192; "
        "use more ranks, or alltoall"
    )


@pytest.mark.usefixtures("fake_libraries")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (1, "deep_ep needs at least 2 ranks, the group has 1; leave the dispatcher out"),
        (3, "deep_ep does not run on 3 ranks; use alltoall"),
    ],
)
def test_unsupported_numbers_of_ranks_are_refused(size: int, reason: str) -> None:
    with pytest.raises(Unsupported) as caught:
        deepep.DeepEP(group(size), moe_config(n_routed_experts=12, dtype=BF16))
    assert str(caught.value) == reason


@pytest.mark.usefixtures("fake_libraries")
def test_rows_in_fp8_are_multiples_of_32_bytes() -> None:
    with pytest.raises(Unsupported, match="deep_ep takes FP8 rows of a multiple of 32, not 208; use symm_mem"):
        deepep.make(group(2), moe_config(dim=208, dtype=BF16), fp8_rows=True)


@pytest.mark.usefixtures("fake_libraries")
def test_no_more_sms_than_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, DeepEP's blocks would wait for blocks that never start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(multi_processor_count=132))
    with pytest.raises(ConfigError) as caught:
        deepep.make(group(2), moe_config(n_routed_experts=12, dtype=BF16), num_sms=134)
    assert str(caught.value) == ("num_sms = 134: the GPU has 132 multiprocessors; give an even number up to 132")


def test_the_number_of_sms_is_an_option_of_deepep() -> None:
    made = GroupedExperts(moe_config(), BackendConfig(dispatcher="deepep", num_sms=24))
    assert made.dispatcher_options == {"num_sms": 24}
    with pytest.raises(ConfigError, match="num_sms = 24: the dispatcher alltoall does not take it; use deepep, or "):
        GroupedExperts(moe_config(), BackendConfig(dispatcher="alltoall", num_sms=24))


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ("aa", None),
        ("aaaaaaaa", None),
        ("ab", "deep_ep needs up to 8 ranks on one node; use alltoall"),
        ("aaaabbbb", "deep_ep needs up to 8 ranks on one node; use alltoall"),
        ("a" * 8 + "b" * 8, None),
        ("ab" * 8, "deep_ep needs 8 ranks on each node, in the order of the ranks; use alltoall"),
        ("aaaa" * 4, "deep_ep needs 8 ranks on each node, in the order of the ranks; use alltoall"),
        ("a" * 8 + "b" * 4 + "c" * 4, "deep_ep needs 8 ranks on each node, in the order of the ranks; use alltoall"),
    ],
)
@pytest.mark.usefixtures("fake_libraries")
def test_ranks_over_nodes_need_eight_on_each(hosts: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between nodes, deep_ep needs memory for RDMA. Within one node it must have none."""
    made: list[tuple[int, int]] = []
    config = SimpleNamespace(
        get_nvl_buffer_size_hint=lambda row_bytes, size: 1000, get_rdma_buffer_size_hint=lambda row_bytes, size: 500
    )
    monkeypatch.setattr(deepep, "_deep_ep", lambda: SimpleNamespace(Buffer=Buffer))
    monkeypatch.setattr(deepep, "hosts_of", lambda group: [*hosts])
    monkeypatch.setattr(deepep, "_buffers", {})

    class Buffer(SimpleNamespace):
        get_dispatch_config = get_combine_config = staticmethod(lambda size: config)

        def __init__(self, group: object, nvl_bytes: int, rdma_bytes: int, explicitly_destroy: bool) -> None:
            made.append((nvl_bytes, rdma_bytes))

    # SimpleNamespace has no hash, and a process group has one
    ranks = type("Group", (), {"size": lambda self: len(hosts)})()
    if reason is None:
        deepep.shared_buffer(ranks, 16)
        assert made == [(1000, 500 if len(hosts) > 8 else 0)]
    else:
        with pytest.raises(Unsupported) as caught:
            deepep.shared_buffer(ranks, 16)
        assert (caught.value.reason, made) == (reason, [])
