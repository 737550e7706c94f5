from __future__ import annotations

import csv
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from modeconn import Connection, metrics, plot
from modeconn.measure.meter import Meter, fetch
from modeconn.measure.profile import Profile
from modeconn.network.loss import cross_entropy
from tests.cases import CASE, ReadsStatistics, batches

CPU = torch.device("cpu")


def profile(**changes) -> Profile:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    values = {
        "t": t,
        "loss": torch.tensor([0.2, 0.9, 0.8, 0.5, 0.4], dtype=torch.float64),
        "accuracy": torch.tensor([0.9, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64),
        "arc_length": 3 * t**2,
        "own_loss": torch.tensor([0.21, 0.41], dtype=torch.float64),
        "own_accuracy": torch.tensor([0.89, 0.79], dtype=torch.float64),
        "num_examples": 500,
        "seconds": 1.5,
    }
    return Profile(**{**values, **changes})


def test_the_barrier_is_measured_from_the_line_between_the_ends():
    assert profile().barrier == pytest.approx(0.9 - (0.75 * 0.2 + 0.25 * 0.4))
    assert profile().accuracy_drop == pytest.approx(0.75 * 0.9 + 0.25 * 0.8 - 0.5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_straight_or_sagging_profile_has_no_barrier(sign):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    loss = 0.3 + 0.1 * t - (sign + 1) * t * (1 - t)
    assert profile(t=t, loss=loss, accuracy=None).barrier == pytest.approx(0, abs=1e-15)


def test_means_over_t_and_over_arc_length_are_named_and_differ():
    accuracy, t, s = profile().accuracy.tolist(), profile().t.tolist(), profile().arc_length.tolist()

    def trapezoid(x):
        return sum((x[i + 1] - x[i]) * (accuracy[i + 1] + accuracy[i]) / 2 for i in range(4)) / x[-1]

    assert profile().mean_accuracy == pytest.approx(trapezoid(t))
    assert profile().arc_mean_accuracy == pytest.approx(trapezoid(s))
    assert profile().mean_accuracy != pytest.approx(profile().arc_mean_accuracy)


def test_a_curve_without_length_has_its_mean_over_t():
    assert profile(arc_length=torch.zeros(5, dtype=torch.float64)).arc_mean_accuracy == profile().mean_accuracy


def test_the_summary_covers_loss_accuracy_and_error():
    summary = profile().summary()
    assert summary["loss"]["max"] == pytest.approx(0.9) and summary["accuracy"]["min"] == pytest.approx(0.5)
    assert summary["error"]["mean"] == pytest.approx(1 - summary["accuracy"]["mean"])
    assert profile(accuracy=None, own_accuracy=None).summary().keys() == {"loss"}


def test_json_keeps_every_field(tmp_path):
    for original in (profile(), profile(accuracy=None, own_accuracy=None)):
        original.to_json(tmp_path / "profile.json")
        copy = Profile.from_json((tmp_path / "profile.json").read_text())
        assert copy.to_json() == original.to_json()
        assert torch.equal(copy.loss, original.loss) and copy.loss.dtype == torch.float64
        assert copy.num_examples == 500 and (copy.accuracy is None) == (original.accuracy is None)


def test_csv_has_one_row_a_point(tmp_path):
    text = profile().to_csv(tmp_path / "profile.csv")
    assert (tmp_path / "profile.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row["loss"]) for row in rows] == profile().loss.tolist()
    assert float(rows[1]["error"]) == 0.5 and rows[0].keys() == {"t", "arc_length", "loss", "accuracy", "error"}


def test_a_profile_prints_as_a_table():
    assert repr(profile()).splitlines() == [
        "Profile(5 points, 500 examples, 1.5 s)",
        "             t=0     t=1  own t=0  own t=1     min     max    mean  arc mean  barrier",
        "loss      0.2000  0.4000   0.2100   0.4100  0.2000  0.9000  0.6250    0.5938   0.6500",
        "accuracy  90.00%  80.00%   89.00%   79.00%  50.00%  90.00%  66.25%    67.81%   37.50%",
    ]
    html = profile()._repr_html_()
    assert (
        html.startswith("<p>5 points, 500 examples, 1.5 s</p><table>")
        and "<th>barrier</th>" in html
        and "<td>0.2100</td>" in html
    )


def test_plot_hands_the_profile_to_the_plot_module(monkeypatch):
    seen = []
    monkeypatch.setattr(plot, "profile", lambda *profiles, **how: seen.append((profiles, how)) or "axes")
    shown = profile()
    assert shown.plot(ax="ax") == "axes" and seen == [((shown,), {"quantity": "loss", "ax": "ax"})]


@pytest.mark.parametrize("last", [1, 5, 12])
def test_every_example_counts_alike_whatever_the_batches(last):
    model, data = CASE["mlp"].make(0, torch.float64), batches(4, 12, last=last, dtype=torch.float64)
    meter = Meter(data, cross_entropy)
    meter.measure(model)
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    loss, accuracy = meter.results().loss, meter.results().accuracy
    torch.testing.assert_close(loss[0], cross_entropy(model(inputs), targets).cpu())
    torch.testing.assert_close(accuracy[0], (model(inputs).argmax(1) == targets).double().mean().cpu())
    assert meter.num_examples == 36 + last


def test_auxiliary_outputs_do_not_count_for_accuracy():
    class WithAuxiliary(nn.Module):
        def forward(self, x):
            right = nn.functional.one_hot(x.long(), 3).float()
            return namedtuple("Outputs", ("logits", "aux"))(right, right.flip(1))

    meter = Meter([(torch.tensor([0.0, 2.0]), torch.tensor([0, 2]))], cross_entropy)
    meter.measure(WithAuxiliary())
    assert meter.results().accuracy.tolist() == [1.0]


def test_targets_that_are_no_classes_have_a_loss_but_no_accuracy():
    meter = Meter([(torch.ones(4, 2), torch.zeros(4, 2))], nn.functional.mse_loss)
    meter.measure(nn.Identity())
    loss, accuracy = meter.results().loss, meter.results().accuracy
    assert loss.tolist() == [1.0] and accuracy is None


def test_batches_of_another_kind_are_measured_by_their_own_forward():
    meter = Meter([{"x": torch.ones(3)}, {"x": torch.zeros(1)}], cross_entropy, lambda model, batch: batch["x"].mean())
    meter.measure(nn.Identity())
    assert meter.results().loss.tolist() == [0.75] and meter.results().accuracy is None and meter.num_examples == 4


@pytest.mark.parametrize("target", [3, -1])
def test_a_target_outside_the_classes_is_an_error(target):
    data = batches(2)
    data[1][1][4] = target
    with pytest.raises(ValueError, match=rf"must lie in 0\.\.2, the model's 3 classes, got a target of {target};"):
        Meter(data, cross_entropy).measure(CASE["mlp"].make(0))


class Counting:
    def __init__(self, data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


def test_data_is_read_once_unless_it_is_too_much_to_keep():
    for limit, passes in ((1 << 30, 1), (100, 4)):
        loader = Counting(batches())
        data = fetch(loader, CPU, limit=limit)
        assert [len(list(data)) for _ in range(3)] == [5, 5, 5]
        assert loader.passes == passes


def test_a_loss_with_one_entry_is_a_loss():
    connection = Connection.straight_between(*(CASE["mlp"].make(seed, torch.float64) for seed in (0, 1)))
    data = batches(2, dtype=torch.float64)

    def forward(model, batch):
        return model(batch[0]).square().mean()

    found = connection.evaluate(data, num_points=3, forward=lambda *given: forward(*given)[None])
    plain = connection.evaluate(data, num_points=3, forward=forward)
    assert torch.equal(found.loss, plain.loss) and found.barrier == plain.barrier


def test_one_metric_under_two_names_is_refused_and_numbers_of_any_kind_are_taken():
    class Ones:
        def update(self, outputs, targets):
            pass

        def reset(self):
            pass

        def compute(self):
            return np.float32(1.5)

    connection = Connection.straight_between(*(CASE["mlp"].make(seed) for seed in (0, 1)))
    assert connection.evaluate(batches(1), num_points=2, metrics={"one": Ones()}).values["one"].tolist() == [1.5, 1.5]
    same = Ones()
    with pytest.raises(ValueError, match="'one' is one object under several names"):
        connection.evaluate(batches(1), num_points=2, metrics={"one": same, "two": same})


def test_layers_are_compared_by_what_they_make_even_if_the_next_works_in_place():
    def network(seed, inplace):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3))

    found = [
        Connection.straight_between(*(network(seed, inplace) for seed in (0, 1)))
        .evaluate(batches(2), num_points=3, metrics={"cka": metrics.cka("b", layer="1")})
        .values["cka"]
        for inplace in (False, True)
    ]
    torch.testing.assert_close(*found)


def test_a_loss_that_is_nan_is_told():
    line = Connection.straight_between(*(nn.Linear(3, 2) for _ in range(2)))
    x = torch.randn(4, 3)
    x[1] = torch.nan
    with pytest.warns(
        UserWarning, match=r"the loss is NaN or infinite at 3 of 3 positions, the first t=0\. Look for values"
    ):
        line.evaluate([(x, torch.tensor([0, 1, 0, 1]))], num_points=3)


def test_norm_layers_that_stay_as_they_are_are_named_beside_those_that_do_not():
    data = [(torch.randn(8, 3), torch.randint(4, (8,)))]
    line = Connection.straight_between(ReadsStatistics(), ReadsStatistics())
    with pytest.warns(UserWarning, match="norm layers 'last' are used in a way in which they cannot be estimated"):
        profile = line.evaluate(data, num_points=3, recalibrate=data)
        assert profile.statistics.endswith(
            "on 8 training examples, but for 'last', whose statistics cannot be estimated"
        )
        attacked = line.curvature(data, num_points=2, recalibrate=data)
        assert attacked.statistics == profile.statistics
