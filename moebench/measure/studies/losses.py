"""Train a small MoE block with several backends on the same data, and compare their losses, for example FP8's.

    python -m moebench.measure.studies.losses --backend triton --backend triton_fp8 --out losses.csv --plot losses.svg

The block has a router and routed experts, and learns from another block with random weights, whose router it begins
with. Each seed has its own initial weights of experts and its own tokens, and every backend gets both. Parameters and
Adam are in float32, and the block computes in `--dtype`. There are two tasks:

* `classes`: as a language model does, predict a class of each new token, which was drawn by the probabilities that the
  other block gives. The loss is the cross-entropy. The draw keeps it well above zero.
* `values`: compute the other block's outputs for the same few batches again and again. The loss is the squared error
  divided by the mean square of the outputs. It comes so near to zero that the rounding itself becomes a part of it.

The first backend is what the others are compared with. The question is whether another backend changes the loss more
than another seed does: the last line compares the differences of each backend, on the same seed, with the largest
difference between two seeds of the first backend. A final loss is the mean over the last tenth of the steps.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experts.block import BlockConfig, MoEBlock
from experts.config import DTYPES, MoEConfig
from experts.errors import RegistryError
from experts.registry import get_backend
from experts.router import RouterConfig
from moebench.errors import UsageError
from moebench.machine import environment
from moebench.measure.call import weights_changed
from moebench.measure.studies import places, run
from moebench.workload.models import shape_fields

LAST_SHARE = 0.1
LEARNING_RATE = 3e-3
#: Of the task `values`: batches of tokens that the steps take in turn.
NUM_BATCHES = 8
#: Of the task `classes`: the number of classes, and the standard deviation of their logits for outputs of size 1.
NUM_CLASSES, SHARPNESS = 64, 2.0
_LIKE = BlockConfig(router=RouterConfig(norm_topk_prob=True))
_TEACHER_SEED = 1 << 20


#: (block, number of the step) -> the loss
Loss = Callable[[MoEBlock, int], Tensor]


@dataclass(frozen=True)
class Training:
    """What is trained: the sizes of the block, its number of tokens a step, the task, and the dtype of the block."""

    config: MoEConfig
    num_tokens: int
    task: str
    dtype: torch.dtype
    device: torch.device

    def block(self, backend: str, seed: int) -> MoEBlock:
        """Return a block whose parameters are in float32. The seed alone decides their values."""
        config = self.config.with_dtype(torch.float32)
        with torch.device(self.device):
            made = MoEBlock(config, _LIKE, get_backend(backend).build(config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                std = 1 / math.sqrt(parameter.shape[-2 if parameter.ndim == 3 else -1])
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for tell in weights_changed(made):
            tell()
        return made

    def losses(self, backend: str, seed: int, num_steps: int) -> Iterator[float]:
        """Train a block and yield the loss of each step."""
        block, teacher = self.block(backend, seed), self.block("loop", _TEACHER_SEED)
        block.router.load_state_dict(teacher.router.state_dict())
        tell = weights_changed(block)
        optimizer = torch.optim.Adam(block.parameters(), lr=LEARNING_RATE)
        loss_of = self._classes(teacher, seed) if self.task == "classes" else self._values(teacher, seed)
        for number in range(num_steps):
            loss = loss_of(block, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for say in tell:
                say()
            yield float(loss.detach())

    def _tokens(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.num_tokens, self.config.dim, generator=generator).to(self.device)

    def _classes(self, teacher: MoEBlock, seed: int) -> Loss:
        tokens, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
        head_DC = torch.randn(self.config.dim, NUM_CLASSES, generator=torch.Generator().manual_seed(_TEACHER_SEED))
        head_DC = head_DC.to(self.device) * SHARPNESS / math.sqrt(self.config.dim)

        def loss(block: MoEBlock, number: int) -> Tensor:
            x_TD = self._tokens(tokens)
            with torch.no_grad():
                chances_TC = (teacher(x_TD) @ head_DC).softmax(-1).cpu()
            classes_T = torch.multinomial(chances_TC, 1, generator=draws).squeeze(-1).to(self.device)
            return nn.functional.cross_entropy(block(x_TD.to(self.dtype)).float() @ head_DC, classes_T)

        return loss

    def _values(self, teacher: MoEBlock, seed: int) -> Loss:
        generator = torch.Generator().manual_seed(seed)
        batches = [self._tokens(generator) for _ in range(NUM_BATCHES)]

        def loss(block: MoEBlock, number: int) -> Tensor:
            x_TD = batches[number % NUM_BATCHES]
            with torch.no_grad():
                right_TD: Tensor = teacher(x_TD)
            error: Tensor = block(x_TD.to(self.dtype)).float() - right_TD
            return error.square().mean() / right_TD.square().mean()

        return loss


def final(losses: "pd.Series[float]") -> float:
    """Return the mean of the last tenth of the losses."""
    return float(losses.tail(max(1, round(LAST_SHARE * len(losses)))).mean())


def summary(rows: pd.DataFrame) -> tuple[dict[tuple[str, int], float], float, dict[str, float]]:
    """Return the final losses by backend and seed, the largest difference between two seeds, and between backends.

    The difference between seeds is of the first backend. The difference of another backend is the largest one, on the
    same seed, from the first backend. Differences are positive.
    """
    finals: dict[tuple[str, int], float] = {}
    for name, seed in zip(rows["backend"], rows["seed"], strict=True):
        if (name, seed) not in finals:
            finals[name, seed] = final(rows.loc[(rows["backend"] == name) & (rows["seed"] == seed), "loss"])
    first = str(rows["backend"].iloc[0])
    own = [loss for (name, _), loss in finals.items() if name == first]
    between = max((abs(one - other) for one, other in itertools.combinations(own, 2)), default=math.nan)
    others: dict[str, float] = {}
    for (name, seed), loss in finals.items():
        if name != first:
            others[name] = max(others.get(name, 0.0), abs(loss - finals[first, seed]))
    return finals, between, others


def plot(rows: pd.DataFrame, title: str, file: Path) -> None:
    """Draw the losses against the steps, one line for each backend and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(rows["backend"].unique())
    for (name, seed), some in rows.groupby(["backend", "seed"]):
        place = names.index(name)
        first = seed == rows["seed"].min()
        axes.plot(
            *(some["step"], some["loss"]),
            color=f"C{place}",
            linestyle=("-", "--", ":", "-.")[place % 4],
            linewidth=1.0,
            alpha=0.8,
            label=str(name) if first else None,
        )
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    figure.savefig(file)


