"""Tiny networks and data that the tests share."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Residual(nn.Module):
    """A convolutional net with batch norm, one residual block and a shared activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = (x + self.bn2(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two linear maps that share one weight, and a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.second(self.first(x.flatten(1)).tanh()).tanh()))


def mlp(hidden: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def frozen() -> nn.Module:
    model = mlp()
    model[1].weight.requires_grad_(False)
    return model


def parametrized() -> nn.Module:
    model = mlp()
    parametrizations.weight_norm(model[1])
    return model


def channels_last() -> nn.Module:
    return Residual().to(memory_format=torch.channels_last)


DEVICE = torch.device(os.environ.get("MODECONN_TEST_DEVICE", "cpu"))
"""Where networks and batches are made, see ``pytest --device``; their numbers are drawn on the CPU everywhere."""


@dataclass(frozen=True)
class Case:
    """An architecture: ``make(seed)`` builds one network, with lively batch-norm statistics."""

    name: str
    factory: object

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.factory().to(dtype)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    nn.init.normal_(module.running_mean)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
        return model.eval().to(DEVICE)


CASES = [
    Case(factory.__name__.lower(), factory)
    for factory in (mlp, dropout, batch_norm, frozen, parametrized, Tied, Residual, channels_last)
]
CASE = {case.name: case for case in CASES}


def batches(num_batches: int = 5, batch_size: int = 12, *, last: int | None = None, seed: int = 0, **kwargs) -> list:
    """Batches of 1x2x4 images in 3 classes that a linear map can tell apart; ``last`` is the size of the last one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [batch_size] * (num_batches - 1) + [last or batch_size]
    prototypes = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(99))
    out = []
    for size in sizes:
        targets = torch.randint(3, (size,), generator=generator)
        inputs = prototypes[targets] + 0.5 * torch.randn(size, 1, 2, 4, generator=generator)
        out.append((inputs.to(DEVICE, kwargs.get("dtype", torch.float32)), targets.to(DEVICE)))
    return out


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    """Whether parameters and buffers of two models agree bit for bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


class ReadsStatistics(nn.Module):
    """Reads the statistics of its layer ``last`` by itself, so that nobody can estimate them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return (x - self.last.running_mean) / (self.last.running_var + 1e-5).sqrt()
