"""Results are copied, pickled, saved with torch and sent to other processes, and are what they were."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import io
import multiprocessing
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import modeconn
from modeconn import PAM, PGD, DeepAlign, Recipe, WeightMatching, data, metrics, models
from modeconn.data import Flip, TensorLoader

RECIPE = Recipe(epochs=1)


@pytest.fixture(scope="module")
def made():
    train, test = data.load("digits")
    train = train.with_(batch_size=250)
    a, b = (models.train(models.mlp(64, (8,), 10, seed=s), train, recipe=RECIPE, seed=s) for s in (1, 2))
    connection = modeconn.fit_curve(a, b, train, align=WeightMatching(), recipe=RECIPE)
    aligner = DeepAlign(num_steps=2, num_validation_pairs=2, features=4, edge_features=4, depth=1).fit([a, b], train)
    objects = {
        "model": b,
        "spec": modeconn.discover(a),
        "report": modeconn.discover(a).report(),
        "alignment": modeconn.align(a, b, train),
        "permutation": connection.permutation,
        "connection": connection,
        "history": connection.history,
        "aligner": aligner,
        "merged": modeconn.merge_many([a, b], train),
        "best swap": modeconn.best_swap(connection, num_batches=2, num_tries=2),
        "ensemble": modeconn.Ensemble([a, b]),
        "profile": connection.evaluate(test, num_points=3, metrics={"top 2": metrics.top_k(2)}),
        "robust profile": connection.robustness(test, PGD(0.1, 0.05, 2), t=[0, 1], num_examples=50),
        "curvature": connection.curvature(test, t=[0.0, 1.0], num_steps=5, tolerance=1.0),
        "comparison": modeconn.compare([(a, b)], [WeightMatching()], train, test, num_points=3),
        "loader": test,
        "recipe": Recipe(2, schedule=modeconn.halving),
        "matcher": modeconn.Sinkhorn(num_steps=3, start=WeightMatching()),
        "refinement": PAM(iterations=2),
        "attack": PGD(0.1, 0.05, 2),
        "curve": modeconn.PolyChain(3),
    }
    return SimpleNamespace(a=a, b=b, train=train, test=test, objects=objects)


def torch_saved(one):
    buffer = io.BytesIO()
    torch.save(one, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one)), "torch.save": torch_saved}
KINDS = [
    *("model", "spec", "report", "alignment", "permutation", "connection", "history", "aligner", "merged", "best swap"),
    *("ensemble", "profile", "robust profile", "curvature", "comparison", "loader", "recipe", "matcher", "refinement"),
    *("attack", "curve"),
]


def seen(one) -> list:
    """All that an object shows and holds."""
    parts = [repr(one)]
    for name in ("control_points", "loss", "values", "inputs"):
        parts.append(str(getattr(one, name, None)))
    for module in (one, getattr(one, "model", None), getattr(one, "model_b", None)):
        if isinstance(module, nn.Module):
            parts += [(name, tensor.tolist()) for name, tensor in module.state_dict().items()]
    if hasattr(one, "tensors"):
        parts.append({name: tensor.tolist() for name, tensor in one.tensors().items()})
    return parts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_what_the_object_was(made, kind, way):
    one = made.objects[kind]
    assert seen(WAYS[way](one)) == seen(one)


def test_kinds_are_all_kinds(made):
    assert list(made.objects) == KINDS


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_works_where_the_object_did(made, way):
    there = {kind: WAYS[way](one) for kind, one in made.objects.items()}
    connection, expected = there["connection"], made.objects["connection"]
    assert torch.equal(connection.evaluate(made.test, t=[0.5]).loss, expected.evaluate(made.test, t=[0.5]).loss)
    aligned = modeconn.align(made.a, made.b, made.train, spec=there["spec"], method=there["aligner"])
    again = modeconn.align(made.a, made.b, made.train, spec=made.objects["spec"], method=made.objects["aligner"])
    assert aligned.permutation == again.permutation
    assert there["spec"].verify(made.a) < 1e-6


def measured_elsewhere(connection, test):
    return connection.evaluate(test, t=[0.0, 0.5]), connection.permutation, connection


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_results_go_to_other_processes_and_come_back(made, start):
    connection = made.objects["connection"]
    context = multiprocessing.get_context(start)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        profile, permutation, again = pool.submit(measured_elsewhere, connection, made.test).result(120)
    assert torch.equal(profile.loss, connection.evaluate(made.test, t=[0.0, 0.5]).loss)
    assert permutation == connection.permutation and torch.equal(again.control_points, connection.control_points)


# -- several threads


def in_threads(jobs, num_threads=8):
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda job: job(), jobs))


def test_jobs_in_threads_end_as_one_after_another(made):
    """Exports and seeded stretches use what all threads of a process share."""

    def job(number):
        a, b = (models.mlp(6, (4 + number % 3,), 3, seed=seed) for seed in (number, number + 1))
        loader = TensorLoader(
            torch.rand(24, 6, generator=torch.Generator().manual_seed(number)), torch.arange(24) % 3, 8
        )
        method = [WeightMatching(), modeconn.ActivationMatching(), modeconn.Sinkhorn(num_steps=2)][number % 3]
        found = modeconn.fit_curve(a, b, loader.shuffled(), align=method, recipe=RECIPE, seed=number)
        return found.control_points, found.evaluate(loader, num_points=3).loss

    jobs = [lambda number=number: job(number) for number in range(12)]
    before = torch.get_rng_state()
    expected = [one() for one in jobs]
    found = in_threads(jobs)
    assert all(
        torch.equal(*pair) for one, two in zip(found, expected, strict=True) for pair in zip(one, two, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluations_of_an_augmented_loader_in_threads_agree():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = TensorLoader(images, torch.arange(40) % 3, 8, shuffle=True, augment=(Flip(),))
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval() for _ in "ab")
    line = modeconn.Connection.straight_between(a, b)
    jobs = [lambda: line.evaluate(loader, t=[0, 0.5, 1], recalibrate=loader).loss] * 12
    before = torch.get_rng_state()
    found = in_threads(jobs)
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(torch.get_rng_state(), before)


# -- loaders with workers, modules with what cannot be copied


class Examples(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((64,), place / 24), place % 10


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loaders_read_by_workers(made, start):
    alone = DataLoader(Examples(), batch_size=8)
    workers = DataLoader(Examples(), batch_size=8, num_workers=2, multiprocessing_context=start)
    line = made.objects["connection"]
    assert torch.equal(line.evaluate(workers, t=[0.5]).loss, line.evaluate(alone, t=[0.5]).loss)


class Locked(nn.Module):
    """Holds what can be neither copied nor pickled, as modules with caches and clients do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = models.mlp(6, (4,), 3)
        self.lock, self.calls = threading.Lock(), 0

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
        return self.layers(x)


