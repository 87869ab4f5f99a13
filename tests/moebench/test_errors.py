"""Every error that a user can meet is a MoebenchError: one line on standard error, and an exit code of its own."""

import ast
import builtins
import re
import sys
from pathlib import Path

import pytest

from moebench import errors
from moebench.cli import app
from moebench.errors import MoebenchError, SweepError

PACKAGE = Path(errors.__file__).parent
#: Exceptions that no user meets, and the files that define them.
INSIDE = {
    "NvmlUnavailable": "machine/nvml.py",  # a fact that NVML does not give is left out of the record
    "NoSpeed": "measure/call.py",  # a job without a time, with the reason in its detail
    "Unfit": "parity/judge.py",  # no backend can be judged on the case, which counts as unsupported
    "Unhealthy": "measure/canary.py",  # ends a worker's process, and the next worker continues
}
BUILT_IN = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
CLASSES = [MoebenchError, *MoebenchError.__subclasses__()]
CLASSES += [leaf for one in CLASSES[1:] for leaf in one.__subclasses__()]


def exceptions(sources: dict[str, str]) -> list[tuple[str, str]]:
    """Return the name and file of every exception that these sources define, whatever its base."""
    defined = [
        (node.name, file, {ast.unparse(base).rpartition(".")[2] for base in node.bases})
        for file, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    ]
    known = BUILT_IN | {"BaseException"}
    while found := {name for name, _, bases in defined if bases & known} - known:
        known |= found
    return [(name, file) for name, file, _ in defined if name in known]


def strangers(sources: dict[str, str]) -> list[str]:
    """Return the exceptions that a user may meet and that moebench.errors does not define."""
    return [
        f"{file}: {name}"
        for name, file in exceptions(sources)
        if file != "errors.py" and not name.startswith("_") and INSIDE.get(name) != file
    ]


def sources() -> dict[str, str]:
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_every_exception_is_one_of_moebenchs_or_stays_inside() -> None:
    assert strangers(sources()) == []
    assert {name for name, _ in exceptions(sources())} >= {*INSIDE, *(one.__name__ for one in CLASSES)}


@pytest.mark.parametrize("bases", ["Exception", "OSError", "errors.RunnerError", "_Failed"])
def test_another_exception_is_seen(bases: str) -> None:
    more = f"class TooBad({bases}):\n    pass\n"
    assert strangers({**sources(), "run/new.py": more}) == ["run/new.py: TooBad"]


def test_the_tree_in_the_docstring_is_that_of_the_classes() -> None:
    """The tree shows the exit codes, and it is as many levels deep as there are bases."""
    rows = re.findall(r"^    ([│├└─ ]*)(\w+) +(\d+)?", str(errors.__doc__), re.MULTILINE)
    parents: list[str] = []
    drawn = {}
    for lines, name, code in rows:
        del parents[len(lines) // 4 :]
        drawn[name] = (parents[-1] if parents else "Exception", int(code) if code else None)
        parents.append(name)
    there = {one.__name__: (one.__bases__[0].__name__, one.exit_code) for one in CLASSES}
    there["MoebenchError"] = ("Exception", None)  # moebench never raises the base
    assert drawn == there


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_command_line_prints_one_line_and_ends_with_its_code(
    kind: type[MoebenchError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is printed unchanged: it is not wrapped, though it is long, and brackets do not colour a word."""
    message = f"out [1]/[red]: {'x' * 300} is not there; name another folder"

    def fail(**settings: object) -> None:
        raise kind([message]) if kind is SweepError else kind(message)

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as end:
        app.main()
    printed = capsys.readouterr()
    assert (end.value.code, printed.out, printed.err) == (kind.exit_code, "", f"{message}\n")


@pytest.mark.parametrize(
    "error",
    [SweepError(["a\nb", "c\td\r"]), errors.PictureError("a\nb", "c\td\r"), errors.RunnerError("a\nb", "c\td\r")],
    ids=lambda error: type(error).__name__,
)
def test_a_newline_in_a_name_makes_no_second_line(
    error: MoebenchError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake is one line. Whoever catches the error gets the text as it was."""

    def fail(**settings: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr().err == "a\\nb\nc\\td\\r\n"
    assert str(error) == "a\nb\nc\td\r"


def test_a_mistake_of_moebench_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "app", lambda **settings: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["moebench"])
    with pytest.raises(ZeroDivisionError):
        app.main()
