"""Batches whose sequences have other lengths, or whose images have other sizes, are data like any other."""

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn.matching import StraightThrough


class Decoder(nn.Module):
    """A language model of one layer with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, 8))
        return self.head(x + self.mlp(x)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)])


def tokens(*lengths):
    ids = [torch.randint(0, 11, (6, n)) for n in lengths]
    return [(x, x) for x in ids]


def sequences(*lengths):
    return [(torch.randn(6, n, 3), torch.randint(0, 2, (6,))) for n in lengths]


def images(*sizes):
    return [(torch.randn(6, 3, n, n), torch.randint(0, 3, (6,))) for n in sizes]


CASES = [(Decoder, tokens), (Recurrent, sequences), (Convolutional, images)]


def networks(kind):
    torch.manual_seed(0)
    return kind().eval(), kind().eval()


@pytest.mark.parametrize(("kind", "data"), CASES, ids=lambda value: value.__name__)
def test_a_planted_relabelling_is_found_on_batches_of_other_sizes(kind, data):
    model, _ = networks(kind)
    loader = data(7, 9, 7, 8)
    spec = modeconn.discover(model, loader[0][0])
    planted = spec.random(torch.Generator().manual_seed(1))
    found = modeconn.align(model, planted.apply(model), loader)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model_b.state_dict()[name], tensor), name


@pytest.mark.parametrize(("kind", "data"), CASES[::2], ids=lambda value: value.__name__)
def test_statistics_over_lengths_are_those_of_the_data_in_any_order(kind, data):
    a, b = networks(kind)
    loader = data(7, 9, 7, 8)
    one, other = (modeconn.align(a, b, batches) for batches in (loader, loader[::-1]))
    assert one.permutation == other.permutation
    for name, value in one.correlation.items():
        torch.testing.assert_close(value, other.correlation[name], rtol=1e-5, atol=1e-6)


def test_a_curve_between_networks_on_batches_of_other_sizes():
    a, b = networks(Decoder)
    loader = tokens(7, 9, 8, 12)
    settings = {"align": StraightThrough(num_steps=3), "recipe": modeconn.Recipe(epochs=1)}
    connection = modeconn.fit_curve(a, b, loader, **settings)
    profile = connection.evaluate(loader, num_points=3)
    total = sum(nn.functional.cross_entropy(a(x), y, reduction="sum").item() for x, y in loader)
    assert profile.loss[0] == pytest.approx(total / sum(y.numel() for _, y in loader), rel=1e-5)


def test_a_spec_is_proved_on_inputs_of_another_size():
    model, _ = networks(Convolutional)
    spec = modeconn.discover(model, torch.randn(2, 3, 9, 9))
    assert spec.verify(model, torch.randn(2, 3, 12, 7)) < 1e-12
