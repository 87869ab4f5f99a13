"""Write CSV, plots and report of every folder in results/published again: `python results/rewrite.py`.

The repository has Parquet, environment, sweep and the plots that documents show. Git ignores the other files.
"""

from pathlib import Path

from moebench.report.folder import rewrite

PUBLISHED = Path(__file__).resolve().parent / "published"

if __name__ == "__main__":
    for parquet in sorted(PUBLISHED.rglob("results.parquet")):
        written = rewrite(parquet.parent)
        print(f"wrote {len(written.paths)} files in {parquet.parent}")
        written.check()
