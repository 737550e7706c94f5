"""One step of learning a curve: weights at t, an ordinary forward and backward pass, the gradient pulled back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.curves import Curve, mix
from modeconn.network.loss import Forward
from modeconn.network.recipe import Recipe, autocast
from modeconn.network.weights import Workspace

BLOCK = 64
"""Steps over which t is stratified."""


def stratified_positions(seed: int, block: int) -> Tensor:
    """Return the positions t of one block of steps: one in each of `BLOCK` equal parts of [0, 1], in random order.

    A function of its arguments alone, so that a run can be taken up at any step. Each position by itself is uniform.

    Returns:
        float64 ``(BLOCK,)`` on the CPU.
    """
    random = np.random.default_rng([seed, block])
    return torch.from_numpy((random.permutation(BLOCK) + random.random(BLOCK)) / BLOCK)


def _placed(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device, itself if it is there; from a GPU, in memory of the CPU that GPUs copy directly."""
    if device.type == "cpu" and x.is_cuda:
        return torch.empty(x.shape, dtype=dtype, pin_memory=True).copy_(x)
    return x.to(device, dtype)


class CurveStep:
    r"""Takes optimizer steps on the control points of a curve.

    With :math:`\theta = \sum_k B_k(t) c_k` the gradient of :math:`c_k` is :math:`B_k(t) \, \nabla L(\theta)`, so a step
    is the ordinary one of the unmodified module, and a few passes over vectors to mix the control points and to gather
    the gradient. Autograd never sees the curve.

    Control points of half precision are moved in single precision, of which a copy is kept: steps are mostly smaller
    than what half precision can tell apart. Where the recipe says so, that copy, its gradient and the optimizer's state
    are in the memory of the CPU.

    Args:
        workspace: The module to run, in train mode, with its flat weights and gradient; its buffers are scratch.
        curve: The curve; its `trained` control points are learned.
        control_points: ``(K, P)``, changed in place.
        recipe: Optimizer, weight decay, precision, compilation. The caller sets the learning rate, see `optimizer`.

    Attributes:
        optimizer: The optimizer of the trained control points, one parameter ``(M, P)``, in single precision at least.
    """

    def __init__(self, workspace: Workspace, curve: Curve, control_points: Tensor, recipe: Recipe) -> None:
        self.curve, self.control_points = curve, control_points
        self.workspace, self.recipe = workspace, recipe
        points = control_points[curve.trained]  # shares memory with the control points
        wide = torch.promote_types(points.dtype, torch.float32)
        home = torch.device("cpu") if recipe.offload else points.device
        self._is_copy = points.dtype != wide or points.device != home
        narrow = points.device != home and points.dtype != wide
        self._between = _placed(torch.zeros_like(points[0]), home, points.dtype) if narrow else None
        self._trained = nn.Parameter(_placed(points, home, wide))
        self._trained.grad = _placed(torch.zeros_like(points), home, wide)
        self._is_single = curve.num_trained == 1
        self._gathers_in = self._is_single and points.device == home
        if self._gathers_in:
            workspace.gather_in(self._trained.grad[0])
        self.optimizer = recipe.make_optimizer([self._trained])
        self._anchor: Tensor | None = None
        self._pull = 0.0
        self._scaler = torch.amp.GradScaler(control_points.device.type, enabled=recipe.autocast == torch.float16)
        workspace.model.train()
        self._model = torch.compile(workspace.model) if recipe.compile else workspace.model

    def __call__(self, batch: Any, weights: Sequence[float], forward: Forward) -> Tensor:
        """Take one step.

        Args:
            batch: What ``forward`` takes, on the device of the control points.
            weights: ``curve.basis(t)``, ``K`` numbers.
            forward: ``forward(model, batch) -> loss``, a mean over examples. What changes a batch in the light of the
                model, as an attack does, comes inside: the model it gets stands at t.

        Returns:
            The loss, a scalar on the device, without the penalty.
        """
        loss = self.differentiate(batch, weights, forward)
        self.update()
        return loss

    def differentiate(self, batch: Any, weights: Sequence[float], forward: Forward) -> Tensor:
        """Bring the gradient of the loss on a batch, and that of the penalty, to `gradient`; return the loss.

        Arguments are those of a step.
        """
        mix(self.control_points, weights, self.workspace.theta)
        self.workspace.zero_grad()
        with autocast(self.control_points.device, self.recipe.autocast):
            loss = forward(self._model, batch)
        self._pull_back(loss, weights[self.curve.trained])
        return loss.detach()

    @property
    def gradient(self) -> Tensor:
        """Where the gradient of the trained control points is, ``(M, P)``; scaled where there is a scaler."""
        return self._trained.grad

    def update(self) -> None:
        """Let the optimizer move the trained control points along `gradient`."""
        if self._anchor is not None:
            self._trained.grad.add_(self._trained.detach() - self._anchor, alpha=self._pull * self._scaler.get_scale())
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._is_copy:
            for point, moved in zip(self.control_points[self.curve.trained], self._trained.detach(), strict=True):
                point.copy_(self._crossing(moved))

    @torch.no_grad()
    def take_control_points(self) -> None:
        """Go on from the control points as they are, after something else has moved them."""
        if self._is_copy:
            self._trained.copy_(self.control_points[self.curve.trained])

    def hold(self, nu: float) -> None:
        r"""Keep the trained control points near where they are now, :math:`c_0`, from here on.

        :math:`\tfrac{1}{2 \nu} \lVert c - c_0 \rVert^2` is added to the loss; nothing if ``nu`` is infinite.
        """
        self._pull = 1.0 / nu
        self._anchor = self._trained.detach().clone() if self._pull else None

    def _pull_back(self, loss: Tensor, weights: Sequence[float]) -> None:
        """Bring the gradient of loss and penalty to the trained control points, which have these ``weights``."""
        # Scaling the loss in place of the gradient spares the usual, single control point two passes over memory.
        factor = weights[0] if self._is_single else 1.0
        self._scaler.scale(loss * factor).backward()
        decay = self.recipe.weight_decay * factor * self._scaler.get_scale()
        gradient = self.workspace.gather_grad(weight_decay=decay)
        if not self._is_single:
            near = self._crossing(gradient)
            for weight, row in zip(weights, self._trained.grad, strict=True):
                if not self._is_copy:
                    torch.mul(near, weight, out=row)
                else:
                    row.copy_(near).mul_(weight)
        elif not self._gathers_in:
            self._trained.grad[0].copy_(self._crossing(gradient))

    def _crossing(self, x: Tensor) -> Tensor:
        """Return a vector that crosses between devices in half precision, if it is to: half the bytes to move."""
        return x if self._between is None else self._between.copy_(x)

    own = ("buffer.",)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that changes from step to step, as tensors and as JSON can hold it."""
        values = self.optimizer.state[self._trained] if self._trained in self.optimizer.state else {}
        tensors = {f"optimizer.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        buffers = {f"buffer.{name}": buffer for name, buffer in self.workspace.model.named_buffers()}
        tensors = {"control_points": self.control_points, **tensors, **buffers}
        if self._is_copy:
            tensors["trained"] = self._trained.detach()
        if self._anchor is not None:
            tensors["anchor"] = self._anchor
        return tensors, {"optimizer": scalars, "scaler": self._scaler.state_dict(), "pull": self._pull}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.control_points.copy_(tensors["control_points"])
        if self._is_copy:
            self._trained.copy_(tensors["trained"])
        for name, buffer in self.workspace.model.named_buffers():  # Some modules learn in their buffers.
            buffer.copy_(tensors[f"buffer.{name}"])
        self._pull, self._anchor = about["pull"], None
        if "anchor" in tensors:
            self._anchor = tensors["anchor"].to(self.control_points.device)
        start = "optimizer."
        values = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        state = {**values, **about["optimizer"]}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
        self._scaler.load_state_dict(about["scaler"])
