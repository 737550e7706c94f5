"""The run that test_resume kills: ``python -m tests.learning.resume_worker CHECKPOINT {batch,write,rename} N``."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from modeconn.connection import Connection
from modeconn.curves import Bezier
from modeconn.curves.step import CurveStep
from modeconn.data import Flip, TensorLoader
from modeconn.fit import fit_curve
from modeconn.learning.checkpoint import Checkpoint
from modeconn.network.recipe import Recipe, one_cycle
from tests.cases import CASE, batches


def loader(*, augment: bool = True) -> TensorLoader:
    """Shuffled and augmented, eight batches an epoch."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(8, 12), strict=True))
    return TensorLoader(inputs, targets, batch_size=12, shuffle=True, augment=(Flip(),) if augment else ())


RECIPE = Recipe(epochs=3, optimizer=partial(torch.optim.Adam, lr=0.01), schedule=one_cycle)


def fit(checkpoint: Path | Checkpoint | None = None, data=None, **changes) -> Connection:
    """Fit a curve of networks with dropout and batch norm, three epochs of eight batches."""
    settings = {"align": False, "curve": Bezier(3), "recipe": RECIPE, "seed": 11, **changes}
    a, b = (CASE["batch_norm"].make(seed) for seed in (0, 1))
    return fit_curve(a, b, loader() if data is None else data, checkpoint=checkpoint, **settings)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, action, function):
    """Return ``function``, which calls ``action`` in place of its ``count``-th call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(None)
        return action() if len(calls) == count else function(*args, **kwargs)

    return counted


def main(path: str, where: str, count: str) -> None:

    if where == "batch":
        CurveStep.__call__ = after(int(count), die, CurveStep.__call__)
        fit(Checkpoint(path, every_batches=3))
    elif where == "write":  # half of the file is there
        os.fsync = after(int(count), die, os.fsync)
        fit(Checkpoint(path, every_batches=3))
    else:  # all of it, but under its temporary name
        os.replace = after(int(count), die, os.replace)
        fit(Checkpoint(path, every_batches=3))


if __name__ == "__main__":
    main(*sys.argv[1:])
