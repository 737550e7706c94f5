"""What several commands read in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import modeconn
from modeconn import Connection
from modeconn.cli import parse
from modeconn.cli.options import DataOptions
from modeconn.network.batches import in_order


def read_connection(path: Path, template: nn.Module | None, curve_class: str | None, device: str) -> Connection:
    """Read a connection, whose curve may be of a class of the user's own, and its model of a factory of theirs."""
    kind = None if curve_class is None else parse.imported(curve_class)
    if template is None:
        parse.enter_factory(path)
    return Connection.load(path, template, curve=kind, device=device)


def training_and_measured(data: DataOptions, on: str) -> tuple[Any, Any]:
    """Return the training loader, and the loader of what is to be measured on: "train" or "test"."""
    if on not in ("train", "test"):
        raise ValueError(f"--on must be train or test, got {on!r}.")
    train_loader, test_loader = data.load()
    return train_loader, in_order(train_loader) if on == "train" else test_loader


def attack_named(name: str | None, eps: str, norm: str | None) -> Any:
    """Return the attack that options name, None for none."""
    if name is None:
        return None
    return modeconn.attacks.build(name, eps=parse.number(eps), norm=None if norm is None else parse.norm(norm))
