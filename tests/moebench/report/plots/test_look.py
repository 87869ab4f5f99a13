"""A backend looks the same everywhere, and the text says what was measured without covering anything."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from moebench.report.plots.figures import breakdown, memory, parity, throughput
from moebench.report.plots.look import BACKEND_STYLES, shortened, style
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status
from tests.moebench.drawn import COUNTS, LONG, bad, case, family, figures_of, legend, line, ok, only, texts


def test_known_backends_look_different_and_unknown_ones_the_same_every_time() -> None:
    assert len({color for color, _ in BACKEND_STYLES.values()}) == len(BACKEND_STYLES)
    assert {marker for _, marker in BACKEND_STYLES.values()} <= set(MarkerStyle.filled_markers)
    others = ("peer_", "triton_fp8_", "deep_gemm_fp8", "triton_main_grad")
    ours = [
        marker for name, (_, marker) in BACKEND_STYLES.items() if not name.startswith(others) and "_lora" not in name
    ]
    assert len(set(ours)) == len(ours)
    for name in ("loop", "torch_mm", "triton"):
        assert BACKEND_STYLES[f"{name}_lora"][1] == BACKEND_STYLES[name][1]
    assert style("loop") == ("#5A5A5A", "o")
    assert style("torch_mm") == ("#0072B2", "s")
    # Literals, so that a changed rule fails here. Published pictures keep their colours.
    assert style("acme:Experts") == ("#661100", "8")
    assert style("acme:Experts")[0] not in {color for color, _ in BACKEND_STYLES.values()}


def test_a_backend_keeps_its_colour_whoever_is_beside_it() -> None:
    alone = only(throughput(to_frame(family("torch_mm")))).axes[0]
    among = only(throughput(to_frame(family("loop") + family("gmm") + family("torch_mm") + family(LONG)))).axes[0]
    assert line(alone, "torch_mm tokens/s").get_color() == line(among, "torch_mm tokens/s").get_color() == "#0072B2"


def test_every_backend_there_is_has_a_look_of_its_own() -> None:
    from experts.registry import backend_names

    assert set(backend_names()) <= set(BACKEND_STYLES)


#: Linear RGB as people without red cones and without green cones see it (Viénot, Brettel and Mollon, 1999).
EYES = (
    np.eye(3),
    np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
)
#: From linear RGB to Oklab, where equal distances look equally large (Ottosson, 2020).
TO_CONES = np.array([[0.41222, 0.53633, 0.05145], [0.2119, 0.68070, 0.1074], [0.0883, 0.28172, 0.62998]])
TO_LAB = np.array([[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]])


def distance(one: str, two: str) -> float:
    """Return the least distance of two colours for any of three kinds of eyes. Black and white are 1 apart."""

    def lab(color: str, eyes: Any) -> Any:
        rgb = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return TO_LAB @ np.cbrt(TO_CONES @ np.clip(eyes @ linear, 0, 1))

    return min(float(np.linalg.norm(lab(one, eyes) - lab(two, eyes))) for eyes in EYES)


def test_torch_mm_save_time_and_triton_are_told_apart_by_colour() -> None:
    names = ("torch_mm", "torch_mm_save_time", "triton")
    colors = [BACKEND_STYLES[name][0] for name in names]
    assert distance("#000000", "#FFFFFF") == pytest.approx(1, abs=0.01)
    assert min(distance(*pair) for pair in combinations(colors, 2)) > 0.2
    before = "#0072B2", "#004E7A", "#332288"
    assert min(distance(*pair) for pair in combinations(before, 2)) < 0.1, "they were taken for each other"


ENGINES, DISPATCHERS = ("loop", "torch_mm", "gmm", "te"), ("allgather", "alltoall", "deepep")


def ep_rows(mode: str = "forward", **fields: Any) -> list[Record]:
    parts = {"dispatch_ms": 0.5, "compute_ms": 2.0, "combine_ms": 0.75}
    return [
        ok(case(count, ep_size=8, mode=mode, **fields), engine, 1.0 + at, dispatcher, **parts)
        for count in COUNTS
        for at, engine in enumerate(ENGINES)
        for dispatcher in DISPATCHERS
    ]


def dashes(drawn: Line2D) -> Any:
    return drawn._unscaled_dash_pattern  # type: ignore[attr-defined]


def test_twelve_lines_have_the_colours_of_engines_and_the_strokes_of_dispatchers() -> None:
    (ax,) = only(throughput(to_frame(ep_rows()))).axes
    drawn = {(e, d): line(ax, f"{e}+{d} tokens/s") for e in ENGINES for d in DISPATCHERS}
    for engine in ENGINES:
        assert {drawn[engine, d].get_color() for d in DISPATCHERS} == {BACKEND_STYLES[engine][0]}
    looks = {d: {(drawn[e, d].get_marker(), str(dashes(drawn[e, d]))) for e in ENGINES} for d in DISPATCHERS}
    assert [len(look) for look in looks.values()] == [1, 1, 1], "a dispatcher looks the same with every engine"
    assert len({drawn["te", d].get_marker() for d in DISPATCHERS}) == 3
    assert len({str(dashes(drawn["te", d])) for d in DISPATCHERS}) == 3
    assert ax.get_xlabel() == "tokens per rank"


def test_what_is_drawn_over_another_line_is_smaller() -> None:
    (ax,) = only(throughput(to_frame(ep_rows()))).axes
    for order in (
        [line(ax, f"te+{d} tokens/s") for d in DISPATCHERS],
        [line(ax, f"{e}+deepep tokens/s") for e in ("loop", "gmm", "te", "torch_mm")],
    ):
        for below, above in pairwise(order):
            assert below.get_zorder() < above.get_zorder()
            assert below.get_linewidth() > above.get_linewidth()
            assert below.get_markersize() > above.get_markersize()


def test_under_ep_the_legend_names_engines_once_and_dispatchers_once() -> None:
    figure = only(throughput(to_frame([*ep_rows(), ok(case(512, ep_size=8), "te", 1.0, "deepep", converged=False)])))
    assert legend(figure) == ["loop", "gmm", "te", "torch_mm", *DISPATCHERS, "not converged"]
    assert legend(only(memory(to_frame(ep_rows("train")))))[-2:] == ["peak", "saved for backward"]
    one_process = family("loop") + family("te")
    assert legend(only(throughput(to_frame(one_process)))) == ["loop", "te"]


def test_the_title_says_ep_size_and_ranks() -> None:
    figure = only(throughput(to_frame(ep_rows(rank_load="one-empty"))))
    assert texts(figure)[:2] == [
        "Throughput: e8k2d256i512, bfloat16, swiglu, EP 8",
        "8 experts on 8 ranks, top 2, dim 256, inter 512, uniform routing, one",
    ]
    assert texts(figure)[2] == "empty rank"


def test_a_long_name_keeps_both_ends() -> None:
    assert shortened("short", 32) == "short"
    assert shortened(LONG, 20) == f"{LONG[:9]}…{LONG[-10:]}"
    assert len(shortened(LONG, 31)) == 31


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
    """Yield each visible text of the figure and its box. Legends and tick labels are included."""
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
    assert_nothing_overlaps(only(draw(to_frame(rows))))


@pytest.mark.parametrize("draw", [throughput, memory, parity, breakdown])
@pytest.mark.parametrize("lone", [False, True])
def test_no_text_overlaps_another_under_ep(draw: Any, lone: bool) -> None:
    rows = [row for load in ("even", "one-empty") for row in ep_rows("train", rank_load=load, routing="zipf:1.2")]
    rows += [bad(case(count, ep_size=8), Status.oom, LONG, "deepep") for count in COUNTS]
    if lone:
        rows = [row for row in rows if row.num_tokens == 128]
    for figure in figures_of(draw(to_frame(rows))).values():
        assert_nothing_overlaps(figure)


def test_labels_of_memory_stand_apart_along_x() -> None:
    """Five labels as long as "512 MiB" would touch one another."""
    sizes = {"one-hot": int(2**25.5), "uniform": int(2**35.6)}
    rows = [ok(case(64, routing=routing), peak_memory_bytes=size) for routing, size in sizes.items()]
    figure = only(memory(to_frame(rows)))
    assert_nothing_overlaps(figure)
    (ax,) = figure.axes
    assert 2 <= len(ax.get_xticklabels()) <= 4


def assert_nothing_overlaps(figure: Figure) -> None:
    found = list(boxes(figure))
    edge = figure.bbox.padded(1)
    for at, (text, box) in enumerate(found):
        assert edge.contains(*box.min), text
        assert edge.contains(*box.max), text
        for other, its in found[at + 1 :]:
            assert not box.padded(-1).overlaps(its.padded(-1)), f"{text!r} overlaps {other!r}"
