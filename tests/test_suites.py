"""`pytest suites/` as users run it: it saves and compares runs, fails wrong backends and skips missing ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SWEEP = """
name = "small"
[policy]
time_cap_s = 0.05
[[grid]]
backend = ["loop", "torch_mm"]
num_tokens = 24
n_routed_experts = 4
n_activated_experts = 2
dim = 32
moe_inter_dim = 32
dtype = "float32"
mode = "train"
"""


BACKENDS = [f"--only={name}" for name in ("loop", "torch_mm", "gmm", "faulty:SwappedExperts")]


def suites(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run pytest on suites/ in `folder` with one CPU thread, and return its exit code and output.

    Variables of the outer pytest are removed.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "backends"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error", "-m", "pytest", str(ROOT / "suites"), "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--benchmark-storage", str(folder / "saved"), *arguments]
    variables |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def autosaved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    folder = tmp_path_factory.mktemp("suites")
    (folder / "small.toml").write_text(SWEEP)
    return folder, *suites(folder, "--sweep", "small.toml", *BACKENDS, "--benchmark-autosave", "--benchmark-save-data")


def saved_file(folder: Path) -> Path:
    (found,) = (folder / "saved").rglob("*.json")
    return found


def test_a_wrong_backend_fails_and_one_that_cannot_run_is_skipped(autosaved: tuple[Path, int, str]) -> None:
    _, code, output = autosaved
    assert code == 1
    (failed,) = (line for line in output.splitlines() if line.startswith("FAILED"))
    assert "-faulty:SwappedExperts]" in failed
    assert "\nmismatch: " in output
    (skipped,) = (line for line in output.splitlines() if line.startswith("SKIPPED"))
    assert "unsupported: grouped_gemm" in skipped
    assert "1 failed, 2 passed, 1 skipped" in output
    assert "warning" not in output.lower()


def test_saved_rows_hold_the_measurements(autosaved: tuple[Path, int, str]) -> None:
    saved = json.loads(saved_file(autosaved[0]).read_text())
    assert saved["machine_info"]["moebench"]["device"] == "cpu"
    rows = {row["extra_info"]["backend"]: row for row in saved["benchmarks"]}
    assert set(rows) == {"loop", "torch_mm"}
    for row in rows.values():
        stats, extra = row["stats"], row["extra_info"]
        assert stats["rounds"] == len(stats["data"]) >= 6
        assert stats["min"] == min(stats["data"])
        assert stats["q3"] - stats["q1"] == stats["iqr"] > 0
        assert extra["tokens_per_s"] == pytest.approx(24 / stats["median"])  # the saved times are in seconds
        assert extra["tflops"] == pytest.approx(3 * 6 * 24 * 2 * 32 * 32 / stats["median"] / 1e12)
        assert extra["backward_ms"] < stats["max"] * 1e3
        assert 0 < extra["parity_worst"] <= 1
        assert extra["saved_memory_bytes"] > 0
        assert extra["peak_memory_bytes"] >= extra["saved_memory_bytes"]
        assert extra["executed"].startswith("aten::")
        assert extra["gpu"] is None
        assert row["group"] == extra["case_id"]


def test_compare_finds_the_saved_run_and_reports_what_became_slower(autosaved: tuple[Path, int, str]) -> None:
    folder = autosaved[0]
    file = saved_file(folder)
    saved = json.loads(file.read_text())
    for row in saved["benchmarks"]:  # pretend that the loop was fast in the saved run, and torch_mm slow
        row["stats"]["median"] *= 1e-3 if row["extra_info"]["backend"] == "loop" else 1e3
    file.write_text(json.dumps(saved))
    arguments = ["--only", "loop", "--only", "torch_mm", "--benchmark-compare"]
    code, output = suites(folder, "--sweep", "small.toml", *arguments, "--benchmark-compare-fail", "median:50%")
    assert code == 1
    assert "machine_info is different" not in output
    for backend in ("loop", "torch_mm"):  # one row for the new run and one for the saved run
        assert f"-{backend}] (NOW)" in output
        assert f"-{backend}] (0001_" in output
    regressed = output.partition("Performance has regressed:\n")[2].splitlines()
    assert "-loop]" in regressed[0]
    assert "-torch_mm]" not in regressed[0] + regressed[1]


@pytest.mark.certify(share=0)  # two more runs of pytest
def test_benchmark_disable_only_checks_and_a_wrong_sweep_name_is_one_line(autosaved: tuple[Path, int, str]) -> None:
    code, output = suites(autosaved[0], "--sweep", "small.toml", "--benchmark-disable", "--only", "loop")
    assert code == 0, output
    assert "1 passed" in output
    code, output = suites(autosaved[0], "--sweep", "smal")
    assert code == 4
    assert "ERROR: smal: no such file" in output
    assert "Traceback" not in output
