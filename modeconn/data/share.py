"""What one of several processes reads of a data set in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


class Drawn(Protocol):
    """A loader whose passes are drawn first and read batch by batch then."""

    @property
    def draws_each_batch(self) -> bool:
        """Whether making a batch draws random numbers, as augmentation does."""
        ...

    def __len__(self) -> int: ...

    def drawn_order(self) -> Any:
        """Draw the order of a pass from torch's global CPU generator."""
        ...

    def batch_at(self, order: Any, number: int) -> Any:
        """Return one batch of a pass of this order."""
        ...


@dataclass(frozen=True)
class Share:
    """Every ``count``-th batch of a loader, from batch ``number`` on.

    All shares of a loader draw the same numbers from torch's global CPU generator in a pass, an order and a seed. So
    processes that begin a pass in one random state read every example once, and end it in one random state. What
    augments a batch is drawn from that seed and the number of the batch.

    Args:
        loader: The whole.
        number: Which share, from 0.
        count: How many there are.
    """

    loader: Drawn
    number: int
    count: int

    def __len__(self) -> int:
        return len(range(self.number, len(self.loader), self.count))

    def __iter__(self) -> Iterator[Any]:
        order, draws = self.loader.drawn_order(), self.loader.draws_each_batch
        seed = int(torch.randint(2**62, (), device="cpu")) if draws else 0
        for number in range(self.number, len(self.loader), self.count):
            if draws:
                with _drawing_from(seed, number):
                    batch = self.loader.batch_at(order, number)
            else:
                batch = self.loader.batch_at(order, number)
            yield batch


@contextmanager
def _drawing_from(*seeds: int) -> Iterator[None]:
    """Let torch's CPU generator begin at seeds of its own for the block, and give it back as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(before)
