"""Attacks by name, as the command line and tables write them."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any, Literal

from modeconn.attacks.pgd import PGD, check_radius
from modeconn.attacks.torch_attacks import TorchAttack, autoattack, is_number, torch_norm
from modeconn.network.attack import Attack
from modeconn.tools.door import checked

_PREFIX = "torchattacks:"
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@checked
def build(
    text: str, *, eps: float | None = None, norm: Literal["linf", "l2"] | None = None, seed: int | None = None
) -> Attack:
    """Make an attack from its name.

    "pgd20" is `PGD` with 20 steps of eps / 4, and so for any other number; "apgd" APGD on cross entropy with 100 steps,
    "square" Square with 5,000 queries; "autoattack" the reference version, see `autoattack`; "autoattack-10" the bundle
    of torchattacks, which makes 10 steps. Any class of torchattacks is written with its own arguments,
    "torchattacks:FAB(eps=8/255, steps=50, norm='Linf')".

    All but PGD need torchattacks (the extra ``attacks``, or ``pip install --no-deps torchattacks``). Square makes up to
    5,000 queries for each example where "pgd20" takes 20 steps, and so costs far more: measure few examples first.

    Args:
        text: The name.
        eps: Radius of the ball, where ``text`` does not say it; default 8/255.
        norm: "linf" (the default but for attacks in "l2" alone) or "l2", where ``text`` does not say it.
        seed: Of its random numbers, where ``text`` does not say it; None draws from torch's global generator.

    Raises:
        ModuleNotFoundError: If the attack needs torchattacks, which is not installed.
        ValueError: If the text cannot be read, there is no such attack or argument, or it cannot take the norm.

    Example:
        >>> build("pgd20", eps=8 / 255)
        PGD(eps=8/255, step_size=2/255, num_steps=20)
    """
    if text.startswith(_PREFIX):
        return _from_torchattacks(text, eps, norm, seed)
    radius, norm = 8 / 255 if eps is None else eps, norm or "linf"
    check_radius(radius)
    if steps := re.fullmatch(r"pgd(\d+)", text):
        return PGD(radius, radius / 4, int(steps[1]) if radius else 0, norm=norm, seed=seed)
    if text == "autoattack":
        return autoattack(radius, norm=norm, seed=seed)
    if text not in _SHORT:
        raise ValueError(
            f"there is no attack {text!r}; there are pgd20 (or any other number of steps), autoattack, "
            f"{', '.join(_SHORT)}, and {_PREFIX}NAME(ARGUMENT=VALUE, ...)."
        )
    name, arguments = _SHORT[text]
    return TorchAttack(name, {"norm": torch_norm(norm), "eps": radius, **arguments}, seed)


_SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd": ("APGD", {"steps": 100}),
    "square": ("Square", {"n_queries": 5000}),
    "autoattack-10": ("AutoAttack", {}),
}


def _from_torchattacks(text: str, eps: float | None, norm: str | None, seed: int | None) -> TorchAttack:
    """Read ``torchattacks:NAME(...)``; what it leaves open is set where the attack has such an argument."""
    name, given = _parse(text.removeprefix(_PREFIX), text)
    seed = given.pop("seed", seed)
    known = TorchAttack(name).settings
    if eps is not None:
        given |= {key: eps for key in ("eps", "max_epsilon") if key in known and key not in given}
    if norm is not None and "norm" in known and "norm" not in given:
        given["norm"] = torch_norm(norm)
    attack = TorchAttack(name, given, seed)
    if norm is not None and "norm" not in given and attack.eps is not None and attack.norm != norm:
        raise ValueError(
            f"{_PREFIX}{name} knows no ball but that of norm {attack.norm!r}, got norm={norm!r}. Leave the norm out, "
            f"or write pgd20, apgd or an attack of torchattacks in that norm."
        )
    return attack


def _parse(call: str, text: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME`` or ``NAME(key=value, ...)`` without running any of it."""
    try:
        node = ast.parse(call.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        node = None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(f"an attack is written {_PREFIX}PGD(eps=8/255, steps=20), got {text!r}.")
    names = [_keyword(word, text) for word in node.keywords]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice in {text!r}.")
    return node.func.id, {name: _value(word.value, text) for name, word in zip(names, node.keywords, strict=True)}


def _keyword(word: ast.keyword, text: str) -> str:
    if word.arg is None:
        raise ValueError(f"arguments are written NAME=VALUE, got ** in {text!r}.")
    return word.arg


def _value(node: ast.expr, text: str) -> Any:
    """Return a literal, or what fractions and sums of numbers are."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _value(node.left, text), _value(node.right, text)
        if not (is_number(left) and is_number(right)) or (right == 0 and isinstance(node.op, ast.Div)):
            raise ValueError(f"{ast.unparse(node)} is no number, in {text!r}.")
        return _ARITHMETIC[type(node.op)](left, right)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(
            f"values are numbers, fractions or strings in quotes, got {ast.unparse(node)} in {text!r}."
        ) from None
