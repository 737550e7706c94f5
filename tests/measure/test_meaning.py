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
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:the loss is NaN or infinite at 2 of 2 positions")
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_classes_are_any_integers(dtype):
    line = Connection.straight_between(*two_of(mlp()))
    found = line.evaluate([(X, Y.to(dtype))], t=[0, 1])
    assert torch.equal(found.loss, line.evaluate([(X, Y)], t=[0, 1]).loss)
    assert float(found.accuracy[0]) == float((line.model_at(0)(X).argmax(1) == Y).double().mean())
    extra = {"perplexity": metrics.Perplexity(), "top": metrics.top_k(2), "other": metrics.disagreement("a")}
    measured, expected = (line.evaluate([(X, y)], t=[1], metrics=extra).metrics for y in (Y.to(dtype), Y))
    assert measured == expected
    attacked, expected = (line.robustness([(X, y)], ATTACK, t=[0.5]).loss["worst"] for y in (Y.to(dtype), Y))
    assert torch.equal(attacked, expected)
    assert torch.equal(*(line.curvature([(X, y)], t=[0.5]).eigenvalue for y in (Y.to(dtype), Y)))
    fitted = [modeconn.fit_curve(*two_of(mlp()), [(X, y)], recipe=modeconn.Recipe(1)) for y in (Y.to(dtype), Y)]
    assert torch.equal(*(one.control_points for one in fitted))


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


@pytest.mark.parametrize("name", ["default", "ignored", "weights", "weights, ignored"])
@pytest.mark.parametrize("size", [12, 5, 3])
def test_losses_of_training_and_matching_are_the_same_mean(name, size):
    loss_fn, y = LOSSES[name]
    a, b = two_of(mlp())
    data = split(X, y, size)
    still = modeconn.Recipe(1, functools.partial(torch.optim.SGD, lr=1e-30), modeconn.constant, 0.0)
    fitted = modeconn.fit_curve(a, a, data, recipe=still, loss_fn=loss_fn)
    assert fitted.history.loss[0] == pytest.approx(float(loss_fn(a(X), y).detach()), rel=1e-5)
    for method in (modeconn.Sinkhorn, modeconn.StraightThrough):
        found = modeconn.align(a, b, data, method=method(num_steps=1, loss_fn=loss_fn))
        whole = modeconn.align(a, b, [(X, y)], method=method(num_steps=1, loss_fn=loss_fn))
        assert found.history[0] == pytest.approx(whole.history[0], rel=1e-5)


def test_training_on_nothing_that_counts_is_refused():
    a, b = two_of(mlp())
    data = [(X, torch.full((12,), -100))]
    with pytest.raises(ValueError, match="no target of the loader's batches counts"):
        modeconn.fit_curve(a, b, data, recipe=modeconn.Recipe(epochs=1))
    with pytest.raises(ValueError, match="no target of the loader's batches counts"):
        modeconn.align(a, b, [*data, *data], method=modeconn.Sinkhorn(num_steps=1))
    some = [*data, (X, Y)]
    assert modeconn.fit_curve(a, b, some, recipe=modeconn.Recipe(epochs=1)).control_points.isfinite().all()
    assert all(
        p.isfinite().all() for p in modeconn.models.train(a, some, recipe=modeconn.Recipe(epochs=1)).parameters()
    )


class Gaps:
    """A loader without a length whose second batch is nothing, as of a collate_fn that leaves examples out."""

    def __iter__(self):
        yield X[:4], Y[:4]
        yield None
        yield X[4:], Y[4:]


def test_a_batch_that_is_nothing_does_not_end_an_epoch():
    a, b = two_of(mlp())
    with pytest.raises(ValueError, match="loader must yield batches, but one of them is None"):
        modeconn.fit_curve(
            a, b, Gaps(), recipe=modeconn.Recipe(epochs=1), forward=lambda model, batch: model(batch[0]).mean()
        )


