"""Copy the documents into a folder from which mkdocs makes the site: `python docs/site/stage.py FOLDER [URL]`.

The folder has the documents and their pictures at the places that they have in the repository. A link to anything else
in the repository leads to URL, the address at which the repository can be read. Without URL, only its text is left.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The documents, and what they show or offer for download.
STAGED = ("README.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md", "docs/ci/*.yml", "results/published/**/README.md")
PICTURES = re.compile(r'<img src="([^"]+)"')
LINKS = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def stage(folder: Path, url: str | None = None) -> None:
    """Make the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    files = [path for pattern in STAGED for path in sorted(ROOT.glob(pattern))]
    documents = {path: path.read_text() for path in files if path.suffix == ".md"}
    pictures = [path.parent / name for path, text in documents.items() for name in PICTURES.findall(text)]
    known = {path.resolve() for path in [*files, *pictures]}
    for path in known:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in documents:
            target.write_text(LINKS.sub(lambda link, path=path: _link(link, path, known, url), documents[path]))
        else:
            shutil.copy(path, target)


def _link(link: re.Match[str], document: Path, known: set[Path], url: str | None) -> str:
    """Return what stands for a link in a document."""
    text, name, anchor = link[1], link[2], link[3] or ""
    target = (document.parent / name).resolve()
    if target in known:
        return link[0]
    if target / "README.md" in known:
        return f"[{text}]({name.rstrip('/')}/README.md{anchor})"
    if url is None:
        return text
    return f"[{text}]({url.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}{anchor})"


if __name__ == "__main__":
    stage(Path(sys.argv[1]), *sys.argv[2:])
