"""A data set in memory, read in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeconn.data.augment import Augmentation
from modeconn.data.share import Share
from modeconn.tools.door import check_settings, looked_at
from modeconn.tools.fingerprint import digest

_CHUNK = 4096


@dataclass(eq=False, repr=False)
class TensorLoader:
    """Batches ``(inputs, targets)`` of a data set that lives as one tensor on one device.

    It can be read any number of times. With ``shuffle``, each pass draws its own order from torch's *global* CPU
    generator when it begins, and augmentations draw from it batch by batch: a run that seeds (or restores) that
    generator sees the same batches again. Without ``shuffle`` and ``augment`` nothing is drawn.

    A last batch of one example joins the one before, because batch norm cannot be trained on a single vector.

    Args:
        inputs: ``(N, ...)``; uint8 images, which are divided by 255 batch by batch, or floating-point values.
        targets: int64 ``(N,)``, in ``[0, num_classes)``.
        batch_size: Examples in a batch.
        shuffle: Whether each pass has its own random order.
        augment: Applied to each batch of inputs in turn; see `modeconn.data.augment`.
        num_classes: Default one more than the largest target.

    Raises:
        ValueError: If the tensors do not belong together, are empty, or a target is no class, or a setting makes no
            sense.

    Example:
        >>> loader = TensorLoader(torch.rand(10, 3), torch.arange(10), batch_size=3)
        >>> [len(targets) for inputs, targets in loader]
        [3, 3, 4]
    """

    inputs: Tensor
    targets: Tensor
    batch_size: int = 128
    shuffle: bool = False
    augment: tuple[Augmentation, ...] = ()
    num_classes: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got batch_size={self.batch_size}.")
        if self.inputs.is_meta or self.targets.is_meta:
            raise ValueError("inputs and targets must have values, got tensors on the device 'meta', which has none.")
        if self.inputs.shape[:1] in ((), (0,)) or self.targets.shape != self.inputs.shape[:1]:
            raise ValueError(
                f"inputs and targets must hold equally many examples, at least one; "
                f"got shapes {tuple(self.inputs.shape)} and {tuple(self.targets.shape)}."
            )
        if self.targets.is_floating_point() or self.targets.is_complex():
            raise ValueError(f"targets must be classes, integers, got targets of {self.targets.dtype}.")
        lowest, highest = (int(value) for value in self.targets.aminmax())
        if self.num_classes is None:
            self.num_classes = highest + 1
        if lowest < 0 or highest >= self.num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"targets must lie in 0..{self.num_classes - 1}, got a target of {wrong}.")

    @property
    def num_examples(self) -> int:
        """Number of examples, ``N``."""
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.inputs.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the data set and its batches live."""
        return self.inputs.device

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (rest > 1) if full else 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.drawn_order()
        for number in range(len(self)):
            yield self.batch_at(order, number)

    def drawn_order(self) -> Tensor:
        """Draw the order of a pass from torch's global CPU generator; int64 ``(N,)``."""
        draw = torch.randperm if self.shuffle else torch.arange
        return draw(self.num_examples, device="cpu").to(self.device)

    def batch_at(self, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return one batch of a pass of this order, augmented."""
        stop = self.num_examples if number == len(self) - 1 else (number + 1) * self.batch_size
        chosen = order[number * self.batch_size : stop]
        return self._augmented(_unit_range(self.inputs[chosen])), self.targets[chosen]

    @property
    def draws_each_batch(self) -> bool:
        """Whether making a batch draws random numbers."""
        return bool(self.augment)

    def digest(self) -> str:
        """Return a hash of the data, by which processes see whether they have the same."""
        return digest([self.inputs, self.targets])

    def share(self, number: int, count: int) -> Share:
        """Return every ``count``-th batch, from batch ``number`` on: what one of several processes reads."""
        return Share(self, number, count)

    def _augmented(self, inputs: Tensor) -> Tensor:
        for augmentation in self.augment:
            inputs = augmentation(inputs)
        return inputs

    def with_(self, **changes: Any) -> TensorLoader:
        """Return a loader of the same tensors with other settings, such as ``with_(augment=(), shuffle=False)``."""
        return dataclasses.replace(self, **changes)

    def in_order(self) -> TensorLoader:
        """Return a loader of the same tensors, always in their order and without augmentation."""
        return self.with_(shuffle=False, augment=())

    def shuffled(self) -> TensorLoader:
        """Return a loader of the same tensors, augmented alike, each pass in an order of its own."""
        return self.with_(shuffle=True)

    @looked_at
    def to(self, device: torch.device | str) -> TensorLoader:
        """Return the loader with its tensors on ``device``."""
        return self.with_(inputs=self.inputs.to(device), targets=self.targets.to(device))

    @looked_at
    def subset(self, indices: Tensor) -> TensorLoader:
        """Return a loader of the examples at ``indices``, int64, in that order."""
        if indices.dtype is not torch.int64 or indices.ndim != 1:
            raise ValueError(f"indices must be int64 of one axis, got {indices.dtype} of shape {tuple(indices.shape)}.")
        outside = indices[(indices < -self.num_examples) | (indices >= self.num_examples)]
        if outside.numel():
            raise ValueError(f"indices must lie in 0..{self.num_examples - 1}, got {outside[0].item()} among them.")
        indices = indices.to(self.device)
        return self.with_(inputs=self.inputs[indices], targets=self.targets[indices])

    @looked_at
    def split(self, num_held_out: int, *, seed: int = 0) -> tuple[TensorLoader, TensorLoader]:
        """Hold out some examples, chosen by ``seed`` alone; return the rest, then the held-out ones.

        The held-out part is neither shuffled nor augmented.

        Raises:
            ValueError: If that leaves one part empty.
        """
        if not 0 < num_held_out < self.num_examples:
            raise ValueError(
                f"between 1 and {self.num_examples - 1} of {self.num_examples} examples can be held out, "
                f"got {num_held_out}."
            )
        order = torch.randperm(self.num_examples, generator=torch.Generator().manual_seed(seed), device="cpu")
        rest, held_out = order[:-num_held_out], order[-num_held_out:]
        return self.subset(rest), self.subset(held_out).in_order()

    def mean(self) -> Tensor:
        """Return the mean of the inputs per channel (or feature), float32, shape ``(C,)``; without augmentation."""
        return self._moments()[0].float()

    def std(self) -> Tensor:
        """Return the standard deviation of the inputs per channel (or feature), over all examples and places."""
        return self._moments()[1].sqrt().float()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance in float64, pooled over chunks: the whole set as floats would need four times its size."""
        places = [0, *range(2, self.inputs.dim())]
        chunks = self.inputs.split(_CHUNK)
        pairs = [torch.var_mean(_unit_range(chunk), places, correction=0) for chunk in chunks]
        variances, means = (torch.stack(values).double() for values in zip(*pairs, strict=True))

        shares = torch.tensor([[len(chunk) / self.num_examples] for chunk in chunks], device=self.device)
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean) ** 2)).sum(0)

    def __repr__(self) -> str:
        settings = [f"batch_size={self.batch_size}", f"shuffle={self.shuffle}"]
        if self.augment:
            settings.append(f"augment={self.augment}")
        return (
            f"TensorLoader({self.num_examples} x {self.input_shape}, {self.num_classes} classes, {', '.join(settings)})"
        )


def _unit_range(inputs: Tensor) -> Tensor:
    return inputs if inputs.is_floating_point() else inputs.float() / 255