def flat(outputs, targets):
    return (outputs.argmax(1) != targets).float().mean()


@pytest.mark.parametrize("verb", ["fit", "train", "sinkhorn", "attack", "best_swap"])
def test_a_loss_without_a_gradient_is_refused_where_something_is_learned(verb):
    a, b = two_of(mlp())
    one = modeconn.Recipe(epochs=1)
    verbs = {
        "fit": lambda: modeconn.fit_curve(a, b, [(X, Y)], recipe=one, loss_fn=flat),
        "train": lambda: modeconn.models.train(a, [(X, Y)], recipe=one, loss_fn=flat),
        "sinkhorn": lambda: modeconn.align(a, b, [(X, Y)], method=modeconn.Sinkhorn(num_steps=1, loss_fn=flat)),
        "attack": lambda: modeconn.PGD(0.1, 0.1, 1, loss_fn=flat)(a, X, Y),
        "best_swap": lambda: modeconn.best_swap(
            modeconn.fit_curve(a, b, [(X, Y)], align=modeconn.WeightMatching()), loss_fn=flat
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="loss_fn= returns a loss without a gradient"):
            verbs[verb]()


def test_best_swap_of_a_loss_that_is_not_finite_is_refused():
    a, b = two_of(mlp())
    fitted = modeconn.fit_curve(a, b, [(X, Y)], align=modeconn.WeightMatching(), recipe=modeconn.Recipe(epochs=1))
    with pytest.raises(FloatingPointError, match="the loss along the curve is nan"):
        modeconn.best_swap(fitted, [(X * torch.nan, Y)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X.double(), Y), "does not run on the inputs of a batch, Tensor of float64"),
        ((X[:, :3], Y), "does not run on the inputs of a batch, Tensor of float32"),
        (((X, X), Y), "inputs that are one dense tensor, got tuple"),
        ((X.numpy(), Y), "inputs that are one dense tensor, got ndarray"),
        (((X * 200).byte(), Y), "inputs of an attack must be floating point, got torch.uint8"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "train"])
def test_what_cannot_be_attacked_is_refused_in_training(batch, message, verb):
    a, b = two_of(mlp())
    one = modeconn.Recipe(epochs=1)
    verbs = {
        "fit": lambda: modeconn.fit_curve(a, b, [(X, Y), batch], recipe=one, adversary=ATTACK, align=False),
        "train": lambda: modeconn.models.train(a, [(X, Y), batch], recipe=one, adversary=ATTACK),
    }
    with pytest.raises(ValueError, match=message):
        verbs[verb]()
    with pytest.raises(ValueError, match=r"inputs|does not run"):
        modeconn.align(a, b, [(X, Y), batch], method=modeconn.ActivationMatching(adversary=ATTACK))


@pytest.mark.parametrize("size", [10, 4])
def test_packed_sequences_count_as_sequences(size):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 5), nn.Linear(5, 3)

        def forward(self, *packed):
            return self.head(self.rnn(nn.utils.rnn.PackedSequence(*packed))[1][-1])

    generator = torch.Generator().manual_seed(0)
    sequences = [torch.rand(2 + number % 5, 3, generator=generator) for number in range(10)]
    y = torch.arange(10) % 3
    data = [
        (nn.utils.rnn.pack_sequence(sequences[i : i + size], enforce_sorted=False), y[i : i + size])
        for i in range(0, 10, size)
    ]
    line = Connection.straight_between(*two_of(Recurrent))
    found = line.evaluate(data, t=[0, 1], forward=lambda model, batch: F.cross_entropy(model(*batch[0]), batch[1]))
    whole = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    expected = float(F.cross_entropy(line.model_at(0)(*whole), y).detach())
    assert found.num_examples == 10 and float(found.loss[0]) == pytest.approx(expected, rel=1e-5)


