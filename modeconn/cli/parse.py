"""Strings of the command line become the objects that the library takes; nowhere else does this happen."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import modeconn
from modeconn import PAM, DeepAlign, Relabelling, models
from modeconn.attacks.pgd import PGD
from modeconn.attacks.training import TRADES, AdversarialTraining, FreeAdversarialTraining
from modeconn.curves import Curve
from modeconn.data import TensorLoader
from modeconn.deep_align import WeightAugmentation
from modeconn.matching import Method
from modeconn.network import recipe, registry
from modeconn.tools import files
from modeconn.tools.checks import there_are
from modeconn.tools.door import hints_of
from modeconn.tools.rng import seeded


class OptionError(ValueError):
    """What is wrong with the value of an option, in the command line's own words."""


CURVES = {"line": modeconn.Line, "bezier": modeconn.Bezier, "polychain": modeconn.PolyChain}
METHODS = {
    "activation": modeconn.ActivationMatching,
    "weight": modeconn.WeightMatching,
    "transport": modeconn.TransportMatching,
    "sinkhorn": modeconn.Sinkhorn,
    "straight_through": modeconn.StraightThrough,
    "deep_align": DeepAlign.load,
}
STEPS = {
    "proximal_linear": modeconn.ProximalLinear,
    "sinkhorn": modeconn.SinkhornStep,
    "relaxed": modeconn.RelaxedStep,
    "rotation": modeconn.RotationStep,
}
SCHEDULES = {
    one.__name__: one
    for one in (
        recipe.piecewise_linear, recipe.halving, recipe.one_cycle, recipe.constant, recipe.cosine, recipe.triangular
    )
}  # fmt: skip
OPTIMIZERS = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
}
_PRECISIONS = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_METRICS = {
    "top_k": modeconn.metrics.top_k,
    "perplexity": modeconn.metrics.Perplexity,
    "tempered_loss": modeconn.metrics.TemperedLoss,
    "disagreement": modeconn.metrics.disagreement,
    "cka": modeconn.metrics.cka,
}
_NO_VARIATION = 0.1  # added to the deviation of single features: some pixels of the digits never change


def curve(text: str) -> Curve:
    """Read ``bezier:2``, ``polychain:num_segments=3``, ``line``.

    Example:
        >>> curve("bezier:3,free_ends=True")
        Bezier(degree=3, free_ends=True)
    """
    return _call(text, CURVES, "curve")


def method(text: str) -> Method:
    """Read ``activation:num_examples=2000``, ``weight:seed=1``, ``weight:start=activation`` or ``deep_align:FILE``."""
    return _call(text, METHODS, "alignment method", start=lambda start: method(start) if start else None)


def extent(text: str) -> tuple[float, ...]:
    """Read the window of a plane.

    Example:
        >>> extent("-1,4,-2.5,2.5")
        (-1.0, 4.0, -2.5, 2.5)
    """
    try:
        left, right, bottom, top = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--extent must be four numbers, LEFT,RIGHT,BOTTOM,TOP, got {text!r}.") from None
    return left, right, bottom, top


def deep_align(text: str) -> DeepAlign:
    """Read settings of Deep-Align and of its augmentation.

    Example:
        >>> deep_align("num_steps=100,noise=0.1").augmentation
        WeightAugmentation(noise=0.1, dropout=0.05, rescale=0.0, prune=0.1)
    """
    given = settings(text.split(",") if text else [])
    augmentation = {name: given.pop(name) for name in [*given] if name in WeightAugmentation.__dataclass_fields__}
    unknown = given.keys() - (DeepAlign.__dataclass_fields__.keys() - {"augmentation", "fitted"})
    if unknown:
        raise ValueError(f"DeepAlign has no setting {min(unknown)!r}.")
    return DeepAlign(**given, augmentation=WeightAugmentation(**augmentation))


def alignment(text: str) -> bool | Method | Relabelling:
    """Read ``none``, a method, or the name of a permutation file."""
    if text == "none":
        return False
    if Path(text).suffix == ".safetensors" and not Path(text).is_file():
        raise ValueError(f"--method {text}: there is no such file.")
    return Relabelling.load(text) if Path(text).is_file() else method(text)


