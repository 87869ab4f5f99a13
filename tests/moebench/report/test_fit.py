"""How many layers fit into a GPU's memory follows from weights, passes and Adam's state."""

import pytest

from moebench.report.fit import Fit, fits, gpu_memory
from moebench.report.tables.advisetable import AdviceTable
from moebench.results.advise import advise, question
from moebench.results.frame import to_frame
from moebench.results.published import default_folders
from tests.moebench.drawn import case, ok

GIB, MIB = 2**30, 2**20


def test_layers_share_the_room_of_a_pass_but_not_what_stays_of_a_step() -> None:
    fit = Fit(
        ep_size=1,
        weight_bytes=2 * GIB,
        pass_bytes=GIB,
        step_bytes=3 * GIB,
        stay_bytes=2 * GIB,
        token_bytes=GIB,
        adam_bytes=5 * GIB,
        is_estimate=False,
    )
    assert fit.forward_layers(10 * GIB) == 4  # 1 + 4·2 = 9 GiB, and a fifth layer would need 11
    assert [fit.train_layers(memory * GIB) for memory in (10, 11, 20, 21)] == [0, 1, 1, 2]  # 1 + 10 GiB each
    assert fit.forward_layers(GIB // 2) == fit.train_layers(GIB // 2) == 0


def test_measured_memory_comes_before_an_estimate() -> None:
    rows = [
        ok(case(256), "gmm", 1.0, peak_memory_bytes=2 * MIB),
        ok(case(256, mode="train"), "gmm", 3.0, peak_memory_bytes=9 * MIB, saved_memory_bytes=MIB),
        ok(case(256, ep_size=2), "gmm", 1.0, "alltoall", peak_memory_bytes=3 * MIB),
    ]
    frame, asked = to_frame(rows), question("e8k2d256i512", 256)
    (advice,) = advise(frame, asked).advices
    found = {fit.ep_size: fit for fit in fits(frame, asked, advice)}
    assert list(found) == [1, 2, 4, 8], "8 experts divide into these many ranks"
    assert found[1] == Fit(1, 6 * MIB, 2 * MIB, 9 * MIB, 7 * MIB, MIB // 8, 36 * MIB, is_estimate=False)
    assert (found[2].weight_bytes, found[2].pass_bytes, found[2].is_estimate) == (3 * MIB, 3 * MIB, True)
    assert found[8].adam_bytes == found[1].adam_bytes // 8
    again = {fit.ep_size: fit for fit in fits(frame, asked.model_copy(update={"context": "checkpoint"}), advice)}
    assert again[1].pass_bytes == 2 * MIB, "a forward has no checkpoint"
    assert again[1].stay_bytes < found[1].stay_bytes


def test_the_memory_of_the_published_gpu_is_known() -> None:
    assert gpu_memory(default_folders())["NVIDIA H200"] == pytest.approx(140 * GIB, rel=0.02)
    frame, asked = to_frame([ok(case(256), "gmm", 1.0)]), question("e8k2d256i512", 256)
    (advice,) = advise(frame, asked).advices
    assert AdviceTable(advice, asked).memory_bytes is None