def test_norm_layers_that_always_use_the_batch_are_told_of():
    def make():
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))

    line = Connection.straight_between(*two_of(make))
    with pytest.warns(UserWarning, match=r"norm layers '1' use the statistics of each batch.*depend on the batch size"):
        line.evaluate(split(X, Y, 5), t=[0, 1])


@pytest.mark.parametrize("size", [12, 5])
def test_a_class_of_weight_0_counts_for_nothing(size):
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]))
    line = Connection.straight_between(*two_of(mlp()))
    data = split(X, UNEVEN, size)
    expected = float(loss_fn(at(line, 0.5)(X), UNEVEN).detach())
    assert float(line.evaluate(data, t=[0.5], loss_fn=loss_fn).loss[0]) == pytest.approx(expected, rel=1e-5)
    assert float(line.robustness(data, ATTACK, t=[0.5], loss_fn=loss_fn).loss["clean"][0]) == pytest.approx(
        expected, rel=1e-5
    )
    assert line.curvature(data, t=[0.5], wrt="inputs", loss_fn=loss_fn).eigenvalue.isfinite().all()
    nothing = nn.CrossEntropyLoss(weight=torch.zeros(3))
    with pytest.raises(ValueError, match="no target of loader counts"):
        line.evaluate(data, t=[0.5], loss_fn=nothing)


@pytest.mark.parametrize("size", [12, 5])
def test_a_loss_that_sums_is_a_mean_over_examples_everywhere(size):
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum")
    a, b = two_of(mlp())
    line, data = Connection.straight_between(a, b), split(X, UNEVEN, size)
    expected = float(loss_fn(a(X), UNEVEN).detach()) / 12
    assert float(line.evaluate(data, t=[0], loss_fn=loss_fn).loss[0]) == pytest.approx(expected, rel=1e-5)
    assert float(line.robustness(data, ATTACK, t=[0], loss_fn=loss_fn).loss["clean"][0]) == pytest.approx(
        expected, rel=1e-5
    )
    still = modeconn.Recipe(1, functools.partial(torch.optim.SGD, lr=1e-30), modeconn.constant, 0.0)
    fitted = modeconn.fit_curve(a, a, data, recipe=still, loss_fn=loss_fn, align=modeconn.WeightMatching())
    assert fitted.history.loss[0] == pytest.approx(expected, rel=1e-5)
    # Batches come again and again, to be measured at more places, so that not all of them come equally often.
    assert modeconn.best_swap(fitted, num_batches=None).loss == pytest.approx(expected, rel=2e-2)
    with pytest.raises(ValueError, match="count as examples for a loss that sums"):
        line.robustness(split(X, SOME, size), ATTACK, t=[0], loss_fn=loss_fn)


def test_probabilities_count_as_places_do():
    line = Connection.straight_between(*two_of(Tokens))
    parts = [IDS[:4, :length] for length in (3, 5, 2)]
    hard = [(ids, ids.roll(1, 1)) for ids in parts]
    soft = [(ids, F.one_hot(targets, 9).float()) for ids, targets in hard]
    found, expected = (line.evaluate(data, t=[0, 0.5]).loss.tolist() for data in (soft, hard))
    assert found == pytest.approx(expected, rel=1e-5)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = mlp()()

    def forward(self, x):
        return self.part(x + 0.05 * torch.randn_like(x))


def test_networks_that_draw_random_numbers_are_not_told_of():
    line = Connection.straight_between(*two_of(Noisy))
    data = split(torch.rand(300, 4), torch.arange(300) % 3, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.evaluate(data, t=[0, 1], loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets))


@pytest.mark.parametrize("answer", [lambda wrong: wrong.sum(), lambda wrong: wrong.any()])
@pytest.mark.filterwarnings("ignore:the loss is no mean")
def test_a_loss_may_be_an_integer(answer):
    line = Connection.straight_between(*two_of(mlp()))
    found = line.evaluate([(X, Y)], t=[0, 1], loss_fn=lambda outputs, targets: answer(outputs.argmax(1) != targets))
    assert float(found.loss[0]) == float(answer(line.model_at(0)(X).argmax(1) != Y))
    with pytest.raises(ValueError, match="returns a loss without a gradient"):
        line.curvature(
            [(X, Y)], t=[0.5], loss_fn=lambda outputs, targets: (outputs.argmax(1) != targets).float().mean()
        )