def refinement(text: str) -> PAM | None:
    """Read ``none``, ``pam``, or ``pam:iterations=2,step=sinkhorn``.

    Example:
        >>> refinement("pam:step=relaxed").step.learning_rate
        0.05
    """
    if text == "none":
        return None
    return _call(text, {"pam": PAM}, "refinement", step=lambda name: _look_up(name, STEPS, "step of PAM")())


def adversary(
    text: str, eps: str | None, step_size: str | None = None, num_steps: int | None = None
) -> AdversarialTraining | FreeAdversarialTraining | TRADES:
    """Read ``pgd``, ``pgd:clean_weight=0.5,norm=l2``, ``trades:beta=3`` or ``free:num_replays=8``.

    A PGD makes 5 steps of eps/4 by default; free training moves by eps.

    Example:
        >>> adversary("trades:beta=3", "8/255")
        TRADES(attack=PGD(eps=8/255, step_size=2/255, num_steps=5), beta=3)
    """
    if eps is None:
        raise ValueError(f"--adversary {text} needs --eps, such as --eps 8/255.")
    radius = number(eps)
    step = None if step_size is None else number(step_size)
    attack = partial(PGD, radius, radius / 4 if step is None else step, 5 if num_steps is None else num_steps)

    def pgd(*, clean_weight: float = 0.0, norm: str = "linf", random_start: bool = True) -> AdversarialTraining:
        return AdversarialTraining(attack(norm=norm, random_start=random_start), clean_weight)

    def trades(*, beta: float = 6.0, norm: str = "linf") -> TRADES:
        return TRADES(attack(norm=norm), beta)

    def free(*, num_replays: int = 4) -> FreeAdversarialTraining:
        if num_steps is not None:
            raise ValueError("one step of the perturbation belongs to each step of training; leave out --attack-steps.")
        return FreeAdversarialTraining(radius, step, num_replays)

    return _call(text, {"pgd": pgd, "trades": trades, "free": free}, "adversary")


def metrics(texts: Sequence[str] | None) -> dict[str, Any]:
    """Read metrics: ``top_k:3``, ``cka:end=a``, ``perplexity``, or ``package.module:name`` of the user's own.

    A class of the user's own is called without arguments. Metrics of the package are named by the text, others by their
    own name.

    Example:
        >>> list(metrics(["top_k:3", "operator:add"]))
        ['top_k:3', 'add']
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        head, _, name = text.partition(":")
        if head in _METRICS or not name:
            found[text] = _call(text, _METRICS, "metric")
            continue
        own = imported(text)
        if name in found:
            raise ValueError(f"--metric is given twice for {name!r}: give one of them another name.")
        found[name] = _called(text, own, {}) if inspect.isclass(own) else own
    return found


def norm(text: str) -> Literal["linf", "l2"]:
    """Read ``linf`` or ``l2``."""
    choices: dict[str, Literal["linf", "l2"]] = {"linf": "linf", "l2": "l2"}
    found: Literal["linf", "l2"] = _look_up(text, choices, "norm")
    return found


def number(text: str) -> float:
    """Read a number, also as a fraction.

    Example:
        >>> number("8/255") == 8 / 255, number("0.5")
        (True, 0.5)
    """
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / (float(bottom) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a number is written 0.03 or 8/255, got {text!r}.") from None


def optimizer(text: str) -> recipe.OptimizerFactory:
    """Read ``adam:lr=0.003``: any optimizer of ``torch.optim``, its name in lower case."""
    return _partial(text, OPTIMIZERS, "optimizer")


def schedule(text: str) -> recipe.Schedule:
    """Read ``one_cycle`` or ``halving:every=10``."""
    return _partial(text, SCHEDULES, "schedule")


def precision(text: str) -> torch.dtype | None:
    """Read ``none``, ``bfloat16`` or ``float16``."""
    return _look_up(text, _PRECISIONS, "precision")


def example_input(text: str) -> torch.Tensor:
    """Read ``2,3,32,32`` (uniform random values) or ``2,16:int64`` (zeros) as an input of that shape.

    Example:
        >>> example_input("2,5:int64").shape
        torch.Size([2, 5])
    """
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype) or not all(size.strip().isdigit() for size in sizes.split(",")):
        raise ValueError(f"an input shape is written 2,3,32,32 or 2,16:int64, got {text!r}.")
    shape = [int(size) for size in sizes.split(",")]
    return torch.rand(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def outputs(texts: Sequence[str] | None) -> Any:
    """Read ``logits``, ``0`` or ``package.module:function``, or several of the first two.

    Example:
        >>> outputs(["logits", "1"])
        ('logits', 1)
    """
    found = [int(text) if text.isdigit() else imported(text) if ":" in text else text for text in texts or ()]
    if any(map(callable, found)) and len(found) > 1:
        raise ValueError(f"outputs are names, or one function of all that the model returns, got {', '.join(texts)}.")
    return found[0] if len(found) == 1 else tuple(found) or None


def settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; values are Python literals or else strings. None is no pair.

    Example:
        >>> settings(["hidden=128,64", "width=0.5", "name=wide"])
        {'hidden': (128, 64), 'width': 0.5, 'name': 'wide'}
    """
    result = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"an argument is written KEY=VALUE, got {pair!r}.")
        result[key] = _literal(value)
    return result


