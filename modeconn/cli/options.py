"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import nn

from modeconn import Recipe, data, models
from modeconn.attacks.training import TRADES, AdversarialTraining, FreeAdversarialTraining
from modeconn.cli import parse
from modeconn.data import TensorLoader

_RECIPE = Recipe()

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, show_default=False)]

Files = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, show_default=False)]

METHOD = f"{', '.join(parse.METHODS)}, each [:KEY=VALUE,...], such as weight:start=activation or deep_align:FILE"

Data = Annotated[str, typer.Option("--data", help=f"Data set: {', '.join(data.names())}.", rich_help_panel="Data")]
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


Finished = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Finished measurements; default: beside the result, deleted at the end."),
]


@dataclass(frozen=True)
class DataOptions:
    """Which data to load, how much of it, and where to."""

    data: Data
    root: Root = None
    batch_size: BatchSize = None
    augment: Augment = True
    train_examples: TrainExamples = None
    test_examples: TestExamples = None
    data_seed: DataSeed = 0
    device: Device = "cpu"

    def load(self) -> tuple[TensorLoader, TensorLoader]:
        """Return training and test data."""
        train, test = data.load(
            self.data,
            self.root,
            batch_size=self.batch_size,
            augment=self.augment,
            seed=self.data_seed,
            device=self.device,
        )
        parts = (("train", train, self.train_examples), ("test", test, self.test_examples))
        return tuple(self._draw(name, loader, count) for name, loader, count in parts)

    def load_if_given(self) -> tuple[TensorLoader | None, TensorLoader | None]:
        """Return training and test data, or twice None if no data was named."""
        return (None, None) if self.data is None else self.load()

    def _draw(self, name: str, loader: TensorLoader, count: int | None) -> TensorLoader:
        if count is None:
            return loader
        if not 1 <= count <= loader.num_examples:
            raise ValueError(f"--{name}-examples must lie in 1..{loader.num_examples}, got {count}.")
        order = torch.randperm(loader.num_examples, generator=torch.Generator().manual_seed(self.data_seed))
        return loader.subset(order[:count])


@dataclass(frozen=True)
class ModelOptions:
    """The architecture of files that do not say it themselves."""

    model: Template = None
    model_arg: ModelArguments = None

    def template(self, train: TensorLoader | None) -> nn.Module | None:
        """Return a model of the architecture, if it was given."""
        if self.model is not None:
            return parse.make_model(self.model, parse.settings(self.model_arg), train)
        if self.model_arg:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        return None

    def read(self, paths: Iterable[Path], train: TensorLoader | None, device: str) -> list[nn.Module]:
        """Return the networks of files."""
        template = self.template(train)
        return [models.load(path, template).to(device) for path in paths]


@dataclass(frozen=True)
class RecipeOptions:
    """How to train, as far as it was said."""

    epochs: Epochs = None
    optimizer: Optimizer = None
    schedule: Schedule = None
    weight_decay: WeightDecay = None
    autocast: Autocast = "none"
    compile: Compile = False

    def change(self, recipe: Recipe = _RECIPE) -> Recipe:
        """Return a recipe with the settings that were given."""
        changes = {
            "epochs": self.epochs,
            "optimizer": None if self.optimizer is None else parse.optimizer(self.optimizer),
            "schedule": None if self.schedule is None else parse.schedule(self.schedule),
            "weight_decay": self.weight_decay,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(recipe, autocast=parse.precision(self.autocast), compile=self.compile, **given)


@dataclass(frozen=True)
class AdversaryOptions:
    """What attacks each batch, if it was given."""

    adversary: Adversary = None
    eps: Eps = None
    step_size: StepSize = None
    attack_steps: AttackSteps = None

    def opponent(self) -> AdversarialTraining | FreeAdversarialTraining | TRADES | None:
        """Return the adversary, None for clean training."""
        if self.adversary is not None:
            return parse.adversary(self.adversary, self.eps, self.step_size, self.attack_steps)
        if (self.eps, self.step_size, self.attack_steps) != (None, None, None):
            raise ValueError("--eps, --step-size and --attack-steps are for --adversary, which is missing.")
        return None


def grouped(*left_out: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take groups of options: a parameter annotated with one of the classes here stands for its fields.

    Args:
        left_out: Fields that the command does not offer; they keep their defaults.
        defaults: Other defaults, by field.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            kind = inspect.Parameter.KEYWORD_ONLY
            if parameter.name not in groups:
                parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))
                continue
            group = groups[parameter.name]
            types = get_type_hints(group, include_extras=True)
            for field in (field for field in fields(group) if field.name not in left_out):
                own = inspect.Parameter.empty if field.default is MISSING else field.default
                default = defaults.get(field.name, own)
                parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=types[field.name]))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = {
                name: group(**{field.name: given.pop(field.name) for field in fields(group) if field.name in given})
                for name, group in groups.items()
            }
            command(**given, **made)

        run.__signature__ = inspect.Signature(parameters)  # what typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def bars(wanted: bool | None) -> bool:
    """Return whether to show progress bars: as wanted, else in a terminal."""
    return sys.stderr.isatty() if wanted is None else wanted
