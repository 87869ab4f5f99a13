"""What the functions return shows itself in a terminal and in a notebook."""

import subprocess
import sys
from pathlib import Path

import pytest

import moebench
from moebench.errors import UsageError
from moebench.results.frame import to_frame
from tests.moebench.gated import job_of, ok, steady

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "results" / "published"


def test_a_gate_shows_its_verdicts_and_is_true_if_it_passed() -> None:
    before, after = (to_frame([ok(job_of(64), steady(seed=seed), run_id=f"r{seed}")]) for seed in (0, 1))
    slow = to_frame([ok(job_of(64), steady(time_ms=1.5, seed=2), run_id="r2")])
    fine, worse = moebench.gate_results(before, after), moebench.gate_results(before, slow)
    assert (bool(fine), fine.exit_code, bool(worse), worse.exit_code) == (True, 0, False, 1)
    assert (fine.total, worse.total) == ("1 PASS", "1 REGRESSED")
    assert worse.frame[["backend", "verdict"]].to_numpy().tolist() == [["loop", "REGRESSED"]]
    assert worse.frame["time_ms_ratio"].iloc[0] == pytest.approx(1.5, rel=0.01)
    assert "REGRESSED time" in repr(worse)
    assert "REGRESSED time" in worse._repr_html_()
    assert worse._repr_html_().startswith("<pre")
    assert "<span" in worse._repr_html_(), "with colours"
    assert "\x1b" not in repr(worse)


def test_a_gate_of_folders_knows_their_environments() -> None:
    folders = [ROOT / "notebooks" / "data" / "gate" / name for name in ("baseline", "candidate")]
    found = moebench.gate_results(*folders)
    assert found.exit_code == 1
    assert "environments differ: env_id" not in repr(found)


def test_advice_is_that_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = moebench.advise("qwen3-30b-a3b", 4096, mode="train", results=PUBLISHED / "h200-2026-11-23")
    assert found.backend == "triton"
    assert found.frame["label"].iloc[0] == "triton"
    assert found.frame["time_ms"].is_monotonic_increasing
    assert "triton" in repr(found)
    assert "triton" in found._repr_html_()
    nothing = moebench.advise("kimi-k2", 4096, results=[PUBLISHED / "h200-peers-2026-11-28"])
    assert nothing.backend is None
    assert nothing.frame.empty
    assert "no result is near this workload" in repr(nothing)
    with pytest.raises(UsageError, match=r"^num_tokens x: "):
        moebench.advise("olmoe", "x")
    with pytest.raises(UsageError, match=r'^model qwen3-30b: .*did you mean "qwen3-30b-a3b"\?'):
        moebench.advise("qwen3-30b", 64)


def test_text_of_results_cannot_reach_a_terminal_or_a_page_as_anything_but_text() -> None:
    frame = to_frame([ok(job_of(64), steady())]).assign(run_id="a\x1b[31m<b>")
    other = to_frame([ok(job_of(64), steady(time_ms=1.5))]).assign(run_id="b")
    found = moebench.gate_results(frame.assign(backend="\x1b[31m<i>"), other.assign(backend="\x1b[31m<i>"))
    assert "\x1b" not in repr(found)
    assert "<i>" not in found._repr_html_()


def test_no_public_name_is_a_name_of_a_module_or_a_folder_of_the_package() -> None:
    package = ROOT / "moebench"
    folders = {path.name for path in package.rglob("*") if path.is_dir()}
    modules = {path.stem for path in package.glob("*.py")}
    assert not (folders | modules) & set(moebench.__all__)
    code = "import moebench\n" + "\n".join(
        f"import {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in sorted(package.glob("api/*.py"))
        if path.stem != "__init__"
    )
    code += "\nassert all(callable(getattr(moebench, name)) for name in moebench.__all__ if name != '__version__')"
    code += "\nimport sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
