"""``forward=`` reaches every place where a loss is computed or a model runs on batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn
from modeconn import PAM, Connection, Recipe, Sinkhorn, StraightThrough, WeightMatching


class Masked(nn.Module):
    """Takes two inputs, in batches that hold targets as well."""

    def __init__(self, seed: int, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 8), *[nn.BatchNorm1d(8)] * norm, nn.ReLU(), nn.Linear(8, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layers(x * mask)


class Plain(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.rand(16, 6, generator=generator),
            "mask": (torch.rand(16, 6, generator=generator) < 0.7).float(),
            "y": torch.randint(3, (16,), generator=generator),
        }
        for _ in range(3)
    ]


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    outputs = model(batch["x"], batch["mask"])
    return F.cross_entropy(outputs, batch["y"]), outputs, batch["y"]


EXAMPLE = {key: batches()[0][key] for key in ("x", "mask")}


def line(norm: bool = True) -> tuple[Connection, Connection]:
    """The straight line between two networks, and the same between networks of one, masked, input."""
    ours = Connection.straight_between(*(Masked(seed, norm).eval() for seed in (1, 2)))
    twins = Connection.straight_between(*(Plain(seed, norm).eval() for seed in (1, 2)))
    return ours, twins


def same(x: nn.Module, y: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(x.state_dict().values(), y.state_dict().values(), strict=True))


PAIRS = [(batch["x"] * batch["mask"], batch["y"]) for batch in batches()]


def test_evaluation_recalibration_and_curvature_are_those_of_ordinary_batches():
    ours, twins = line()
    found = ours.evaluate(batches(), num_points=3, recalibrate=batches(), forward=forward)
    expected = twins.evaluate(PAIRS, num_points=3, recalibrate=PAIRS)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.accuracy, expected.accuracy) and "48 training examples" in repr(found)
    middle = ours.model_at(0.5, recalibrate=batches(), forward=forward)
    assert same(middle, twins.model_at(0.5, recalibrate=PAIRS))
    settings = {"t": [0.5], "num_steps": 30, "tolerance": 1e-2}
    bend = ours.curvature(batches(), recalibrate=batches(), forward=forward, **settings).eigenvalue
    torch.testing.assert_close(bend, twins.curvature(PAIRS, recalibrate=PAIRS, **settings).eigenvalue)


@pytest.mark.parametrize("norm", [True, False])
def test_interpolation_repair_and_merging_are_those_of_ordinary_batches(norm):
    ours, twins = ([kind(seed, norm).eval() for seed in (1, 2)] for kind in (Masked, Plain))
    found = modeconn.interpolate(*ours, 0.4, recalibrate=batches(), repair=not norm, forward=forward)
    assert same(found, modeconn.interpolate(*twins, 0.4, recalibrate=PAIRS, repair=not norm))
    merged = modeconn.merge_many(ours, batches(), repair=not norm, forward=forward, example_input=EXAMPLE)
    expected = modeconn.merge_many(twins, PAIRS, repair=not norm)
    assert same(merged.model, expected.model)


def test_curves_learned_matchers_and_comparisons_take_it():
    a, b = (Masked(seed).eval() for seed in (1, 2))
    given = {"example_input": EXAMPLE}
    settings = {"num_steps": 3, "num_rounds": 2, "forward": forward}
    for method in (Sinkhorn(**settings), StraightThrough(**settings)):
        aligned = modeconn.align(a, b, batches(), method=method, **given)
        assert len(aligned.history) > 1
    fitted = modeconn.fit_curve(
        a, b, batches(), align=WeightMatching(), refine=PAM(iterations=1, num_batches=2), recipe=Recipe(epochs=1),
        forward=forward, **given,
    )  # fmt: skip
    assert fitted.evaluate(batches(), num_points=3).accuracy is not None
    assert modeconn.best_swap(fitted, num_tries=3).num_tried == 3
    table = modeconn.compare(
        [(a, b)], [WeightMatching()], batches(), batches(), num_points=3, recipe=Recipe(epochs=1), forward=forward,
        **given,
    )  # fmt: skip
    assert table.values["WeightMatching"].keys() >= {"line", "line accuracy lost", "repaired", "curve"}
