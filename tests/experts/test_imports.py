"""Which module imports which.

experts imports nothing of the harness. Vendor packages are imported inside functions. No engine imports another.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import experts
from experts.dispatchers import dispatcher_names
from experts.engines import engine_names

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experts").rglob("*.py"))
#: Packages of kernels. They import Triton, so other modules import them inside functions.
FP8 = (
    "activation",
    "dequantise",
    "gradients",
    "hopper",
    "kernels",
    "products",
    "quantise",
    "rounding",
    "turned",
    "weights",
    "whole",
)
KERNELS = (
    *(f"experts.fp8.{name}" for name in FP8),
    "experts.steps.fused",
    "experts.gemm",
    "experts.exchange.fused",
    "experts.messages.fused",
)
VENDOR = (
    "deep_ep",
    "grouped_gemm",
    "nemo_automodel",
    "sonicmoe",
    "torchao",
    "transformer_engine",
    "transformers",
    "triton",
)

ALONE = f"""
import sys
import torch

class Blocked:
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {VENDOR!r}:
            self.asked.append(name)
            raise ModuleNotFoundError(name)

for name in {{*sys.modules}}:
    if name.partition(".")[0] in {VENDOR!r}:
        del sys.modules[name]
sys.meta_path.insert(0, Blocked())
from experts import *
print(*sys.modules)
print(Blocked.asked)
from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.registry import backend_names, get_backend

config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")
for name in ("loop", "torch_mm"):
    assert name in backend_names()
    made = get_backend(name).build(config)
    made.init_weights(torch.device("cpu"))
    x = torch.ones(3, 16, requires_grad=True)
    output = made(x, torch.ones(3, dtype=torch.bool), torch.ones(3, 2), torch.tensor([[0, 1], [2, -1], [3, 0]]))
    output.sum().backward()
    assert output.shape == (3, 16) and x.grad.any() and made.down_projs.grad.any()
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"moebench", "matplotlib", "pandas", "pyarrow", "scipy", "rich", "typer", *{VENDOR!r}}}))
"""


CATALOG = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "experts"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import experts.catalog
from experts import ConfigError, Unsupported, catalog

assert catalog.BACKENDS and set(experts.__all__) <= set(dir(experts))
try:
    experts.GroupedExperts
except ImportError as error:
    print(error)
try:
    experts.NoSuchThing
except AttributeError as error:
    print(error)
"""


def test_the_catalog_needs_nothing_but_python() -> None:
    """Without torch, the catalog and the errors can be imported. A layer names the package that it lacks."""
    done = subprocess.run([sys.executable, "-c", CATALOG], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    no_layer, no_name = done.stdout.splitlines()
    assert no_layer.endswith("is blocked")
    assert no_name == "module 'experts' has no attribute 'NoSuchThing'"


def imported(nodes: list[ast.stmt], inside_functions: bool) -> Iterator[str]:
    """Yield the full names of everything that is imported, also of a module that is imported from its package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            handlers = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.ExceptHandler)]
            yield from imported([*inner, *(stmt for handler in handlers for stmt in handler.body)], inside_functions)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_file_imports_the_harness(file: Path) -> None:
    names = list(imported(ast.parse(file.read_text()).body, inside_functions=True))
    assert not [name for name in names if name.partition(".")[0] in ("moebench", "tests")]


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_vendor_packages_are_imported_inside_functions(file: Path) -> None:
    names = list(imported(ast.parse(file.read_text()).body, inside_functions=False))
    if any(file.with_suffix("").is_relative_to(ROOT / name.replace(".", "/")) for name in KERNELS):
        names = [name for name in names if name.partition(".")[0] != "triton" and not name.startswith(KERNELS)]
    assert not [name for name in names if name.partition(".")[0] in VENDOR or name.startswith(KERNELS)]


def is_engine_or_dispatcher(file: Path) -> bool:
    """Whether the file has an ENGINE or a class with dispatch and combine. Other files there hold shared code."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENGINE":
            return True
        if isinstance(node, ast.ClassDef):
            methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            if {"dispatch", "combine"} <= methods:
                return True
    return False


BACKENDS = [
    file
    for file in FILES
    if file.parent.name in ("compute", "dispatch") and file.name != "__init__.py" and is_engine_or_dispatcher(file)
]


def module_name(file: Path) -> str:
    return f"experts.{file.parent.name}.{file.stem}"


def test_the_files_of_engines_and_dispatchers_are_found() -> None:
    engines = {f"experts.compute.{name}" for name in engine_names()}
    assert {*map(module_name, BACKENDS)} == engines | {f"experts.dispatch.{name}" for name in dispatcher_names()}


def test_experts_runs_with_the_vendor_packages_blocked() -> None:
    """In a fresh process, `import experts` imports no engine and no vendor package.

    A run of the layers imports neither the harness nor its dependencies.
    """
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported_with_experts, vendor_packages_asked_for, loaded = done.stdout.splitlines()
    assert not {*imported_with_experts.split()} & {*map(module_name, BACKENDS)}
    assert vendor_packages_asked_for == "[]"
    assert loaded == "[]"


@pytest.mark.parametrize("file", [*BACKENDS, ROOT / "experts/te/layer.py"], ids=relative)
def test_engines_and_dispatchers_import_no_other(file: Path) -> None:
    names = list(imported(ast.parse(file.read_text()).body, inside_functions=True))
    others = [module_name(other) for other in BACKENDS if other != file]
    above = ["experts.modules", "experts.registry", "experts.engines"]
    assert not [name for name in names for other in (*others, *above) if f"{name}.".startswith(f"{other}.")]


def test_modules_are_attributes_of_the_package_and_wrong_names_are_refused() -> None:
    code = "import experts\nassert experts.config.MoEConfig is experts.MoEConfig\nassert experts.te\n"
    code += "try:\n    experts.no_such\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "module 'experts' has no attribute 'no_such'\n"), done.stderr


def test_the_public_names_are_documented() -> None:
    assert experts.__all__ == [
        "Backend",
        "BackendConfig",
        "ConfigError",
        "ExpertsError",
        "GroupedExperts",
        "GroupedExpertsDeepEP",
        "GroupedExpertsLoRA",
        "GroupedExpertsTE",
        "InputError",
        "MoEConfig",
        "RegistryError",
        "Unsupported",
        "backend_names",
        "catalog",
        "check_name",
        "destroy_buffers",
        "get_backend",
        "get_expert_activation_for_deepep",
        "is_gated_activation",
        "parameter_shapes",
        "quick_geglu_deepep",
        "relu2_deepep",
    ]
    assert all(getattr(experts, name).__doc__ for name in experts.__all__)
    assert all(getattr(experts, name).__module__.startswith("experts.") for name in experts._HOMES)
    assert {*experts._HOMES, *experts._MODULES} == set(experts.__all__)


def test_every_error_is_an_experts_error() -> None:
    for error in (experts.ConfigError, experts.InputError, experts.RegistryError, experts.Unsupported):
        assert issubclass(error, experts.ExpertsError)
    assert issubclass(experts.InputError, ValueError)
    assert issubclass(experts.RegistryError, LookupError)
    assert not issubclass(experts.Unsupported, ValueError)
