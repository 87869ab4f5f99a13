"""The figures about layers of other libraries, and about the products of other libraries (the study `steps`)."""

from collections.abc import Iterable, Iterator
from typing import Any

from moebench.workload.models import SHAPE_AXES, shape_name
from tests.figures import data, rounds
from tests.figures.data import (
    JOB,
    PEERS,
    SHAPES,
    SHAPES_OF_STEPS_AGAIN,
    results,
    select,
    the,
)
from tests.figures.markdown import markdown

#: The dates of the files: with sizes on the host, and with cuBLASLt 13.4, which takes them on the device for `te`.
FIRST_STEPS, STEPS_AGAIN = "2026-11-23", "2026-11-30"


def of_automodel() -> dict[str, str]:
    found = {}
    for backend in ("torch_mm", "triton"):
        for number, shape in enumerate(SHAPES):
            own, peer = (data.peers_of(name, shape) for name in (backend, "peer_automodel_torch_mm"))
            times_ms = [the(frame, mode="train")["time_ms"] for frame in (own, peer)]
            found[f"{backend}{number}"] = f"{times_ms[0] / times_ms[1]:.2f}"
    return found


def of_sonicmoe() -> dict[str, Any]:
    """What SonicMoE takes over what `triton` takes in the same run: times by shape, and peaks of train steps."""
    ratios: dict[str, list[float]] = {"forward": [], "train": [], "peak": []}
    for shape in SHAPES:
        for mode in ("forward", "train"):
            own, peer = (the(data.peers_of(name, shape), mode=mode) for name in ("triton", "peer_sonicmoe"))
            ratios[mode].append(peer["time_ms"] / own["time_ms"])
        ratios["peak"].append(peer["peak_memory_bytes"] / own["peak_memory_bytes"])
    surely = float(earlier_peers()["close"].rstrip("%")) / 100
    far = {
        (mode, at) for mode in ("forward", "train") for at, ratio in enumerate(ratios[mode]) if _apart(ratio) > surely
    }
    assert far == {("train", 0), ("forward", 2)}, "the document names the leads that another run would show, too"
    (many,), (few,) = {experts for experts, *_ in list(SHAPES)[:1]}, {experts for experts, *_ in list(SHAPES)[1:]}
    return {
        **{f"{mode}{number}": f"{ratio:.2f}" for mode in ratios for number, ratio in enumerate(ratios[mode])},
        "many": many,
        "few": few,
        "train_close": f"{max(map(_apart, ratios['train'][1:])):.0%}",
        "forward_most": f"{max(ratios['forward']):.2f}",
        "peak_low": f"{min(ratios['peak']) - 1:.0%}".rstrip("%"),
        "peak_high": f"{max(ratios['peak']) - 1:.0%}",
    }


def _apart(ratio: float) -> float:
    return abs(ratio - 1)


def earlier_peers() -> dict[str, str]:
    """How far the times of layers that did not change are from those of earlier runs on other H200s."""
    now = results(PEERS)

    def apart(name: str, backends: list[str]) -> float:
        both = select(now, backend=backends).merge(results(name), on=JOB, suffixes=("", "_before"))
        return float((both["time_ms"] / both["time_ms_before"] - 1).abs().max())

    close = max(apart(name, ["torch_mm", "peer_transformers"]) for name in data.EARLIER_PEERS)
    return {"close": f"{close:.1%}", "automodel": f"{apart(data.EARLIER_PEERS[1], ['peer_automodel_torch_mm']):.1%}"}


def warmup_of_sonicmoe() -> dict[str, str]:
    """What the two jobs of each shape took before they were timed, in s."""
    of_shapes = [data.peers_of("peer_sonicmoe", shape)["warmup_ms"].sum() / 1e3 for shape in SHAPES]
    return {f"s{number}": f"{seconds:.0f}" for number, seconds in enumerate(of_shapes)}


# the study `steps`


def steps_of(date: str, shape: tuple[int, ...], only: str = "") -> dict[str, Any]:
    """The rows of one file by their names. `only` is the end of the name of a file with one backend."""
    path = "-".join(["steps/h200", date, *map(str, shape), *([only] if only else [])])
    return {row["name"]: row for row in data.document(f"{path}.json")["rows"]}


def steps() -> str:
    return _table_of_steps(FIRST_STEPS, SHAPES)


def steps_again() -> str:
    return _table_of_steps(STEPS_AGAIN, SHAPES_OF_STEPS_AGAIN)


