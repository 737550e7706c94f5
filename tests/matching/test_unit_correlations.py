"""Correlations of units against numpy, on planted permutations, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import modeconn
from modeconn import unit_correlations

from ..cases import CASES, batches


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


DATA = batches(dtype=torch.float64)


def test_correlations_are_those_of_numpy():
    a, b = network(1), network(2)
    state = torch.get_rng_state()
    found = unit_correlations(a, b, DATA)
    assert torch.equal(state, torch.get_rng_state()) and len(found) == 2
    x = torch.cat([x for x, _ in DATA])
    for matrix, depth in zip(found.values(), (3, 5), strict=True):
        with torch.no_grad():
            values = [nn.Sequential(*list(model)[:depth])(x).cpu().numpy() for model in (a, b)]
        expected = np.corrcoef(*values, rowvar=False)[: len(matrix), len(matrix) :]
        np.testing.assert_allclose(matrix, expected, atol=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("mlp", "residual")], ids=str)
def test_pairs_of_an_alignment_stand_on_the_diagonal(case):
    a = case.make(1, torch.float64)
    spec = modeconn.discover(a, DATA[0][0])
    b = spec.random(torch.Generator().manual_seed(3)).apply(a)
    aligned = modeconn.align(a, b, DATA, spec=spec)
    for name, matrix in unit_correlations(a, aligned.model_b, DATA, spec=spec).items():
        assert matrix.shape == (spec[name].size,) * 2
        kept = matrix.diagonal() != 0  # units that never change
        torch.testing.assert_close(matrix.diagonal()[kept], torch.ones(int(kept.sum()), dtype=torch.float64))
        assert float(matrix.diagonal().mean()) == pytest.approx(aligned.correlation[name][1], abs=1e-9)


def test_bad_settings_and_other_networks_are_refused():
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        unit_correlations(network(1), network(2), DATA, num_examples=0)
    with pytest.raises(ValueError):
        unit_correlations(network(1), nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double(), DATA)