@pytest.mark.parametrize("name", sorted(NO_MEANS.keys() - {"spread out", "ignored"}))
def test_robustness_tells_of_a_loss_that_is_no_mean(name):
    loss_fn, y = NO_MEANS[name]
    a, _ = two_of(mlp())
    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        modeconn.robustness(a, split(X, y, 6), ATTACK, loss_fn=loss_fn)
    noisy = lambda outputs, targets: F.cross_entropy(outputs + 0.01 * torch.randn_like(outputs), targets)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modeconn.robustness(a, split(X, Y, 6), ATTACK, loss_fn=noisy)
        modeconn.robustness(a, split(X, UNEVEN, 6), ATTACK, loss_fn=nn.CrossEntropyLoss(weight=WEIGHTS))


@pytest.mark.parametrize("adversary", [None, ATTACK], ids=["clean", "attacked"])
def test_a_batch_whose_classes_all_weigh_0_moves_nothing(adversary):
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]))
    a, b = two_of(mlp())
    data = [(X[:4], torch.zeros(4, dtype=torch.int64)), (X[4:], UNEVEN[4:])]

    def by_hand(outputs, targets):
        return loss_fn(outputs, targets) if targets.any() else 0.0 * outputs.sum()

    if adversary is not None:
        adversary = modeconn.PGD(0.1, 0.05, 2, loss_fn=loss_fn, seed=0)
    settings = {"recipe": modeconn.Recipe(2), "align": False, "adversary": adversary}
    fitted, expected = (modeconn.fit_curve(a, b, data, loss_fn=fn, **settings) for fn in (loss_fn, by_hand))
    assert fitted.control_points.isfinite().all()
    assert torch.equal(fitted.control_points, expected.control_points)
    at_once = [(X, torch.cat([y for _, y in data]))]
    found, whole = (fitted.curvature(batches, t=[0.5], loss_fn=loss_fn).eigenvalue for batches in (data, at_once))
    assert float(found[0]) == pytest.approx(float(whole[0]), rel=1e-3)


def nested(x):
    return torch.nested.nested_tensor(list(x))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            lambda x: x.to(torch.float8_e4m3fn),
            "holds a tensor of torch.float8_e4m3fn, with which torch does not compute",
        ),
        (nested, "holds a nested tensor of the layout torch.strided"),
    ],
    ids=["float8", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_with_which_torch_cannot_compute_are_refused_at_the_door(inputs, message):
    a, b = two_of(mlp())
    line = Connection.straight_between(a, b)
    data = [(X, Y), (inputs(X), Y)]
    verbs = [
        lambda: modeconn.fit_curve(a, b, data, recipe=modeconn.Recipe(1), align=False),
        lambda: modeconn.align(a, b, data[1:]),
        lambda: line.evaluate(data),
        lambda: line.robustness(data, ATTACK),
        lambda: line.curvature(data),
        lambda: line.curvature(data[1:], wrt="inputs"),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match=message):
            verb()


def test_sparse_inputs_have_no_curvature():
    line = Connection.straight_between(*two_of(lambda: nn.Sequential(Dense(), mlp()())))
    assert line.curvature([(X.to_sparse(), Y)], t=[0.5]).eigenvalue.isfinite().all()
    with pytest.raises(
        ValueError, match="must be one dense floating-point tensor for wrt='inputs', got Tensor of sparse"
    ):
        line.curvature([(X.to_sparse(), Y)], t=[0.5], wrt="inputs")


class Dense(nn.Module):
    def forward(self, x):
        return x.to_dense()


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.ones(3), r"two real numbers, got a tensor of shape \(3,\)"),
        (torch.ones((), dtype=torch.complex64), "two real numbers, got a complex tensor"),
    ],
)
def test_what_a_metric_function_sums_is_a_number(total, message):
    line = Connection.straight_between(*two_of(mlp()))
    with pytest.raises(ValueError, match=message):
        line.evaluate([(X, Y)], metrics={"mine": lambda outputs, targets: (total, 1)})


