"""A backend wins a case only by more than noise, and the best of each case comes with its lead and its memory."""

import math
from typing import Any

import pandas as pd
import pytest

from moebench.report.ranking import best, num_compared, ranked, wins
from moebench.report.tables.besttable import wins_sentence
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, ok


def timed(backend: str, low: float, time_ms: float, high: float, count: int = 128, **measured: Any) -> Record:
    return ok(case(count), backend, time_ms, time_ms_low=low, time_ms_high=high, **measured)


def marks(*rows: Record) -> dict[str, str]:
    found = ranked(to_frame(rows))
    return {row["label"]: "*" * row["fastest"] + "~" * row["close"] for row in found.to_dict("records")}


def test_a_clear_lead_is_a_win() -> None:
    assert marks(timed("loop", 1.9, 2.0, 2.1), timed("te", 2.2, 2.3, 2.4)) == {"loop": "*", "te": ""}


@pytest.mark.parametrize(
    "second",
    [
        timed("te", 2.05, 2.3, 2.4),  # its interval reaches the fastest's
        timed("te", 2.05, 2.05, 2.05),  # less than 3% apart
        timed("te", -math.inf, 4.0, math.inf),  # too few samples for an interval
        timed("te", 2.0, 2.0, 2.0),  # the same time
    ],
)
def test_what_noise_blurs_is_a_win_for_nobody(second: Record) -> None:
    rows = (timed("loop", 1.9, 2.0, 2.1), second, timed("gmm", 6.0, 6.1, 6.2))
    assert marks(*rows) == {"loop": "~", "te": "~", "gmm": ""}
    assert wins(ranked(to_frame(rows))) == ({}, 1)


def test_a_noisy_backend_behind_a_clear_second_blurs_nothing() -> None:
    rows = timed("a", 0.99, 1.0, 1.01), timed("b", 1.19, 1.2, 1.21), timed("c", 0.9, 2.5, 9.0)
    assert marks(*rows) == {"a": "*", "b": "", "c": ""}
    (first,) = best(to_frame(rows)).to_dict("records")
    assert (first["label"], first["close_to"], first["next"]) == ("a", "", "b")


def test_a_backend_alone_and_a_failure_win_nothing() -> None:
    alone = (timed("loop", 1.9, 2.0, 2.1), bad(case(128), Status.crash, "te"))
    assert marks(*alone) == {"loop": "", "te": ""}
    assert wins_sentence(to_frame(alone)) == "no case has times of several backends"


def test_the_best_of_each_case_has_its_lead_its_memory_and_what_is_too_close_to_it() -> None:
    rows = [
        *(timed("te", 4.0, 4.0, 4.0), timed("loop", 2.0, 2.0, 2.0, peak_memory_bytes=77)),
        *(timed("loop", 1.0, 1.0, 1.0, 256), timed("te", 1.01, 1.01, 1.01, 256), timed("gmm", 3.0, 3.0, 3.0, 256)),
        timed("te", 1.0, 1.0, 1.0, 512),
        bad(case(1024), Status.oom, "te"),
    ]
    found = best(to_frame(rows))
    columns = ["num_tokens", "label", "time_ms", "peak_memory_bytes", "close_to", "next", "lead"]
    cells = found[columns].astype(object).where(found[columns].notna(), None).to_numpy().tolist()
    assert cells == [
        [128, "loop", 2.0, 77, "", "te", 2.0],
        [256, "loop", 1.0, 256_000, "te", "gmm", 3.0],
        [512, "te", 1.0, 512_000, "", None, None],
    ], "a case without a time has no row"
    assert wins_sentence(to_frame(rows)) == "wins in 2 cases: loop 1, too close to call 1"
    assert best(to_frame(rows[-1:])).empty
    assert num_compared(to_frame(rows)) == 2


def test_times_the_fastest_count_within_a_case_of_one_run() -> None:
    one = to_frame([timed("loop", 2.0, 2.0, 2.0), timed("te", 5.0, 5.0, 5.0), bad(case(128), Status.crash, "gmm")])
    other = to_frame([timed("loop", 1.0, 1.0, 1.0)]).assign(run_id="20261124-run")
    found = ranked(pd.concat([one, other], ignore_index=True)).set_index(["run_id", "label"])["times_fastest"]
    assert found["20261123-run"][["loop", "te"]].tolist() == [1.0, 2.5]
    assert math.isnan(found["20261123-run", "gmm"])
    assert found["20261124-run", "loop"] == 1.0