def test_modules_that_hold_a_lock_or_hooks_work():
    x, y = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    heard = []
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = Locked().eval()
        network.layers.register_forward_hook(lambda *_: heard.append(1))
        networks.append(network)
    fitted = modeconn.fit_curve(*networks, [(x, y)], recipe=RECIPE)
    assert fitted.evaluate([(x, y)], num_points=3).loss.isfinite().all()


def test_compiled_networks_end_as_those_they_were_compiled_from():
    x, y = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval())
    compiled = [torch.compile(network, backend="eager") for network in networks]
    compiled[0](x)
    found, expected = (modeconn.fit_curve(*pair, [(x, y)], recipe=RECIPE) for pair in (compiled, networks))
    assert torch.equal(found.control_points, expected.control_points)
    assert torch.equal(found.evaluate([(x, y)], num_points=3).loss, expected.evaluate([(x, y)], num_points=3).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_changes_nothing_of_what_results_say(kind, made):
    """Properties are computed when they are read, outside of the call that made the result."""
    one = pickle.loads(pickle.dumps(made.objects[kind]))  # without what was computed before
    public = [name for name in dir(type(one)) if not name.startswith("_")]
    names = (
        []
        if kind == "model"
        else [n for n in public if isinstance(getattr(type(one), n), (property, functools.cached_property))]
    )
    expected = {name: repr(getattr(made.objects[kind], name)) for name in names}
    with torch.device("meta"):
        assert repr(one) == repr(made.objects[kind])
        assert {name: repr(getattr(one, name)) for name in names} == expected
        if hasattr(one, "to_json") and hasattr(type(one), "from_json"):
            assert repr(type(one).from_json(one.to_json())) == repr(one)
