"""Run git. All of moebench calls git through this module."""

import os
import subprocess


def run_git(*arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run git and return the finished process, with its output in English.

    Variables that a git hook sets do not reach git. Raises OSError where git does not run, and
    subprocess.TimeoutExpired where it does not finish within `timeout_s`, by default without a limit.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook sets these
    variables["LC_ALL"] = "C"
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, check=False, env=variables, timeout=timeout_s)
