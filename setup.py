"""Copies suites/*.toml into the wheel, as moebench/suites/. The rest of the build is described in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSuites(build_py):
    """An editable install copies nothing: it finds the sweeps of the checkout, as they are on the day of a run."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "moebench" / "suites"
        self.mkpath(str(folder))
        for sweep in sorted(Path("suites").glob("*.toml")):
            self.copy_file(str(sweep), str(folder / sweep.name))


setup(cmdclass={"build_py": BuildWithSuites})
