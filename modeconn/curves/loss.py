"""The loss along a curve on a fixed sample, as a function of the relabelled network b and of the curve's bend."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.curves import Curve
from modeconn.network.batches import num_examples
from modeconn.network.loss import Forward, weight_by
from modeconn.network.modes import backward_in_eval_mode, flags_kept, use_batch_statistics
from modeconn.network.recipe import autocast
from modeconn.network.weights import Workspace
from modeconn.tools.processes import joined
from modeconn.tools.rng import preserved, reseed

Sample = Sequence[tuple[float, Any]]
"""Positions t, each with the batch that the loss is measured on there."""


class CurveLoss:
    r"""The mean over a sample of :math:`L(\theta(t))`, and its gradients.

    A curve through the networks a and :math:`P b` is told by how its inner control points lie beside the straight line,

    .. math:: \theta(t) = (1 - t) \, a + t \, P b + \sum_k B_k(t) \, \varphi_k,

    so that its middle moves with :math:`P` (Tatro et al., 2020). All evaluations use the same batches at the same
    positions, with the same random numbers if ``forward`` draws any: two values differ by the networks alone. Several
    processes, which must have the same sample, share its places. Batch norm uses the statistics of the batch, dropout
    is off. Places count as the targets of their batches do in the loss.

    Args:
        workspace: The module to run; its weights, gradient and buffers are scratch.
        curve: A curve with fixed ends.
        theta_a: Network a, ``(P,)``.
        forward: ``forward(model, batch) -> loss``.
        sample: See `Sample`.
        precision: Of the forward passes, None for the model's own.

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439
    """

    def __init__(
        self,
        workspace: Workspace,
        curve: Curve,
        theta_a: Tensor,
        forward: Forward,
        sample: Sample,
        precision: torch.dtype | None = None,
    ) -> None:
        self._workspace, self._theta_a, self._forward = workspace, theta_a, forward
        self._them = joined()
        self._batches = [batch for _, batch in sample]
        self._shares = _shares(forward, self._batches)
        basis = curve.basis(torch.tensor([t for t, _ in sample], dtype=torch.float64))
        self._inner = basis[:, 1:-1].tolist()
        self._share_of_b = (basis @ line_positions(curve)).tolist()
        self._precision = precision

    @contextlib.contextmanager
    def _quiet(self) -> Any:
        """Batch statistics in norm layers, and nothing else of train mode: no dropout, no layers dropped at random.

        Gradients reach frozen parameters too, since these move with the units.
        """
        model = self._workspace.model
        with flags_kept(model), backward_in_eval_mode(model), preserved(self._theta_a.device):
            use_batch_statistics(model)
            model.requires_grad_(True)
            yield

    def value(self, theta_b: Tensor, bend: Tensor) -> float:
        """Return the loss of the curve to ``theta_b (P,)``, the relabelled b, with ``bend (K - 2, P)``."""
        return float(self.values(theta_b, bend).mean())

    @torch.no_grad()
    def values(self, theta_b: Tensor, bend: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """Return the loss at each place of the sample, or at those of ``places``, float64 ``(S,)`` on the CPU."""
        places = range(len(self)) if places is None else places

        def mine() -> list[float]:
            with self._quiet():
                losses = [self._loss_at(place, theta_b, bend).double() for place in self._them.mine(places)]
            return torch.stack(losses).tolist() if losses else []

        losses = self._them.in_order(self._them.each(mine))
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def gradient(
        self, theta_b: Tensor, bend: Tensor, places: Sequence[int] | None = None
    ) -> tuple[float, Tensor, Tensor]:
        """Return the loss, its gradient with respect to ``theta_b (P,)`` and that of ``bend (K - 2, P)``.

        With ``places``, over these places of the sample only.
        """
        places = range(len(self)) if places is None else places
        # Row 0 is towards b, the others towards the bend: one tensor, so that processes exchange one.
        dtype = torch.promote_types(theta_b.dtype, bend.dtype)  # a bend may be kept more precisely than networks
        towards, losses = theta_b.new_zeros((1 + len(bend), theta_b.numel()), dtype=dtype), []

        def mine() -> Tensor:
            with torch.enable_grad(), self._quiet():
                for place in self._them.mine(places):
                    self._workspace.zero_grad()
                    loss = self._loss_at(place, theta_b, bend)
                    loss.backward()
                    gradient = self._workspace.gather_grad()
                    losses.append(float(loss.detach()))
                    for row, weight in zip(towards, [self._share_of_b[place], *self._inner[place]], strict=True):
                        row.add_(gradient, alpha=weight / len(places))
                self._workspace.zero_grad()
            return towards

        self._them.sum(mine)
        losses = self._them.in_order(self._them.each(lambda: losses))
        return sum(losses) / len(places), towards[0].to(theta_b.dtype), towards[1:].to(bend.dtype)

    def __len__(self) -> int:
        """Return the number of places of the sample."""
        return len(self._batches)

    def _loss_at(self, place: int, theta_b: Tensor, bend: Tensor) -> Tensor:
        theta = torch.lerp(self._theta_a, theta_b, self._share_of_b[place], out=self._workspace.theta)
        for row, weight in zip(bend, self._inner[place], strict=True):
            theta.add_(row, alpha=weight)
        reseed(place, theta.device)
        with autocast(theta.device, self._precision):
            loss = self._forward(self._workspace.model, self._batches[place])
        # Of no target that counts the loss is NaN, and its gradient 0.
        return self._shares[place] * (loss if self._shares[place] else loss.nan_to_num())


def _shares(forward: Forward, batches: Sequence[Any]) -> list[float]:
    """Return how much each batch counts, 1 in the mean."""
    if getattr(forward, "is_sum", False):  # so that the mean is one over examples
        return [len(batches) / sum(map(num_examples, batches))] * len(batches)
    if len(batches) == 1:
        return [1.0]
    weights = torch.tensor([float(weight_by(forward, batch)) for batch in batches], dtype=torch.float64)
    if not weights.any():
        raise ValueError("no target of the loader's batches counts: the loss ignores them all.")
    return (weights / weights.mean()).tolist()


def line_positions(curve: Curve) -> Tensor:
    """Return how far along the straight line each control point lies at first, float64 ``(K,)``."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    return curve.initial_control_points(*ends)[:, 0]


def straight(curve: Curve, theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """Return the inner control points of the straight curve, ``(K - 2, P)``."""
    return curve.initial_control_points(theta_a, theta_b)[1:-1]
