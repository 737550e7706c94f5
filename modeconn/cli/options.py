"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
import typer
from torch import nn
from tqdm import tqdm

from modeconn import Recipe, callbacks, data, models
from modeconn.attacks.training import TRADES, AdversarialTraining, FreeAdversarialTraining
from modeconn.cli import parse
from modeconn.data import TensorLoader
from modeconn.measure.along import chosen_positions
from modeconn.tools import provenance
from modeconn.tools.processes import joined, writes
from modeconn.tools.writing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RECIPE = Recipe()

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, show_default=False)]

Files = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, show_default=False)]

_ADVERSARY = """Attack each batch: pgd[:norm=l2,random_start=False,clean_weight=0.5], trades[:beta=6,norm=l2] or
free[:num_replays=8]."""

METHOD = f"{', '.join(parse.METHODS)}, each [:KEY=VALUE,...], such as weight:start=activation or deep_align:FILE"


def _option(panel: str, help: str, *names: str, metavar: str | None = None, min: int | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, min=min, rich_help_panel=panel)


def file_option(help: str, *names: str, metavar: str | None = None) -> Any:
    """Return an option of commands that write models tensor by tensor."""
    return _option("Files", help, *names, metavar=metavar)


Model = Annotated[str, _option("Model", "A model of the zoo, or package.module:factory.", "--model")]
ModelArguments = Annotated[
    list[str] | None,
    _option("Model", "For its factory; may be repeated.", "--model-arg", metavar="KEY=VALUE"),
]
InputShape = Annotated[
    list[str] | None,
    _option(
        "Model",
        "Shape of an example input where neither data nor model says it, such as 2,3,224,224 or 2,16:int64; repeat it "
        "for several inputs.",
        "--input-shape",
        metavar="N,C,H,W[:DTYPE]",
    ),
]
SelectedOutputs = Annotated[
    list[str] | None,
    _option(
        "Model",
        "An output of the model that has to stay as it is: its name, its position, or package.module:function of all "
        "that the model returns. May be repeated; default: all outputs.",
        "--outputs",
        metavar="NAME",
    ),
]
Symmetries = Annotated[
    str,
    _option(
        "Model",
        "permutation or orthogonal: whether units are reordered alone, or also rotated where nothing but linear layers "
        "and norms read them, as in transformers.",
    ),
]
Untie = Annotated[
    bool,
    _option("Model", "Give tied weights, such as a head that is the embedding, a tensor for each of their names."),
]
Progress = Annotated[bool | None, typer.Option(help="Whether to show progress bars; default: in a terminal.")]


Kept = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Where the run saves itself; default: OUT.checkpoint, deleted at the end."),
]
Finished = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Finished measurements; default: beside the result, deleted at the end."),
]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of another command.")]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, all or nothing, in the format that its ending names."""
    try:
        with replacing(path) as file:
            kind = path.suffix.removeprefix(".").lower() or "png"
            figure.savefig(file, format=kind, dpi=150, metadata=_made_by(kind))
    except ValueError as error:  # an ending that matplotlib does not know
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from None


def _made_by(kind: str) -> dict[str, str] | None:
    """Return what a figure says of how it was made, where its format has a place for that."""
    entry = {"png": "Description", "svg": "Description", "pdf": "Subject"}.get(kind)
    text = provenance.current_command()
    return {entry: text} if entry and text else None


def say(text: str) -> None:
    """Tell the user something that is no result: on stderr, so that results can be piped."""
    if joined().is_first:
        with tqdm.external_write_mode(sys.stderr):  # above progress bars, not inside of them
            typer.echo(f"modeconn: {text}", err=True)


@contextmanager
def kept_until_done(*paths: Path, is_own: bool) -> Iterator[None]:
    """Say where an interrupted run is kept; delete the files of a finished one, unless they are the user's own.

    A run of several parts has a file for each; those that have begun are there.
    """
    try:
        yield
    except KeyboardInterrupt:
        if kept := _there(paths):
            say(f"the run is kept in {kept}; give the same command again to go on.")
        raise
    except FloatingPointError:
        if kept := _there(paths):
            say(f"the last good state of the run is kept in {kept}.")
        raise
    if not is_own and writes():
        for path in paths:
            path.unlink(missing_ok=True)


def _there(paths: Sequence[Path]) -> str:
    """Name the files that exist."""
    return ", ".join(str(path) for path in paths if path.exists())