def _table_of_steps(date: str, shapes: Iterable[tuple[int, ...]]) -> str:
    header = ["shape", "backend"]
    for mode in ("forward", "train"):
        header += [f"{mode}: its products, TFLOP/s", "layer, TFLOP/s", "share"]

    def rows() -> Iterator[list[Any]]:
        for shape in shapes:
            found = steps_of(date, shape)
            for backend in ("gmm", "te"):
                cells: list[str] = []
                for mode in ("forward", "train"):
                    products, layer = (found[f"{backend}: {what}, {mode}"] for what in ("products", "layer"))
                    cells += [f"{products['tflops']:.0f}", f"{layer['tflops']:.0f}", f"{layer['fraction']:.2f}"]
                yield [shape_name(dict(zip(SHAPE_AXES, shape, strict=True))), f"`{backend}`", *cells]

    return markdown(header, rows())


def products_of_te() -> dict[str, str]:
    """What the layer of `te` reaches with sizes on the device, and what `triton` reached in another run."""
    found = [steps_of(STEPS_AGAIN, shape) for shape in SHAPES_OF_STEPS_AGAIN]
    shares = {mode: [f"{one[f'te: layer, {mode}']['fraction']:.2f}" for one in found] for mode in ("forward", "train")}
    (train,) = set(shares["train"])
    own = [rounds.train_step("triton", shape)["tflops"] for shape in SHAPES_OF_STEPS_AGAIN]
    products, layers = ([one[f"te: {what}, train"]["tflops"] for one in found] for what in ("products", "layer"))
    assert all(fast > whole for fast, whole in zip(products, own, strict=True)), "the products are faster"
    assert all(whole > layer for whole, layer in zip(own, layers, strict=True)), "the layer of `te` is slower"
    values = {"products": products, "layer": layers, "triton": own}
    return {
        "train": train,
        **{f"forward{number}": share for number, share in enumerate(shares["forward"])},
        **{f"{name}{number}": f"{one:.0f}" for name, ones in values.items() for number, one in enumerate(ones)},
    }


def products_of_gmm() -> dict[str, str]:
    found = [steps_of(STEPS_AGAIN, shape) for shape in SHAPES_OF_STEPS_AGAIN]
    for one, shape in zip(found, SHAPES_OF_STEPS_AGAIN, strict=True):
        for name in ("gmm: layer, forward", "gmm: layer, train"):
            assert one[name]["fraction"] <= steps_of(FIRST_STEPS, shape)[name]["fraction"], "no more than before"
    (train,) = {f"{one['gmm: layer, train']['fraction']:.2f}" for one in found}
    forward = [f"{one['gmm: layer, forward']['fraction']:.2f}" for one in found]
    return {"train": train, **{f"forward{number}": share for number, share in enumerate(forward)}}


def by_place() -> dict[str, str]:
    """The time of the products of `te` with sizes on the device over that with sizes on the host, by shape."""
    over = []
    for shape in SHAPES_OF_STEPS_AGAIN:
        for mode in ("forward", "train"):
            times = steps_of(STEPS_AGAIN, shape)[f"te: products, {mode}"]["ms_by_place_of_sizes"]
            over.append(times["device"] / times["host"])
    assert max(over[:2]) < 1 < min(over[2:])
    names = ("first_forward", "first_train", "second_forward", "second_train")
    return {name: f"{ratio:.2f}" for name, ratio in zip(names, over, strict=True)}


def forward_of_te() -> dict[str, str]:
    """What the steps of a forward of `te` take together, and what the layer takes, in ms."""
    found: dict[str, str] = {}
    shares = []
    for number, shape in enumerate(SHAPES_OF_STEPS_AGAIN):
        steps = steps_of(STEPS_AGAIN, shape)
        rest = [steps[name] for name in ("mask_choices", "sort_by_expert", "gather_rows", "activate", "sum_rows")]
        shares += [step["fraction"] for step in rest[2:]]
        products_ms = steps["te: products, forward"]["ms_by_place_of_sizes"]["device"]
        times = [sum(step["ms"] for step in rest), products_ms, steps["te: layer, forward"]["ms"]]
        times.append(times[0] + times[1])
        names = ("rest", "products", "layer", "sum")
        found |= {f"{name}{number}": f"{ms:.2f}" for name, ms in zip(names, times, strict=True)}
    return {**found, "least": f"{min(shares):.0%}"[:-1], "most": f"{max(shares):.0%}"}


def of_two_processes() -> dict[str, str]:
    """How far the times of `te` are from those of an earlier process with `te` alone."""
    apart = []
    for shape in SHAPES_OF_STEPS_AGAIN:
        earlier, later = steps_of(STEPS_AGAIN, shape, "te"), steps_of(STEPS_AGAIN, shape)
        names = [name for name in earlier if name.startswith("te: ")]
        assert len(names) == 4
        apart += [abs(later[name]["ms"] / earlier[name]["ms"] - 1) for name in names]
    return {"apart": f"{max(apart):.1%}"}