def make_data(name: str, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """Call a factory ``package.module:function`` that returns the loaders to train and to measure on."""
    factory = imported(name)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        takes = _takes("--data-arg", inspect.signature(factory).parameters)
        raise OptionError(f"data {name!r} cannot be made: {error}. {takes}") from None
    loaders = _called(name, factory, arguments)
    if not isinstance(loaders, (tuple, list)) or len(loaders) != 2:
        got = f"{len(loaders)} values" if isinstance(loaders, (tuple, list)) else type(loaders).__name__
        raise ValueError(f"{name} must return two loaders, to train and to measure on, got {got}.")
    return loaders[0], loaders[1]


def _called(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a factory; what one of the user's own raises is told with its name."""
    if ":" not in name:
        return factory(**arguments)
    try:
        return factory(**arguments)
    except Exception as error:
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error


def enter_factory(path: Path) -> tuple[str, dict[str, Any]] | None:
    """Let a file be read whose model a factory of the user's own made, by the name that it holds.

    Returns:
        Name and arguments of the factory, of the user's own or of the zoo; None if the file says none.

    Raises:
        ValueError: If what the file names cannot be imported, or does not say of itself that it makes models.
    """
    try:
        described = (files.description(path) or {}).get("model")
    except ValueError:
        return None  # whoever reads the file says what is wrong with it
    match described:
        case [str(name), dict(arguments)]:
            pass
        case _:
            return None
    if ":" not in name or registry.is_known(name):
        return name, arguments
    module = name.partition(":")[0]
    found = None if module.partition(".")[0] in sys.stdlib_module_names else imported(name)
    if not says_that_it_makes_models(found):
        raise ValueError(
            f"{str(path)!r} says that {name} made its model, which is neither a torch.nn.Module nor a function "
            f"annotated to return one, so it is not called. Say it yourself, --model {name}, or annotate it, "
            f"def {name.partition(':')[2]}(...) -> torch.nn.Module."
        )
    registry.enter(name, found)
    return name, arguments


def says_that_it_makes_models(found: Any) -> bool:
    """Whether something is a class of modules, or annotated to return one: files alone may have it called then."""
    result = (
        found if inspect.isclass(found) else getattr(found, "__annotations__", {}) and hints_of(found).get("return")
    )
    return inspect.isclass(result) and issubclass(result, nn.Module)


def make_model(name: str, arguments: Mapping[str, Any], train: Any, *, seed: int = 0) -> nn.Module:
    """Build a model of the zoo, or of a factory ``package.module:function``.

    Args:
        name: Which.
        arguments: For its factory; they come before what the data says.
        train: Data from which classes, channels, image size, number of inputs, mean and standard deviation are taken,
            as far as the factory has arguments of these names.
        seed: Of the initial weights.
    """
    zoo = {known: getattr(models, known) for known in models.names()}
    factory = imported(name) if ":" in name else _look_up(name, zoo, "model")
    known = inspect.signature(factory).parameters
    facts = {key: value for key, value in _facts(train).items() if key in known}
    seeds = {"seed": seed} if "seed" in known else {}
    try:
        inspect.signature(factory).bind(**{**facts, **seeds, **arguments})
    except TypeError as error:
        raise OptionError(f"model {name!r} cannot be made: {error}. {_takes('--model-arg', known)}") from None
    _check_lists(factory, arguments)
    with seeded(seed):
        model = _called(name, factory, {**facts, **seeds, **arguments})
    if ":" in name:
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} must return a torch.nn.Module, got {type(model).__name__}.")
        registry.remember(model, name, {**facts, **arguments})
    return model


def _takes(option: str, known: Mapping[str, inspect.Parameter]) -> str:
    """Say which arguments a factory has."""
    names = [name for name, one in known.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return f"{option} KEY=VALUE sets {', '.join(names)}." if names else f"It takes nothing: leave out {option}."


def _check_lists(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError where one value was given in place of a list, and say how a list of one is written."""
    hints = hints_of(inspect.unwrap(factory))
    for name, value in arguments.items():
        if typing.get_origin(hints.get(name)) in (Sequence, list, tuple) and isinstance(value, (int, float, str)):
            raise ValueError(
                f"{name} is a list, got {name}={value}: write '{name}={value},' with a comma for one value, "
                f"'{name}={value},{value}' for two."
            )


def _facts(train: Any) -> dict[str, Any]:
    """Return what data says of a model, under the names that the zoo's factories use; nothing of foreign loaders."""
    if not isinstance(train, TensorLoader):
        return {}
    shape = train.input_shape
    is_image = len(shape) == 3
    return {
        "num_classes": train.num_classes,
        "num_inputs": math.prod(shape),
        "mean": train.mean(),
        "std": train.std() + (0 if is_image else _NO_VARIATION),
        **({"in_channels": shape[0], "image_size": shape[-1]} if is_image else {}),
    }


def imported(path: str) -> Any:
    """Import ``package.module:name`` or ``package.module``, also from the current folder, as ``python -m`` would."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = _module(module)
        return getattr(found, name) if name else found
    except Exception as error:  # what a module raises while it is imported may be of any type
        raise ValueError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error


def _module(name: str) -> Any:
    """Import a module, or one that its package merely offers, as modeconn offers ``modeconn.metrics``."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package, _, last = name.rpartition(".")
        if not package or error.name != name:
            raise
        found = getattr(importlib.import_module(package), last, None)
        if not inspect.ismodule(found):
            raise
        return found


def _call(text: str, choices: Mapping[str, Callable[..., Any]], what: str, **readers: Callable[[Any], Any]) -> Any:
    """Read ``name``, ``name:value`` or ``name:key=value,...`` and make the object; ``readers`` read named values."""
    name, _, rest = text.partition(":")
    parts = rest.split(",") if rest else []
    positional = [_literal(part) for part in parts if "=" not in part]
    given = settings([part for part in parts if "=" in part])
    named = {key: readers[key](value) if key in readers else value for key, value in given.items()}
    make = _look_up(name, choices, what)
    signature = inspect.signature(make)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "nothing"
        raise OptionError(f"{what} {text!r}: {error}; {name} takes {known}.") from None
    return make(*positional, **named)


def _partial(text: str, choices: Mapping[str, Callable[..., Any]], what: str) -> Callable[..., Any]:
    """Read ``name`` or ``name:key=value,...``: a function with some of its arguments set."""
    name, _, rest = text.partition(":")
    function, named = _look_up(name, choices, what), settings(rest.split(",") if rest else [])
    settable = [one.name for one in inspect.signature(function).parameters.values() if one.default is not one.empty]
    unknown = named.keys() - set(settable)
    if unknown:
        raise OptionError(f"{what} {name!r} has no argument {min(unknown)!r}; it has {', '.join(settable) or 'none'}.")
    return partial(function, **named) if named else function


def _look_up(name: str, choices: Mapping[str, Any], what: str) -> Any:
    if name not in choices:
        raise ValueError(f"there is no {what} {name!r}; {there_are(sorted(choices))}.")
    return choices[name]


_WORDS = {"true": True, "false": False, "none": None, "inf": math.inf}


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
