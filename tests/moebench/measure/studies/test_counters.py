"""moebench.measure.studies.counters makes one row of each kernel on ncu's page."""

from pathlib import Path

import pandas as pd
import pytest

from moebench.errors import UsageError
from moebench.measure.studies import counters, run

HEADER = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'


def lines(number: int, name: str, duration: str = "1,203,104", unit: str = "ns") -> str:
    metrics = [
        ("DRAM Frequency", "hz", "3,123,873,873.87"),
        ("Duration", unit, duration),
        ("SM Frequency", "hz", "1,652,334,918.68"),
        ("SM: Pipe Tensor Cycles Active", "%", "81.37"),
        ("DRAM Throughput", "%", "29.33"),
        ("L2 Cache Throughput", "%", "53.05"),
    ]
    return "".join(f'"{number}","{name}","{metric}","{unit}","{value}"\n' for metric, unit, value in metrics)


def test_a_row_for_each_kernel_in_their_order_without_the_lines_of_ncu() -> None:
    text = "==PROF== Connected\n" + HEADER + lines(10, "last", "999") + lines(2, "grouped_gemm") + "==WARNING== none\n"
    found = counters.table(text)
    assert found["kernel"].tolist() == ["grouped_gemm", "last"]
    assert found.loc[0].drop("kernel").to_dict() == {
        "duration_ms": 1.203104,
        "sm_clock_ghz": 1.652335,
        "tensor_active_percent": 81.37,
        "dram_percent": 29.33,
        "l2_percent": 53.05,
    }
    assert found.loc[1, "duration_ms"] == 0.000999


def test_a_long_name_is_cut() -> None:
    (name,) = counters.table(HEADER + lines(0, "k" * 100))["kernel"]
    assert name == "k" * 59 + "…"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not CSV"),
        ('"ID","Kernel Name"\n', "not CSV"),
        (HEADER, "has no Duration"),
        (HEADER + lines(0, "k").replace("DRAM Throughput", "Other"), "has no DRAM Throughput"),
        (HEADER + lines(0, "k") + lines(1, "l").replace("L2 Cache", "L3 Cache"), "has no L2 Cache Throughput"),
        (HEADER + lines(0, "k", unit="us"), "its unit is us"),
    ],
)
def test_another_page_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        counters.table(text)


def test_the_program_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, out = tmp_path / "counted.csv", tmp_path / "counters.csv"
    counted.write_text(HEADER + lines(0, "grouped_gemm"))
    monkeypatch.setattr("sys.argv", ["counters", str(counted), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        run(counters.main, "counters")
    assert not ended.value.code
    assert pd.read_csv(out).equals(counters.table(counted.read_text()))


def test_a_file_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["counters", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit) as ended:
        run(counters.main, "counters")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
