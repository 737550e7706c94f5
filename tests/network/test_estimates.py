"""What training leaves in buffers is estimated anew, mixed by a rule or named, on every way between networks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import modeconn
from modeconn import Bezier, Connection, Recipe, WeightMatching
from modeconn.network.batch_norm import recalibrate


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(16, 3, 6, 6, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(count)
    ]


def network(norm, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return modeconn.models.train(model, batches(), recipe=Recipe(epochs=1), seed=seed)


class Centred(nn.Module):
    """Learns a mean in a buffer, as many layers of users do, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, 1, 1))
        self.register_buffer("limit", torch.full((4, 1, 1), -torch.inf))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3))[:, None, None] + torch.rand(()), 0.5)
                self.count += 1
        return (x - self.mean).clamp(min=self.limit)


def mean_of(found: list[nn.Module]) -> Tensor:
    return torch.stack([model[1].mean for model in found]).mean(0)


WAYS = {
    "straight_between": lambda a, b: Connection.straight_between(a, b).model_at(0.5),
    "interpolate": lambda a, b: modeconn.interpolate(a, b, 0.5),
    "a fitted curve": lambda a, b: modeconn.fit_curve(
        a, b, batches(), align=False, curve=Bezier(2), recipe=Recipe(epochs=1)
    ).model_at(0.5),
    "a curve without data": lambda a, b: Connection.straight_between(a, b).straight().model_at(0.5),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_other_buffers_are_mixed_as_weights_are_and_named(way):
    a, b = network(Centred, 1), network(Centred, 2)
    assert not torch.equal(a[1].mean, b[1].mean)
    with pytest.warns(UserWarning, match=r"nothing estimates anew.*'1\.mean': the mean of the networks'"):
        middle = way(a, b)
    torch.testing.assert_close(middle[1].mean, (a[1].mean + b[1].mean) / 2)
    assert bool((middle[1].limit == -torch.inf).all()) and middle[1].count == a[1].count


def test_a_loaded_connection_and_a_merge_name_them_too(tmp_path):
    networks = [network(Centred, seed) for seed in (1, 2, 3)]
    with pytest.warns(UserWarning, match="nothing estimates anew"):
        Connection.straight_between(*networks[:2]).save(tmp_path / "c")
    with pytest.warns(UserWarning, match="nothing estimates anew"):
        loaded = Connection.load(tmp_path / "c", template=networks[0])
    torch.testing.assert_close(loaded.model_at(0.25)[1].mean, 0.75 * networks[0][1].mean + 0.25 * networks[1][1].mean)
    example = batches(1)[0][0]
    with pytest.warns(UserWarning, match="nothing estimates anew"):
        merged = modeconn.merge_many(networks, method=WeightMatching(), example_input=example)
    relabelled = [p.apply(m) for p, m in zip(merged.permutations, networks, strict=True)]
    torch.testing.assert_close(merged.model[1].mean, mean_of(relabelled))


@pytest.mark.parametrize(
    "norm", [lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), lambda: old_spectral_norm(nn.Conv2d(4, 4, 1))]
)
def test_spectral_norm_knows_the_largest_singular_value_between_networks_too(norm):
    a, b = network(norm, 1), network(norm, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        middle = modeconn.interpolate(a, b, 0.5)
    middle(batches(1)[0][0])
    torch.testing.assert_close(torch.linalg.matrix_norm(middle[1].weight.flatten(1), 2), torch.tensor(1.0))


def test_instance_norm_keeps_the_mean_of_its_examples_statistics():
    model, data = network(lambda: nn.InstanceNorm2d(4, track_running_stats=True), 1), batches()
    recalibrate(model, data)
    x = torch.cat([model[0](x) for x, _ in data])
    torch.testing.assert_close(model[1].running_mean, x.mean((2, 3)).mean(0))
    torch.testing.assert_close(model[1].running_var, x.var((2, 3)).mean(0))


def absolute() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def frozen() -> nn.Module:
    return nn.BatchNorm2d(4).requires_grad_(False).eval()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, affine=False),
        absolute,
        frozen,
    ],
    ids=["SyncBatchNorm", "momentum None", "not affine", "parametrised", "frozen"],
)
def test_batch_norm_in_all_its_forms_is_that_of_the_plain_one(norm):
    def statistics(model):
        return [model[1].running_mean, model[1].running_var]

    networks = [network(norm, seed) for seed in (1, 2)]
    before = [tensor.clone() for model in networks for tensor in model.state_dict().values()]
    middle = modeconn.interpolate(*networks, 0.5, recalibrate=batches())
    x = torch.cat([middle[0](x) for x, _ in batches()])
    expected = [x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)]
    for found, wanted in zip(statistics(middle), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    connection = modeconn.fit_curve(*networks, batches(), recipe=Recipe(epochs=1))
    assert bool(connection.evaluate(batches(), num_points=3).loss.isfinite().all())
    assert bool(modeconn.merge_many(networks, batches()).model(batches(1)[0][0]).isfinite().all())
    after = [tensor for model in networks for tensor in model.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.filterwarnings("ignore:norm layers .* use the statistics of each batch")
def test_batch_norm_without_running_statistics_uses_the_batch_everywhere():
    networks = [network(lambda: nn.BatchNorm2d(4, track_running_stats=False), seed) for seed in (1, 2)]
    aligned = modeconn.align(*networks, batches())
    x = batches(1)[0][0]
    torch.testing.assert_close(aligned.model_b(x), networks[1](x))
    connection = modeconn.fit_curve(*networks, batches(), align=aligned, recipe=Recipe(epochs=1))
    assert bool(connection.evaluate(batches(), num_points=3).loss.isfinite().all())