@dataclass(frozen=True)
class DataOptions:
    """Which data to load, how much of it, and where to."""

    data: Annotated[
        str, _option("Data", f"Data set: {', '.join(data.names())}; or package.module:factory of two loaders.")
    ]
    root: Annotated[Path | None, _option("Data", "Folder of its files; digits need none.")] = None
    data_arg: Annotated[
        list[str] | None, _option("Data", "For the factory of --data; may be repeated.", metavar="KEY=VALUE")
    ] = None
    batch_size: Annotated[int | None, _option("Data", "Default 64 for digits, 128 for images.")] = None
    augment: Annotated[bool, _option("Data", "Whether to augment training images.")] = True
    train_examples: Annotated[int | None, _option("Data", "Train on so many, drawn with --data-seed.")] = None
    test_examples: Annotated[int | None, _option("Data", "Measure on so many, drawn with --data-seed.")] = None
    validation: Annotated[
        int | None,
        _option("Data", "Hold out so many training examples, drawn with --data-seed: they are the test data.", min=1),
    ] = None
    data_seed: Annotated[int, _option("Data", "Which examples are drawn; the split of digits.")] = 0
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu"

    def load(self) -> tuple[Any, Any]:
        """Return training and test data."""
        train, test = self._made() if ":" in self.data else self._known()
        parts = (("train", train, self.train_examples), ("test", test, self.test_examples))
        return tuple(self._draw(name, loader, count) for name, loader, count in parts)

    def _made(self) -> tuple[Any, Any]:
        """Return what a factory of the user's own makes."""
        if (self.root, self.batch_size, self.validation) != (None, None, None):
            raise ValueError(
                f"--root, --batch-size and --validation are for the data sets of modeconn; tell {self.data} by "
                f"--data-arg KEY=VALUE."
            )
        loaders = parse.make_data(self.data, parse.settings(self.data_arg))
        return tuple(one.to(self.device) if isinstance(one, TensorLoader) else one for one in loaders)

    def _known(self) -> tuple[TensorLoader, TensorLoader]:
        if self.data_arg:
            raise ValueError("--data-arg is for the factory of --data package.module:factory.")
        return data.load(
            self.data,
            self.root,
            batch_size=self.batch_size,
            augment=self.augment,
            validation=self.validation or 0,
            seed=self.data_seed,
            device=self.device,
        )

    def load_if_given(self) -> tuple[Any, Any]:
        """Return training and test data, or twice None if no data was named."""
        return (None, None) if self.data is None else self.load()

    def _draw(self, name: str, loader: Any, count: int | None) -> Any:
        if count is None:
            return loader
        if not isinstance(loader, TensorLoader):
            raise ValueError(f"--{name}-examples is for a modeconn.data.TensorLoader, {self.data} made another loader.")
        if not 1 <= count <= loader.num_examples:
            raise ValueError(f"--{name}-examples must lie in 1..{loader.num_examples}, got {count}.")
        order = torch.randperm(loader.num_examples, generator=torch.Generator().manual_seed(self.data_seed))
        return loader.subset(order[:count])


Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Also measure this: top_k:K, perplexity, tempered_loss, cka:END, disagreement:END (a or b), or yours, "
        "package.module:name. May be repeated.",
        show_default=False,
    ),
]


