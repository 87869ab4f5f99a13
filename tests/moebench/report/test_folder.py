"""Committed results, which have no CSV, report and few plots, get these again."""

from pathlib import Path

from moebench.report.folder import rewrite
from moebench.results.frame import to_frame, write
from tests.moebench.drawn import family


def test_all_but_the_parquet_file_is_written_again(tmp_path: Path) -> None:
    write(to_frame(family("torch_mm")), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "results.csv").unlink()
    written = {path.relative_to(tmp_path).as_posix() for path in rewrite(tmp_path)}
    assert written > {"results.csv", "report.html", "plots/roofline-overview.svg", "plots/roofline-overview.png"}
    assert "results.parquet" not in written
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    pictures = sum(name.endswith(".svg") for name in written)
    assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == pictures
