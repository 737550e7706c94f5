"""Every object that saves, through save and load, into every verb that takes it: a table, each cell one test."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import modeconn
from modeconn import AlongCurve, Comparison, DeepAlign, PermutationSpec, Recipe, WeightMatching, data, models
from modeconn.cli.app import app

RECIPE = Recipe(epochs=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One object of each kind, the files they were saved in, and what was loaded from these."""
    folder = tmp_path_factory.mktemp("objects")
    train, test = data.load("digits")
    train = train.with_(batch_size=250)
    a, b = (models.train(models.mlp(64, (8,), 10, seed=s), train, recipe=RECIPE, seed=s) for s in (1, 2))
    spec = modeconn.discover(a)
    permutation = modeconn.align(a, b, spec=spec, method=WeightMatching()).permutation
    connection = modeconn.fit_curve(a, b, train, align=permutation, recipe=RECIPE)
    aligner = DeepAlign(num_steps=4, num_validation_pairs=4, features=4, edge_features=4, depth=1).fit([a, b], train)
    objects = {
        "model": b,
        "spec": spec,
        "permutation": permutation,
        "connection": connection,
        "deep align": aligner,
        "profile": connection.evaluate(test, num_points=3, metrics={"top 2": modeconn.metrics.top_k(2)}),
        "robust profile": connection.robustness(test, modeconn.PGD(0.1, 0.05, 2), num_points=2, num_examples=50),
        "curvature": connection.curvature(test, wrt="inputs", t=[0.0, 1.0], num_steps=5, tolerance=1.0),
        "comparison": modeconn.compare([(a, b)], [WeightMatching()], train, test, num_points=3),
        "plane": modeconn.plane(connection, test, num_points=3, refine=1),
    }
    read = {
        "model": models.load,
        "spec": PermutationSpec.load,
        "permutation": modeconn.Permutation.load,
        "connection": modeconn.Connection.load,
        "deep align": DeepAlign.load,
        "comparison": lambda path: Comparison.from_json(path.read_text()),
        "plane": modeconn.Plane.load,
    }
    loaded = {}
    for kind, one in objects.items():
        path = folder / kind.replace(" ", "_")
        if kind == "model":
            models.save(one, path)
        elif hasattr(one, "save"):
            one.save(path)
        else:
            one.to_json(path)
        loaded[kind] = read.get(kind, lambda path: AlongCurve.from_json(path.read_text()))(path)
    return SimpleNamespace(a=a, b=b, train=train, test=test, objects=objects, loaded=loaded, folder=folder)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def fitted(made, a, b, **settings) -> Tensor:
    settings = {"align": WeightMatching(), **settings}
    return modeconn.fit_curve(a, b, made.train, recipe=RECIPE, seed=1, **settings).control_points


def drawn(one, **settings) -> Tensor:
    with matplotlib.rc_context({"backend": "agg"}):
        ax = one.plot(**settings)
        matplotlib.pyplot.close(ax.figure)
    return torch.cat([torch.as_tensor(line.get_ydata()).double().flatten() for line in ax.lines])


def arrays(one, path) -> Tensor:
    one.to_npz(path)
    with np.load(path) as held:
        return torch.cat([torch.from_numpy(held[name]).flatten().double() for name in held.files])


def perms(permutation) -> Tensor:
    return torch.cat([perm.flatten() for perm in permutation.perms.values()])


