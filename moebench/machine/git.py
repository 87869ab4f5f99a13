"""git, as moebench calls it."""

import os
import subprocess

TIMEOUT_S = 60.0


def run_git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """What git answers, in English and whatever a hook's variables say. Raises OSError where it does not run.

    A git that does not answer within TIMEOUT_S raises subprocess.TimeoutExpired.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook sets these
    variables["LC_ALL"] = "C"
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, check=False, env=variables, timeout=TIMEOUT_S)
