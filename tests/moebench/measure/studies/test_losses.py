"""moebench.measure.studies.losses trains blocks on the same data, and compares backends with seeds."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from experts.config import MoEConfig
from moebench.errors import UsageError
from moebench.measure.studies import losses
from moebench.measure.studies.losses import Training, final, plot, summary

CPU = torch.device("cpu")
CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=16, dtype=torch.float32)


def train(task: str, backend: str, seed: int, steps: int = 12) -> list[float]:
    return list(Training(CONFIG, 32, task, torch.float32, CPU).losses(backend, seed, steps))


@pytest.mark.parametrize("task", ["classes", "values"])
def test_backends_get_the_same_weights_and_tokens_and_seeds_get_others(task: str) -> None:
    loop = train(task, "loop", 1)
    assert train(task, "torch_mm", 1) == pytest.approx(loop, rel=1e-3)
    assert train(task, "loop", 1) == loop
    assert train(task, "loop", 2) != pytest.approx(loop, rel=1e-3)


def test_a_block_learns() -> None:
    found = train("values", "loop", 0, 80)
    assert sum(found[-8:]) < 0.6 * sum(found[:8])


def test_a_layer_that_keeps_weights_is_told_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(losses, "weights_changed", lambda module: [lambda: told.append(1)])
    train("values", "loop", 0, 5)
    assert len(told) == 2 + 5, "once for each block, and once after each step"


def rows(**values: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"backend": key.rpartition("_")[0], "seed": int(key[-1]), "step": step, "loss": loss}
        for key, of in values.items()
        for step, loss in enumerate(of, 1)
    )


def test_the_final_loss_is_the_mean_of_the_last_tenth() -> None:
    assert final(pd.Series([9.0] * 18 + [1.0, 3.0])) == 2.0
    assert final(pd.Series([9.0, 4.0])) == 4.0


def test_backends_are_compared_on_the_same_seed() -> None:
    found = rows(one_0=[5.0, 1.0], one_1=[5.0, 2.0], other_0=[5.0, 1.5], other_1=[5.0, 1.75], third_0=[5.0, 1.0])
    finals, between, others = summary(found)
    assert list(finals.values()) == [1.0, 2.0, 1.5, 1.75, 1.0]
    assert (between, others) == (1.0, {"other": 0.5, "third": 0.0})


def test_the_plot_has_a_line_for_each_backend_and_seed(tmp_path: Path) -> None:
    plot(rows(one_0=[5.0, 1.0], one_1=[5.0, 2.0], other_0=[5.0, 1.5]), "a title", tmp_path / "losses.svg")
    text = (tmp_path / "losses.svg").read_text()
    assert text.count("line2d") > 3
    assert "a title" in text or "<use" in text


def test_the_study_writes_every_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses.main(["loop", "torch_mm"], "e4k2d16i16", 16, 3, 2, "values", "float32", "cpu", tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 2 * 2 * 3
    assert set(table["task"]) == {"values"}
    assert (
        "torch_mm differs from loop by up to 0.0000 on the same seed; two seeds of loop differ"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "e4"}, "--shape e4: it must be experts"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"task": "words"}, "--task words: it must be classes or values"),
        ({"out": Path("a.json")}, "--out a.json: it must end in .csv"),
        ({"backend": ["nothing"]}, "--backend nothing: there is no backend"),
    ],
)
def test_a_wrong_argument_is_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        losses.main(**{"device": "cpu", "backend": ["loop"], **fields})  # type: ignore[arg-type]
