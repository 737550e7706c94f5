"""What outputs and targets mean is decided by stated rules, and batches combine exactly whatever their size."""

from __future__ import annotations

import functools
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modeconn import Connection, cross_entropy
from modeconn.measure.meter import Meter
from modeconn.network.loss import main_output
from modeconn.network.scores import class_axes, classes_of, scores_of, weighted

Named = namedtuple("Named", ("logits", "aux_logits"))


@dataclass
class Held:
    logits: Tensor
    features: Tensor


SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 3, 1, 2, 2, 0])


# -- which output


@pytest.mark.parametrize(
    "outputs",
    [SCORES, Named(SCORES, SCORES + 1), Held(SCORES, torch.ones(6, 9)), {"logits": SCORES}, UserDict(logits=SCORES)],
    ids=lambda outputs: type(outputs).__name__,
)
def test_scores_are_what_is_alone_or_called_logits(outputs):
    assert scores_of(outputs) is SCORES and main_output(outputs) is SCORES
    auxiliary = 0.3 * F.cross_entropy(SCORES + 1, TARGETS) if isinstance(outputs, Named) else 0.0
    torch.testing.assert_close(cross_entropy(outputs, TARGETS), F.cross_entropy(SCORES, TARGETS) + auxiliary)


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        ((SCORES, torch.ones(6, 9)), r"2 outputs \(\(6, 4\), \(6, 9\)\)"),
        ([SCORES], r"1 outputs \(\(6, 4\)\)"),
        ({"scores": SCORES, "cache": None}, "a dict of 'scores', 'cache'"),
        (object(), "a object"),
    ],
)
def test_several_outputs_without_names_are_refused_and_have_no_accuracy(outputs, named):
    with pytest.raises(ValueError, match=f"the model returns {named}.*'logits'.*loss_fn=.*forward="):
        cross_entropy(outputs, TARGETS)
    assert classes_of(outputs, TARGETS) is None


# -- which axis


@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.data())
def test_classes_lie_along_the_one_axis_that_targets_lack(shape, data):
    axis = data.draw(st.integers(1, len(shape) - 1))
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    targets = torch.zeros([n for d, n in enumerate(shape) if d != axis], dtype=torch.int64)
    axes = class_axes(scores, targets)
    assert axis in axes
    found = classes_of(scores, targets)
    if axes == [axis]:
        assert torch.equal(found.scores, scores.movedim(axis, 1))
        torch.testing.assert_close(cross_entropy(scores, targets), F.cross_entropy(scores.movedim(axis, 1), targets))
    else:
        assert found is None
        with pytest.raises(ValueError, match=r"classes may lie along .* or "):
            cross_entropy(scores, targets)
        if 1 in axes:
            assert torch.equal(classes_of(scores, targets, nn.CrossEntropyLoss()).scores, scores)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.randn(6, 1), TARGETS),  # one logit
        (torch.randn(6), TARGETS),  # counts
        (SCORES, torch.rand(6, 4)),  # real numbers
        (SCORES, torch.rand(6) < 0.5),  # truth values
        (SCORES, ["a"] * 6),
        (SCORES, torch.zeros(5, dtype=torch.int64)),
    ],
)
def test_what_is_no_class_has_no_accuracy(outputs, targets):
    assert classes_of(outputs, targets) is None


def test_integers_outside_the_classes_have_no_accuracy_under_a_loss_of_ones_own():
    """Counts with a mean and a variance for each: of the shape of classes."""

    def gaussian(outputs, targets):
        return F.gaussian_nll_loss(outputs[:, 0], targets.double(), outputs[:, 1].exp())

    meter = Meter([(torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])), (torch.randn(4, 2).double(),
                   torch.tensor([7, 30, 2, 0]))], gaussian)  # fmt: skip
    meter.measure(nn.Identity())
    assert meter.results().accuracy is None and bool(meter.results().loss.isfinite())


# -- what counts, and for how much

WEIGHTS = torch.tensor([1.0, 5.0, 0.5, 2.0])
LOSSES = {
    "default": cross_entropy,
    "torch": nn.CrossEntropyLoss(),
    "function": F.cross_entropy,
    "classes weighted": nn.CrossEntropyLoss(weight=WEIGHTS),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHTS),
    "label 2 ignored": nn.CrossEntropyLoss(ignore_index=2),
    "partial": functools.partial(F.cross_entropy, ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 2), (1, 5), (5, 1)])
