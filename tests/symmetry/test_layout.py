"""A spec found in one memory layout serves another: exports hold the copies that their own layout needs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn import ActivationMatching, discover
from modeconn.symmetry.export import export
from modeconn.symmetry.graph import Example

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().contiguous().view(x.shape[0], -1))


class Attends(nn.Module):
    """Ends attention as torch does: a permuted result is copied only if it does not lie as a view needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).permute(0, 2, 3, 1).contiguous()
        return self.out(h.view(-1, 8)).view(x.shape[0], -1, 4).mean(1)


def written_through(x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], -1)
    flat.mul_(2.0)
    return x.sum((2, 3))


class Writes(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(written_through(self.conv(x).relu().contiguous()))


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(8, 3, 4, 4), torch.arange(8) % 4) for _ in range(2)]


@pytest.mark.parametrize(("found_in", "used_in"), [(CONTIGUOUS, LAST), (LAST, CONTIGUOUS)])
@pytest.mark.parametrize("kind", [Flat, Attends])
def test_a_spec_serves_every_memory_format(kind, found_in, used_in):
    x = batches()[0][0]
    spec = discover(kind().to(memory_format=found_in), x.to(memory_format=found_in))
    a, b = (kind().to(memory_format=used_in) for _ in range(2))
    data = [(x.to(memory_format=used_in), y) for x, y in batches()]
    assert spec.verify(a, data[0][0]) < 1e-9
    aligned = modeconn.align(a, b, data, method=ActivationMatching(), spec=spec)
    own = modeconn.align(a, b, data, method=ActivationMatching())
    assert aligned.permutation == own.permutation
    torch.testing.assert_close(aligned.model_b(x), b(x))


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_a_run_writes_through_views_as_the_model_does(layout):
    x, model = batches()[0][0].to(memory_format=layout), Writes().to(memory_format=layout)
    graph = export(model, Example.of(x), training=False)
    *_, (_, value) = graph.run(dict(model.named_parameters()), Example.of(x))
    torch.testing.assert_close(value, model(x))


def test_a_copy_that_is_written_to_is_a_step_of_its_own():
    class Copies(Writes):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).relu()
            written_through(h.clone())
            return self.head(h.sum((2, 3)))

    class Overwrites(Writes):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).relu()
            written_through(h)
            return self.head(h.sum((2, 3)))

    x, model = batches()[0][0], Copies()
    spec = discover(model, x)
    other = Overwrites()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="does not compute what the model does"):
        spec.verify(other, x)
    assert spec.verify(copy.deepcopy(model), x) < 1e-9


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_final_states_of_an_lstm_have_their_own_shapes(num_layers, bidirectional):
    class Finals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 6, num_layers, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.lstm(x)[1]
            return self.head(torch.cat([h[-1] + c[0], h[0]]))

    model, x = Finals(), torch.randn(4, 7, 5)
    graph = export(model, Example.of(x), training=False)
    (lstm,) = (node for node in graph.nodes if node.target == torch.ops.aten.lstm.input)
    count = num_layers * (1 + bidirectional)
    assert [tuple(value.shape)[0::2] for value in lstm.meta["val"][1:]] == [(count, 6)] * 2
    assert [value.dim() for value in lstm.meta["val"]] == [3, 3, 3]
    assert discover(model, x).verify(model, x) < 1e-9
