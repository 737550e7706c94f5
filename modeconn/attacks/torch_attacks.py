"""Attacks of the package torchattacks, by name, and the reference ensemble AutoAttack composed from them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.network.attack import Attack, under_attack
from modeconn.network.loss import main_output
from modeconn.tools.rng import seeded

_RADII = ("eps", "max_epsilon")
_STEP_SIZES = ("alpha", "lr")
_REAL = ("c", "kappa", "lam", "nsig", "scale")  # Their defaults are integers, but other numbers are allowed.
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", tuple: "a pair"}
_BLACK_BOXES = ("GN", "OnePixel", "Pixle", "SPSA", "Square")  # These attacks read outputs, never gradients.
_FEWEST_CLASSES = 4  # the loss of its targeted attack divides by a difference among the four largest logits


@dataclass(frozen=True, repr=False)
class TorchAttack:
    """An attack of the package torchattacks (Kim, 2020), as ``attack(model, x, y) -> x_adv``.

    Its ``repr`` is the text that `modeconn.attacks.build` reads. The network is attacked in the mode it is in, its
    parameters receive no gradient, and global random states stay, though many of these attacks reseed them. Inputs
    that are no square images, which some of these attacks take alone, are written row by row into such images, filled
    up by zeros that the network does not see.

    Attacks that stop at the first wrong answer (APGD, FAB, Square, ...) return all other inputs as they were.

    Args:
        name: The class: "PGD", "APGD", "Square", "FAB", "CW", ...
        arguments: Of its constructor. Where it has ``n_classes``, the default is 10 or, if the network has fewer
            classes, that number; where it has ``seed``, that is drawn.
        seed: Of all its random numbers; each call then begins alike. None draws from torch's global generator.

    Raises:
        ModuleNotFoundError: If torchattacks is not installed.
        ValueError: If there is no such attack or argument, or a value is impossible; when called, if the network has
            too few classes, or torchattacks fails.

    References:
        Kim, 2020, https://arxiv.org/abs/2010.01950
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        known = _classes()
        if self.name not in known:
            raise ValueError(f"torchattacks has no attack {self.name!r}; it has {', '.join(known)}.")
        names = list(_defaults(self.name))
        for argument in self.arguments:
            if argument not in names:
                raise ValueError(
                    f"torchattacks:{self.name} has no argument {argument!r}; it has {', '.join(names) or 'none'}."
                )
        self._check_values()

    def _check_values(self) -> None:
        """Raise unless every value is of the kind of its default, and in a range in which there is an attack."""
        given = dict(self.arguments) if self.seed is None else {**self.arguments, "seed": self.seed}
        for name, value in given.items():
            default = 0 if name == "seed" else _defaults(self.name)[name]
            is_whole = type(default) is int and name not in _REAL
            kind = int if is_whole else float if is_number(default) else type(default)
            if not _is_of(kind, value):
                raise ValueError(f"{name} must be {_KINDS[kind]}, got {name}={value!r} for {self!r}.")
            if name in _RADII and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more, got {name}={value} for {self!r}.")
            if ((is_whole and name != "seed") or name in _STEP_SIZES) and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {name}={value} for {self!r}.")

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments, those that were not given at their defaults; without seed and verbosity."""
        settings = {**_defaults(self.name), **self.arguments}
        return {name: value for name, value in settings.items() if name not in ("seed", "verbose")}

    @property
    def eps(self) -> float | None:
        """The radius of the ball that examples stay in; None for an attack that only tries to stay near."""
        settings = self.settings
        return next((settings[name] for name in _RADII if name in settings), None)

    @property
    def norm(self) -> str:
        """The norm of that ball: "linf", "l2" or "l1"."""
        default = "L2" if self.name.endswith("L2") else "Linf"
        return str(self.settings.get("norm", default)).lower()

    @property
    def black_box(self) -> bool | None:
        """Whether it sees only what the network answers; None for a bundle, of which a part does."""
        return None if self.name == "AutoAttack" else self.name in _BLACK_BOXES

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial examples, see `PGD.__call__`."""
        if self.eps == 0 or not len(x):
            return x
        seen = _AsImages(model, x)
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        with seeded(seed, x.device), under_attack(model):
            images = seen.images(x)
            arguments = self._arguments(seen, images)
            try:
                return seen.inputs(_classes()[self.name](seen, **arguments)(images, y).detach())
            except torch.OutOfMemoryError:
                raise
            # torchattacks rarely validates its arguments, so any exception may mean a wrong one.
            except Exception as error:
                raise ValueError(f"{self!r} failed with {type(error).__name__}: {error}") from error

    def _arguments(self, seen: nn.Module, images: Tensor) -> dict[str, Any]:
        """Return the given arguments, and those that depend on the network and the random state."""
        defaults, filled = _defaults(self.name), dict(self.arguments)
        if "seed" in defaults and "seed" not in filled:
            filled["seed"] = int(torch.randint(2**31, ()))
        if "n_classes" in defaults:
            with torch.no_grad():
                # The whole batch, because batch norm in train mode refuses a single example.
                num_classes = seen(images).shape[1]
            filled.setdefault("n_classes", min(defaults["n_classes"], num_classes))
            self._check_classes(filled["n_classes"], num_classes)
        return filled

    def _check_classes(self, asked: int, num_classes: int) -> None:
        fewest = _FEWEST_CLASSES if self.name in ("APGDT", "AutoAttack") else 2
        if num_classes < fewest:
            raise ValueError(_too_few(repr(self), fewest, num_classes))
        if not 2 <= asked <= num_classes:
            raise ValueError(
                f"n_classes must lie in 2..{num_classes}, the classes of the network, got n_classes={asked} "
                f"for {self!r}."
            )

    def __repr__(self) -> str:
        given = dict(self.arguments) if self.seed is None else {**self.arguments, "seed": self.seed}
        return f"torchattacks:{self.name}({', '.join(f'{name}={_show(name, value)}' for name, value in given.items())})"


