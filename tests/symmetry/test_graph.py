"""What export makes of a model: free batch sizes, silence, and a proof that does not add up rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn.symmetry.export import ExportError, export
from modeconn.symmetry.graph import Example


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class AnyKeyword(Net):
    def forward(self, scale: float = 1.0, **inputs: Tensor) -> Tensor:
        return super().forward(inputs["x"] * scale + inputs["y"])


class AnyPositional(Net):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0] + inputs[1])


class Nested(Net):
    def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
        return super().forward(sum(batch["x"]))


class FixedBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(1, 8).relu())


class AsksForBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 5
        return super().forward(x)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def inputs(batch: int = 5) -> Tensor:
    return torch.zeros(batch, 4)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Net(), inputs()),
        (Net(), inputs(1)),
        (AnyKeyword(), {"x": inputs(), "y": inputs()}),
        (AnyKeyword(), {"x": inputs(), "scale": 2.0, "y": inputs()}),
        (AnyPositional(), (inputs(), inputs())),
        (Nested(), ({"x": [inputs(), inputs()]},)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_batch_size_is_free_however_inputs_are_passed(model, example):
    graph = export(model, Example.of(example), training=False)
    assert graph.free_batch
    spec = modeconn.discover(model, example)
    assert spec.num_units == 8
    assert spec.verify(model, example) < 1e-12


@pytest.mark.parametrize(("model", "batch"), [(FixedBatch(), 1), (AsksForBatch(), 5)], ids=["view", "assert"])
def test_a_model_that_fixes_its_batch_size_is_exported_for_that_one(model, batch):
    graph = export(model, Example.of(inputs(batch)), training=False)
    assert not graph.free_batch
    spec = modeconn.discover(model, inputs(batch))
    assert spec.num_units == 8
    assert spec.fixed_batch and modeconn.discover(Net(), inputs()).fixed_batch is None
    assert spec.verify(model, inputs(batch)) < 1e-12
    assert graph.takes(Example.of(inputs(batch))) and not graph.takes(Example.of(inputs(batch + 1)))
    with pytest.raises(ValueError, match=rf"does not run on example_input of shape \({batch + 1}, 4\)"):
        spec.verify(model, inputs(batch + 1))


def test_a_model_that_cannot_be_exported_prints_nothing(capfd, monkeypatch):
    monkeypatch.setattr("modeconn.symmetry.export.record", None)
    with pytest.raises(ExportError, match="no branches on tensor values"):
        modeconn.discover(Branches(), inputs())
    assert capfd.readouterr() == ("", "")


class Chaotic(Net):
    """Each step moves neighbours apart: the order of sums decides what comes out after sixty of them."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(60):
            x = torch.sin(8 * self.again(x))
        return self.last(x)


def test_rounding_does_not_add_up_in_a_proof():
    assert modeconn.discover(Chaotic(), inputs()).verify(Chaotic(), inputs()) < 1e-12
