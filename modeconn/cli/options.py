"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from modeconn import Recipe, data
from modeconn.attacks.training import TRADES, AdversarialTraining, FreeAdversarialTraining
from modeconn.cli import parse
from modeconn.data import TensorLoader

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, show_default=False)]

METHOD = f"{', '.join(parse.METHODS)}, each [:KEY=VALUE,...], such as weight:start=activation or deep_align:FILE"

Data = Annotated[str, typer.Option("--data", help=f"Data set: {', '.join(data.names())}.", rich_help_panel="Data")]
OptionalData = Annotated[
    str | None, typer.Option("--data", help=f"Data set: {', '.join(data.names())}.", rich_help_panel="Data")
]
Root = Annotated[Path | None, typer.Option(help="Folder of its files; digits need none.", rich_help_panel="Data")]
BatchSize = Annotated[int | None, typer.Option(help="Default 64 for digits, 128 for images.", rich_help_panel="Data")]
Augment = Annotated[bool, typer.Option(help="Whether to augment training images.", rich_help_panel="Data")]
TrainExamples = Annotated[
    int | None, typer.Option(help="Train on so many examples, drawn with --data-seed.", rich_help_panel="Data")
]
TestExamples = Annotated[
    int | None, typer.Option(help="Measure on so many examples, drawn with --data-seed.", rich_help_panel="Data")
]
DataSeed = Annotated[int, typer.Option(help="Which examples are drawn; the split of digits.", rich_help_panel="Data")]

Model = Annotated[
    str, typer.Option("--model", help="A model of the zoo, or package.module:factory.", rich_help_panel="Model")
]
Template = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Architecture of files that do not say it themselves: a model of the zoo, or package.module:factory.",
        rich_help_panel="Model",
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="For its factory; may be repeated.", rich_help_panel="Model"),
]

Epochs = Annotated[int | None, typer.Option(help="Passes over the training data.", rich_help_panel="Recipe")]
Optimizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME:KEY=VALUE,...",
        help="Any of torch.optim, such as adam:lr=0.003.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"{', '.join(parse.SCHEDULES)}.", show_default=False, rich_help_panel="Recipe"),
]
WeightDecay = Annotated[float | None, typer.Option(help="Strength of the L2 penalty.", rich_help_panel="Recipe")]
Autocast = Annotated[str, typer.Option(help="none, bfloat16 or float16.", rich_help_panel="Recipe")]
Compile = Annotated[bool, typer.Option(help="Whether to use torch.compile.", rich_help_panel="Recipe")]

Adversary = Annotated[
    str | None,
    typer.Option(
        metavar="NAME:KEY=VALUE,...",
        help="Attack each batch: pgd[:norm=l2,random_start=False,clean_weight=0.5], trades[:beta=6,norm=l2] or "
        "free[:num_replays=8].",
        show_default=False,
        rich_help_panel="Adversary",
    ),
]
Eps = Annotated[
    str | None,
    typer.Option(
        metavar="8/255",
        help="Radius of the attack, in units of the pixel range.",
        show_default=False,
        rich_help_panel="Adversary",
    ),
]
StepSize = Annotated[
    str | None,
    typer.Option(metavar="2/255", help="Default: eps/4.", show_default=False, rich_help_panel="Adversary"),
]
AttackSteps = Annotated[int | None, typer.Option(help="Default: 5.", show_default=False, rich_help_panel="Adversary")]

Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
Progress = Annotated[bool | None, typer.Option(help="Whether to show progress bars; default: in a terminal.")]


@dataclass(frozen=True)
class DataOptions:
    """Which data to load, and how much of it."""

    name: str
    root: Path | None = None
    batch_size: int | None = None
    augment: bool = True
    train_examples: int | None = None
    test_examples: int | None = None
    seed: int = 0
    device: str = "cpu"

    def load(self) -> tuple[TensorLoader, TensorLoader]:
        """Return training and test data."""
        train, test = data.load(
            self.name,
            self.root,
            batch_size=self.batch_size,
            augment=self.augment,
            seed=self.seed,
            device=self.device,
        )
        parts = (("train", train, self.train_examples), ("test", test, self.test_examples))
        return tuple(self._draw(name, loader, count) for name, loader, count in parts)

    def _draw(self, name: str, loader: TensorLoader, count: int | None) -> TensorLoader:
        if count is None:
            return loader
        if not 1 <= count <= loader.num_examples:
            raise ValueError(f"--{name}-examples must lie in 1..{loader.num_examples}, got {count}.")
        order = torch.randperm(loader.num_examples, generator=torch.Generator().manual_seed(self.seed))
        return loader.subset(order[:count])


def change_recipe(
    recipe: Recipe,
    *,
    epochs: int | None = None,
    optimizer: str | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    autocast: str = "none",
    compile: bool = False,
) -> Recipe:
    """Return a recipe with the settings that were given."""
    changes = {
        "epochs": epochs,
        "optimizer": None if optimizer is None else parse.optimizer(optimizer),
        "schedule": None if schedule is None else parse.schedule(schedule),
        "weight_decay": weight_decay,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe, autocast=parse.precision(autocast), compile=compile, **given)


def adversary(
    name: str | None, eps: str | None, step_size: str | None, num_steps: int | None
) -> AdversarialTraining | FreeAdversarialTraining | TRADES | None:
    """Return the adversary that ``--adversary`` names, if it was given."""
    if name is not None:
        return parse.adversary(name, eps, step_size, num_steps)
    if (eps, step_size, num_steps) != (None, None, None):
        raise ValueError("--eps, --step-size and --attack-steps are for --adversary, which is missing.")
    return None


def template(name: str | None, arguments: list[str] | None, train: TensorLoader | None) -> nn.Module | None:
    """Return a model of the architecture that ``--model`` names, if it was given."""
    if name is None:
        if arguments:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        return None
    return parse.make_model(name, parse.settings(arguments), train)


def bars(wanted: bool | None) -> bool:
    """Return whether to show progress bars: as wanted, else in a terminal."""
    return sys.stderr.isatty() if wanted is None else wanted
