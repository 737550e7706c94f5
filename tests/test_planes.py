"""Planes: coordinates and values against a twin written by hand, what a file keeps, what is refused."""

from __future__ import annotations

import base64
import copy
import dataclasses
import gzip
import json
import math
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeconn
from modeconn import PGD, AdversarialExamples, Bezier, Connection, Plane, PolyChain, Recipe, plane
from modeconn.tools.measurements import read_records
from tests.cases import ReadsStatistics

from .cases import CASES, DEVICE, Residual, batches, mlp, same_bits
from .reference import pooled_statistics


def networks(case, dtype=torch.float64):
    return [case.make(seed, dtype) for seed in (1, 2, 3)]


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().cpu()


def by_hand(three, x, y):
    """The network at a point, from coordinates by Gram and Schmidt in numpy."""
    a, b, c = (flat(model).numpy() for model in three)
    u = (b - a) / np.linalg.norm(b - a)
    v = (c - a) - u * (u @ (c - a))
    theta = torch.from_numpy(a + x * u + y * v / np.linalg.norm(v))
    model = copy.deepcopy(three[0])
    for parameter in model.parameters():
        values, theta = theta[: parameter.numel()], theta[parameter.numel() :]
        parameter.data.copy_(values.view(parameter.shape))
    return model.eval()


def recalibrated(model, data):
    for name, (mean, var) in pooled_statistics(model, data).items():
        layer = model.get_submodule(name)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return model


@torch.no_grad()
def loss_and_accuracy(model, data):
    outputs, targets = torch.cat([model(x) for x, _ in data]), torch.cat([y for _, y in data])
    return float(F.cross_entropy(outputs, targets)), float((outputs.argmax(1) == targets).double().mean())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_networks_made_by_hand(case):
    three, train = networks(case), batches(seed=1, dtype=torch.float64)
    test = batches(3, last=5, seed=2, dtype=torch.float64)
    before = [copy.deepcopy(model) for model in three]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are frozen in each of them
        found = plane(three, test, num_points=(3, 2), recalibrate=train)
    assert torch.equal(state, torch.get_rng_state())
    assert all(same_bits(model, other) for model, other in zip(three, before, strict=True))
    for i, y in enumerate(found.y.tolist()):
        for j, x in enumerate(found.x.tolist()):
            loss, accuracy = loss_and_accuracy(recalibrated(by_hand(three, x, y), train), test)
            assert float(found.values["loss"][i, j]) == pytest.approx(loss, rel=1e-9)
            assert float(found.values["accuracy"][i, j]) == pytest.approx(accuracy)


def test_coordinates_are_distances_of_weight_space():
    three = networks(CASES[0])
    found = plane(dict(zip(("one", "two", "three"), three, strict=True)), batches(dtype=torch.float64), num_points=2)
    places = torch.stack(list(found.networks.values()))
    assert list(found.networks) == ["one", "two", "three"]
    distances = torch.cdist(torch.stack([flat(model) for model in three]), torch.stack([flat(m) for m in three]))
    torch.testing.assert_close(torch.cdist(places, places), distances, rtol=1e-9, atol=1e-9)
    for number, model in enumerate(three):
        expected = loss_and_accuracy(model, batches(dtype=torch.float64))[0]
        assert float(found.own["loss"][number]) == pytest.approx(expected, rel=1e-9)


def connected(curve):
    recipe = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1))
    a, b = (copy.deepcopy(CASES[0].make(seed, torch.float64)) for seed in (1, 2))
    return modeconn.fit_curve(a, b, batches(dtype=torch.float64), align=False, curve=curve, recipe=recipe)


def test_a_point_that_a_chain_passes_through_is_named_by_its_position():
    networks = [CASES[0].make(seed, torch.float64) for seed in range(3)]
    found = plane(modeconn.Connection.through(networks), batches(dtype=torch.float64), num_points=3)
    assert list(found.networks) == ["a", "b", "t=0.5"]
    assert found.curve_distance < 1e-6 * float(found.x[-1] - found.x[0])


def test_a_corner_that_is_no_control_point_names_none():
    @dataclass(frozen=True)
    class Cornered(Bezier):
        knots = (0.5,)

    found = plane(connected(Cornered(3)), batches(dtype=torch.float64), num_points=3)
    assert list(found.networks) == ["a", "b", "control point 2"]


