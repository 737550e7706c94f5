"""A callback of a user's own: it keeps the curve that was best on validation data."""

from __future__ import annotations

import modeconn

# -- what the user writes


class KeepBest:
    """Saves the connection after every epoch in which its middle is better than ever before."""

    def __init__(self, path, loader):
        self.path, self.loader, self.best = path, loader, float("inf")

    def after_epoch(self, event):
        loss = event.connection().evaluate(self.loader, t=[0.5]).loss.item()
        if loss < self.best:
            self.best = loss
            event.connection().save(self.path)
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
