"""What networks along a curve say to every example, and what they say together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.measure.plane_points import OwnExamples
from modeconn.measure.profile import Networks
from modeconn.network.attack import Attack
from modeconn.network.batches import inputs_and_targets, run
from modeconn.network.scores import IGNORED, is_integer
from modeconn.tools import provenance
from modeconn.tools.door import looked_at, shortened
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import reseed
from modeconn.tools.shown import Shown
from modeconn.tools.writing import write_arrays

_MADE_BY = provenance.ATTRIBUTE


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Shown):
    """Probabilities of classes, of networks along a curve, for the same examples.

    Args:
        t: Positions, rising, float64 ``(N,)``; this and all others on the CPU.
        probabilities: Of each class, by the softmax of the outputs, float32 ``(N, M, C)``.
        targets: Classes of the examples, int64 ``(M,)``; -100 for examples that do not count.
        statistics: Which statistics of norm layers networks had; empty for networks that have none.
        attack: What the examples were attacked by, each network's own; empty for clean ones.

    Raises:
        ValueError: If shapes do not belong together, there is nothing, positions do not rise, or targets are no
            classes.
    """

    t: Tensor
    probabilities: Tensor
    targets: Tensor
    statistics: str = ""
    attack: str = ""

    made_by: Mapping[str, Any] | None = field(default=None, init=False)
    """How it came about: call or command, versions, data."""

    @looked_at
    def __post_init__(self) -> None:
        shape = tuple(self.probabilities.shape)
        if len(shape) != 3 or shape[:2] != (len(self.t), len(self.targets)):
            raise ValueError(
                f"probabilities must have the shape (positions, examples, classes), with {len(self.t)} positions and "
                f"{len(self.targets)} examples, got {shape}."
            )
        if not min(shape) or not bool((self.t.diff() > 0).all() and self.t.isfinite().all()):
            raise ValueError(
                f"t must hold rising positions, and there must be examples, got t={self.t.tolist()!r:.80}."
            )
        outside = (self.targets != IGNORED) & ((self.targets < 0) | (self.targets >= shape[2]))
        if not is_integer(self.targets) or bool(outside.any()) or shape[2] < 2:
            raise ValueError(
                f"targets must be classes from 0 to {shape[2] - 1}, of two or more, got "
                f"{shortened(self.targets[outside][:5].tolist() or self.targets.dtype)} for {shape[2]} classes."
            )

    @property
    def accuracy(self) -> Tensor:
        """Fraction of right answers of each network, float64 ``(N,)``; NaN for one whose outputs are not all finite."""
        return self._right(self.probabilities)

    @property
    def ensemble_accuracy(self) -> Tensor:
        """Fraction of right answers of the mean of the first networks, one more each time, float64 ``(N,)``."""
        return self._right(self.probabilities.double().cumsum(0))

    def _right(self, scores: Tensor) -> Tensor:
        counts = self.targets != IGNORED
        right = (scores[:, counts].argmax(2) == self.targets[counts]).double().mean(1)
        return torch.where(scores.isfinite().all(2).all(1), right, torch.nan)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an ``.npz`` file, all or nothing, which `load` and `numpy.load` read."""
        tensors = {"t": self.t, "probabilities": self.probabilities, "targets": self.targets}
        texts = {"statistics": self.statistics, "attack": self.attack, _MADE_BY: json.dumps(provenance.of(self))}
        write_arrays({**tensors, **texts}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another file, or damaged.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                tensors = {name: torch.from_numpy(file[name]) for name in ("t", "probabilities", "targets")}
                texts = {name: str(file[name]) for name in ("statistics", "attack")}
                made_by = json.loads(str(file[_MADE_BY]))
        except FileNotFoundError:
            raise
        except Exception as error:  # of zip, of numpy: whatever a file that is something else leads to
            raise ValueError(f"{str(path)!r} holds no predictions ({shortened(error, 100)}).") from None
        found = cls(**tensors, **texts)
        provenance.keep(found, made_by)
        return found

    def _facts(self) -> dict[str, str]:
        networks, examples, classes = self.probabilities.shape
        found = {
            "networks": f"{networks}, t={self.t[0]:g} to {self.t[-1]:g}",
            "examples": f"{examples:,}, of {classes} classes",
            "accuracy": f"{self.accuracy.min():.2%} to {self.accuracy.max():.2%}",
            "together": f"{self.ensemble_accuracy[-1]:.2%}",
        }
        return found | {name: text for name in ("attack", "statistics") if (text := getattr(self, name))}

    def __repr__(self) -> str:
        return f"Predictions({'; '.join(f'{name} {text}' for name, text in self._facts().items())})"


def predictions_along(
    networks: Networks,
    t: Sequence[float],
    data: Iterable[Any],
    attack: Attack | None,
    *,
    seed: int,
    device: torch.device,
    progress: bool,
) -> Predictions:
    """Return what networks at the positions ``t`` say; processes share them.

    Args:
        networks: The networks.
        t: In [0, 1], rising.
        data: Batches on their device.
        attack: What attacks the examples, None for nothing.
        seed: Of the attack.
        device: Where random numbers are drawn, within a stretch of `modeconn.tools.rng.seeded`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If outputs are no scores of classes, or targets no classes.
    """
    own = None if attack is None else OwnExamples(data, attack, seed)
    them = joined()

    def mine() -> list[tuple[Tensor, Tensor]]:
        found = []
        for position in progress_bar(them.mine(list(t)), show=progress, desc="predict"):
            reseed(0, device)
            model = networks(position)
            if own is not None:
                own.model = model
            found.append(_said(model, data if own is None else own))
        return found

    said = them.in_order(them.each(mine))
    return Predictions(
        torch.tensor(t, dtype=torch.float64, device="cpu"),
        torch.stack([probabilities for probabilities, _ in said]),
        said[0][1],
        networks.statistics,
        "" if attack is None else provenance.text_of(attack),
    )


@torch.no_grad()
def _said(model: nn.Module, data: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return probabilities ``(M, C)`` and targets ``(M,)``."""
    parts = []
    for batch in data:
        inputs, targets = inputs_and_targets(batch)
        outputs = run(model, inputs)
        if not (isinstance(outputs, Tensor) and outputs.ndim == 2 and is_integer(targets) and targets.ndim == 1):
            raise ValueError(
                f"predictions are of classifiers: outputs must have the shape (examples, classes) and targets be whole "
                f"numbers, one for each example, got {_kind(outputs)} and {_kind(targets)}."
            )
        parts.append((outputs.double().softmax(1).float().cpu(), targets.long().cpu()))
    probabilities, targets = (torch.cat(some) for some in zip(*parts, strict=True))
    return probabilities, targets


def _kind(value: Any) -> str:
    return f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