CurveClass = Annotated[
    str | None,
    typer.Option(
        metavar="package.module:CLASS",
        help="The class of the curve, for connections on one that is not of modeconn.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The architecture of files that do not say it themselves."""

    model: Annotated[
        str | None, _option("Model", "Of files that do not say it: a model of the zoo, or package.module:factory.")
    ] = None
    model_arg: ModelArguments = None
    entry: Annotated[
        str | None, _option("Model", "Which state dict of files of torch.save that hold several.", metavar="NAME")
    ] = None
    input_shape: InputShape = None
    outputs: SelectedOutputs = None
    symmetries: Symmetries = "permutation"
    untie: Untie = False

    def how_to_discover(self) -> dict[str, Any]:
        """Return what discovery is told: an example input, which outputs count, and what is looked for."""
        return {
            "example_input": self.example(),
            "outputs": parse.outputs(self.outputs),
            "symmetries": self.symmetries,
            "untie": self.untie,
        }

    def example(self) -> tuple[torch.Tensor, ...] | None:
        """Return an example input, if its shape was given."""
        return None if self.input_shape is None else tuple(map(parse.example_input, self.input_shape))

    def template(self, train: Any) -> nn.Module | None:
        """Return a model of the architecture, if it was given."""
        if self.model is not None:
            return parse.make_model(self.model, parse.settings(self.model_arg), train)
        if self.model_arg:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        return None

    def read(self, paths: Iterable[Path], train: Any, device: str) -> list[nn.Module]:
        """Return the networks of files."""
        template = self.template(train)
        return [read_network(path, template, self.entry).to(device) for path in paths]


def read_network(path: Path, template: nn.Module | None, entry: str | None = None) -> nn.Module:
    """Return the network of a file, also of one that a factory of the user's own made, if the file says it."""
    if template is None:
        parse.enter_factory(path)
    return models.load(path, template, entry=entry)


@dataclass(frozen=True)
class RecipeOptions:
    """How to train, as far as it was said."""

    epochs: Annotated[int | None, _option("Recipe", "Passes over the training data.")] = None
    optimizer: Annotated[
        str | None, _option("Recipe", "Any of torch.optim, such as adam:lr=0.003.", metavar="NAME:KEY=VALUE,...")
    ] = None
    schedule: Annotated[str | None, _option("Recipe", f"{', '.join(parse.SCHEDULES)}.", metavar="NAME")] = None
    weight_decay: Annotated[float | None, _option("Recipe", "Strength of the L2 penalty.")] = None
    autocast: Annotated[str, _option("Recipe", "none, bfloat16 or float16.")] = "none"
    compile: Annotated[bool, _option("Recipe", "Whether to use torch.compile.")] = False

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


_WATCH = "While it runs"


@dataclass(frozen=True)
class WatchOptions:
    """What is measured and kept while a run goes on, if anything."""

    validate_every: Annotated[
        int | None,
        _option(_WATCH, "Measure on the test data after every so many epochs, and after the last; a line each.", min=1),
    ] = None
    validate_at: Annotated[
        str | None, _option(_WATCH, "Where on the curve, rising; default: 0.5.", metavar="0,0.5,1")
    ] = None
    log: Annotated[
        Path | None,
        _option(
            _WATCH,
            "CSV file for the loss of every epoch, and what was measured after it. Default: NAME.log.csv of train with "
            "--validate-every, otherwise none.",
            metavar="FILE.csv",
        ),
    ] = None
    keep_every: Annotated[
        int | None,
        _option(_WATCH, "Keep what is trained, after every so many epochs: NAME.epochs/epoch_10.safetensors.", min=1),
    ] = None

    def check(self, *, are_epochs: bool) -> None:
        """Raise a ValueError if there are no epochs to do something after, or positions make no sense."""
        if self.validate_at is not None and self.validate_every is None:
            raise ValueError("--validate-at is for --validate-every, which is missing.")
        try:
            chosen_positions(self._positions, 2)
        except ValueError:
            raise ValueError(f"--validate-at must be rising positions from 0 to 1, got {self.validate_at}.") from None
        if not are_epochs and (self.validate_every, self.log, self.keep_every) != (None, None, None):
            raise ValueError(
                "--validate-every, --log and --keep-every are for curves that are learned, and a line is not: leave "
                "them out."
            )

    @property
    def _positions(self) -> list[float] | None:
        return None if self.validate_at is None else [parse.number(t) for t in self.validate_at.split(",")]

    def callbacks(self, test: Any, out: Path, **settings: Any) -> list[callbacks.Callback]:
        """Return what watches a run whose result is written to ``out``; ``settings`` are those of the validation."""
        found: list[callbacks.Callback] = []
        if self.validate_every is not None:
            found += [callbacks.Validation(test, self._positions, every=self.validate_every, **settings)]
            found.append(_SpokenValidation())
        if self.log is not None:
            found.append(callbacks.CSVLog(self.log))
        if self.keep_every is not None:
            folder = out.with_name(f"{out.stem}.epochs")
            if folder == out:
                raise ValueError(
                    f"--keep-every makes a folder {str(out)!r}, which is where the result goes: name it else."
                )
            found.append(callbacks.KeepEpochs(folder, every=self.keep_every))
        return found


class _SpokenValidation(callbacks.Callback):
    """Says what was measured after an epoch."""

    reads_values = True

    def after_epoch(self, event: callbacks.EpochEnd) -> None:
        """Say it in one line."""
        if event.values:
            found = {"loss": event.loss, **event.values}
            texts = [f"{name}: {value:{'.2%' if 'accuracy' in name else '.4f'}}" for name, value in found.items()]
            say("; ".join([f"epoch {event.epoch} of {event.num_epochs}", *texts]))


@dataclass(frozen=True)
class AdversaryOptions:
    """What attacks each batch, if it was given."""

    adversary: Annotated[str | None, _option("Adversary", _ADVERSARY, metavar="NAME:KEY=VALUE,...")] = None
    eps: Annotated[str | None, _option("Adversary", "Radius, in units of the pixel range.", metavar="8/255")] = None
    step_size: Annotated[str | None, _option("Adversary", "Default: eps/4.", metavar="2/255")] = None
    attack_steps: Annotated[int | None, _option("Adversary", "Default: 5.")] = None

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
