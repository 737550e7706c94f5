"""Loss and accuracy of networks on the same data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.batches import batches, inputs_and_targets, num_bytes, num_examples
from modeconn.network.loss import Forward, LossFn, check_targets, is_classification, main_output

_KEPT_BYTES = 1 << 30


def fetch(loader: Iterable[Any], device: torch.device, *, limit: int = _KEPT_BYTES) -> Iterable[Any]:
    """Read a loader once and keep its batches on ``device``, to be used for every point of a curve.

    More than ``limit`` bytes are not kept: the loader is then read anew for every point.
    """
    kept, size = [], 0
    for batch in batches(loader, device):
        kept.append(batch)
        size += num_bytes(batch)
        if size > limit:
            return _Reread(loader, device)
    return kept


@dataclass(frozen=True)
class _Reread:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Any:
        return batches(self.loader, self.device)


class Meter:
    """Measures networks on the same data: mean loss per example and, for class targets, accuracy.

    Results stay on the device until they are read, so that measuring many networks does not wait for each.

    Args:
        data: Batches on the device of the networks, from `fetch`.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, for batches that are no ``(inputs, targets)``; there is
            then no accuracy.
    """

    def __init__(self, data: Iterable[Any], loss_fn: LossFn, forward: Forward | None = None) -> None:
        self._data = data
        self._loss_fn = loss_fn
        self._forward = forward
        self._checked = False
        self._totals: list[Tensor] = []
        self.num_examples = 0

    @torch.no_grad()
    def measure(self, model: nn.Module) -> None:
        """Measure one network, in the mode it is in."""
        totals, self.num_examples = [], 0
        for batch in self._data:
            size = num_examples(batch)
            totals.append(self._batch_means(model, batch) * size)  # by size: the last batch may be a small one
            self.num_examples += size
        self._totals.append(torch.stack(totals).sum(0) / self.num_examples)
        self._checked = True

    def results(self) -> tuple[Tensor, Tensor | None]:
        """Return loss and accuracy, each float64 ``(M,)`` on the CPU, of all networks measured so far."""
        loss, accuracy = torch.stack(self._totals).cpu().unbind(1)
        return loss, None if accuracy.isnan().all() else accuracy

    def _batch_means(self, model: nn.Module, batch: Any) -> Tensor:
        if self._forward is not None:
            loss = self._forward(model, batch).double()
            return torch.stack([loss, torch.full_like(loss, torch.nan)])
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        if not self._checked:
            check_targets(outputs, targets, self._loss_fn)
        loss = self._loss_fn(outputs, targets).double()
        if not is_classification(outputs, targets):
            return torch.stack([loss, torch.full_like(loss, torch.nan)])
        correct = main_output(outputs).argmax(1) == targets
        return torch.stack([loss, correct.double().mean()])
