"""The examples in README and docs work as they are shown."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import moebench
from experts.registry import get_backend
from moebench.cli import console
from moebench.cli.app import app
from moebench.measure.cache import Workload
from moebench.measure.trials import Trier
from moebench.parity import judge, passes
from moebench.parity.checks import case_job
from moebench.parity.play.backwards import REPEATS
from moebench.parity.space.covering import covering
from moebench.parity.space.programs import PROGRAMS, STEPS
from moebench.parity.space.trial import AXES, Trial
from moebench.verdicts.looks import schedule
from moebench.verdicts.ranksum import group_size_needed, null_tail
from moebench.verdicts.times import FALSE_ALARMS
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config
from moebench.workload.spec import parse_sweep
from tests.moebench.executed import measure_shortly

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def my_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the example module of docs/add-a-backend.md, and return the name of its backend."""
    (source,) = blocks(ROOT / "docs" / "add-a-backend.md", "python")
    name = re.match(r"# (\w+)\.py\n", source).group(1)
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    attribute = re.search(r"class (\w+)", source).group(1)
    yield f"{name}:{attribute}"
    sys.modules.pop(name, None)


@pytest.mark.parametrize("routing", ["uniform", "empty:0.5"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_backend_in_the_docs_is_right(my_backend: str, dtype: str, routing: str) -> None:
    case = Case(
        num_tokens=40,
        n_routed_experts=6,
        n_activated_experts=2,
        dim=32,
        moe_inter_dim=48,
        dtype=dtype,
        mode="train",
        masked_share=0.2,
        routing=routing,
    )
    backend, inputs, parameters = get_backend(my_backend), make_inputs(case, CPU), make_parameters(case, CPU)
    layer = backend.build(moe_config(case))
    layer.load_state_dict(parameters)
    verdict = judge.check(case, inputs, parameters, [passes.run_pass(layer, inputs, "train")])
    assert verdict.passed, verdict.worst


@pytest.mark.parametrize("steps", PROGRAMS, ids=",".join)
def test_the_backend_in_the_docs_passes_every_sequence_of_steps(my_backend: str, steps: tuple[str, ...]) -> None:
    trial = Trial(
        steps=steps,
        num_tokens=7,
        n_routed_experts=4,
        n_activated_experts=2,
        dim=8,
        moe_inter_dim=16,
        dtype="float64",
        mask="some",
        choices="some-dropped",
        unused_weights="nan",
        memory="poisoned",
    )
    trier = Trier(case_job(my_backend, trial), Workload(CPU))
    failure = trier.play(trial)
    assert failure is None, failure.reason
    assert trier.tried.num_ok == 1


def test_concepts_names_every_value_of_the_space_and_every_step() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    rows = dict(re.findall(r"^\| `([\w:]+)` \| .* \| (.*) \|$", text, re.MULTILINE))
    for name, values in AXES.items():
        if len(values) > 1 and name != "steps":
            shown = [word.strip("`").replace(",", "") for word in rows[name].split(", ")]
            assert shown == [f"{value:g}" if type(value) is float else str(value) for value in values], name
    assert rows["steps"] == f"{len(PROGRAMS)} sequences"
    for step, what in STEPS.items():
        assert f"| `{step}` | {what} |" in text, step


def test_concepts_counts_the_cases_that_repeat_a_call() -> None:
    text = " ".join((ROOT / "docs" / "concepts.md").read_text().split())
    repeated = sum("repeat" in trial.steps for trial in covering())
    assert f"{repeated} covering cases have this step" in text
    assert f"makes {REPEATS} calls" in text


def test_the_backend_in_the_docs_refuses_a_bias(my_backend: str) -> None:
    shape = {"num_tokens": 1, "n_routed_experts": 2, "n_activated_experts": 1, "dim": 8, "moe_inter_dim": 8}
    reason = get_backend(my_backend).unsupported(CPU, moe_config(Case(**shape, expert_bias=True)))
    assert reason is not None
    assert reason.reason == "has no bias"
    assert get_backend(my_backend).unsupported(CPU, moe_config(Case(**shape))) is None


def test_the_sweep_in_the_readme_has_6_jobs() -> None:
    (sweep,) = blocks(ROOT / "README.md", "toml")
    assert len(parse_sweep(sweep, "README.md").jobs()) == 6
    assert "It has six jobs." in (ROOT / "README.md").read_text()


def test_the_python_code_in_the_readme_runs() -> None:
    (source,) = blocks(ROOT / "README.md", "python")
    scope: dict = {}
    exec(compile(source, "README.md", "exec"), scope)
    layer = scope["layer"]
    tokens = torch.randn(3, 1024, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, 1, 2, 3, 4, 5]] * 3)
    output = layer(tokens, torch.ones(3, dtype=torch.bool), torch.full((3, 6), 1 / 6), chosen)
    assert output.shape == (3, 1024)
    assert output.isfinite().all()


def test_the_notebook_functions_work_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, source = blocks(ROOT / "docs" / "notebooks.md", "python")
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(source, "notebooks.md", "exec"), scope)
    assert scope["times"]["torch_mm"].notna().all()
    assert scope["slowdown"].min(axis=None) == 1.0
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    assert (scope["sides"]["time_ms_ratio:after"] == 1).all()


