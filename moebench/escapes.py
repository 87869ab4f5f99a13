"""Make text that somebody else wrote harmless, with one function for each kind of reader. SECURITY.md lists them.

The text may be the name of a backend, a trace or a file, a key of a TOML file, or the message of an exception. moebench
stores such text as it is, and calls one of these functions where it shows the text.
"""

import re

_KEPT = "\n\t"
#: Characters at the start of a cell for which a spreadsheet takes the cell for a formula, also in their wide forms.
#: An apostrophe is among them, so that a reader can tell ours from one that was there before.
_FORMULA = tuple("=+-@\t\n'＝＋－＠")  # noqa: RUF001
#: The start of a command in a log of GitHub Actions. GitHub also reads commands after spaces. The older form `##[` is
#: read anywhere in a line.
_COMMAND = re.compile(r"^((?:[^\S\n]|\x1b\[[0-9;]*m)*)::", re.MULTILINE)
#: Characters that XML 1.0 cannot represent.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"([!-$&'*/:;=?@\[\\\]^_`{|}~>])")


def visible(text: str) -> str:
    r"""Return the text with an escape such as `\x1b` or `\u202e` for each character that cannot be seen.

    These are the characters that Python calls not printable: controls of a terminal, controls of the writing direction,
    parts of broken UTF-8, and others. Newlines and tabs stay. A terminal, a web page and a picture show the result as
    it is, and it can always be encoded.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or character in _KEPT:
        return character
    return character.encode("unicode_escape").decode()


def line(text: str) -> str:
    """Return the text as `visible` does, in one line: newlines and tabs are escaped, too. Use it for names."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def log(text: str) -> str:
    """Return lines of output from which GitHub Actions reads no command. It writes `%3A` for `:`, as GitHub does."""
    return _COMMAND.sub(r"\1%3A%3A", text).replace("##[", "##%5B")


def command(text: str) -> str:
    """Return the text as the message of a command of GitHub Actions. GitHub shows it as it was, in several lines."""
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def command_property(text: str) -> str:
    """Return the text as a property of a command of GitHub Actions, such as its title."""
    return command(text).replace(":", "%3A").replace(",", "%2C")


def markdown(text: str) -> str:
    """Return the text as one line of Markdown that shows it as it is: no table cell ends, no HTML, link or image."""
    marked = _MARKDOWN.sub(r"\\\1", visible(text))
    return " ".join(marked.replace("<", "&lt;").split())


def csv(text: str) -> str:
    """Return the text as a cell of a CSV file that no spreadsheet takes for a formula.

    A cell that begins with one of = + - @ ' or with white space gets an apostrophe before it. A reader of the CSV gets
    the text back by removing the first apostrophe of each text that begins with one.
    """
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def json(text: str) -> str:
    r"""Return the same JSON document for a terminal or a log: strings have `\u202e` for a character not to be seen."""
    shown = "".join(map(_visible_in_json, text)) if not text.isprintable() else text
    return shown.replace("##[", "##\\u005b")


def _visible_in_json(character: str) -> str:
    if character.isprintable() or character in _KEPT:
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def xml(text: str) -> str:
    """Return the text with U+FFFD for each character that XML 1.0 cannot represent. A writer of XML does the rest."""
    return _NOT_XML.sub("\ufffd", text)
