"""A backend looks the same everywhere, and the text says what was measured without covering anything."""

from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.figure import Figure

from moebench.frame import to_frame
from moebench.look import BACKEND_STYLES, style
from moebench.plots import memory, parity, throughput
from moebench.record import Status
from tests.moebench.drawn import COUNTS, LONG, bad, case, family, line, ok, only, texts


def test_known_backends_look_different_and_unknown_ones_the_same_every_time() -> None:
    assert len({color for color, _ in BACKEND_STYLES.values()}) == len(BACKEND_STYLES)
    assert len({marker for _, marker in BACKEND_STYLES.values()}) == len(BACKEND_STYLES)
    assert style("loop") == ("#5A5A5A", "o")
    assert style("torch_mm") == ("#0072B2", "s")
    # literal, so that a change of the rule shows: published pictures keep their colours
    assert style("acme:Experts") == ("#661100", "8")
    assert style("acme:Experts")[0] not in {color for color, _ in BACKEND_STYLES.values()}


def test_a_backend_keeps_its_colour_whoever_is_beside_it() -> None:
    alone = only(throughput(to_frame(family("torch_mm")))).axes[0]
    among = only(throughput(to_frame(family("loop") + family("gmm") + family("torch_mm") + family(LONG)))).axes[0]
    assert line(alone, "torch_mm tokens/s").get_color() == line(among, "torch_mm tokens/s").get_color() == "#0072B2"


def test_dispatchers_of_one_backend_are_lines_of_one_colour() -> None:
    rows = [ok(case(n, ep_size=8), "te", dispatcher=d) for n in COUNTS for d in ("alltoall", "deepep")]
    (ax,) = only(throughput(to_frame(rows))).axes
    lines = [line(ax, f"te+{dispatcher} tokens/s") for dispatcher in ("alltoall", "deepep")]
    assert lines[0].get_color() == lines[1].get_color() == BACKEND_STYLES["te"][0]
    assert lines[0].get_fillstyle() != lines[1].get_fillstyle()
    assert ax.get_xlabel() == "tokens per rank"


def test_the_figure_says_what_was_measured_where() -> None:
    figure = only(throughput(to_frame(family("loop"))))
    assert texts(figure)[:3] == [
        "Throughput: e8k2d256i512, bfloat16, swiglu",
        "8 experts, top 2, dim 256, inter 512, uniform routing",
        "NVIDIA H200, 2026-11-23",
    ]
    assert figure.axes[0].get_ylabel() == "tokens/s per GPU"
    cpu = to_frame([ok(case(count), gpu=None, device="cpu") for count in COUNTS])
    assert only(throughput(cpu)).axes[0].get_ylabel() == "tokens/s per process"


def boxes(figure: Figure) -> Iterator[Any]:
    """Where text and legends stand, tick labels included."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    for text in figure.findobj(lambda one: isinstance(one, Text) and one.get_visible() and one.get_text().strip()):
        assert isinstance(text, Text)
        yield text.get_text(), text.get_window_extent()


@pytest.mark.parametrize("draw", [throughput, memory, parity])
@pytest.mark.parametrize("many", [False, True])
def test_no_text_overlaps_another_or_leaves_the_figure(draw: Any, many: bool) -> None:
    rows = [one for mode in ("forward", "train") for one in family("loop", mode=mode) + family(LONG, mode=mode)]
    rows += [bad(case(count), Status.mismatch, "te_fp8_block", parity_worst=50.0) for count in COUNTS]
    if many:
        acts = ("swiglu", "geglu", "quick_geglu")
        rows = [
            ok(case(64, expert_activation=a, expert_bias=True, routing=r))
            for a in acts
            for r in ("zipf:1.2", "one-hot")
        ]
    figure = only(draw(to_frame(rows)))
    found = list(boxes(figure))
    edge = figure.bbox.padded(1)
    for at, (text, box) in enumerate(found):
        assert edge.contains(*box.min), text
        assert edge.contains(*box.max), text
        for other, its in found[at + 1 :]:
            assert not box.padded(-1).overlaps(its.padded(-1)), f"{text!r} overlaps {other!r}"
