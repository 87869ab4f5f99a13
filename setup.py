"""Copies the sweeps and the routing of suites/ into the wheel, as moebench/suites/. pyproject.toml has the rest."""

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
        for file in sorted(path for path in Path("suites").iterdir() if path.suffix in (".toml", ".npz")):
            self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithSuites})
