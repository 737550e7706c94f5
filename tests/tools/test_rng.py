"""The caller's random state after a stretch in which anything may seed anything."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from modeconn.tools.rng import preserved, seeded


def states() -> list[object]:
    devices = range(torch.cuda.device_count())
    return [
        torch.get_rng_state().tolist(),
        *(torch.cuda.get_rng_state(i).tolist() for i in devices),
        str(np.random.get_state(legacy=False)),
        random.getstate(),
    ]


@pytest.mark.parametrize("stretch", [preserved, lambda: seeded(3)], ids=["preserved", "seeded"])
def test_generators_of_all_devices_are_given_back(stretch):
    """A model, loss or attack on the CPU may call ``torch.manual_seed``, which seeds every GPU as well."""
    if torch.cuda.is_available():
        torch.cuda.init()
    before = states()
    with stretch():
        torch.manual_seed(1234)
        np.random.seed(1)
        random.seed(1)
        torch.rand(2), np.random.rand(2), random.random()
    assert states() == before