def test_the_five_lines_of_python_work_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check is only asked for: its covering cases take minutes."""
    source, _ = blocks(ROOT / "docs" / "notebooks.md", "python")
    (tmp_path / "my_experts.py").write_text(
        "from experts import GroupedExperts\n\nclass MyExperts(GroupedExperts): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    measure_shortly(monkeypatch)
    signature, asked = inspect.signature(moebench.check), []
    monkeypatch.setattr("moebench.api.runs.check", lambda *given, **more: asked.append(signature.bind(*given, **more)))
    scope: dict = {}
    exec(compile(source, "notebooks.md", "exec"), scope)
    assert [one.arguments["backend"].__name__ for one in asked] == ["MyExperts"]
    assert scope["run"].frame["status"].tolist() == ["ok"] * 4
    assert scope["run"].best["num_tokens"].tolist() == [16, 256]


WORKFLOWS = sorted((ROOT / "docs" / "ci").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_only_keys_that_github_reads(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow.keys() == {"name", True, "jobs"}, "the keys must be name, on and jobs (YAML 1.1 reads `on` as True)"
    for job in workflow["jobs"].values():
        assert job.keys() <= {"runs-on", "timeout-minutes", "steps"}
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert step.keys() <= {"name", "run", "shell", "uses", "with", "if"}


def commands(path: Path) -> list[str]:
    """Return every `moebench …` command in the indented blocks of a document."""
    text = path.read_text()
    return re.findall(r"^ {4}\s*(?:\.venv/bin/)?(moebench [^#\n]*)", text, re.MULTILINE)


@pytest.mark.parametrize("path", [ROOT / "docs" / "gating.md"], ids=lambda path: path.name)
def test_commands_in_the_docs_exist_with_their_options(path: Path) -> None:
    """The help text of each command names every option that the document gives to it."""
    found = commands(path)
    assert found
    for line in found:
        words = [word for word in shlex.split(line)[1:] if word not in ("||", "&&")]
        name = words[:2] if words[0] == "baseline" else words[:1]
        shown = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert re.search(rf"{option}\b", shown.output), f"{line}: {option}"


def test_the_rounds_in_gating_md_are_the_fewest_that_suffice() -> None:
    text = (ROOT / "docs" / "gating.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for jobs, a_side, candidate, baseline in (map(int, row) for row in rows):
        level = FALSE_ALARMS / jobs
        assert group_size_needed(level) == a_side
        assert null_tail([(baseline, candidate)])[0] <= level < null_tail([(baseline - 1, candidate)])[0]


def test_the_looks_in_gating_md_are_those_of_ab() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+), (\d+), (\d+) \|$", (ROOT / "docs" / "gating.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for jobs, *looks in (map(int, row) for row in rows):
        assert schedule(jobs) == tuple(looks)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub and the site give to the headings of a document, and those that it gives itself."""
    text = without_code(document.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return named | set(re.findall(r' id="([^"]+)"', text))


def broken_links(document: Path) -> list[str]:
    """Return the links and pictures of a document whose file or heading does not exist."""
    text = without_code(document.read_text())
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text)
    found = []
    for name, anchor in [*links, *((name, "") for name in re.findall(r'src="([^"]+)"', text))]:
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(f"{name}#{anchor}")
    return found


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_targets_of_links_and_pictures_exist(document: Path) -> None:
    assert broken_links(document) == []


def stage(folder: Path, *url: str) -> list[Path]:
    """Write what `make docs` builds the site from. Return its documents."""
    command = [sys.executable, ROOT / "docs" / "site" / "stage.py", folder, *url]
    subprocess.run(command, check=True, timeout=100)
    return sorted(folder.rglob("*.md"))


def test_the_site_has_every_document_and_leaves_no_link_open(tmp_path: Path) -> None:
    documents = stage(tmp_path / "site")
    assert {path.name for path in (*DOCUMENTS, *OTHERS)} <= {path.name for path in documents}
    for document in documents:
        assert broken_links(document) == [], document.name
    nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / "docs" / "site" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {path.relative_to(ROOT).as_posix() for path in DOCUMENTS} <= set(nav)
    assert not [name for name in nav if not (tmp_path / "site" / name).is_file()]


def test_the_site_links_to_the_repository_for_what_it_does_not_show(tmp_path: Path) -> None:
    stage(tmp_path / "alone")
    stage(tmp_path / "linked", "https://example.org/moebench")
    alone, linked = (tmp_path / name / "docs" / "measured.md" for name in ("alone", "linked"))
    target = "results/published/h200-peers-ep2-2026-11-29/bandwidth-deepseek-v3.json"
    assert f"](../{target})" in (ROOT / "docs" / "measured.md").read_text()
    assert f"](https://example.org/moebench/blob/main/{target})" in linked.read_text()
    assert target not in alone.read_text()
    assert "](../results/published/h200-peers-2026-11-28/README.md)" in alone.read_text()


@pytest.mark.parametrize(("document", "whole"), [("README.md", False), ("docs/results.md", True)])
def test_the_advice_in_the_documents_is_what_the_command_prints(
    document: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README leaves out the last lines."""
    monkeypatch.setattr(console.out, "width", 160)
    text = (ROOT / document).read_text()
    command, shown = re.search(r"^    moebench (advise .*?)\n.*?^```text\n(.*?)^```", text, re.DOTALL | re.M).groups()
    printed = CliRunner().invoke(app, shlex.split(command)).output
    lines = [line.rstrip() for line in printed.splitlines()]
    told = shown.splitlines()
    assert len(told) > 5
    assert told == (lines if whole else lines[: len(told)])
