"""The plot of throughput against the EP size, for one workload at several EP sizes."""

import numpy as np

from moebench.report.plots.figures import draw, scaling
from moebench.results.frame import to_frame
from moebench.results.record import Record
from tests.moebench.drawn import case, line, ok, only, panels


def at_sizes(backend: str, dispatcher: str, *sizes: int, num_tokens: int = 128, **fields: object) -> list[Record]:
    """Return one row per EP size, each with its own time."""
    return [
        ok(case(num_tokens, ep_size=size, **fields), backend, size + 1.0, "local" if size == 1 else dispatcher)
        for size in sizes
    ]


def test_rates_stand_at_their_ep_size_and_one_process_begins_every_dispatchers_line() -> None:
    rows = [*at_sizes("te", "deepep", 1, 2, 4, 8), *at_sizes("te", "alltoall", 2, 4)]
    shown = panels(only(scaling(to_frame(rows))))
    assert list(shown) == ["forward, 128 tokens per rank"]
    (ax,) = shown.values()
    for dispatcher, sizes in (("deepep", [1, 2, 4, 8]), ("alltoall", [1, 2, 4])):
        drawn = line(ax, f"te+{dispatcher} tokens/s")
        np.testing.assert_array_equal(drawn.get_xdata(), sizes)
        np.testing.assert_allclose(drawn.get_ydata(), [128 / (size + 1.0) * 1e3 for size in sizes])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4", "8"]


def test_only_as_many_tokens_a_rank_are_compared() -> None:
    """A line has only rows with the same token count and the same load of the ranks."""
    rows = [
        *at_sizes("te", "deepep", 1, 2),
        *at_sizes("te", "deepep", 4, num_tokens=256),
        *at_sizes("te", "deepep", 4, rank_load="uneven"),
        *at_sizes("gmm", "alltoall", 2),
    ]
    (ax,) = only(scaling(to_frame(rows))).axes
    np.testing.assert_array_equal(line(ax, "te+deepep tokens/s").get_xdata(), [1, 2])
    assert [drawn for drawn in ax.lines if "gmm" in str(drawn.get_label())] == []


def test_each_mode_load_and_count_has_a_panel() -> None:
    rows = [
        *at_sizes("te", "deepep", 1, 2, mode="train"),
        *at_sizes("te", "deepep", 1, 2, num_tokens=1024),
        *at_sizes("te", "deepep", 2, 4, rank_load="uneven"),
    ]
    assert list(panels(only(scaling(to_frame(rows))))) == [
        "forward, 1K tokens per rank",
        "forward, 128 tokens per rank, uneven ranks",
        "train, 128 tokens per rank",
    ]


def test_one_ep_size_scales_nothing() -> None:
    assert scaling(to_frame(at_sizes("te", "deepep", 2))) == []
    names = list(draw(to_frame(at_sizes("te", "deepep", 1, 2)), ("svg",)).images)
    assert [name for name in names if name.startswith("scaling-")] == ["scaling-e8k2d256i512-bfloat16-swiglu"]
