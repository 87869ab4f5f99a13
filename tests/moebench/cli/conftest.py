"""A sweep, and a run of it that went well."""

from types import SimpleNamespace

import pytest

from moebench.workload.spec import load_sweep
from tests.moebench.typed import SWEEP, finished


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "tiny.toml"
    path.write_text(SWEEP)
    return path


@pytest.fixture(scope="session")
def case_ids(sweep):
    return [job.case.case_id for job in load_sweep(sweep).jobs()[::2]]


@pytest.fixture(scope="session")
def good_run(sweep, tmp_path_factory):
    """A run with `--json` and no failures. Its results include unsupported and out of memory."""
    cwd = tmp_path_factory.mktemp("good")
    backends = ["loop", "torch_mm", "broken:SaysUnsupported", "broken:OutOfMemory"]
    chosen = [argument for name in backends for argument in ("--only", name)]
    asked = ["--json", "--filter", "num_tokens=8", *chosen, "--device", "cpu", "--profile"]
    found = finished("run", sweep, *asked, cwd=cwd)
    return SimpleNamespace(**vars(found), cwd=cwd, backends=backends)
