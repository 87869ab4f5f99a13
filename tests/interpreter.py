"""Run tests in Triton's interpreter, which must be turned on before triton is imported: in a process of its own.

python -m tests.interpreter '[["tests/experts/test_gemm.py", "-k", "cpu"]]'
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def replace_functions_once() -> None:
    """Let the interpreter replace the functions of `triton.language` by its own once for a kernel.

    It replaces them again at every call of a function in the kernel, which takes a third of its time.
    """
    from triton import language
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    replace_all = interpreter._patch_lang

    def replace(kernel: Any) -> Any:
        seen = [
            module
            for module in (language, language.core)
            if any(value is module for value in kernel.__globals__.values())
        ]
        return replace_all(kernel) if any(is_builtin(module.load) for module in seen) else interpreter._LangPatchScope()

    interpreter._patch_lang = replace


def assert_passes(*runs: Sequence[str], **variables: str) -> None:
    """Run pytest with the arguments of each run, one after the other in one process that has the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "tests.interpreter", json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.count(" passed") == len(runs), done.stdout[-5000:]


def main(runs: list[list[str]]) -> int:
    """Run pytest for each run until one fails, and return the exit status of the last."""
    # a tile reads past its group, where memory may hold infinities; numpy warns about them
    quiet = ["-W", "ignore:invalid value encountered:RuntimeWarning", "-W", "ignore:overflow:RuntimeWarning"]
    options = ["-p", "no:cacheprovider", "-q", "--timeout", "0", *quiet]
    return next(filter(None, (int(pytest.main([*options, *run])) for run in runs)), 0)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
