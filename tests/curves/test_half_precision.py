"""Curves between networks of half precision: control points as the networks have them, moved in single precision."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from modeconn import Bezier, PolyChain, Recipe, constant, fit_curve, models
from modeconn.curves.step import CurveStep
from modeconn.network.loss import supervised
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.tools.callbacks import Callback

HALF = [torch.bfloat16, torch.float16]


def pair(dtype, hidden=(6,)):
    return [models.mlp(5, hidden, 3, seed=seed).to(dtype) for seed in (1, 2)]


def batches(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 5, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def step_of(networks, curve, recipe):
    space = WeightSpace(networks[0])
    points = curve.initial_control_points(*(space.flatten(network) for network in networks))
    return CurveStep(Workspace(networks[0], space), curve, points, recipe)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("curve", [Bezier(2), Bezier(3), PolyChain(3)], ids=repr)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_steps_are_those_of_single_precision_on_rounded_control_points(dtype, curve, offload):
    networks = pair(dtype)
    recipe = Recipe(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), weight_decay=0.0, offload=offload)
    step = step_of(networks, curve, recipe)
    points = step.control_points.clone()
    places = range(len(points))[curve.trained]
    masters = [points[place].float() for place in places]
    speeds = [torch.zeros_like(master) for master in masters]
    twin = networks[0].train()
    for number, (x, y) in enumerate(batches(50, dtype)):
        t = (number + 0.5) / 50
        weights = curve.basis(torch.tensor([t], dtype=torch.float64))[0].tolist()
        step((x, y), weights, supervised(cross_entropy))
        total, mean = 0.0, None
        for weight, point in zip(weights, points, strict=True):  # as control points are mixed
            if weight:
                total += weight
                mean = point.clone() if mean is None else torch.lerp(mean, point, weight / total)
        torch.nn.utils.vector_to_parameters(mean, twin.parameters())
        factor = weights[places[0]] if len(places) == 1 else 1.0
        gradients = torch.autograd.grad(cross_entropy(twin(x), y) * factor, list(twin.parameters()))
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        for place, master, speed in zip(places, masters, speeds, strict=True):
            slope = gradient.float() if len(places) == 1 else gradient.float() * weights[place]
            speed.mul_(0.9).add_(slope)
            master.sub_(speed, alpha=0.1)
            points[place] = master.to(dtype)
    tolerance = torch.finfo(dtype).eps
    assert torch.allclose(step.control_points.float(), points.float(), rtol=tolerance, atol=tolerance)
    assert step.control_points.dtype is dtype and not torch.equal(
        points[1], step_of(networks, curve, recipe).control_points[1]
    )


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_add_up(dtype):
    """Each is far below what half precision can tell apart from none; together they are not."""
    networks = pair(dtype)
    far, near = (step_of(networks, Bezier(2), Recipe(optimizer=partial(torch.optim.SGD, lr=rate), weight_decay=0.0))
                 for rate in (1e-5, 1e-5 * 2_000))  # fmt: skip
    begin = far.control_points.clone()
    (batch,) = batches(1, dtype)
    for _ in range(2_000):
        far(batch, [0.25, 0.5, 0.25], supervised(cross_entropy))
    near(batch, [0.25, 0.5, 0.25], supervised(cross_entropy))  # one step as long as all of them
    moved, expected = ((one.control_points[1] - begin[1]).float() for one in (far, near))
    assert moved.norm() > 0 and torch.cosine_similarity(moved, expected, dim=0) > 0.95


class Stop(Exception):
    pass


@pytest.mark.parametrize("dtype", HALF)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path, dtype):
    networks, data = pair(dtype), batches(6, dtype)
    how = {"recipe": Recipe(3, partial(torch.optim.Adam, lr=1e-3), constant), "curve": Bezier(2), "seed": 1}
    whole = fit_curve(*networks, data, **how)
    file = tmp_path / "run"

    class Stopping(Callback):
        def after_epoch(self, event):
            if event.epoch == 2:
                raise Stop

    with pytest.raises(Stop):
        fit_curve(*networks, data, **how, checkpoint=file, callbacks=[Stopping()])
    assert file.exists()
    resumed = fit_curve(*networks, data, **how, checkpoint=file)
    assert torch.equal(whole.control_points, resumed.control_points) and whole.control_points.dtype is dtype


class Checkpointed(nn.Module):
    """A network that computes its middle anew on the way back, if it is told to."""

    def __init__(self, is_checkpointed):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.is_checkpointed = is_checkpointed

    def forward(self, x):
        x = self.first(x).relu()
        x = checkpoint(self.middle, x, use_reentrant=False) if self.is_checkpointed else self.middle(x)
        return self.last(x.relu())


def test_activation_checkpointing_stays_as_the_model_has_it():
    found = []
    for is_checkpointed in (False, True):
        networks = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            networks.append(Checkpointed(is_checkpointed))
        found.append(fit_curve(*networks, batches(4, torch.float32), recipe=Recipe(2), curve=Bezier(2)))
    assert torch.equal(found[0].control_points, found[1].control_points)


def test_offloading_is_for_curves():
    network, data = models.mlp(5, (4,), 3), batches(2, torch.float32)
    with pytest.raises(ValueError, match=r"Recipe\(offload=True\) is for curves"):
        models.train(network, data, recipe=Recipe(1, offload=True))
    with pytest.raises(ValueError, match=r"Recipe\(offload=True\) is for curves"):
        models.train_population([network, network], data, recipe=Recipe(1, offload=True))
    plain, offloaded = (fit_curve(*pair(torch.float32), data, recipe=Recipe(2, offload=one)) for one in (False, True))
    assert torch.equal(plain.control_points, offloaded.control_points)
