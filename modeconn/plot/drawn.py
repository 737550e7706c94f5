"""What each figure needs of the results that it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Quantity(Protocol):
    """How a quantity is drawn; "%" is the unit of fractions shown in percent."""

    unit: str


class AlongCurve(Protocol):
    """What `profile` draws: values along a curve by name, tensors on the CPU, as `modeconn.Profile` has them."""

    t: Tensor
    num_examples: int

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Values at each position, ``(N,)``."""
        ...

    @property
    def own(self) -> Mapping[str, Tensor]:
        """Values of both ends with the statistics they came with, ``(2,)``."""
        ...

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is drawn."""
        ...


class RobustProfile(Protocol):
    """What `robust_profile` draws: values along a curve by row, tensors on the CPU."""

    t: Tensor
    loss: Mapping[str, Tensor]
    accuracy: Mapping[str, Tensor]
    interval: Mapping[str, Tensor]
    attacks: Mapping[str, Any]


class Alignment(Protocol):
    """What `correlation` draws: mean correlation ``(before, after)`` by group."""

    correlation: Mapping[str, tuple[float, float]]


class Rotation(Protocol):
    """What `eigen_angles` draws: angles ``(..., n)`` by group, from 0 to pi."""

    def angles(self) -> Mapping[str, Tensor]:
        """Return the angles of each group that rotates."""
        ...


class History(Protocol):
    """What `history` draws: the loss of each epoch, its means in bins of t, and what callbacks measured, by name."""

    loss: Sequence[float]
    loss_by_t: Sequence[Sequence[float | None]]
    values: Sequence[Mapping[str, float]]


class Turns(Protocol):
    """What `turns` draws: of each turn of a refinement the loss before and after, and how much it moved."""

    turns: Sequence[Mapping[str, Any]]


class Relabelling(Protocol):
    """What `cycles` draws: where each unit goes, ``(..., n)`` by group."""

    perms: Mapping[str, Tensor]


class Fit(Protocol):
    """Something learned, with its history if there is one."""

    history: History | None


class Plane(Protocol):
    """What `plane` draws: values of networks of a plane, tensors on the CPU, as `modeconn.Plane` has them."""

    x: Tensor
    y: Tensor
    networks: Mapping[str, Tensor]
    curve: Tensor | None
    limit: float | None

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Values of the grid, ``(H, W)``."""
        ...

    def scattered(self, name: str) -> tuple[Tensor, Tensor]:
        """Return all points of a quantity ``(M, 2)``, and its values ``(M,)``."""
        ...

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is drawn."""
        ...


class Comparison(Protocol):
    """What `comparison` draws: by row and column one value for each pair."""

    values: Mapping[str, Mapping[str, Sequence[float]]]
    columns: Sequence[str]


Correlation = Mapping[str, tuple[float, float]]
"""Mean correlation ``(before, after)`` by group."""
