"""Copies the sweeps and the published results into the wheel. pyproject.toml describes the rest of the build.

The sweeps and the routing of suites/ become moebench/suites/, and the files of results/published/*/ that commands read
become moebench/published/.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: The files of a results folder that `advise`, `show`, `compare` and `report` read.
READ = ("results.parquet", "environment.json", "run.json", "sweep.toml")


class BuildWithData(build_py):
    """Copy the data, except for an editable install, which reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in sorted(path for path in Path("suites").iterdir() if path.suffix in (".toml", ".npz")):
            self._copy(file, Path("suites"))
        for parquet in sorted(Path("results", "published").glob("*/results.parquet")):
            for name in READ:
                self._copy(parquet.with_name(name), Path("published", parquet.parent.name))

    def _copy(self, file: Path, folder: Path) -> None:
        target = Path(self.build_lib, "moebench", folder, file.name)
        self.mkpath(str(target.parent))
        self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithData})
