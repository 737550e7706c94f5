from __future__ import annotations

import pytest

import modeconn
from modeconn import data, models


@pytest.fixture(scope="package")
def digits_line():
    """Two small networks on the digits, training and test data."""
    train, test = data.load("digits")
    recipe = modeconn.Recipe(epochs=2)
    a, b = (models.train(models.mlp(64, (16,), 10, seed=s), train, recipe=recipe, seed=s) for s in (1, 2))
    return a, b, train, test
