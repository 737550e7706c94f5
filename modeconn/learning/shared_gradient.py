"""The mean gradient of processes that share the steps of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable

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
    def average(self, counts: Tensor) -> None:
        """Replace the gradients, right after an exchange in which no process failed.

        Args:
            counts: What the batch of each process counts, ``(N,)`` on the CPU; 0 for one that had none.
        """
        total = float(counts.sum())
        share = float(counts[self._them.rank]) / total if total else 1.0 / self._them.size
        for place, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
            has_one = parameter.grad is not None
            self._has_one[place] = float(has_one)
            torch.mul(parameter.grad, share, out=view) if has_one else view.zero_()
        self._them.add(self._flat)
        for parameter, view, has_one in zip(self._parameters, self._views, self._has_one.tolist(), strict=True):
            parameter.grad = view.to(parameter.dtype) if has_one else None
