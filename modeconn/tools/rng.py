"""One seeded stretch of randomness that leaves the caller's random state as it was, one thread at a time."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch


class _Lock:
    """Lets one thread at a time into what changes the state of the whole process, as often as it likes.

    A forked process begins with a lock of its own: the thread that holds it in the parent is not there to let go.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            yield


one_thread = _Lock()
"""``with one_thread():`` other threads wait for the end of the block: of what uses the global random generators, and of
`torch.export`, which knows one thread only."""


def rng_state(device: torch.device) -> dict[str, object]:
    """Return the state of torch's (CPU and ``device``), numpy's and Python's global generators."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, object], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def preserved(device: torch.device | str = "cpu") -> Iterator[None]:
    """Give the caller's generators back unchanged after the block, whatever draws from them or reseeds them in it.

    Other threads that come to such a block wait: the generators are those of the whole process.
    """
    device = torch.device(device)
    with one_thread():
        saved = rng_state(device)
        # All GPUs, because a call of torch.manual_seed in the block seeds every device.
        others = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        try:
            yield
        finally:
            set_rng_state(saved, device)
            if others:
                torch.cuda.set_rng_state_all(others)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch, numpy and Python for the block, then give the caller's generators back unchanged.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer of 0 or more, got seed={seed!r}.")
    device = torch.device(device)
    with preserved(device):
        reseed(seed, device)
        yield


def seed_of(*numbers: int) -> int:
    """Return a seed that follows from some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def reseed(seed: int, device: torch.device) -> None:
    """Seed torch, numpy and Python, inside of a stretch of `seeded` or `preserved`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
