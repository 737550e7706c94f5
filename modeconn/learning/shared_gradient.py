"""The mean gradient of processes that share the steps of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from modeconn.tools.processes import joined


class SharedGradient:
    """Makes the gradients of parameters those of all processes, each weighed by what its batch counts.

    All gradients go into one buffer, which is summed at once. A parameter that has a gradient in no process is left
    without one, as an optimizer of a single process would meet it.

    Args:
        parameters: The same in all processes.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._them = joined()
        sizes = [parameter.numel() for parameter in self._parameters]
        dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in self._parameters))
        self._flat = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=self._parameters[0].device)
        *views, self._has_one = self._flat.split([*sizes, len(sizes)])
        self._views = [view.view(p.shape) for view, p in zip(views, self._parameters, strict=True)]

    @torch.no_grad()
    def average(self, work: Callable[[], tuple[float, bool]]) -> bool:
        """Do ``work`` in every process, which brings gradients to the parameters; replace them by their mean.

        Args:
            work: Returns what the batch of this process counts, and whether it had one.

        Returns:
            Whether any process had a batch.
        """

        def summed(numbers: Tensor) -> Tensor | None:
            share = share_in_mean(numbers[:, 0], numbers[:, 1], self._them.rank)
            if share is None:
                return None
            for place, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
                gradient = parameter.grad
                self._has_one[place] = float(gradient is not None)
                if gradient is None:
                    view.zero_()
                else:
                    torch.mul(gradient.to_dense() if gradient.is_sparse else gradient, share, out=view)
            return self._flat

        def counted() -> tuple[float, bool]:
            with torch.enable_grad():
                return work()

        if not self._them.numbers(counted, summed)[:, 1].any():
            return False
        for parameter, view, has_one in zip(self._parameters, self._views, self._has_one.tolist(), strict=True):
            parameter.grad = view.to(parameter.dtype) if has_one else None
        return True


def share_in_mean(counts: Tensor, had_one: Tensor, rank: int) -> float | None:
    """Return the share of a process's gradient in the mean of all, None if no process has one.

    Args:
        counts: What the batch of each process counts, ``(N,)``; 0 for one that had none. Where nothing counts in any,
            those that had a batch are alike: what is left of their gradients, such as a penalty, is the mean.
        had_one: Whether each process had a batch, ``(N,)``.
        rank: Which process.
    """
    if not had_one.any():
        return None
    weights = counts if counts.any() else had_one
    return float(weights[rank] / weights.sum())
