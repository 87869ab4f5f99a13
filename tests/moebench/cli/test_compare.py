"""moebench compare, merge and history as a user types them."""

import json

import pytest

from tests.moebench.gated import H200, changed, job_of


def test_compare_shows_ratios_and_what_differs(moebench, folders):
    (folders / "same" / "environment.json").write_text(H200.model_copy(update={"env_id": "e"}).to_json())
    (folders / "slow" / "environment.json").write_text(changed(cpu_model="other", env_id="f").to_json())
    found = moebench("compare", "same", "slow", "other")
    assert found.code == 0
    assert "1.040" in found.out
    assert "B's median time divided by A's" in found.out
    assert "95.4 MiB" in found.out, "memory in every table"
    assert "other against same: no job in common" in found.out
    assert "slow against same: cpu Intel(R) Xeon(R) Processor -> other" in found.out
    assert json.loads(moebench("compare", "same", "slow", "--json").out)[0]["time_ms_ratio:slow"] == pytest.approx(1.04)
    header, line = moebench("compare", "same", "slow", "--csv").out.splitlines()
    assert len(header.split(",")) == len(line.split(","))
    nothing = moebench("compare", "same", "other")
    assert (nothing.code, nothing.out, "no job in common" in nothing.err) == (2, "", True)
    assert moebench("compare", "same").code == moebench("compare", "same", "same").code == 2


def test_merge_and_history(moebench, folders):
    assert moebench("merge", "same", "slow", "--out", "merged").code == 2
    assert not (folders / "merged").exists()
    assert moebench("merge", "same", "other", "--out", "merged").code == 0
    case_id = job_of(64).case.case_id
    found = moebench("history", case_id, "merged", "slow", "--plot", "history.png")
    assert (found.code, found.err) == (0, "wrote history.png\n")
    assert "+4.0%" in found.out
    assert (folders / "history.png").is_file()
    document = json.loads(moebench("history", case_id, "merged", "slow", "--json").out)
    assert [row["result"] for row in document] == ["merged", "slow"]
    assert moebench("history", "nothing", "merged").code == 2
