"""Text that somebody else wrote is harmless for each kind of reader, and the reader gets the text as it was."""

import csv
import io
import json
import unicodedata
from xml.etree import ElementTree as xml

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench import escapes
from moebench.results.frame import to_csv

#: ESC, CSI, DEL, carriage return, backspace, bidi override and isolate, zero width, line separator, tag, surrogate.
CONTROLS = "\x1b\x9b\x7f\r\x08\u202e\u2066\u200b\u2028\U000e0041\ud800"
TEXTS = st.text(st.one_of(st.sampled_from(CONTROLS + "=+-@:#[|<`'\n\t"), st.characters()))


def test_controls_are_shown_and_all_else_stays():
    text = "\x1b[31m\u202eevil\ud800\r"
    assert escapes.visible(text) == r"\x1b[31m\u202eevil\ud800\r"
    assert escapes.visible("Größe ×2 ≤ 5\n\tnächste") == "Größe ×2 ≤ 5\n\tnächste"
    assert escapes.line("a\n::stop\tb") == r"a\n::stop\tb"


@settings(deadline=None)
@given(TEXTS)
def test_nothing_that_is_shown_has_a_control_or_breaks_an_encoding(text):
    for shown in (escapes.visible(text), escapes.line(text), escapes.command(text), escapes.csv(text)):
        assert all(unicodedata.category(one) not in ("Cf", "Cs", "Zl", "Zp") for one in shown)
        assert not {one for one in shown if unicodedata.category(one) == "Cc"} - {"\n", "\t"}
        assert shown.encode().decode() == shown
    assert escapes.line(text).isprintable()
    assert len(escapes.command(text).splitlines()) <= 1
    assert len(escapes.markdown(text).splitlines()) <= 1


@pytest.mark.parametrize("line", ["::stop-commands::x", "  \t::add-mask::x", "\x1b[1m::x", "a ##[add-mask]x", "a\n::x"])
def test_no_line_of_a_log_is_a_command(line):
    shown = escapes.log(line)
    assert "##[" not in shown
    assert not any(one.replace("\x1b[1m", "").strip().startswith("::") for one in shown.splitlines())
    assert escapes.log("torch::add is at::native") == "torch::add is at::native", "only a line's start is a command"


def test_markdown_shows_a_text_as_it_is():
    shown = escapes.markdown("![x](http://e) <b> a|b `c` $x$ **y**\n# z")
    assert shown == r"\!\[x\](http\:\/\/e) &lt;b\> a\|b \`c\` \$x\$ \*\*y\*\* \# z"
    assert escapes.markdown("+3.1% (+2.8 to +3.5)") == "+3.1% (+2.8 to +3.5)"


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\n=1", "＝1", "'=1"])  # noqa: RUF001
def test_a_spreadsheet_gets_a_text_and_no_formula(text):
    assert escapes.csv(text) == "'" + text
    assert escapes.csv("a" + text) == "a" + text


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1))
def test_a_reader_of_the_csv_gets_the_texts_back(texts):
    frame = pd.DataFrame({"text": pd.Series(texts, dtype="object"), "number": -1.5})
    head, *rows = csv.reader(io.StringIO(to_csv(frame), newline=""))
    assert head == ["text", "number"]
    read = [cell.removeprefix("'") if cell.startswith("'") else cell for cell, _ in rows]
    assert read == [escapes.visible(text) for text in texts]
    assert {number for _, number in rows} == {"-1.5"}, "a number is no formula"


@settings(deadline=None)
@given(TEXTS)
def test_json_keeps_its_meaning(text):
    document = json.dumps({text: [text]}, ensure_ascii=False)
    shown = escapes.json(document)
    assert shown.isprintable()
    assert "##[" not in shown
    assert json.loads(shown) == {text: [text]}


@settings(deadline=None)
@given(TEXTS)
def test_xml_can_be_read_again(text):
    element = xml.Element("a", {"name": escapes.xml(text)})
    assert xml.fromstring(xml.tostring(element)).get("name") is not None
