"""An attack of a user's own: one step along the gradient, from the best of several random starts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import modeconn
from modeconn import RobustProfile

# -- what the user writes


@dataclass(frozen=True)
class RandomStep:
    """Moves every pixel by ``eps`` up or down, by the sign of the gradient at a random point of the ball."""

    eps: float
    norm: str = "linf"

    def __call__(self, model, x, y):
        start = (x + self.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
        return (x + self.eps * gradient.sign()).clamp(0, 1)


# -- what it can do


def test_it_trains_measures_resumes_and_is_described(digits_line, tmp_path):
    a, _, train, test = digits_line
    attack, recipe = RandomStep(0.1), modeconn.Recipe(epochs=1)
    hardened = modeconn.models.train(modeconn.models.mlp(64, (16,), 10, seed=1), train, recipe=recipe, adversary=attack)
    line = modeconn.fit_curve(hardened, a, train, recipe=recipe, adversary=attack)
    how = {"num_points": 3, "num_examples": 50, "checkpoint": tmp_path / "kept"}
    found = line.robustness(test, {"step": attack, "half": RandomStep(0.05)}, **how)
    assert (found.accuracy["step"] <= found.accuracy["clean"]).all()
    assert found.attacks["step"] == {
        "settings": {"eps": 0.1, "norm": "linf"}, "kind": "RandomStep", "eps": 0.1, "norm": "linf", "black_box": False
    }  # fmt: skip
    again = RobustProfile.from_json(line.robustness(test, {"step": attack, "half": RandomStep(0.05)}, **how).to_json())
    assert torch.equal(again.loss["step"], found.loss["step"])


def test_one_that_leaves_its_ball_is_caught(digits_line):
    a, b, _, test = digits_line

    class TooFar(RandomStep):
        def __call__(self, model, x, y):
            return (x + 2 * self.eps).clamp(0, 1)

    with pytest.raises(ValueError, match=r"left its ball: an example moved by 0\.2"):
        modeconn.Connection.straight_between(a, b).robustness(test, TooFar(0.1), num_points=2)
