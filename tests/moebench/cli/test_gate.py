"""moebench gate as a user types it: exit codes, files, and one line for a mistake."""

import json
import shutil
from xml.etree import ElementTree as xml

import pytest

from moebench.cli.gate import share
from moebench.errors import UsageError
from moebench.results.journal import Journal
from tests.moebench.gated import H200, job_of, ok, steady


@pytest.mark.parametrize(("candidate", "code"), [("again", 0), ("slow", 1), ("one", 3)])
def test_exit_codes(moebench, folders, candidate, code):
    found = moebench("gate", folders / "same", folders / candidate)
    assert (found.code, found.err) == (code, "")
    assert found.out.splitlines()[-1].startswith("gate: 1 ")


def test_the_same_folder_or_a_copy_on_both_sides_is_not_green(moebench, folders):
    shutil.copytree(folders / "same", folders / "copy")
    for candidate in ("same", "copy"):
        found = moebench("gate", "same", candidate)
        assert (found.code, found.out.splitlines()[-1]) == (3, "gate: 1 INCOMPARABLE")
        assert "both sides are the same measurement" in " ".join(found.out.split())


def test_the_threshold_is_a_share(moebench, folders):
    assert moebench("gate", folders / "same", folders / "slow", "--threshold", "10%").code == 0
    assert moebench("gate", folders / "same", folders / "slow", "--threshold", "0.1").code == 0
    assert [share("--x", text) for text in ("3%", "0.03", " 2.5 %", ".5")] == [0.03, 0.03, 0.025, 0.5]
    for text in ("3", "0", "0%", "100%", "-1%", "x", "", "nan", "1e-2"):
        with pytest.raises(UsageError, match="must be a share"):
            share("--threshold", text)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("same", "nowhere"), "no such file"),
        (("nowhere", "same"), "no such file"),
        (("same", "empty"), "no rows"),
        (("same", "."), "neither journal.jsonl nor results.parquet"),
        (("same", "other"), "no job in common"),
        (("same", "same", "--threshold", "3"), "3% or 0.03"),
        (("same", "same", "--allow-env-change", "weather"), "weather"),
        (("same", "same", "--json", "--github"), "choose one"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(moebench, folders, arguments, word):
    found = moebench("gate", *arguments)
    assert (found.code, found.out) == (2, "")
    (line,) = found.err.strip().splitlines()
    assert word in line


def test_another_schema_is_one_line(moebench, folders):
    row = json.loads((folders / "same" / "journal.jsonl").read_text())
    (folders / "one" / "journal.jsonl").write_text(json.dumps({**row, "schema": 99}) + "\n")
    found = moebench("gate", "same", "one")
    assert found.code == 2
    assert "schema 99" in found.err


def test_json_is_all_there_is_on_standard_output(moebench, folders):
    found = moebench("gate", "same", "slow", "--json", "--junit", "made/gate.xml")
    assert found.code == 1
    assert json.loads(found.out)["exit_code"] == 1
    assert xml.parse(folders / "made" / "gate.xml").getroot().get("failures") == "1"


def test_github_gets_annotations_and_a_summary(moebench, folders, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folders / "summary.md"))
    (folders / "summary.md").write_text("before\n")
    found = moebench("gate", "same", "slow", "--github")
    assert found.code == 1
    assert found.out.splitlines()[-1].startswith("::error title=moebench%3A REGRESSED::loop on ")
    assert (folders / "summary.md").read_text().startswith("before\n## moebench gate: 1 REGRESSED")


def test_outside_github_the_summary_that_is_not_written_is_said(moebench, folders):
    found = moebench("gate", "same", "again", "--github")
    assert found.code == 0
    assert "GITHUB_STEP_SUMMARY" in found.err


def test_a_filter_gates_those_jobs_alone(moebench, folders):
    Journal(folders / "same" / "journal.jsonl").append(ok(job_of(128), steady()))
    assert moebench("gate", "same", "again").code == 1, "one is missing"
    assert moebench("gate", "same", "again", "--filter", "num_tokens<100").code == 0
    found = moebench("gate", "same", "again", "--filter", "num_tokens>100")
    assert (found.code, "no job in common" in found.err) == (2, True)
    found = moebench("gate", "same", "again", "--filter", "size=3")
    assert (found.code, "there is no key 'size'" in found.err) == (2, True)


def test_a_stored_baseline_is_gated_against(moebench, folders):
    environment = H200.model_copy(update={"env_id": "e"})
    for name in ("same", "slow"):
        (folders / name / "environment.json").write_text(environment.to_json())
    stored = moebench("baseline", "update", "same")
    assert (stored.code, stored.err) == (0, "")
    assert "baseline:nvidia-h200-e: 1 jobs in results/published/baselines/nvidia-h200-e" in stored.out
    assert moebench("gate", "auto", "again").code == 0
    assert moebench("gate", "baseline:nvidia-h200-e", "slow").code == 1
    assert "nvidia-h200-e" in moebench("gate", "baseline:nothing", "slow").err
    shown = moebench("baseline", "show")
    assert "rounds: 10" in shown.out
    assert json.loads(moebench("baseline", "show", "--json").out)[0]["jobs"] == 1
    (folders / "again" / "environment.json").write_text(environment.to_json())
    replaced = moebench("baseline", "update", "again")
    assert "replaced 1 jobs of run 20261123-000000-a by run 20261123-000000-a" in replaced.out
    refused = moebench("baseline", "update", "again", "same")
    assert (refused.code, "is given twice" in refused.err) == (2, True)
    (folders / "one" / "environment.json").write_text(environment.to_json())
    assert "--rounds" in moebench("baseline", "update", "one").err


def test_without_baselines_show_says_how_to_make_one(moebench):
    found = moebench("baseline", "show")
    assert (found.code, "moebench baseline update" in " ".join(found.out.split())) == (0, True)