@pytest.mark.parametrize("settings", [(1e308, 0.1), (0.1, 1e308)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_ball_that_no_number_holds_is_refused(settings, norm):
    a, _ = two_of(mlp())
    with pytest.raises(ValueError, match=r"eps and step_size must be at most 8.51e\+37 for inputs of torch.float32"):
        modeconn.PGD(*settings, 2, norm=norm)(a, X, Y)


def test_truth_values_are_called_so():
    line = Connection.straight_between(*two_of(mlp()))
    with pytest.raises(ValueError, match="targets of loader are truth values"):
        line.evaluate([(X, torch.ones(12, 3).bool())])


def test_the_forward_of_a_fit_is_named_where_batches_are_of_another_kind():
    a, b = two_of(mlp())
    data = [{"x": X, "y": Y}]
    forward = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
    fitted = modeconn.fit_curve(a, b, data, forward=forward, align=False, recipe=modeconn.Recipe(1))
    with pytest.raises(ValueError, match=r"A connection remembers that of its fit; .* or loss_fn="):
        fitted.evaluate([(X, Y)])
    assert fitted.evaluate([(X, Y)], t=[0], loss_fn=F.cross_entropy).loss == fitted.evaluate(data, t=[0]).loss


SMOOTH = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 3.0]), label_smoothing=0.2)


@pytest.mark.parametrize("size", [12, 11, 5, 1])
def test_smoothed_labels_of_classes_of_weight_0_count_at_any_batch_size(size):
    line = Connection.straight_between(*two_of(mlp()))
    expected = [float(SMOOTH(at(line, t)(X), UNEVEN).detach()) for t in (0, 0.5, 1)]
    found = line.evaluate(split(X, UNEVEN, size), t=[0, 0.5, 1], loss_fn=SMOOTH)
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="smooths labels and has classes of weight 0"):
        line.robustness(split(X, UNEVEN, size), ATTACK, loss_fn=SMOOTH)


