"""The numbers in README and docs match the committed results. See tests/figures."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.figures.sentences import SENTENCES, Sentence
from tests.figures.tables import TABLES, without_tables, written

ROOT = Path(__file__).parents[1]
#: Documents in which every number must be in a generated table or in a tested sentence.
COVERED = ("README.md", "docs/measured.md", "docs/scaling.md", "docs/training.md")
#: Numbers that no result can change: names, required versions, exit codes.
NAMES = re.compile(
    r"\b(H200s?|FP8|L2|float32|float64|bfloat16|2026-11-23|Qwen3(-30B-A3B)?|DeepSeek-V3|Kimi-K2|GLM-4\.5-Air|GPT-OSS-120B|Apache-2\.0)\b"
    r"|Python 3\.11 or later"
    r"|right if this number is at most 1\.|95% confidence interval"
    r"|ends with exit code 1 if|fewer than 1% of gates raise|2026-11-(28|29|30)|2026-12-01"
    r"|A share may be 1 or more"
)


def flat(text: str) -> str:
    return " ".join(text.split())


@cache
def rendered(sentence: Sentence) -> str:
    return sentence.rendered()


def uncovered(document: str, text: str) -> list[str]:
    """Return the words with a digit that are in no tested sentence, generated table, code, link or name."""
    text = re.sub(r"^```.*?^```|^ {4}.*?$", " ", without_tables(text), flags=re.DOTALL | re.MULTILINE)
    text = flat(text)
    for sentence in SENTENCES:
        if sentence.document == document:
            text = text.replace(rendered(sentence), " ")
    text = re.sub(r"`[^`]*`|(\[results/[^\]]*)?\]\([^)]*\)|<img src=\"[^\"]*\" width=\"\d+\"", " ", text)
    return re.findall(r"\S*\d\S*", NAMES.sub(" ", text))


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda one: f"{one.document}: {one.text[:50]}")
def test_a_sentence_quotes_the_committed_results(sentence: Sentence) -> None:
    text = flat((ROOT / sentence.document).read_text())
    assert rendered(sentence) in text, f"{sentence.document} must say: {rendered(sentence)}"


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_a_table_matches_the_committed_results(document: str, name: str) -> None:
    text = (ROOT / document).read_text()
    assert written(text, name, TABLES[document, name]()) == text, "the table is stale; run `make results`"


@pytest.mark.parametrize("document", COVERED)
def test_every_number_is_in_a_table_or_a_tested_sentence(document: str) -> None:
    found = uncovered(document, (ROOT / document).read_text())
    assert not found, f"{document}: {found} are in no sentence of tests/figures/sentences.py"


def test_a_number_outside_of_tables_and_sentences_is_found() -> None:
    assert uncovered("README.md", "On an H200 a forward takes 3.7 ms (`triton`, 16384).") == ["3.7", "16384)."]


def test_a_table_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="needs one line `<!-- table peers"):
        written("no table here", "peers", "| a |\n")


def test_the_committed_pictures_are_those_that_documents_show() -> None:
    """`make results` draws more pictures. Git ignores the rest."""
    shown = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r'(?:src="|\]\()([^")#:]+\.(?:svg|png))', path.read_text()):
            shown.add(str((path.parent / target).resolve().relative_to(ROOT)))
    listed = subprocess.run(
        ["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout")
    assert shown == {path for path in listed if path.endswith((".svg", ".png"))}