RESULT = {
    "plot": lambda one, made: drawn(one),
    "to_csv": lambda one, made: one.to_csv(),
    "to_json": lambda one, made: one.to_json(),
    "repr": lambda one, made: repr(one) + one._repr_html_(),
}
ARRAYS = {**RESULT, "to_npz": lambda one, made: arrays(one, made.folder / "arrays.npz")}
TABLE = {
    "model": {
        "discover": lambda one, made: modeconn.discover(one).to_json(),
        "align": lambda one, made: perms(modeconn.align(made.a, one, made.train).permutation),
        "fit_curve": lambda one, made: fitted(made, made.a, one),
        "interpolate": lambda one, made: weights(modeconn.interpolate(made.a, one, 0.3)),
        "merge_many": lambda one, made: weights(modeconn.merge_many([made.a, one], method=WeightMatching()).model),
        "compare": lambda one, made: modeconn.compare(
            [(made.a, one)], [WeightMatching()], made.train, made.test, num_points=3
        ).values["WeightMatching"]["line"],
        "robustness": lambda one, made: modeconn.robustness(
            one, made.test, modeconn.PGD(0.1, 0.05, 2), num_examples=50
        ).values["worst loss"],
        "evaluate": lambda one, made: modeconn.evaluate(one, made.test).loss,
        "plane": lambda one, made: modeconn.plane(one, made.test, directions="random", num_points=2).values["loss"],
        "train": lambda one, made: weights(models.train(one, made.train, recipe=RECIPE)),
        "train_population": lambda one, made: weights(models.train_population([one], made.train, recipe=RECIPE)[0]),
    },
    "spec": {
        "verify": lambda one, made: one.verify(made.a),
        "align": lambda one, made: perms(modeconn.align(made.a, made.b, made.train, spec=one).permutation),
        "fit_curve": lambda one, made: fitted(made, made.a, made.b, spec=one),
        "PAM": lambda one, made: fitted(
            made, made.a, made.b, spec=one, align=False, refine=modeconn.PAM(iterations=1, num_batches=2)
        ),
        "merge_many": lambda one, made: weights(
            modeconn.merge_many([made.a, made.b], method=WeightMatching(), spec=one).model
        ),
        "compare": lambda one, made: modeconn.compare(
            [(made.a, made.b)], [WeightMatching()], made.train, made.test, num_points=3, spec=one
        ).values["WeightMatching"]["line"],
        "DeepAlign.fit": lambda one, made: weights(
            DeepAlign(num_steps=2, num_validation_pairs=2, features=4, edge_features=4, depth=1)
            .fit([made.a, made.b], made.train, spec=one)
            .fitted.encoder
        ),
        "report": lambda one, made: one.report().to_json(),
        "random": lambda one, made: perms(one.random(torch.Generator().manual_seed(0))),
    },
    "permutation": {
        "apply": lambda one, made: weights(one.apply(made.b)),
        "inverse": lambda one, made: perms(one.inverse()),
        "@": lambda one, made: perms(one @ one),
        "fit_curve": lambda one, made: fitted(made, made.a, made.b, align=one),
        "start": lambda one, made: perms(
            modeconn.align(made.a, made.b, method=WeightMatching(start=one), spec=one.spec).permutation
        ),
    },
    "connection": {
        "model_at": lambda one, made: weights(one.model_at(0.3)),
        "evaluate": lambda one, made: one.evaluate(made.test, num_points=3).loss,
        "robustness": lambda one, made: one.robustness(
            made.test, modeconn.PGD(0.1, 0.05, 2), num_points=2, num_examples=50
        ).values["worst loss"],
        "curvature": lambda one, made: (
            one.curvature(made.test, wrt="inputs", t=[0.5], num_steps=5, tolerance=1.0).eigenvalue
        ),
        "straight": lambda one, made: one.straight().control_points,
        "plane": lambda one, made: modeconn.plane(one, made.test, num_points=3).values["loss"],
        "predict": lambda one, made: one.predict(made.test, num_points=3).probabilities,
        "best_swap": lambda one, made: modeconn.best_swap(one, made.train, num_batches=2, num_tries=3).decrease,
        "plot.history": lambda one, made: drawn(SimpleNamespace(plot=lambda: modeconn.plot.history(one))),
    },
    "deep align": {
        "align": lambda one, made: perms(modeconn.align(made.a, made.b, method=one).permutation),
        "fit_curve": lambda one, made: fitted(made, made.a, made.b, align=one),
        "start": lambda one, made: perms(modeconn.align(made.a, made.b, method=WeightMatching(start=one)).permutation),
        "compare": lambda one, made: modeconn.compare(
            [(made.a, made.b)], {"learned": one}, made.train, made.test, num_points=3
        ).values["learned"]["line"],
    },
    "profile": ARRAYS,
    "robust profile": ARRAYS,
    "curvature": ARRAYS,
    "comparison": RESULT,
    "plane": ARRAYS,
}
CELLS = [(kind, verb) for kind, verbs in TABLE.items() for verb in verbs]


@pytest.mark.parametrize(("kind", "verb"), CELLS, ids=[f"{kind}-{verb}" for kind, verb in CELLS])
def test_what_was_loaded_goes_into_every_verb_as_what_was_saved(kind, verb, made):
    ours, theirs = (TABLE[kind][verb](side[kind], made) for side in (made.objects, made.loaded))
    if isinstance(ours, Tensor):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
    else:
        assert theirs == ours


@pytest.mark.parametrize("kind", TABLE)
def test_every_file_is_described(kind, made):
    result = CliRunner().invoke(app, ["info", str(made.folder / kind.replace(" ", "_"))])
    assert result.exit_code == 0 and f": {kind}\n" in result.stdout