def test_examples_with_unequally_many_targets_are_told_of_where_a_loss_is_not_known():
    line = Connection.straight_between(*two_of(Tokens))
    data = [(ids := IDS[:4, :length], ids.roll(1, 1)) for length in (3, 5)]

    def flat(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def forward(model, batch):
        return flat(model(batch[0]), batch[1])

    for settings in ({"loss_fn": flat}, {"forward": forward}):
        with pytest.warns(UserWarning, match="examples have 3 targets in one batch and 5 in another"):
            line.evaluate(data, t=[0, 1], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.evaluate(data, t=[0, 1])
        line.evaluate([data[0], data[0]], t=[0, 1], forward=forward)
        images = [(torch.rand(4, 3, n, n), Y[:4]) for n in (5, 8)]
        pooled = Connection.straight_between(*two_of(lambda: nn.Sequential(Pool(), nn.Linear(3, 3))))
        pooled.evaluate(images, t=[0, 1], loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_a_loss_that_is_no_mean_is_told_of_in_batches_of_one_and_in_sorted_ones():
    line = Connection.straight_between(*two_of(mlp()))

    def root(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").square().mean().sqrt()

    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        line.evaluate(split(X, Y, 1), t=[0, 1], loss_fn=root)
    weighted = NO_MEANS["weights"][0]
    sorted_targets = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2])
    with pytest.warns(UserWarning, match="the loss is no mean over the examples"):
        line.evaluate(split(X, sorted_targets, 8), t=[0, 1], loss_fn=weighted)


class WithAuxiliary(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.part, self.kind = mlp()(), kind

    def forward(self, x):
        scores = self.part(x)
        parts = {"loss": scores.square().mean(), "features": x.repeat(1, 2), "head": 2 * scores}
        return {"logits": scores, f"aux_{self.kind}": parts[self.kind]}


@pytest.mark.parametrize("kind", ["loss", "features"])
def test_what_is_called_auxiliary_and_has_another_shape_is_no_head(kind):
    line = Connection.straight_between(*two_of(lambda: WithAuxiliary(kind)))
    with pytest.warns(UserWarning, match=f"output 'aux_{kind}', of shape .*, is left out of the loss"):
        found = line.evaluate([(X, Y)], t=[0])
    assert float(found.loss[0]) == pytest.approx(float(F.cross_entropy(line.model_at(0).part(X), Y).detach()), rel=1e-5)
    head = Connection.straight_between(*two_of(lambda: WithAuxiliary("head"))).evaluate([(X, Y)], t=[0])
    scores = line.model_at(0).part(X).detach()
    expected = F.cross_entropy(scores, Y) + 0.3 * F.cross_entropy(2 * scores, Y)
    assert float(head.loss[0]) == pytest.approx(float(expected), rel=1e-5)


def test_one_hot_integers_one_logit_and_nothing_that_counts_are_said_plainly():
    line, one = (Connection.straight_between(*two_of(mlp(n))) for n in (3, 1))
    with pytest.raises(ValueError, match=r"If they are one-hot, pass targets.argmax\(1\), or targets.float\(\)"):
        line.evaluate([(X, F.one_hot(Y, 3))])
    with pytest.raises(ValueError, match="mse_loss or binary_cross_entropy_with_logits"):
        one.evaluate([(X, Y % 2)])
    with pytest.raises(ValueError, match="no target of loader counts"):
        line.curvature([(X, torch.full((12,), -100))], t=[0.5])


def test_networks_made_in_inference_mode_are_refused_where_gradients_are_needed():
    with torch.inference_mode():
        a, b = two_of(mlp())
    for verb in (
        lambda: modeconn.robustness(a, [(X, Y)], ATTACK),
        lambda: modeconn.align(a, b, [(X, Y)]),
        lambda: modeconn.discover(a, X),
    ):
        with pytest.raises(ValueError, match=r"made inside of torch.inference_mode\(\).*Pass copy.deepcopy\(network\)"):
            verb()
    assert all(parameter.requires_grad for parameter in a.parameters())
    assert modeconn.robustness(copy.deepcopy(a), [(X, Y)], ATTACK).num_examples == 12


@pytest.mark.filterwarnings("ignore::modeconn.symmetry.UnknownOperatorWarning")
def test_tables_of_limited_norm_are_not_written_to():
    def make():
        return nn.Sequential(nn.Embedding(9, 6, max_norm=0.5), nn.Flatten(), nn.Linear(30, 3))

    a, b = two_of(make)
    before = copy.deepcopy((a.state_dict(), b.state_dict()))
    data = [(IDS, Y[:10])]
    modeconn.align(a, b, data)
    line = modeconn.fit_curve(a, b, data, recipe=modeconn.Recipe(1))
    line.evaluate(data, num_points=3)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_batch_of_one_that_fits_no_other_is_repaired_with():
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    a, b = two_of(make)
    data = [(torch.rand(4, 3, 4), None), (torch.rand(1, 1, 4), None)]
    merged = modeconn.repair(modeconn.interpolate(a, b), [a, b], data)
    every = torch.cat([x.flatten(0, -2) for x, _ in data])
    outputs = [model(every).detach() for model in (a, b, merged)]
    torch.testing.assert_close(outputs[2].mean(0), (outputs[0].mean(0) + outputs[1].mean(0)) / 2)
    torch.testing.assert_close(outputs[2].std(0), (outputs[0].std(0) + outputs[1].std(0)) / 2)
