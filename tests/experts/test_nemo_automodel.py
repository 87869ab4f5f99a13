"""NeMo AutoModel's layers under expert parallelism: results, layout, and refusals. test_peers.py has one process.

Two ranks over gloo (automodel_ranks.py) run a fake with AutoModel's interface, and AutoModel itself where it is
installed. On two GPUs nothing is a fake.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import Unsupported
from experts.peers import nemo_automodel
from experts.registry import get_backend
from experts.te import library
from tests import forked
from tests.experts import automodel_ranks, fakes
from tests.experts.layers import BF16, moe_config

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TE, TORCH_MM = "peer_automodel_te", "peer_automodel_torch_mm"
ON_CPU = [fact.__name__ for fact in automodel_ranks.FACTS + automodel_ranks.WITH_FAKES]
ON_GPU = [fact.__name__ for fact in automodel_ranks.FACTS]
IS_INSTALLED = importlib.util.find_spec("nemo_automodel") is not None
REAL = pytest.param("real", marks=pytest.mark.skipif(not IS_INSTALLED, reason="nemo_automodel is not installed"))
pytestmark = pytest.mark.timeout(500)

Launched = Callable[[str], Path]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Return a function that launches two ranks once for each mode, and returns the folder of their outcomes."""
    folders: dict[str, Path] = {}

    def launch(mode: str) -> Path:
        if mode not in folders:
            folder = folders[mode] = tmp_path_factory.mktemp(mode)
            # AutoModel's activations are not compiled: each layer would compile them again
            variables = {"OMP_NUM_THREADS": "1", "AUTOMODEL": mode, "TORCHDYNAMO_DISABLE": "1"}
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            script = ROOT / "tests/experts/automodel_ranks.py"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            done = subprocess.run(
                [*launcher, str(script), str(folder)] if mode == "gpu" else forked.command(2, script, folder),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **variables},
                capture_output=True,
                text=True,
                check=False,
                timeout=400,
            )
            (folder / "log.txt").write_text(f"exit status {done.returncode}\n{done.stderr[-8000:]}")
        return folders[mode]

    return launch


def assert_holds(name: str, folder: Path) -> None:
    for rank in range(2):
        file = folder / f"{name}.rank{rank}.txt"
        assert file.exists(), (folder / "log.txt").read_text()
        assert file.read_text() == "", f"rank {rank}"


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("mode", ["fake", REAL])
def test_a_fact_holds_between_two_ranks(mode: str, name: str, launched: Launched) -> None:
    assert_holds(name, launched(mode))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_INSTALLED, reason="nemo_automodel is not installed")
@pytest.mark.parametrize("name", ON_GPU)
def test_a_fact_holds_between_two_gpus(name: str, launched: Launched) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_holds(name, launched("gpu"))


# refusals


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library is a fake, and AutoModel is found."""
    fakes.install(monkeypatch)
    monkeypatch.setattr(nemo_automodel, "not_installed", lambda *_: None)


def refusal(name: str, dispatcher: str | None, device: torch.device = CUDA, **fields: Any) -> str | None:
    reason = get_backend(name).unsupported(device, moe_config(**{"dtype": BF16, **fields}), dispatcher)
    return None if reason is None else reason.reason


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "dispatcher", "said"),
    [
        (TORCH_MM, None, None),
        (TORCH_MM, "allgather", None),
        (TORCH_MM, "deepep", None),
        (
            TORCH_MM,
            "symm_mem",
            "brings its own way to send tokens, which is not symm_mem; use the dispatcher allgather or deepep",
        ),
        (TE, None, "runs on two or more ranks only; use ep_size = 2 or more, with the dispatcher deepep"),
        (TE, "allgather", "brings its own way to send tokens, which is not allgather; use the dispatcher deepep"),
        (TE, "deepep", None),
    ],
)
def test_a_peer_runs_only_with_its_own_dispatchers(name: str, dispatcher: str | None, said: str | None) -> None:
    assert refusal(name, dispatcher) == said


@pytest.mark.usefixtures("installed")
def test_a_layer_of_two_ranks_is_not_built_for_one_process() -> None:
    with pytest.raises(Unsupported, match="runs on two or more ranks only"):
        get_backend(TE).build(moe_config())
    with pytest.raises(Unsupported, match="which is not alltoall"):
        get_backend(TORCH_MM).build(moe_config(), "alltoall")


@pytest.mark.usefixtures("installed")
def test_limits_of_the_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bfloat16, not float16" in (refusal(TORCH_MM, "deepep", dtype=torch.float16) or "")
    assert "before the down projection; use peer_automodel_torch_mm" in (
        refusal(TE, "deepep", apply_router_weight_after_down=True) or ""
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    assert "needs SM70, this is SM61" in (refusal(TE, "deepep") or "")


@pytest.mark.parametrize("name", [TORCH_MM, TE])
def test_a_module_of_automodel_that_does_not_import_is_one_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example one that needs another library."""
    monkeypatch.setattr(nemo_automodel, "not_installed", lambda *_: None)
    monkeypatch.setattr(library, "unsupported", lambda *_: None)
    monkeypatch.setitem(sys.modules, "nemo_automodel.components.moe.experts", None)
    with pytest.raises(Unsupported) as caught:
        get_backend(name).build(moe_config(), "deepep")
    assert str(caught.value).startswith("nemo_automodel does not import (")
    assert str(caught.value).endswith("; pip install nemo_automodel")


def test_without_transformer_engine_the_layers_on_deepep_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoModel sorts rows by expert with functions of Transformer Engine."""
    fakes.remove(monkeypatch)
    with pytest.raises(Unsupported, match=r"^transformer_engine does not import"):
        nemo_automodel._check_deepep(None, moe_config())  # type: ignore[arg-type]
