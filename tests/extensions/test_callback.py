"""A callback of a user's own: it keeps the curve, or the network, that was best on validation data."""

from __future__ import annotations

import modeconn
from modeconn import models

# -- what the user writes


class KeepBest:
    """Saves the connection, or the network, after every epoch in which (its middle) is better than ever before."""

    def __init__(self, path, loader):
        self.path, self.loader, self.best = path, loader, float("inf")

    def after_epoch(self, event):
        of_curve = event.connection is not None
        found = event.connection() if of_curve else event.model()
        profile = found.evaluate(self.loader, t=[0.5]) if of_curve else modeconn.evaluate(found, self.loader)
        if profile.loss.item() < self.best:
            self.best = profile.loss.item()
            found.save(self.path) if of_curve else models.save(found, self.path)
        event.values["best so far"] = self.best

    def state(self):
        return {"best": self.best}

    def load_state(self, state):
        self.best = state["best"]


# -- what it can do


def test_it_keeps_the_best_curve(digits_line, tmp_path):
    a, b, train, test = digits_line
    keep = KeepBest(tmp_path / "best", test)
    recipe = modeconn.Recipe(epochs=3)
    fitted = modeconn.fit_curve(
        a, b, train, align=True, recipe=recipe, callbacks=[keep], checkpoint=tmp_path / "k", seed=1
    )
    best = modeconn.Connection.load(tmp_path / "best")
    assert best.evaluate(test, t=[0.5]).loss.item() == keep.best <= fitted.evaluate(test, t=[0.5]).loss.item()
    assert fitted.history.values[-1] == {"best so far": keep.best}


def test_it_keeps_the_best_network(digits_line, tmp_path):
    *_, train, test = digits_line
    keep, network = KeepBest(tmp_path / "best", test), models.mlp(64, (12,), 10, seed=3)
    trained = models.train(
        network, train, recipe=modeconn.Recipe(epochs=3), callbacks=[keep], checkpoint=tmp_path / "k", seed=1
    )
    best = modeconn.evaluate(models.load(tmp_path / "best"), test).loss.item()
    assert best == keep.best <= modeconn.evaluate(trained, test).loss.item()
