"""The figure of a replay: a bar to p50 and a stroke to p99 per backend, and the load of experts and ranks."""

import numpy as np

from moebench.report.plots.figures import draw, replay
from moebench.report.plots.replays import case_figure
from moebench.results.frame import to_frame
from moebench.results.labels import backend_labels
from moebench.results.record import Record, Status, record
from moebench.workload.case import Case, Job

SHAPE = {"num_tokens": 8, "n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8}


def row(backend: str, p50: float, routing: str = "trace:0123456789abcdef", ep_size: int = 2, **more: object) -> Record:
    case = Case.model_validate({**SHAPE, "routing": routing, "ep_size": ep_size})
    steps = {"num_steps": 3, "step_p50_ms": p50, "step_p99_ms": 2 * p50, "expert_rows": (1, 6, 3, 2)}
    loads = {"rank_rows": (7, 5), "expert_skew": 2.0, "rank_skew": 1.25, "parity_worst": 0.5}
    job = Job(case=case, backend=backend, dispatcher="allgather" if ep_size > 1 else "local")
    return record(job, Status.ok, run_id="r", env_id="e", device="cpu", time_ms=p50, **{**steps, **loads, **more})


def test_bars_end_at_p50_and_strokes_at_p99_and_loads_are_relative_to_the_mean() -> None:
    frame = to_frame([row("loop", 4.0), row("torch_mm", 1.0)])
    figure = case_figure(frame.assign(line=backend_labels(frame)))
    times, experts, ranks = figure.axes
    assert [patch.get_width() for patch in times.patches] == [4.0, 1.0]
    assert [list(line.get_xdata()) for line in times.lines] == [[4.0, 8.0], [1.0, 2.0]]
    assert [patch.get_height() for patch in experts.patches] == [2.0, 1.0, *np.array([2, 1]) / 3]
    assert [patch.get_height() for patch in ranks.patches] == [7 / 6, 5 / 6]
    assert "1.25 × the mean" in ranks.get_xlabel()


def test_a_case_has_a_picture_if_its_routing_was_captured() -> None:
    nothing = dict.fromkeys(("num_steps", "step_p50_ms", "step_p99_ms", "expert_rows", "rank_rows", "expert_skew"))
    frame = to_frame([row("loop", 1.0, ep_size=1), row("loop", 1.0, "uniform", **nothing, rank_skew=None)])
    (picture,) = replay(frame)
    drawn = draw(frame, formats=("svg",))
    assert not drawn.failures
    assert picture.name in drawn.images
    assert len(case_figure(frame.iloc[:1].assign(line="loop")).axes) == 2, "one rank has no load of ranks"
