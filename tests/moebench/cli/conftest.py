"""A sweep, and a run of it that went well. All test processes share them."""

import json
import os
from types import SimpleNamespace

import pytest
from filelock import FileLock

from moebench.workload.spec import load_sweep
from tests.moebench.typed import SWEEP, finished


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cli"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sweep(shared):
    path = shared / "tiny.toml"
    with FileLock(shared / "sweep.lock"):
        if not path.exists():
            path.write_text(SWEEP)
    return path


@pytest.fixture(scope="session")
def case_ids(sweep):
    return [job.case.case_id for job in load_sweep(sweep).jobs()[::2]]


@pytest.fixture(scope="session")
def good_run(sweep, shared):
    """A run with `--json` and no failures. Its results include unsupported and out of memory."""
    cwd, told = shared / "good", shared / "good.json"
    backends = ["loop", "torch_mm", "broken:SaysUnsupported", "broken:OutOfMemory"]
    chosen = [argument for name in backends for argument in ("--only", name)]
    asked = ["--json", "--filter", "num_tokens=8", *chosen, "--device", "cpu", "--profile"]
    with FileLock(shared / "good.lock"):
        if not told.exists():
            cwd.mkdir()
            told.write_text(json.dumps(vars(finished("run", sweep, *asked, cwd=cwd))))
    return SimpleNamespace(**json.loads(told.read_text()), cwd=cwd, backends=backends)
