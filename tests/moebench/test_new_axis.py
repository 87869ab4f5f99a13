"""A field that is added to a case shows everywhere, and no other file changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from moebench.report.page import page
from moebench.report.plots.figures import throughput
from moebench.report.plots.notebook import pivot
from moebench.report.tables.tables import summary
from moebench.results.compare import compare
from moebench.results.frame import COLUMNS, load, to_frame, write
from moebench.results.folder import open_result
from moebench.results.labels import describe
from moebench.results.merge import merge
from moebench.results.record import Status, record
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.findings import job_of
from moebench.verdicts.gate import gate
from moebench.workload.case import Case, Job
from moebench.workload.selection import filter_jobs

out = Path(sys.argv[1])
shape = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8}
cases = [Case(num_tokens=n, **shape, **more) for more in ({}, {"num_shared": 2, "is_sorted": True}) for n in (8, 16)]
assert cases[0].case_id == "e4k2d16i8-t8-bfloat16-forward-uniform-ep1-" + sys.argv[2]
jobs = [Job(case=case, backend="loop") for case in cases]
assert len({job.key for job in jobs}) == 4
assert filter_jobs(jobs, ["num_shared>=1"]) == filter_jobs(jobs, ["is_sorted=true"]) == jobs[2:]

def run(some, run_id):
    speed = {"time_ms": 1.0, "tokens_per_s": 8.0, "parity_worst": 0.5, "device": "cpu"}
    return to_frame(record(job, Status.ok, run_id=run_id, env_id="e", **speed) for job in some)

frame = run(jobs, "20261101-000000-a")
assert [job_of(row) for row in frame.to_dict("records")] == jobs
assert describe(frame).labels == [
    "8", "16", "8 num_shared 2 is sorted", "16 num_shared 2 is sorted"
]
assert COLUMNS.index("num_shared") == COLUMNS.index("check") - 2
for name, some in (("a", jobs[:2]), ("b", jobs[2:])):
    (out / name).mkdir()
    write(run(some, "20261101-000000-" + name), out / name)
assert "num_shared" in (out / "a" / "results.csv").read_text().splitlines()[0]
merge([out / "a", out / "b"], out / "both")
assert load(out / "both")["num_shared"].tolist() == [0, 0, 2, 2]
assert len(throughput(frame)) == 2, "a workload of its own"
assert "num_shared" in pivot(frame).index.names
assert compare({"a": frame, "b": frame})["num_shared"].tolist() == [0, 0, 2, 2]
result = gate(frame, frame, Comparability({}, {}))
assert {job.case for job in result.jobs} == set(describe(frame).labels)
assert "num_shared 2" in page(frame, {}, out)
console = Console(width=100, record=True, file=open(out / "printed", "w"))
console.print(summary(frame))
assert "num_shared 2" in console.export_text()
"""


def test_a_new_field_of_a_case_is_an_axis_and_a_column_everywhere(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "moebench", tmp_path / "moebench", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "moebench" / "workload" / "case.py"
    lines = source.read_text().splitlines(keepends=True)
    (last,) = (number for number, line in enumerate(lines) if line.startswith("    seed: "))
    lines.insert(last + 1, "    num_shared: int = 0\n    is_sorted: bool = False\n")
    source.write_text("".join(lines))
    (tmp_path / "out").mkdir()
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), _digest()]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _digest() -> str:
    """Return the end of the id that the case has without the new field."""
    from moebench.workload.case import Case

    return Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8).case_id[-8:]