def main(
    backend: Annotated[list[str], typer.Option(help="a backend; the first is compared with the others; repeatable")] = [  # noqa: B006
        "triton",
        "triton_fp8",
    ],
    shape: Annotated[str, typer.Option(help="experts, top-k, dim and inter")] = "e8k2d256i256",
    num_tokens: Annotated[int, typer.Option(min=1, help="tokens of a step")] = 512,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds of each backend")] = 3,
    task: Annotated[str, typer.Option(help="classes or values")] = "classes",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    device: str | None = None,
    out: Annotated[Path | None, typer.Option(help="a file .csv with every loss")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="a file .svg or .png")] = None,
) -> None:
    """Train a small MoE block with each backend, and compare the losses."""
    fields = shape_fields(shape)
    if fields is None:
        raise UsageError(f"--shape {shape}: it must be experts, top-k, dim and inter; for example e8k2d256i256")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    if task not in ("classes", "values"):
        raise UsageError(f"--task {task}: it must be classes or values")
    for option, file, suffixes in (("--out", out, (".csv",)), ("--plot", plot_to, (".svg", ".png"))):
        if file is not None and file.suffix not in suffixes:
            raise UsageError(f"{option} {file}: it must end in {' or '.join(suffixes)}")
    on = places(device, out or plot_to)
    sizes: dict[str, Any] = {**fields, "dtype": DTYPES[dtype]}
    training = Training(MoEConfig(**sizes), num_tokens, task, DTYPES[dtype], on)
    for name in backend:
        try:
            reason = get_backend(name).unsupported(on, training.config)
        except RegistryError as error:
            raise UsageError(f"--backend {name}: {error}") from error
        if reason is not None:
            raise UsageError(f"--backend {name}: {reason.reason}")
    rows = pd.DataFrame(
        {"backend": name, "seed": seed, "step": step, "loss": loss}
        for name in backend
        for seed in range(seeds)
        for step, loss in enumerate(training.losses(name, seed, steps), 1)
    )
    _show(rows)
    described = environment.collect(on.type)
    machine = described.gpus[0].name if described.gpus and on.type == "cuda" else described.cpu_model
    if plot_to is not None:
        plot(rows, f"{task}: {shape}, {num_tokens} tokens a step, {dtype}, {machine}", plot_to)
    if out is not None:
        facts: dict[str, Any] = {
            "task": task,
            "shape": shape,
            "num_tokens": num_tokens,
            "dtype": dtype,
            "machine": machine,
        }
        rows.assign(**facts, torch=described.versions.get("torch")).to_csv(out, index=False)


def _show(rows: pd.DataFrame) -> None:
    finals, between, others = summary(rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("backend", "seed", "first loss", "final loss"):
        table.add_column(title, justify="left" if title == "backend" else "right")
    for (name, seed), loss in finals.items():
        own = rows[(rows["backend"] == name) & (rows["seed"] == seed)]
        table.add_row(name, str(seed), f"{own['loss'].iloc[0]:.4f}", f"{loss:.4f}")
    console = Console()
    console.print(table)
    first = rows["backend"].iloc[0]
    for name, difference in others.items():
        seeds = "there is one seed" if math.isnan(between) else f"two seeds of {first} differ by up to {between:.4f}"
        console.print(
            f"{name} differs from {first} by up to {difference:.4f} on the same seed; {seeds}", soft_wrap=True
        )


if __name__ == "__main__":
    run(main, "moebench.measure.studies.losses")