@pytest.mark.parametrize("ignored", [False, True])
def test_batches_of_any_size_give_the_loss_of_the_whole(loss_fn, sizes, ignored, recwarn):
    targets = TARGETS.clone()
    label = -100 if loss_fn in (LOSSES["default"], LOSSES["torch"], LOSSES["function"]) else 2
    if ignored and label == -100:
        targets[[0, 4]] = label
    meter = Meter(list(zip(SCORES.split(sizes), targets.split(sizes), strict=True)), loss_fn)
    meter.measure(nn.Identity())
    divisor = len(targets) if loss_fn is LOSSES["sum"] else 1
    torch.testing.assert_close(meter.results().loss, loss_fn(SCORES, targets).double()[None] / divisor)
    uses_label = (ignored and label == -100) or loss_fn in (LOSSES["label 2 ignored"], LOSSES["partial"])
    counted = targets != label if uses_label else torch.ones(6, dtype=torch.bool)
    right = (SCORES.argmax(1) == targets)[counted].double().mean()
    torch.testing.assert_close(meter.results().accuracy, right[None])
    assert not recwarn.list


def test_batches_of_which_nothing_counts_weigh_nothing():
    batches = [(SCORES[:3], torch.full((3,), -100)), (SCORES[3:], TARGETS[3:])]
    meter = Meter(batches, cross_entropy)
    meter.measure(nn.Identity())
    torch.testing.assert_close(meter.results().loss, F.cross_entropy(SCORES[3:], TARGETS[3:]).double()[None])


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), F.l1_loss, nn.HuberLoss(), nn.BCEWithLogitsLoss()])
def test_means_over_elements_combine_by_elements(loss_fn):
    torch.manual_seed(0)
    parts = [(torch.randn(2, n, dtype=torch.float64), torch.rand(2, n, dtype=torch.float64)) for n in (3, 7)]
    meter = Meter(parts, loss_fn)
    meter.measure(nn.Identity())
    flat = [torch.cat([one.flatten() for one in side]) for side in zip(*parts, strict=True)]
    torch.testing.assert_close(meter.results().loss, loss_fn(*flat).double()[None])


def test_a_loss_that_is_no_mean_is_named_once_and_one_that_is_not():
    def by_sum(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    def by_weight(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=WEIGHTS)

    data = [(SCORES, TARGETS), (SCORES, TARGETS)]
    for loss_fn in (by_sum, by_weight):
        meter = Meter(data, loss_fn)
        with pytest.warns(UserWarning, match=r"is no mean over the examples of a batch: it is .* of 6 examples"):
            meter.measure(nn.Identity())
        meter.measure(nn.Identity())
    Meter(data, lambda outputs, targets: F.cross_entropy(outputs, targets)).measure(nn.Identity())
    Meter(data, lambda outputs, targets: torch.rand(())).measure(nn.Identity())  # draws random numbers: nobody knows
    Meter(data, cross_entropy, lambda model, batch: F.cross_entropy(*batch)).measure(nn.Identity())


def test_the_weight_of_a_loss_nobody_knows_is_the_number_of_examples():
    found = weighted(lambda o, t: o.mean(), torch.tensor(2.0), SCORES, TARGETS, 6)
    assert (float(found.total), found.weight, found.is_exact) == (12.0, 6.0, False)


# -- on the way through the package


def test_sequences_of_any_length_have_their_own_accuracy():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(12, 16), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x).relu())

    def flat(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    for length, is_certain in ((6, True), (20, True), (12, False)):
        a, b = Tagger(), Tagger()
        x, y = torch.randint(12, (16, length)), torch.randint(12, (16, length))
        profile = Connection.straight_between(a, b).evaluate([(x, y)], num_points=2, loss_fn=flat)
        torch.testing.assert_close(profile.loss[0], flat(a(x), y).double(), atol=0, rtol=1e-6)
        right = (a(x).argmax(-1) == y).double().mean()
        assert profile.accuracy[0] == right if is_certain else profile.accuracy is None
        if is_certain:
            by_default = Connection.straight_between(a, b).evaluate([(x, y)], num_points=2)
            torch.testing.assert_close(by_default.loss, profile.loss, atol=0, rtol=1e-6)  # sums in another order
            assert torch.equal(by_default.accuracy, profile.accuracy)
