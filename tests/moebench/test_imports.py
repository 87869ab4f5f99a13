"""Modules import only what their folder may. Results open and runs are planned without torch and vendor packages."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import moebench
from moebench.results.journal import Journal
from moebench.results.record import Status, record
from moebench.workload.case import Case, Job

ROOT = Path(__file__).parents[2]

#: A finder that stands before all other finders: whoever imports a blocked module is told that it does not exist.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformer_engine", "grouped_gemm", "deep_ep", "torchao", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""

PACKAGE = ROOT / "moebench"
LOWEST = frozenset({"workload", "machine"})
#: What each folder may import besides itself, moebench.errors, moebench.escapes and moebench.names: folders, and single
#: modules of other folders.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "workload": frozenset(),
    "machine": frozenset(),
    "results": LOWEST,
    "parity": frozenset({"workload"}),
    "measure": LOWEST | {"results", "parity"},
    "run": LOWEST | {"results", "parity.checks", "parity.space", "parity.together", "measure.protocol"},
    "verdicts": LOWEST | {"results", "run"},
    "report": LOWEST | {"results", "run", "verdicts"},
    "api": LOWEST | {"results", "run", "verdicts", "report"},
    "cli": LOWEST | {"results", "parity", "measure", "run", "verdicts", "report"},
}
#: Where a module may import torch, or `experts`, which imports torch: at module level, and only inside functions.
TORCH_AT_IMPORT = ("parity", "measure", "workload.driven", "workload.inputs", "workload.ranks")
NEVER_TORCH_AT_IMPORT = ("parity.checks", "parity.space", "parity.together", "measure.protocol")
#: What judges `experts` uses nothing of it, so that no fault of it can hide itself.
NEVER_EXPERTS = ("parity.oracle", "parity.space", "parity.checks")
TORCH_IN_FUNCTIONS = (
    "machine.backends",
    "machine.doctor",
    "machine.environment",
    "machine.versions",
    "cli.listing",
)
#: Modules of `experts` that do not import torch.
TORCH_FREE_EXPERTS: tuple[str, ...] = ("experts.catalog",)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE
}


def is_within(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield each module that a source imports, and whether at module level. Skip imports for type checkers."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body.clear()
            node.body.append(ast.Pass())
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in in_functions) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, id(node) not in in_functions) for name in names)


def broken_rules(module: str, source: str) -> list[str]:
    """Return each import that breaks the rules, for a module named without the prefix `moebench.`."""
    folder = module.partition(".")[0]
    allowed = MAY_IMPORT[folder] | {folder, "errors", "escapes", "names", "__version__"}
    found = []
    for name, at_import in imports(source):
        package, _, rest = name.partition(".")
        if package == "moebench" and rest and not is_within(rest, allowed):
            found.append(f"{module} imports {name}")
        if package in ("torch", "experts") and not is_within(name, TORCH_FREE_EXPERTS):
            may = is_within(module, TORCH_AT_IMPORT) and not is_within(module, NEVER_TORCH_AT_IMPORT)
            if not (may or (not at_import and is_within(module, TORCH_IN_FUNCTIONS))):
                found.append(f"{module} imports {name}")
        if package == "experts" and is_within(module, NEVER_EXPERTS):
            found.append(f"{module} imports {name}")
    return found


def test_folders_are_those_of_the_design() -> None:
    """A new folder needs a rule, and no folder may have more modules than a reader takes in."""
    folders = {path.parent for path in MODULES.values()}
    assert {folder.relative_to(PACKAGE).parts[0] for folder in folders} == MAY_IMPORT.keys()
    for folder in folders:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 15, f"{folder.relative_to(ROOT)} has {len(files)} files"
    own = {"__init__.py", "__main__.py", "errors.py", "escapes.py", "names.py"}
    assert {path.name for path in PACKAGE.glob("*.py")} == own


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert not broken_rules(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("workload.case", "from moebench.machine import gpus"),
        ("machine.gpus", "from moebench.workload.case import Case"),
        ("results.advise", "from moebench.verdicts.times import FALSE_ALARMS"),
        ("parity.judge", "from moebench.machine import nvml"),
        ("measure.job", "from moebench.run.plan import Plan"),
        ("run.audit", "from moebench.report.tables.cells import DIM"),
        ("run.audit", "from moebench.parity.judge import check"),
        ("run.supervisor", "from moebench.measure import worker"),
        ("verdicts.ab", "from moebench.parity.checks import CHECKS"),
        ("report.page", "from moebench.measure.protocol import WorkList"),
        ("report.page", "from moebench.cli.console import out"),
        ("results.frame", "import moebench.cli.app"),
        ("results.frame", "import torch"),
        ("results.frame", "def f():\n    import torch"),
        ("parity.checks", "import torch"),
        ("parity.checks", "from moebench.parity.space import search\nfrom experts.catalog import ENGINES"),
        ("parity.space.rules", "def f():\n    import torch"),
        ("parity.oracle", "from experts.config import MoEConfig"),
        ("measure.protocol", "from experts import MoEConfig"),
        ("cli.listing", "import torch"),
    ],
)
def test_an_import_that_is_turned_round_is_seen(module: str, line: str) -> None:
    assert broken_rules(module, f"{MODULES[module].read_text()}\n{line}\n")


def test_no_public_name_hides_a_folder() -> None:
    """`import moebench.results` must not replace a function `moebench.results`, and the reverse must not happen."""
    folders_and_modules = {path.stem for path in PACKAGE.iterdir()}
    assert not folders_and_modules & {name for name in moebench.__all__ if name != "__version__"}


def test_every_public_name_is_there(tmp_path: Path) -> None:
    names = (
        *("load", "pivot", "plot", "compare", "open_result", "Comparability", "parity_errors", "ResultsError"),
        *("check", "bench", "run_sweep", "gate_results", "advise", "MoebenchError"),
        "__version__",
    )
    assert set(moebench.__all__) == set(names)
    code = "import moebench\nfor name in sys.argv[1:]: getattr(moebench, name)\nassert 'torch' not in sys.modules\n"
    done = python(code, *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def python(code, *arguments, cwd, blocked=BLOCKED):
    command = [sys.executable, "-W", "error", "-c", blocked + code, *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def folder(tmp_path):
    """Write a results folder of one record."""
    case = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    measured = {"time_ms": 1.5, "parity_worst": 0.25, "samples_ms": (1.5,), "sample_rounds": (0,)}
    row = record(Job(case=case, backend="gmm"), Status.ok, run_id="20261101-000000-a", env_id="e", **measured)
    Journal(tmp_path / "journal.jsonl").append(row)
    return tmp_path


def test_what_is_free_of_torch_imports_where_torch_is_not(tmp_path: Path) -> None:
    with_torch = {name for name in MODULES if is_within(name, TORCH_AT_IMPORT)}
    without = {name for name in MODULES if is_within(name, NEVER_TORCH_AT_IMPORT)} | {"parity", "measure"}
    free = sorted(MODULES.keys() - with_torch | without)
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(f'moebench.{name}')\n"
    code += "assert 'torch' not in sys.modules\n"
    done = python(code, *free, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


COMMAND = """
from moebench.cli.app import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("command", ["show", "plots", "report", "dry-run"])
def test_results_are_opened_and_runs_planned_without_torch(folder, command):
    arguments = ["run", ROOT / "suites" / "quick.toml", "--dry-run"] if command == "dry-run" else [command, folder]
    done = python(COMMAND, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    *printed, has_torch = done.stdout.splitlines()
    assert has_torch == "False"
    assert {"show": "gmm", "plots": "wrote", "report": "wrote", "dry-run": "jobs"}[command] in "\n".join(printed)


#: What takes longest to import. A command starts without those of them that it does not use.
HEAVY = ("torch", "matplotlib", "pandas", "pyarrow", "scipy", "numpy", "hypothesis", "jinja2")
#: The commands that open results.
OF_RESULTS = ("show", "compare", "gate", "advise", "ab", "parity")
STARTED = """
import sys
from moebench.__main__ import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("--help", (*HEAVY, "pydantic", "psutil")),
        ("list", HEAVY),
        ("doctor", HEAVY),
        ("run --help", HEAVY),
        *((f"{command} --help", ("pandas", "pyarrow", "scipy", "torch")) for command in OF_RESULTS),
        ("nosuch", (*HEAVY, "psutil")),
    ],
)
def test_a_command_starts_without_what_it_does_not_use(tmp_path: Path, command: str, absent: tuple[str, ...]) -> None:
    done = python(STARTED, *command.split(), cwd=tmp_path, blocked="")
    assert done.returncode == (2 if command == "nosuch" else 0), done.stderr
    imported = done.stderr.splitlines()[-1].split()
    assert "moebench.cli.app" in imported
    assert [name for name in absent if name in imported] == []


def test_no_command_imports_matplotlib_before_it_draws(tmp_path: Path) -> None:
    """The command that draws first sets aside what the user set of matplotlib (moebench.report.plots.settings)."""
    commands = [name for name in MODULES if name.startswith("cli.")]
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(f'moebench.{name}')\n"
    done = python(code + "print('matplotlib' in sys.modules)", *commands, cwd=tmp_path)
    assert done.stdout == "False\n", done.stderr


def test_the_block_blocks(tmp_path):
    done = python("import moebench.parity.judge", cwd=tmp_path)
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr


CHECKED = """
import sys
import torch
import moebench.measure.worker
from moebench.measure.memory import storage_tracker
from moebench.measure.profiling import executed
from moebench.parity.poison import poisoned
print([name for name in sys.argv[1:] if name in sys.modules])
with poisoned(torch.device("cpu")), storage_tracker():
    print(executed(lambda: torch.ones(2, 2) @ torch.ones(2, 2), torch.device("cpu")))
print([name for name in sys.argv[1:] if name in sys.modules])
"""


def test_a_worker_does_without_what_one_rank_and_a_sweep_never_need() -> None:
    """Each of these imports takes a second or more in every worker. The checks and the profile need none of them."""
    slow = ["torch._dynamo", "torch.distributed.tensor", "hypothesis", "matplotlib", "pandas"]
    done = subprocess.run([sys.executable, "-c", CHECKED, *slow], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "aten::matmul > aten::mm", "[]"]
