"""Metrics along a curve, against their definitions on all outputs at once."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn
from modeconn import Connection, TrainingData, metrics
from modeconn.data import TensorLoader

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))


def network(seed: int, *, norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).double().eval()


def line(*, norm: bool = False, loader: object = None) -> Connection:
    return Connection.straight_between(network(1, norm=norm), network(2, norm=norm), training=TrainingData(loader))


def outputs(connection: Connection, num_points: int = 3) -> list[Tensor]:
    with torch.no_grad():
        return [connection.model_at(t)(X) for t in torch.linspace(0, 1, num_points).tolist()]


class Biggest:
    """The largest output of all: no sum could give it."""

    higher_is_better = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.value = -math.inf

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.value = max(self.value, float(outputs.max()))

    def compute(self) -> float:
        return self.value


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def naive_cka(x: Tensor, y: Tensor) -> float:
    """By the matrices of all pairs of examples (Kornblith et al., 2019)."""
    of_x, of_y = (centred(one) @ centred(one).T for one in (x.detach(), y.detach()))
    return float((of_x * of_y).sum() / (of_x.norm() * of_y.norm()))


EXPECTED = {
    "biggest": (Biggest, lambda out, ends: float(out.max())),
    "top 2": (
        lambda: metrics.top_k(2),
        lambda out, ends: sum(int(y) in row.topk(2)[1] for row, y in zip(out, Y, strict=True)) / 50,
    ),
    "perplexity": (metrics.Perplexity, lambda out, ends: math.exp(F.cross_entropy(out, Y))),
    "function": (lambda: lambda out, y: (out.sum(), len(y)), lambda out, ends: float(out.sum()) / 50),
    "differs from a": (
        lambda: metrics.disagreement("a"), lambda out, ends: float((out.argmax(1) != ends[0].argmax(1)).double().mean())
    ),
    "differs from b": (
        lambda: metrics.disagreement("b"), lambda out, ends: float((out.argmax(1) != ends[1].argmax(1)).double().mean())
    ),
    "cka with a": (lambda: metrics.cka("a"), lambda out, ends: naive_cka(out, ends[0])),
    "cka with b": (lambda: metrics.cka("b"), lambda out, ends: naive_cka(out, ends[1])),
    "own against b": (
        lambda: metrics.Against("b", lambda out, other: ((out - other).abs().sum(), len(out))),
        lambda out, ends: float((out - ends[1]).abs().sum()) / 50,
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [50, 7, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_is_what_its_definition_says_of_all_examples_whatever_the_batches(name, batch_size):
    make, define = EXPECTED[name]
    connection = line()
    profile = connection.evaluate(TensorLoader(X, Y, batch_size=batch_size), num_points=3, metrics={name: make()})
    said = outputs(connection)
    expected = torch.tensor([define(out, (said[0], said[-1])) for out in said], dtype=torch.float64)
    torch.testing.assert_close(profile.metrics[name], expected)
    torch.testing.assert_close(profile.own_metrics[name], expected[[0, -1]])


def test_layers_are_compared_by_name():
    connection = line()
    profile = connection.evaluate(
        [(X[:20], Y[:20]), (X[20:], Y[20:])], num_points=3, metrics={"h": metrics.cka("a", layer="0")}
    )
    hidden = [connection.model_at(t)[0](X) for t in (0.0, 0.5, 1.0)]
    assert profile.metrics["h"].tolist() == pytest.approx([naive_cka(one, hidden[0]) for one in hidden])
    with pytest.raises(ValueError, match="the model has no layer 'x'; its layers are 0, 1, 2"):
        connection.evaluate([(X, Y)], num_points=2, metrics={"h": metrics.cka("a", layer="x")})


def test_ends_are_compared_with_the_statistics_they_have_among_the_points():
    data = [(X, Y)]
    profile = line(norm=True, loader=data).evaluate(
        data, num_points=3, metrics={"a": metrics.disagreement("a"), "b": metrics.cka("b")}
    )
    assert profile.metrics["a"][0] == 0 and profile.metrics["b"][-1] == pytest.approx(1)
    assert profile.own_metrics["a"][0] > 0  # running statistics of a new network are far off


def test_what_is_too_large_to_keep_is_computed_again(monkeypatch):
    named = {"a": metrics.disagreement("a"), "b": metrics.cka("b", layer="0")}
    data = TensorLoader(X, Y, batch_size=8)
    kept = line().evaluate(data, num_points=3, metrics=named)
    monkeypatch.setattr(modeconn.measure.meter, "_KEPT_BYTES", 1000)
    again = line().evaluate(data, num_points=3, metrics=named)
    for name in named:
        assert torch.equal(kept.metrics[name], again.metrics[name])


def test_a_metric_is_in_table_files_and_figures_and_has_a_barrier_if_it_says_its_way(tmp_path):
    profile = line().evaluate(
        [(X, Y)], num_points=5, metrics={"big": Biggest(), "mean": lambda out, y: (out.sum(), len(y))}
    )
    assert "\nbig " in repr(profile) and ">mean</td>" in profile._repr_html_()
    assert profile.to_csv().splitlines()[0] == "t,arc_length,loss,accuracy,error,big,mean"
    copy = modeconn.Profile.from_json(profile.to_json())
    assert torch.equal(copy.metrics["big"], profile.metrics["big"]) and repr(copy) == repr(profile)
    assert profile.plot(quantity="big").get_ylabel() == "big"
    assert profile.barrier_of("big") >= 0 and math.isnan(profile.barrier_of("mean"))


def test_forward_gives_outputs_and_targets_to_metrics_and_may_always_do_so():
    def forward(model, batch):
        out = model(batch["x"])
        return F.cross_entropy(out, batch["y"]), out, batch["y"]

    def loss_alone(model, batch):
        return forward(model, batch)[0]

    data = [{"x": X[:30], "y": Y[:30]}, {"x": X[30:], "y": Y[30:]}]
    named = {"big": Biggest(), "a": metrics.disagreement("a")}
    plain = line().evaluate([(X, Y)], num_points=3, metrics=named)
    found = line().evaluate(data, num_points=3, forward=forward, metrics=named)
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(found.accuracy, plain.accuracy)
    assert all(torch.equal(found.metrics[name], plain.metrics[name]) for name in named)

    recipe = modeconn.Recipe(epochs=2, optimizer=torch.optim.Adam)
    how = {"recipe": recipe, "seed": 3}
    how |= {"align": modeconn.WeightMatching(), "refine": modeconn.PAM(iterations=1), "example_input": X}
    fits = [modeconn.fit_curve(network(1), network(2), data, forward=one, **how) for one in (forward, loss_alone)]
    assert torch.equal(fits[0].control_points, fits[1].control_points)
    assert fits[0].evaluate(data, num_points=2, metrics=named).accuracy is not None
    with pytest.raises(ValueError, match=r"with metrics=, forward= must return \(loss, outputs, targets\)"):
        fits[1].evaluate(data, num_points=2, metrics=named)
    trained = [modeconn.models.train(network(1), data, recipe=recipe, forward=one) for one in (forward, loss_alone)]
    assert torch.equal(trained[0][0].weight, trained[1][0].weight)


def test_classes_in_the_last_axis_are_asked_for_by_name():
    scores = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    for metric in (metrics.Perplexity(axis=-1), metrics.top_k(2, axis=-1)):
        metric.update(scores, targets)
        twin = metrics.Perplexity() if isinstance(metric, metrics.Perplexity) else metrics.top_k(2)
        twin.update(scores.movedim(-1, 1), targets)
        assert float(metric.compute()) == pytest.approx(float(twin.compute()))
        with pytest.raises(
            ValueError, match=r"with classes in axis 1, outputs of shape \(3, 5, 7\) do not fit targets"
        ):
            type(metric).update(twin, scores, targets)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda out, y: out.mean(), r"metric 'm' is a function, so it must return \(sum, weight\) of a batch"),
        (metrics.Perplexity, r"metric 'm' is a class; pass an object of it, Perplexity\(...\)"),
        ("ece", "metric 'm' must have update, compute and reset, or be a function"),
        (metrics.top_k(5), "k must be at most the number of classes, 4, got k=5"),
    ],
)
def test_what_is_no_metric_is_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        line().evaluate([(X, Y)], num_points=2, metrics={"m": metric})


def test_names_ends_and_results_out_of_range_are_refused():
    with pytest.raises(ValueError, match="metrics must not be named t, arc_length, loss, accuracy, error, got 'loss'"):
        line().evaluate([(X, Y)], metrics={"loss": Biggest()})
    with pytest.raises(ValueError, match=r"end must be 'a' \(t=0\) or 'b' \(t=1\), got end='c'"):
        metrics.cka("c")
    with pytest.raises(ValueError, match="k must be at least 1, got k=0"):
        metrics.top_k(0)

    class Matrix(Biggest):
        def compute(self):
            return torch.eye(2)

    with pytest.raises(ValueError, match="metric 'm' must compute one number, got tensor"):
        line().evaluate([(X, Y)], num_points=2, metrics={"m": Matrix()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.top_k("x"), "k must be an integer, got k='x'"),
        (lambda: metrics.top_k(1.5), "k must be an integer, got k=1.5"),
        (lambda: metrics.top_k(math.inf), "k must be an integer, got k=inf"),
        (lambda: metrics.top_k(1, axis="x"), "axis must be an integer, got axis='x'"),
        (lambda: metrics.cka("a", layer=3), "layer must be a string or None, got layer=3"),
        (lambda: metrics.Perplexity(axis="x"), "axis must be an integer, got axis='x'"),
        (lambda: metrics.Perplexity(ignore_index=[]), r"ignore_index must be an integer, got ignore_index=\[\]"),
        (lambda: metrics.Quotient(3), "function must be a function, got function=3"),
    ],
)
def test_settings_of_another_kind_are_refused_where_they_are_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_a_tempered_loss_is_the_least_over_temperatures(scale):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (400,), generator=generator)
    scores = scale * (torch.randn(400, 5, generator=generator) + 2 * F.one_hot(targets, 5))
    least = scipy.optimize.minimize_scalar(
        lambda log_t: F.cross_entropy(scores.double() / math.exp(log_t), targets).item(), bounds=(-2, 2)
    ).fun
    metric, last = metrics.TemperedLoss(), metrics.TemperedLoss(axis=-1)
    for part in torch.arange(400).split(150):
        metric.update(scores[part], targets[part])
        last.update(scores[part].view(-1, 50, 5), targets[part].view(-1, 50))
    assert float(metric.compute()) == pytest.approx(least, abs=2e-5)
    assert float(last.compute()) == pytest.approx(least, abs=2e-5)
    assert float(metric.compute()) <= F.cross_entropy(scores, targets).item() + 1e-6


def test_a_tempered_loss_of_a_network_that_is_always_right_is_that_of_the_coldest():
    targets = torch.arange(3)
    metric = metrics.TemperedLoss()
    metric.update(torch.eye(3), targets)
    assert float(metric.compute()) == pytest.approx(
        F.cross_entropy(torch.eye(3).double() * math.exp(2), targets).item()
    )