def test_a_quadratic_curve_lies_in_its_plane():
    connection = connected(Bezier(2))
    found = plane(connection, batches(dtype=torch.float64), num_points=3)
    assert found.curve_distance < 1e-6 * float(found.x[-1] - found.x[0])
    assert list(found.networks) == ["a", "b", "control point"]
    a, _, b = connection.control_points.double().cpu()
    origin, theta = flat(connection.model_at(0.0)), flat(connection.model_at(0.5))
    x = float((theta - origin) @ (b - a) / (b - a).norm())
    torch.testing.assert_close(found.curve[[0, -1]], torch.stack([found.networks["a"], found.networks["b"]]))
    assert float(found.curve[100][0]) == pytest.approx(x, rel=1e-9)
    assert float(found.curve[100].norm()) == pytest.approx(float((theta - origin).norm()), rel=1e-9)


@pytest.mark.parametrize("curve", [Bezier(3), PolyChain(3)], ids=str)
def test_other_curves_are_projected_and_their_distance_is_told(curve):
    connection = connected(curve)
    found = plane(connection, batches(dtype=torch.float64), num_points=2)
    points = connection.control_points.double().cpu()
    basis = torch.linalg.qr((points[[-1, len(points) // 2]] - points[0]).T)[0]
    away = []
    for t in torch.linspace(0, 1, 201):
        way = flat(connection.model_at(float(t))) - points[0]
        away.append(float((way - basis @ (basis.T @ way)).norm()))
    assert found.curve_distance == pytest.approx(max(away), rel=1e-6)
    assert "the curve is projected" in found.caption


def test_cells_on_the_curve_are_halved():
    connection = connected(Bezier(2))
    coarse, fine = (plane(connection, batches(dtype=torch.float64), num_points=5, refine=k) for k in (0, 2))
    assert coarse.between is None and torch.equal(coarse.values["loss"], fine.values["loss"])
    points, values = fine.scattered("loss")
    assert len(points) == len({tuple(p) for p in points.tolist()}) == 25 + len(fine.between) + len(fine.networks)
    step = (fine.x[1] - fine.x[0]).item(), (fine.y[1] - fine.y[0]).item()
    nearest = torch.cdist(fine.between, fine.curve).min(1).values
    assert float(nearest.max()) < 1.5 * (step[0] ** 2 + step[1] ** 2) ** 0.5
    three = [connection.model_at(0.0), connection.model_at(1.0), copy.deepcopy(connection.model_at(0.0))]
    connection.space.load(connection.control_points[1], three[2])
    for number in (25, len(points) - 1):
        expected = loss_and_accuracy(by_hand(three, *points[number].tolist()), batches(dtype=torch.float64))[0]
        assert float(values[number]) == pytest.approx(expected, rel=1e-9)


def test_a_plane_goes_on_where_it_was_stopped(tmp_path):
    three, test = networks(CASES[0]), batches(dtype=torch.float64)
    calls, file = [], tmp_path / "points"

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 30 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    stopped = []
    with pytest.raises(KeyboardInterrupt):
        plane(three, test, num_points=4, forward=forward, checkpoint=file)
    known = len(read_records(file))
    assert known > 1
    calls.clear()
    found = plane(three, test, num_points=4, forward=forward, checkpoint=file)
    again = len(calls)
    calls.clear()
    same = plane(three, test, num_points=4, forward=forward, checkpoint=file)
    assert not calls and again > 0 and torch.equal(same.values["loss"], found.values["loss"])
    other = plane(three, batches(seed=7, dtype=torch.float64), num_points=4, forward=forward, checkpoint=file)
    assert calls and not torch.equal(other.values["loss"], found.values["loss"])


class Scaled(nn.Module):
    """A network with a buffer that nothing estimates anew."""

    def __init__(self, seed, scale=1.0):
        super().__init__()
        self.net = CASES[0].make(seed, torch.float64)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.scale


TRAIN = [(x.sigmoid(), y) for x, y in batches(3, dtype=torch.float64)]
NORMED = next(case for case in CASES if case.name == "residual")
OTHERS = {
    "examples": ({"recalibrate": TRAIN}, {"recalibrate": [TRAIN[0], *((x * 0.2, y) for x, y in TRAIN[1:])]}),
    "fewer": ({"recalibrate": TRAIN}, {"recalibrate": TRAIN[:1]}),
    "attacked": ({"recalibrate": TRAIN}, {"recalibrate": AdversarialExamples(TRAIN, PGD(0.3, 0.15, 2))}),
    "attack": tuple({"recalibrate": AdversarialExamples(TRAIN, PGD(eps, eps / 2, 2))} for eps in (0.05, 0.3)),
    "metrics": tuple({"recalibrate": TRAIN, "metrics": {"m": modeconn.metrics.top_k(k)}} for k in (1, 2)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_measurements_of_other_settings_are_not_taken(what, tmp_path):
    three, how = networks(NORMED), {"num_points": 2, "extent": (0.0, 1.0, 0.0, 1.0)}
    before, after = OTHERS[what]
    plane(three, TRAIN, checkpoint=tmp_path / "points", **how, **before)
    found = plane(three, TRAIN, checkpoint=tmp_path / "points", **how, **after)
    expected = plane(three, TRAIN, **how, **after)
    assert all(torch.equal(found.values[name], expected.values[name]) for name in expected.values)


@pytest.mark.filterwarnings("ignore:buffers differ")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_measurements_of_networks_with_other_buffers_are_not_taken(which, tmp_path):
    how = {"num_points": 2, "extent": (0.0, 1.0, 0.0, 1.0)}
    found = []
    for scale in (1.0, 5.0):
        three = [Scaled(seed, scale if seed == which else 1.0).to(DEVICE) for seed in range(3)]
        found.append([plane(three, TRAIN, checkpoint=kept, **how) for kept in (tmp_path / "points", None)])
    assert torch.equal(found[1][0].values["loss"], found[1][1].values["loss"])


def test_a_loss_below_zero_has_no_limit():
    from matplotlib.figure import Figure

    found = plane(networks(CASES[0]), TRAIN, num_points=3, loss_fn=lambda o, y: F.cross_entropy(o, y) - 50)
    assert found.limit is None and "colours end" not in found.caption
    levels = found.plot(ax=Figure().subplots()).collections[0].levels
    assert levels[0] < levels[-1] < 0
    lost = plane(networks(CASES[0]), TRAIN, num_points=2, loss_fn=lambda o, y: F.cross_entropy(o, y) * float("nan"))
    assert lost.limit is None and "4 with a loss that is not finite" in lost.caption
    with pytest.raises(ValueError, match="finite nowhere"):
        lost.to_html("none.html")


def test_what_lies_outside_of_a_given_extent_is_not_drawn():
    from matplotlib.figure import Figure

    found = plane(networks(CASES[0]), TRAIN, num_points=2, extent=(100.0, 101.0, 100.0, 101.0))
    ax = found.plot(ax=Figure().subplots())
    assert ax.get_xlim() == (100, 101) and not ax.texts


def test_examples_are_attacked_at_each_point():
    three = networks(CASES[0])
    data = [(x.sigmoid(), y) for x, y in batches(2, dtype=torch.float64)]
    attack = PGD(0.2, 0.1, 3)
    clean, robust = (plane(three, data, num_points=2, extent=(-1, 1, -1, 1), attack=one) for one in (None, attack))
    assert bool((robust.values["loss"] > clean.values["loss"]).all()) and "PGD" in robust.caption
    expected = modeconn.robustness(three[0], data, {"pgd": attack})
    assert float(robust.own["accuracy"][0]) == pytest.approx(float(expected.accuracy["pgd"][0]))
    assert float(robust.own["loss"][0]) == pytest.approx(float(expected.loss["pgd"][0]), rel=1e-6)


def test_norm_layers_know_the_attacked_examples_if_they_are_asked_to():
    case = next(one for one in CASES if one.name == "residual")
    three, data = networks(case), [(x.sigmoid(), y) for x, y in batches(2, dtype=torch.float64)]
    examples = AdversarialExamples(data, PGD(0.2, 0.1, 2))
    found = plane(three, data, num_points=2, extent=(-1, 1, -1, 1), recalibrate=examples)
    assert "own adversarial examples" in found.caption


@pytest.mark.parametrize("directions", ["random", "given"])
def test_a_plane_along_directions(directions):
    (model,) = networks(CASES[0])[:1]
    size = sum(p.numel() for p in model.parameters())
    given = "random" if directions == "random" else tuple(torch.randn(2, size, dtype=torch.float64, device=DEVICE))
    found = plane(model, batches(dtype=torch.float64), directions=given, num_points=3)
    assert list(found.networks) == ["network"] and found.networks["network"].tolist() == [0, 0]
    assert float(found.own["loss"][0]) == pytest.approx(loss_and_accuracy(model, batches(dtype=torch.float64))[0])


def test_a_limit_ends_the_extent():
    recipe = Recipe(epochs=20, optimizer=partial(torch.optim.SGD, lr=0.3))
    three = [modeconn.models.train(one, batches(dtype=torch.float64), recipe=recipe) for one in networks(CASES[0])]
    near, far = (plane(three, batches(dtype=torch.float64), num_points=2, times=times) for times in (1.01, 1e6))
    assert float(far.x[-1] - far.x[0]) > float(near.x[-1] - near.x[0])
    assert near.limit == pytest.approx(1.01 * float(near.own["loss"].max()))


@pytest.fixture(scope="module")
def some():
    return plane(connected(Bezier(2)), batches(dtype=torch.float64), num_points=(4, 3), refine=1)


def test_files_keep_all(some, tmp_path):
    some.save(tmp_path / "plane.json")
    back = Plane.load(tmp_path / "plane.json")
    assert repr(back) == repr(some) and back.caption == some.caption
    for name in ("x", "y", "curve", "between"):
        assert torch.equal(getattr(back, name), getattr(some, name))
    assert all(torch.equal(back.values[name], some.values[name]) for name in some.values)
    some.to_npz(tmp_path / "plane.npz")
    arrays = np.load(tmp_path / "plane.npz")
    assert np.array_equal(arrays["values/loss"], some.values["loss"].numpy()) and "networks/a" in arrays
    assert len(some.to_csv().splitlines()) == 1 + len(some.scattered("loss")[0])
    with pytest.raises(ValueError, match="holds no Plane"):
        Plane.load(tmp_path / "plane.npz")
    with pytest.raises(ValueError, match="not a Plane"):
        Plane.from_json(Connection.straight_between(mlp(), mlp()).evaluate(batches(), num_points=2).to_json())


def test_a_coarse_grid_does_not_hide_how_low_the_loss_is_at_a_network(some):
    points, values = some.scattered("loss")
    for place, value in zip(some.networks.values(), some.own["loss"], strict=True):
        (at,) = (points == place).all(1).nonzero().flatten().tolist()
        assert values[at] == value
    beyond = dataclasses.replace(
        some, networks={"far": 100 * some.x[-1:].expand(2)}, own=dict.fromkeys(some.values, torch.zeros(1))
    )
    older = dataclasses.replace(some, own={})  # as files of before
    for other in (beyond, older):
        assert len(other.scattered("loss")[0]) == len(points) - len(some.networks)


def test_vtk_gets_the_grid(some, tmp_path):
    some.to_vti(tmp_path / "plane.vti")
    root = ElementTree.parse(tmp_path / "plane.vti").getroot()
    image = root.find("ImageData")
    assert image.get("WholeExtent") == "0 3 0 2 0 0"
    assert [float(x) for x in image.get("Origin").split()] == [float(some.x[0]), float(some.y[0]), 0]
    arrays = {array.get("Name"): base64.b64decode(array.text) for array in root.iter("DataArray")}
    for name, content in arrays.items():
        assert int.from_bytes(content[:8], "little") == len(content) - 8
        assert np.array_equal(np.frombuffer(content[8:], "<f8"), some.values[name].flatten().numpy())
    assert set(arrays) == set(some.values)


def test_a_page_holds_the_surface_and_its_library(some, tmp_path):
    some.to_html(tmp_path / "plane.html")
    text = (tmp_path / "plane.html").read_text()
    content = text.split('<script type="application/json">')[1].split("</script>")[0]
    surface, marks, line = json.loads(content)["data"]
    points, values = some.scattered("loss")
    assert np.allclose(surface["z"], values.clamp(max=some.limit).log10())
    assert surface["customdata"] == values.tolist() and surface["x"] == points[:, 0].tolist()
    corners = np.stack([surface[name] for name in "ijk"], 1)
    sides = points.numpy()[corners]
    (first, second) = (sides[:, corner] - sides[:, 0] for corner in (1, 2))
    areas = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    assert np.isclose(areas.sum(), float((some.x[-1] - some.x[0]) * (some.y[-1] - some.y[0])))  # they cover the plane
    assert marks["text"] == list(some.networks) and line["x"] == some.curve[:, 0].tolist()
    library = text.split('id="library">')[1].split("</script>")[0]
    assert b"plotly.js" in gzip.decompress(base64.b64decode(library))[:500]
    assert "http" not in text.replace(library, "") and len(text) < 3_000_000
    with pytest.raises(ValueError, match="no quantity 'f1'"):
        some.to_html(tmp_path / "none.html", quantity="f1")


@pytest.mark.parametrize("quantity", ["loss", "accuracy", None])
def test_a_plane_is_drawn(some, quantity):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert some.plot(quantity=quantity, ax=ax) is ax
    assert {text.get_text() for text in ax.texts} == {"a", "b", "control point"}
    with pytest.raises(ValueError, match="no quantity 'f1'"):
        some.plot(quantity="f1", ax=ax)


def test_values_that_are_not_finite_are_drawn():
    from matplotlib.figure import Figure

    axis = torch.arange(3.0, dtype=torch.float64)
    values = {"loss": torch.tensor([[0.1, 0.2, torch.inf], [0.3, torch.nan, 1e30], [0.1, 0.2, 0.3]]).double()}
    found = Plane(axis, axis, values, limit=0.5)
    found.plot(ax=Figure().subplots())
    assert torch.equal(Plane.from_json(found.to_json()).values["loss"].isfinite(), values["loss"].isfinite())
    flat_one = Plane(axis, axis, {"loss": torch.ones(3, 3, dtype=torch.float64)}, limit=5.0)
    flat_one.plot(ax=Figure().subplots())


def shared(rank):
    found = plane(
        networks(CASES[0]),
        modeconn.data.TensorLoader(*map(torch.cat, zip(*batches(dtype=torch.float64), strict=True)), 12),
        num_points=3,
    )
    return found.values["loss"], found.x


def test_processes_share_the_points(pool):
    (alone,) = pool.run(1, shared)
    for found in pool.run(2, shared):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_points": 1}, "num_points must be at least 2"),
        ({"extent": (1, 0, 0, 1)}, "extent must be"),
        ({"extent": (-math.inf, 1, 0, 1)}, "extent must be .* finite"),
        ({"attack": 3}, "attack must be called as attack"),
        ({"times": 1.0}, "times must be more than 1"),
        ({"refine": 9}, "refine must be from 0 to 4"),
        ({"directions": "random"}, "directions= is for one network"),
        ({"attack": PGD(0.1, 0.1, 1), "forward": lambda m, b: 0}, "Leave one out"),
        ({"metrics": {"same": modeconn.metrics.disagreement("a")}}, "no meaning on a plane"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        plane(networks(CASES[0]), batches(dtype=torch.float64), **arguments)


def test_what_is_no_plane_is_refused():
    a, b, _ = networks(CASES[0])
    middle = modeconn.interpolate(a, b, 0.3)
    with pytest.raises(ValueError, match="on one line"):
        plane([a, b, middle], batches(dtype=torch.float64))
    with pytest.raises(ValueError, match="on one line"):
        plane([a, a, b], batches(dtype=torch.float64))
    with pytest.raises(ValueError, match="a straight line has no plane"):
        plane(Connection.straight_between(a, b), batches(dtype=torch.float64))
    with pytest.raises(ValueError, match="three networks"):
        plane([a, b], batches(dtype=torch.float64))
    with pytest.raises(ValueError, match="directions="):
        plane(a, batches(dtype=torch.float64))
    with pytest.raises(ValueError, match="names that are text"):
        plane({1: a, 2: b, 3: middle}, batches(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"directions\[0\] must be finite and not 0"):
        plane(a, batches(dtype=torch.float64), directions=tuple(torch.zeros(2, flat(a).numel()).double().to(DEVICE)))
    with pytest.raises(ValueError, match="needs statistics of training data"):
        plane([Residual().double().to(DEVICE) for _ in range(3)], batches(dtype=torch.float64))


def test_norm_layers_of_a_plane_need_training_data():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(3)]
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    with pytest.raises(ValueError, match=r"between the networks of a plane batch norm needs .* Pass recalibrate="):
        modeconn.plane(networks, data, num_points=3)


@pytest.mark.filterwarnings("ignore:the statistics of the norm layers 'last'")
def test_a_plane_that_was_measured_before_names_norm_layers_that_stay_too(tmp_path):
    data = [(torch.randn(8, 3), torch.randint(4, (8,)))]
    networks, settings = [ReadsStatistics() for _ in range(3)], {"recalibrate": data, "checkpoint": tmp_path / "seen"}
    first, again = (modeconn.plane(networks, data, num_points=2, **settings) for _ in range(2))
    assert first.statistics == again.statistics and "but for 'last'" in again.statistics
