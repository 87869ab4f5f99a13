"""Copies suites/*.toml into the wheel, as moebench/suites/. pyproject.toml describes the rest of the build."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSuites(build_py):
    """Copy the sweeps, except for an editable install, which reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "moebench" / "suites"
        self.mkpath(str(folder))
        for sweep in sorted(Path("suites").glob("*.toml")):
            self.copy_file(str(sweep), str(folder / sweep.name))


setup(cmdclass={"build_py": BuildWithSuites})
