"""Groups of many blocks: paired by what is inside of them, and matched in each pair."""

import pytest
import torch
from torch import nn

import modeconn
from benchmarks.llama import small
from modeconn.matching import blocks
from modeconn.tools.memory import peak_memory
from tests.tensor_files.test_networks import made


class Experts(nn.Module):
    """A mixture of gated experts, each in one slice of three tensors."""

    def __init__(self, count=6, width=10, hidden=7):
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(count, width, hidden)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(count, hidden, width))
        self.inputs, self.outputs = nn.Linear(5, width), nn.Linear(width, 3)

    def example_input(self):
        return torch.randn(4, 5)

    def forward(self, x):
        x = self.inputs(x)
        gate, up = (torch.einsum("nd,edh->neh", x, weight) for weight in (self.gate, self.up))
        chosen = self.router(x).softmax(-1)
        return self.outputs(torch.einsum("ne,neh,ehd->nd", chosen, gate.sigmoid() * up, self.down))


NETWORKS = {
    "experts": (Experts, "permutation"),
    "heads": (small, "permutation"),
    "rotated heads": (small, "orthogonal"),
}


def network(name, seed):
    factory, symmetries = NETWORKS[name]
    return made(factory, seed, torch.float64), symmetries


def planted(spec, seed):
    """An element that moves blocks and what is inside of them, and nothing else."""
    drawn = spec.random(torch.Generator().manual_seed(seed)).tensors()
    still = spec.identity().tensors()
    inside = {group.name for groups in spec.trees() if blocks.is_of_blocks(groups) for group in groups}
    return spec.relabelling({name: drawn[name] if name in inside else still[name] for name in drawn})


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(blocks, "LARGE", 0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_elements_are_found_by_blocks(always, name, seed):
    a, symmetries = network(name, 1)
    spec = modeconn.discover(a, symmetries=symmetries)
    assert any(blocks.is_of_blocks(groups) for groups in spec.trees())
    a = spec.prepared(a)
    b = planted(spec, seed).apply(a)
    found = modeconn.WeightMatching().match(spec, a, b)
    back = found.permutation.apply(b)
    for x, y in zip(a.parameters(), back.parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_move_gains_is_what_the_objective_rises_by(always, name):
    a, symmetries = network(name, 1)
    b, _ = network(name, 2)
    spec = modeconn.discover(a, symmetries=symmetries)
    a, b = spec.prepared(a), spec.prepared(b)
    found = modeconn.WeightMatching().match(spec, a, b)
    moved = dict(found.permutation.apply(b).named_parameters())
    moving = {place[0] for group in spec.groups for place in group.places}
    value = sum(float((x * moved[n]).detach().sum()) for n, x in a.named_parameters() if n in moving)
    assert found.history[-1] == pytest.approx(value, rel=1e-9)
    rises = [after - before for before, after in zip(found.history, found.history[1:], strict=False)]
    assert len(rises) > 1 and min(rises) > -1e-9


@pytest.mark.parametrize("hidden", [3, 40])
def test_blocks_are_compared_alike_by_grams_and_by_products(hidden):
    torch.manual_seed(0)
    a, b = (torch.randn(4, hidden, 30, dtype=torch.float64) for _ in range(2))
    expected = torch.tensor([[float((x @ y.T).norm()) for y in b] for x in a], dtype=torch.float64)
    assert torch.allclose(blocks._norms_of_products(a, b), expected)
    order = torch.randperm(hidden)
    assert torch.allclose(blocks._norms_of_products(a[:, order], b), expected)


def test_few_units_are_compared_all_with_all():
    spec = modeconn.discover(Experts())
    assert not any(blocks.is_of_blocks(groups) for groups in spec.trees())


def test_a_thousand_blocks_take_no_matrix_of_all_units():
    """Pairs of blocks are compared by Gram matrices, of which the memory is that of the weights."""
    a = made(lambda: Experts(1_000, 16, 24), 1)
    spec = modeconn.discover(a)
    b = planted(spec, 0).apply(a)
    with peak_memory(torch.device("cpu")) as peak:
        found = modeconn.WeightMatching().match(spec, a, b)
    assert spec.num_units > blocks.LARGE and (peak.num_bytes or 0) < 250 << 20  # all with all take 2.3 GB
    back = found.permutation.apply(b)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), back.parameters(), strict=True))
