"""Which factory made a model, so that files can say how to build it again; `modeconn.models` enters its factories."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.tools.door import check, check_arguments, hints_of, shortened
from modeconn.tools.files import NeedsModelError
from modeconn.tools.rng import seeded

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)

_TENSORS = ("mean", "std")  # what the command line takes from data, as tensors
_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


def factory(make: Callable[P, M]) -> Callable[P, M]:
    """Enter a function that makes a model into the zoo, under its own name.

    The decorated function checks its arguments, initialises the model with its argument ``seed`` and leaves the global
    random state as it was; the model remembers its name and its other arguments, for `describe`.
    """
    signature = inspect.signature(make)
    counts = [name for name, hint in hints_of(make).items() if hint in (int, Sequence[int]) and name != "seed"]

    @functools.wraps(make)
    def make_seeded(*args: P.args, **kwargs: P.kwargs) -> M:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check_arguments(make, bound)
        for name in counts:
            _check_counts(name, bound.arguments[name])
        arguments = {name: _json_value(value) for name, value in bound.arguments.items() if name != "seed"}
        with seeded(bound.arguments["seed"], torch.get_default_device()):
            model = make(*bound.args, **bound.kwargs)
        model.zoo_entry = (make.__name__, arguments)
        return model

    _FACTORIES[make.__name__] = make_seeded
    return make_seeded


def enter(name: str, make: Callable[..., nn.Module]) -> None:
    """Let files be read whose model ``make`` made, which they know as ``name``, such as "package.module:factory"."""

    def made(**arguments: Any) -> nn.Module:
        tensors = {key: torch.tensor(value) for key, value in arguments.items() if key in _TENSORS}
        model = make(**arguments | tensors)
        remember(model, name, arguments)
        return model

    _FACTORIES[name] = made


def is_known(name: str) -> bool:
    """Whether `build` knows a name."""
    return name in _FACTORIES


def remember(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    """Let a model know which factory of the user's own made it, if its arguments go through JSON."""
    plain = {key: _json_value(value) for key, value in arguments.items()}
    with contextlib.suppress(TypeError, ValueError):
        if json.loads(json.dumps(plain)) == plain:
            model.zoo_entry = (name, plain)


def _check_counts(name: str, given: int | Sequence[int]) -> None:
    """Raise unless a number of channels, classes or units is at least 1, and so each of several."""
    if any(count < 1 for count in ([given] if isinstance(given, Integral) else given)):
        raise ValueError(
            f"{name} must be at least 1{'' if isinstance(given, Integral) else ' each'}, got {name}={given}."
        )


def _json_value(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist() if not isinstance(value, np.longdouble) else float(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value


def names() -> tuple[str, ...]:
    """Return the names of all models of the zoo, sorted.

    Example:
        >>> from modeconn import models
        >>> "tinyten" in models.names()
        True
    """
    return tuple(sorted(name for name in _FACTORIES if ":" not in name))


def build(name: str, **arguments: Any) -> nn.Module:
    """Make the zoo's model ``name``: ``build("mlp", num_inputs=64, ...)`` is ``mlp(num_inputs=64, ...)``.

    Raises:
        ValueError: If the zoo has no model of that name, the model no such argument, or an argument makes no sense.
    """
    check("name", name, str)
    if name not in _FACTORIES and ":" in name:
        raise NeedsModelError(f"{name} made it, which files do not call. Pass template=, a model made by it.")
    if name not in _FACTORIES:
        raise ValueError(f"the zoo has no model {name!r}; it has {', '.join(names())}.")
    try:
        inspect.signature(_FACTORIES[name]).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} cannot be made from {arguments}: {shortened(error, 600)}.") from None
    return _FACTORIES[name](**arguments)


def rebuild(described: Any, tensors: Mapping[str, Tensor | Sequence[int]], dtype: torch.dtype) -> nn.Module:
    """Build a model again from what `describe` returned, once its tensors are known to have the shapes of a file's.

    Args:
        described: What `describe` returned.
        tensors: Tensors, or their shapes, by name: all that the model has, or its parameters alone.
        dtype: Of the model.

    Raises:
        ValueError: If they do not belong together; before memory is taken for the model.
    """
    name, arguments = described
    with torch.device("meta"):
        sketch = build(name, **arguments)
    mine = {name: tensor.shape for name, tensor in (*sketch.named_parameters(), *sketch.named_buffers())}
    theirs = {name: tuple(getattr(tensor, "shape", tensor)) for name, tensor in tensors.items()}
    parameters = {name for name, _ in sketch.named_parameters()}
    for wrong in (name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)):
        if wrong in theirs or wrong in parameters:
            sides = [tuple(shapes[wrong]) if wrong in shapes else "missing" for shapes in (theirs, mine)]
            raise ValueError(f"{wrong!r} is {sides[0]} in the file, {sides[1]} in {name}(...).")
    return build(name, **arguments).to(dtype)


def describe(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return name and arguments from which `build` makes the same architecture; None for a model not of the zoo.

    The seed is left out: two endpoints of one architecture have equal descriptions. The arguments are plain numbers,
    strings and lists, and go through JSON unchanged.

    Example:
        >>> from modeconn import models
        >>> name, arguments = models.describe(models.resnet20(100, width=2, seed=7))
        >>> name, arguments["num_classes"], arguments["width"]
        ('resnet20', 100, 2)
    """
    entry = getattr(model, "zoo_entry", None)
    return None if entry is None else (entry[0], dict(entry[1]))
