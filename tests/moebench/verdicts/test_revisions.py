"""`experts` is copied from git or a folder without touching the working tree. An error names the wrong revision."""

import subprocess
from pathlib import Path

import pytest

from moebench.errors import RevisionError
from moebench.verdicts.revisions import Revision, copy_experts, unknown_backends

ROOT = Path(__file__).parents[3]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a repository, and make it the current folder.

    It has two commits with `experts` and a third without. Its working tree differs from all three.
    """
    folder = tmp_path / "repository"
    (folder / "experts").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "trunk")
    for name in ("one", "two"):
        (folder / "experts" / "__init__.py").write_text(f"NAME = {name!r}\n")
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)
    git(folder, "rm", "-q", "-r", "experts")
    git(folder, "commit", "-q", "--allow-empty", "-m", "none")
    git(folder, "tag", "none")
    git(folder, "checkout", "-q", "two")
    (folder / "experts" / "__init__.py").write_text("NAME = 'dirty'\n")
    (folder / "docs").mkdir()
    monkeypatch.chdir(folder)
    return folder


def content(revision):
    return (revision.folder / "experts" / "__init__.py").read_text()


@pytest.mark.parametrize("asked", ["one", "two", "HEAD~1", "trunk~2"])
def test_a_git_revision_is_what_was_committed(repository, tmp_path, asked):
    before = git(repository, "status", "--porcelain")
    revision = copy_experts(asked, tmp_path / "copies" / "a")
    name = {"one": "one", "two": "two", "HEAD~1": "one", "trunk~2": "one"}[asked]
    assert content(revision) == f"NAME = {name!r}\n"
    assert revision.commit == git(repository, "rev-parse", asked)
    assert str(revision) == f"{asked} ({revision.commit[:10]})"
    assert git(repository, "status", "--porcelain") == before
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_revision_is_found_from_a_folder_inside_the_repository(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository / "docs")
    assert content(copy_experts("one", tmp_path / "a")) == "NAME = 'one'\n"


def test_a_folder_is_copied_as_it_is_now(repository, tmp_path):
    revision = copy_experts(".", tmp_path / "a")
    (repository / "experts" / "__init__.py").write_text("NAME = 'later'\n")
    assert content(revision) == "NAME = 'dirty'\n"
    assert (revision.commit, str(revision)) == (None, ".")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("no-such", "fatal: bad revision 'no-such'"),
        ("one..two", "fatal: Needed a single revision"),
        ("docs", "fatal: bad revision 'docs'"),
        ("none", "pathspec 'experts' did not match any files"),
        ("--all", "fatal: bad revision '--all'"),
    ],
)
def test_a_wrong_revision_is_one_line_with_gits_reason(repository, tmp_path, asked, why):
    with pytest.raises(RevisionError) as error:
        copy_experts(asked, tmp_path / "a")
    assert str(error.value).startswith(
        f"{asked}: neither a folder that holds an experts nor a git revision with one; git says:"
    )
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_outside_of_a_repository_git_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RevisionError, match="not a git repository"):
        copy_experts("main", tmp_path / "a")


def test_a_revision_says_which_backends_it_has_not(tmp_path):
    revision = copy_experts(str(ROOT), tmp_path / "a")
    catalog = revision.folder / "experts" / "catalog.py"
    catalog.write_text(catalog.read_text() + "\n\ndef backend_names():\n    return ('loop',)\n")
    unknown = unknown_backends(revision, ["loop", "torch_mm", "json:loads"])
    assert list(unknown) == ["torch_mm"]
    assert "there is no backend 'torch_mm'" in unknown["torch_mm"]


def test_experts_that_this_harness_cannot_drive_are_named(tmp_path):
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "__init__.py").write_text("")
    with pytest.raises(RevisionError, match=r"old: this moebench cannot drive its experts: .*Error: "):
        unknown_backends(Revision("old", None, tmp_path), ["loop"])
