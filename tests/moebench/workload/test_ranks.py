"""What ranks tell each other.

In a launch of two ranks both write down each fact. With one rank these calls change nothing.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moebench.workload.ranks import ALONE, Ranks, join, leave
from tests import forked

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")

RANK = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from moebench.workload.ranks import ALONE, join, leave

cpu, folder = torch.device("cpu"), Path(sys.argv[1])
ranks = join(cpu, timeout_s=60)
rank = ranks.rank
assert rank == int(os.environ["RANK"])
facts = {"size": ranks.size, "mesh": [list(ranks.mesh.shape), ranks.mesh.mesh_dim_names[0]]}
facts["backend"] = dist.get_backend()
facts["told"] = ranks.tell(rank), ranks.tell([None, "a longer one"][rank])
facts["largest"] = ranks.largest(1.5 if rank == 0 else -3.0)

def rows(counts, *shape, dtype=torch.float32):
    count = counts[rank]
    mine = (100 * rank + torch.arange(count * int(torch.tensor(shape).prod()))).reshape(count, *shape).to(dtype)
    found = ranks.rows(mine)
    assert found.dtype == dtype
    return found.tolist()

facts["unequal"] = rows((2, 3), 2)
facts["none of the first"] = rows((0, 2), 2)
facts["none of the last"] = rows((2, 0), 2)
facts["none"] = [list(ranks.rows(torch.zeros(0, 3, 2)).shape), rows((0, 0), 2)]
facts["vectors"] = rows((1, 2), dtype=torch.int64)
facts["bool"] = ranks.rows(torch.tensor([True, False] if rank == 0 else [False, True, True])).tolist()
facts["bfloat16"] = rows((2, 1), 1, dtype=torch.bfloat16)
facts["float64"] = ranks.rows(torch.full((1,), 1 / 3 + rank, dtype=torch.float64)).tolist()
not_finite = ranks.rows(torch.tensor([[float("nan"), 1.0]] * (1 + rank)))
facts["nan"] = not_finite.isnan().tolist()

total = torch.tensor([[1.0, 2.0]], dtype=torch.float64) * 10**rank
facts["sum gives"] = ranks.sum(total)
facts["sum"] = total.tolist()

# rank 0 is at the barrier, as far as rank 1 can see, before rank 1 does what rank 0 then must find done
if rank == 0:
    (folder / "waiting").touch()
else:
    while not (folder / "waiting").exists():
        pass
    sum(range(10**6))
    (folder / "done").touch()
ranks.align(cpu)
facts["aligned"] = (folder / "done").exists()

(folder / f"{rank}.json").write_text(json.dumps(facts))
leave(ranks)
(folder / f"{rank}.left").write_text(str(dist.is_initialized()))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Launch two ranks and return the facts of both."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        forked.command(2, folder / "rank.py", folder),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(facts=facts, left=[(folder / f"{rank}.left").read_text() for rank in range(2)])


def both(ranks, name):
    """Return a fact that both ranks must have found alike."""
    one, other = (facts[name] for facts in ranks.facts)
    assert one == other
    return one


def test_ranks_of_a_cpu_join_over_gloo_in_one_dimension(ranks):
    assert both(ranks, "size") == 2
    assert both(ranks, "mesh") == [[2], "ep"]
    assert both(ranks, "backend") == "gloo"


def test_every_value_is_told_to_all_in_the_order_of_the_ranks(ranks):
    assert both(ranks, "told") == [[0, 1], [None, "a longer one"]]
    assert both(ranks, "largest") == 1.5


def test_rows_are_those_of_all_ranks_whatever_their_counts(ranks):
    assert both(ranks, "unequal") == [[0, 1], [2, 3], [100, 101], [102, 103], [104, 105]]
    assert both(ranks, "none of the first") == [[100, 101], [102, 103]]
    assert both(ranks, "none of the last") == [[0, 1], [2, 3]]
    assert both(ranks, "none") == [[0, 3, 2], []]


def test_rows_may_be_of_any_dtype_and_shape(ranks):
    assert both(ranks, "vectors") == [0, 100, 101]
    assert both(ranks, "bool") == [True, False, False, True, True]
    assert both(ranks, "bfloat16") == [[0.0], [1.0], [100.0]]
    assert both(ranks, "float64") == [1 / 3, 1 / 3 + 1]
    assert both(ranks, "nan") == [[True, False]] * 3


def test_sums_are_in_place(ranks):
    assert both(ranks, "sum") == [[11.0, 22.0]]
    assert both(ranks, "sum gives") is None


def test_nobody_goes_on_before_all_are_there(ranks):
    assert both(ranks, "aligned") is True


def test_who_left_may_join_again(ranks):
    assert ranks.left == ["False", "False"]


def test_alone_everything_is_as_it_was():
    tensor = torch.randn(3, 2)
    before = tensor.clone()
    assert ALONE.rows(tensor) is tensor
    ALONE.sum(tensor)
    ALONE.align(CPU)
    assert torch.equal(tensor, before)
    value = object()
    assert ALONE.tell(value) == [value]
    assert ALONE.largest(-2.0) == -2.0
    assert (ALONE.rank, ALONE.size, ALONE.mesh) == (0, 1, None)


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for _ in range(2):
        ranks = join(CPU, 60.0)
        assert ranks == ALONE == Ranks()
        leave(ranks)
        assert not torch.distributed.is_initialized()
        monkeypatch.setenv("WORLD_SIZE", "1")
