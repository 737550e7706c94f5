"""What outputs, targets and losses mean, against plain torch: the same numbers whatever the batch size, or a word."""

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeconn
from modeconn import Connection, RobustProfile, metrics

X = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
SOME = Y.clone()
SOME[6:11] = -100
WEIGHTS = torch.tensor([1.0, 5.0, 0.2])
IDS = torch.randint(9, (10, 5), generator=torch.Generator().manual_seed(1))


def mlp(last: int = 3):
    return lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, last))


def two_of(make):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(make().eval())
    return found


class Tokens(nn.Module):
    """Scores ``(N, T, V)``."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids):
        return self.head(self.embed(ids).relu())


def at(line: Connection, t: float) -> nn.Module:
    """The network at t, mixed by hand."""
    a, b = (line.model_at(end).state_dict() for end in (0, 1))
    model = copy.deepcopy(line.model_at(0))
    model.load_state_dict({name: torch.lerp(a[name], b[name], t) for name in a})
    return model.eval()


def split(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


class MeanOfSum(nn.Module):
    reduction = "sum"  # of what it calls, not of itself

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum") / len(targets)


class Below(nn.CrossEntropyLoss):
    """What people write to give a loss a name."""


LOSSES: dict[str, tuple[Any, torch.Tensor]] = {
    "default": (modeconn.cross_entropy, Y),
    "ignored": (modeconn.cross_entropy, SOME),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), Y),
    "weights, ignored": (nn.CrossEntropyLoss(weight=WEIGHTS), SOME),
    "weights below": (Below(weight=WEIGHTS, ignore_index=1), Y),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHTS, ignore_index=1), Y),
    "attribute": (MeanOfSum(), Y),
    "squares": (nn.MSELoss(), torch.rand(12, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [12, 6, 5, 3])
def test_the_mean_does_not_depend_on_the_batch_size(name, size):
    loss_fn, y = LOSSES[name]
    line = Connection.straight_between(*two_of(mlp()))
    found = line.evaluate(split(X, y, size), t=[0, 0.5, 1], loss_fn=loss_fn)
    expected = [float(loss_fn(at(line, t)(X), y).detach()) for t in (0, 0.5, 1)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-5)


UNEVEN = torch.tensor([0, 0, 1, 0, 0, 2, 1, 1, 2, 1, 2, 2])
NO_MEANS: dict[str, tuple[Any, torch.Tensor]] = {
    "ignored": (lambda outputs, targets: F.cross_entropy(outputs, targets), SOME),
    "weights": (lambda outputs, targets: F.cross_entropy(outputs, targets, weight=WEIGHTS), UNEVEN),
    "spread out": (nn.PoissonNLLLoss(), UNEVEN.float()),
    "sum": (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum"), Y),
}


@pytest.mark.parametrize("name", NO_MEANS)
@pytest.mark.parametrize("size", [12, 6, 5, 3])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_is_no_mean_is_told_of_at_any_batch_size(name, size):
    loss_fn, y = NO_MEANS[name]
    line = Connection.straight_between(*two_of(mlp(1 if name == "spread out" else 3)))
    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        line.evaluate(split(X, y, size), t=[0, 1], loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        line.evaluate(split(X, y, size), t=[0, 1], forward=lambda model, batch: loss_fn(model(batch[0]), batch[1]))


def test_one_batch_of_many_is_enough():
    """The first batches have nothing to ignore."""
    line = Connection.straight_between(*two_of(mlp()))
    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        line.evaluate(split(X, SOME, 4), t=[0, 1], loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets))


def test_losses_that_are_means_are_not_told_of():
    line = Connection.straight_between(*two_of(mlp()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.evaluate(split(X, Y, 5), t=[0, 1], loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets))
        line.evaluate(split(X, Y, 5), t=[0, 1], loss_fn=lambda outputs, _: torch.rand(()) + outputs.mean() * 0)


@pytest.mark.parametrize("size", [10, 3])
def test_networks_disagree_where_their_classes_lie(size):
    targets = IDS.roll(1, 1).clone()
    targets[:4, 2:] = -100
    line = Connection.straight_between(*two_of(Tokens))
    named = {"a": metrics.disagreement("a"), "top": metrics.top_k(1, axis=-1)}
    found = line.evaluate(split(IDS, targets, size), t=[0, 0.5, 1], metrics=named)
    chosen, counted = [at(line, t)(IDS).argmax(-1) for t in (0, 0.5, 1)], targets != -100
    expected = [float((one != chosen[0])[counted].double().mean()) for one in chosen]
    assert found.metrics["a"].tolist() == pytest.approx(expected)
    right = [float((one == targets)[counted].double().mean()) for one in chosen]
    assert found.accuracy.tolist() == found.metrics["top"].tolist() == pytest.approx(right)


def test_what_a_network_of_one_score_chooses_is_not_guessed():
    line = Connection.straight_between(*two_of(mlp(1)))
    with pytest.raises(ValueError, match=r"not known which classes a network chooses .* Pass Against\(end, function\)"):
        line.evaluate(
            split(X, Y[:, None] % 2.0, 4),
            t=[0, 1],
            loss_fn=nn.BCEWithLogitsLoss(),
            metrics={"a": metrics.disagreement("a")},
        )


ATTACK = modeconn.PGD(0.1, 0.05, 2)


@pytest.mark.parametrize("name", ["ignored", "255", "weights", "weights, ignored"])
@pytest.mark.parametrize("size", [12, 5])
@pytest.mark.filterwarnings("ignore:.*attack")
def test_clean_rows_of_robustness_are_what_evaluate_finds(name, size):
    loss_fn, y = LOSSES.get(name, (nn.CrossEntropyLoss(ignore_index=255), torch.where(SOME == -100, 255, SOME)))
    line = Connection.straight_between(*two_of(mlp()))
    found = line.robustness(split(X, y, size), ATTACK, t=[0, 0.5], loss_fn=loss_fn)
    expected = line.evaluate(split(X, y, size), t=[0, 0.5], loss_fn=loss_fn)
    again = RobustProfile.from_json(found.to_json())
    for one in (found, again):
        assert one.loss["clean"].tolist() == pytest.approx(expected.loss.tolist(), rel=1e-5)
        assert one.accuracy["clean"].tolist() == expected.accuracy.tolist()
        assert one.num_examples == int((y != -100).sum()) if name != "255" else one.num_examples == 7


def test_robustness_of_nothing_that_counts_is_refused():
    with pytest.raises(ValueError, match="holds no example whose target counts: all are -100"):
        modeconn.robustness(mlp()().eval(), [(X, torch.full((12,), -100))], ATTACK)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: Any = None
    loss: Any = None


class Mapping(dict):
    """A mapping that torch does not know."""


@pytest.mark.parametrize("kind", [Output, Mapping], ids=["data class", "mapping"])
@pytest.mark.filterwarnings("ignore:.*attack")
def test_robustness_takes_outputs_of_any_kind(kind):
    class Wrapped(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return kind(logits=self.part(x), hidden=None, loss=torch.zeros(()))

    a, _ = two_of(mlp())
    found, expected = (modeconn.robustness(m.eval(), [(X, Y)], ATTACK) for m in (Wrapped(a), a))
    assert found.loss["worst"].tolist() == pytest.approx(expected.loss["worst"].tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_classes_are_any_integers(dtype):
    line = Connection.straight_between(*two_of(mlp()))
    found = line.evaluate([(X, Y.to(dtype))], t=[0, 1])
    assert torch.equal(found.loss, line.evaluate([(X, Y)], t=[0, 1]).loss)
    assert float(found.accuracy[0]) == float((line.model_at(0)(X).argmax(1) == Y).double().mean())


def test_probabilities_lie_along_the_axis_where_they_are_some():
    targets = torch.rand(10, 5, 9).softmax(-1)
    line = Connection.straight_between(*two_of(Tokens))
    expected = float(-(line.model_at(0)(IDS).log_softmax(-1) * targets).sum(-1).mean().detach())
    assert float(line.evaluate([(IDS, targets)], t=[0, 1]).loss[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss_fn", "targets", "message"),
    [
        (nn.BCEWithLogitsLoss(), Y.float(), "loss_fn= cannot compare the model's outputs.*must be the same"),
        (nn.CrossEntropyLoss(), Y[:5], "loss_fn= cannot compare the model's outputs.*batch_size"),
        (lambda outputs, targets: {}["a"], Y, "loss_fn= cannot compare the model's outputs.*KeyError"),
        (lambda outputs, targets: 1 / 0, Y, "loss_fn= cannot compare the model's outputs.*ZeroDivisionError"),
    ],
)
def test_losses_that_fail_are_one_sentence(loss_fn, targets, message):
    line = Connection.straight_between(*two_of(mlp()))
    with pytest.raises(ValueError, match=message):
        line.evaluate([(X, targets)], t=[0, 1], loss_fn=loss_fn)
    with pytest.raises(ValueError, match=message):
        modeconn.models.train(line.model_at(0), [(X, targets)], loss_fn=loss_fn)
