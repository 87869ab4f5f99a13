"""Which GPUs a run takes, and how its workers share the GPUs and the cores."""

import pytest

from moebench.errors import UsageError
from moebench.machine.gpus import ANYWHERE, Slot, VisibleGpu, choose, places, variables, visible_gpus

FOUR = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


@pytest.fixture
def node(fake_nvml, monkeypatch):
    """Add four GPUs: another process uses the second, and a process that is not visible keeps the fourth busy."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    use = {"GPU-b": {"pids": [17, 18]}, "GPU-d": {"busy_percent": 93}}
    for uuid in FOUR:
        fake_nvml.add_gpu(uuid, **use.get(uuid, {}))
    return fake_nvml


def names(chosen):
    slots, _ = chosen
    return [slot.gpu for slot in slots]


def test_all_that_are_free_are_taken_and_the_others_named(node):
    assert names(choose(None, None, share=False)) == ["GPU-a", "GPU-c"]
    _, notes = choose(None, "all", share=False)
    busy = "93% busy with a process that is not visible from here"
    reasons = {1: "in use by process 17, 18", 3: busy}
    assert notes == [
        f"GPU {n} is {why}, so the run leaves it out; --share-gpus uses it anyway" for n, why in reasons.items()
    ]


def test_shared_gpus_are_taken_without_a_word(node):
    assert choose("cuda", None, share=True) == (tuple(map(Slot, FOUR)), [])


def test_those_that_are_named_are_taken(node):
    assert names(choose(None, "2, 0,2", share=False)) == ["GPU-c", "GPU-a"]
    assert names(choose(None, "1,2", share=False)) == ["GPU-c"]
    assert names(choose("cuda:2", None, share=False)) == ["GPU-c"]


@pytest.mark.parametrize(
    ("device", "wanted", "says"),
    [
        (None, "1,3", "GPU 1 is in use by process 17, 18"),
        ("cuda:1", None, "GPU 1 is in use"),
        (None, "0,4", "--gpus 0,4: '4': no such GPU, there are 0 to 3"),
        (None, "first", "--gpus first: 'first': no such GPU"),
        (None, "", "--gpus : '': no such GPU"),
        ("cuda:9", None, "--device cuda:9: '9': no such GPU"),
        ("cuda:0", "1", "--gpus 1 and --device cuda:0"),
        ("cpu", "all", "--gpus all and --device cpu"),
    ],
)
def test_what_cannot_be_had(node, device, wanted, says):
    with pytest.raises(UsageError) as refusal:
        choose(device, wanted, share=False)
    assert says in str(refusal.value)


def test_without_gpus_there_is_one_slot_anywhere(fake_nvml):
    assert choose(None, None, share=False) == (ANYWHERE, [])
    with pytest.raises(UsageError, match="this machine has none"):
        choose(None, "all", share=False)
    fake_nvml.init_error = "Driver Not Loaded"
    assert choose(None, None, share=False) == choose("cuda:1", None, share=False) == (ANYWHERE, [])
    with pytest.raises(UsageError, match="Driver Not Loaded"):
        choose(None, "0", share=False)


def test_a_cpu_run_asks_for_no_gpu(node):
    assert choose("cpu", None, share=False) == (ANYWHERE, [])


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        ("2,0", ["GPU-c", "GPU-a"]),
        ("GPU-d,GPU-b", ["GPU-d", "GPU-b"]),
        ("1,7,0", ["GPU-b"]),
        ("-1", []),
        ("0,-1,1", ["GPU-a"]),
        ("0,,1", ["GPU-a"]),
        ("0,GPU-x,1", ["GPU-a"]),
        ("none", []),
        ("1,2,1", []),
        ("GPU", []),
        ("9" * 6000, []),
        ("", []),
        ("MIG-1", ["MIG-1"]),
    ],
)
def test_what_cuda_is_let_see_is_all_there_is(node, monkeypatch, listed, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert [gpu.name for gpu in visible_gpus()] == seen


def test_who_hides_all_gpus_cannot_have_one(node, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UsageError, match="--gpus 0: '0': no such GPU, this machine has none"):
        choose(None, "0", share=False)
    assert choose(None, None, share=False) == (ANYWHERE, [])


def test_numbers_are_those_of_what_is_visible(node, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert names(choose(None, "0", share=False)) == ["GPU-c"]
    assert visible_gpus()[1] == VisibleGpu("GPU-b", "in use by process 17, 18", (9, 0))


def test_places_are_as_large_as_groups_of_ranks():
    slots = tuple(map(Slot, FOUR[:3]))
    assert places(slots, 1) == [(slot,) for slot in slots]
    assert places(slots, 2) == [slots[:2]]
    assert places(slots, 4) == [slots], "too few: the worker says so"
    assert places(ANYWHERE, 4) == [ANYWHERE], "ranks share a CPU"
    shares = (Slot(num_threads=1), Slot(num_threads=2))
    assert places(shares, 2) == [shares[:1], shares[1:]]


def test_what_a_worker_is_told_of_its_place(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert variables(ANYWHERE, 1, 1, cores=8) == {}, "alone it takes what there is"
    assert variables(ANYWHERE, 1, 2, cores=8) == {"OMP_NUM_THREADS": "4"}
    pair = (Slot("GPU-a"), Slot("GPU-b"))
    assert variables(pair, 2, 2, cores=9) == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "OMP_NUM_THREADS": "2"}
    assert variables((Slot(num_threads=3),), 2, 1, cores=2) == {"OMP_NUM_THREADS": "3"}
    assert variables(ANYWHERE, 4, 4, cores=2) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert variables(ANYWHERE, 1, 2, cores=8) == {}, "the user's goes first"
