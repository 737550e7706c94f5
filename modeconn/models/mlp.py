"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modeconn.models.zoo import Statistic, ZooModel
from modeconn.network.registry import factory


class MLP(ZooModel):
    """Linear layers with ReLU between them; inputs of any shape ``(N, ...)`` are flattened."""

    def __init__(
        self, num_inputs: int, hidden: Sequence[int], num_classes: int, mean: Statistic = None, std: Statistic = None
    ) -> None:
        super().__init__((num_inputs,), mean, std)
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(num_inputs, width), nn.ReLU()]
            num_inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(num_inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.normalize(x.flatten(1)))


@factory
def mlp(
    num_inputs: int,
    hidden: Sequence[int],
    num_classes: int,
    *,
    mean: Statistic = None,
    std: Statistic = None,
    seed: int = 0,
) -> MLP:
    """Make a perceptron ``num_inputs - hidden[0] - ... - num_classes``.

    Args:
        num_inputs: Number of input features.
        hidden: Widths of the hidden layers, possibly none.
        num_classes: Number of logits.
        mean: Subtracted from the inputs before the first layer, one number or one for each; default 0.5.
        std: What inputs are divided by after that, one number or one for each; default 0.25.
        seed: Of the initial weights (torch's own initialisation of a linear layer).

    Example:
        >>> [tuple(p.shape) for p in mlp(64, (128, 128), 10, seed=1).parameters() if p.dim() == 2]
        [(128, 64), (128, 128), (10, 128)]
    """
    return MLP(num_inputs, hidden, num_classes, mean, std)