@dataclass(frozen=True, repr=False)
class Cascade:
    """Attacks one after the other, each on the examples that none before it has broken.

    Examples that none breaks stay as they were.

    Args:
        attacks: The cheapest first.
        fewest_classes: What the network must tell apart at least, for all of them to be defined.
        text: Its ``repr``, where a shorter one says it all.

    Raises:
        ValueError: If there is no attack; when called, if the network has too few classes.
    """

    attacks: tuple[Attack, ...]
    fewest_classes: int = 2
    text: str | None = None

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("attacks is empty: a cascade needs at least one attack.")

    @property
    def eps(self) -> float | None:
        """The radius of the smallest ball around all its examples; None if an attack has none."""
        radii: list[Any] = [getattr(attack, "eps", None) for attack in self.attacks]
        return None if None in radii or self.norm is None else max(radii)

    @property
    def norm(self) -> str | None:
        """The norm of the attacks, None if they have several."""
        norms = {getattr(attack, "norm", None) for attack in self.attacks}
        return norms.pop() if len(norms) == 1 else None

    @property
    def black_box(self) -> bool | None:
        """Whether its attacks see only what the network answers; None if some do and some see gradients."""
        kinds = {getattr(attack, "black_box", False) for attack in self.attacks}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of all attacks, each under ``number.name``."""
        parts = [getattr(attack, "settings", {"attack": repr(attack)}) for attack in self.attacks]
        return {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part.items()}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial examples, see `PGD.__call__`."""
        with under_attack(model):
            return self._attack(model, x, y)

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv, (unbroken, num_classes) = x.clone(), self._right(model, x, y)
        if num_classes < self.fewest_classes:
            raise ValueError(_too_few(repr(self), self.fewest_classes, num_classes))
        for attack in self.attacks:
            left = unbroken.nonzero().flatten()
            if not len(left):
                break
            found = attack(model, x[left], y[left])
            wrong = ~self._right(model, found, y[left])[0]
            x_adv[left[wrong]] = found[wrong]
            unbroken[left[wrong]] = False
        return x_adv

    def __repr__(self) -> str:
        return self.text or f"Cascade({', '.join(map(repr, self.attacks))})"

    @torch.no_grad()
    def _right(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        outputs = main_output(model(x))
        return outputs.argmax(1) == y, outputs.shape[1]


def autoattack(eps: float, *, norm: str = "linf", seed: int | None = None) -> Cascade:
    """Return the standard version of AutoAttack (Croce & Hein, 2020), with the settings of its reference.

    APGD on cross entropy with 100 steps, targeted APGD with 100 steps for each of 9 targets, targeted FAB with as many,
    and Square with 5,000 queries, each on the examples still unbroken. Networks of fewer than 10 classes have fewer
    targets. The bundle that torchattacks calls AutoAttack makes 10 steps where this makes 100. In l2, targeted APGD of
    torchattacks moves every example by the step size of the first.

    Args:
        eps: Radius of the ball, in units of the pixel range.
        norm: "linf" or "l2".
        seed: Of all its random numbers; each call then begins alike.

    Raises:
        ModuleNotFoundError: If torchattacks is not installed.
        ValueError: If eps or norm is impossible; when called, for a network of fewer than 4 classes.

    References:
        Croce & Hein, 2020, https://arxiv.org/abs/2003.01690
    """
    ball = {"norm": torch_norm(norm), "eps": eps}
    parts: dict[str, dict[str, Any]] = {
        "APGD": {"steps": 100, "n_restarts": 1, "loss": "ce", "rho": 0.75},
        "APGDT": {"steps": 100, "n_restarts": 1, "rho": 0.75},
        "FAB": {"steps": 100, "n_restarts": 1, "multi_targeted": True},
        "Square": {"n_queries": 5000, "n_restarts": 1, "p_init": 0.8},
    }
    attacks = tuple(TorchAttack(name, {**ball, **arguments}, seed) for name, arguments in parts.items())
    given = {"eps": eps, "norm": norm, **({} if seed is None else {"seed": seed})}
    text = f"autoattack({', '.join(f'{name}={_show(name, value)}' for name, value in given.items())})"
    return Cascade(attacks, _FEWEST_CLASSES, text)


def torch_norm(norm: str) -> str:
    """Return what torchattacks calls a norm."""
    names = {"linf": "Linf", "l2": "L2"}
    if norm not in names:
        raise ValueError(f"norm must be 'linf' or 'l2', got norm={norm!r}.")
    return names[norm]


class _AsImages(nn.Module):
    """A network of any inputs as one of square images ``(N, C, S, S)``, in float32 as all of torchattacks is.

    `train` and `eval`, which torchattacks calls, do nothing, so no flag of the network moves.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._shape, self._dtype = x.shape[1:], x.dtype
        self._channels = x.shape[1] if x.dim() == 4 else 1
        self._length = x[0].numel() // self._channels
        self._side = math.isqrt(self._length - 1) + 1  # round up to a whole side

    def train(self, mode: bool = True) -> _AsImages:
        return self

    def forward(self, images: Tensor) -> Tensor:
        return main_output(self.model(self.inputs(images))).float()

    def images(self, x: Tensor) -> Tensor:
        """Return inputs as images."""
        rows = x.float().reshape(len(x), self._channels, self._length)
        return F.pad(rows, (0, self._side**2 - self._length)).unflatten(2, (self._side, self._side))

    def inputs(self, images: Tensor) -> Tensor:
        """Invert `images`."""
        return images.flatten(2)[:, :, : self._length].reshape(-1, *self._shape).to(self._dtype)


def _classes() -> dict[str, Any]:
    """Return the attacks of torchattacks by name; its wrappers of several networks or attacks are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about torchattacks' own source code, which the user cannot mend
            import torchattacks
    except ModuleNotFoundError as error:
        if error.name != "torchattacks":
            raise
        raise ModuleNotFoundError(
            "this attack needs the package torchattacks, which is not installed: pip install --no-deps torchattacks",
            name="torchattacks",
        ) from None
    every = {name: value for name, value in sorted(vars(torchattacks).items()) if inspect.isclass(value)}
    return {name: value for name, value in every.items() if value.__module__.startswith("torchattacks.attacks.")}


def _defaults(name: str) -> dict[str, Any]:
    """Return the arguments of an attack, with their defaults."""
    parameters = inspect.signature(_classes()[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "model"}


def _too_few(attack: str, fewest: int, num_classes: int) -> str:
    return f"{attack} compares {fewest} classes, but the network has {num_classes}. Use pgd100 or apgd and square."


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_of(kind: type, value: Any) -> bool:
    """Whether a value is one of ``_KINDS``; whole numbers are numbers too, and so are those of numpy."""
    if kind in (int, float):
        return is_number(value) and (kind is float or isinstance(value, Integral))
    return isinstance(value, kind)


def _show(name: str, value: Any) -> str:
    """Write radii and steps in units of 1/255 where they are whole."""
    is_whole = name in (*_RADII, "alpha") and is_number(value) and 0 < value <= 1 and round(value * 255) / 255 == value
    return f"{round(value * 255)}/255" if is_whole else repr(value)
