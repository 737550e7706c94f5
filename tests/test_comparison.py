from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import random
import sys
from dataclasses import replace
from functools import partial

import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import nn

import modeconn
from modeconn import ActivationMatching, Bezier, Comparison, Connection, Recipe, WeightMatching, compare, data, models
from modeconn.data import TensorLoader
from modeconn.matching import Match, alignment
from modeconn.measure.profile import Meter, Profile
from modeconn.network.loss import TrainingData
from modeconn.tools.memory import peak_memory
from tests.cases import Residual

RECIPE = Recipe(2, partial(torch.optim.Adam, lr=3e-3), weight_decay=0.0)
METHODS = {"weights": WeightMatching(), "activations": ActivationMatching()}
TIMES = ("seconds", "curve seconds", "peak bytes")


def digits() -> tuple[TensorLoader, TensorLoader]:
    train, test = data.load("digits")
    return train.with_(batch_size=128), test.with_(batch_size=500)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[nn.Module, nn.Module]]:
    train, _ = digits()
    untrained = [models.mlp(64, (12, 12), 10, seed=seed) for seed in range(4)]
    trained = models.train_population(untrained, train, recipe=RECIPE)
    return [(trained[0], trained[1]), (trained[2], trained[3])]


@pytest.fixture(scope="module")
def compared(pairs) -> Comparison:
    return compare(pairs, METHODS, *digits(), num_points=5, recipe=RECIPE)


def untimed(comparison: Comparison) -> dict:
    return {
        row: {column: cells for column, cells in columns.items() if column not in TIMES}
        for row, columns in comparison.values.items()
    }


# -- every cell is what the package's other verbs give


@pytest.mark.parametrize("row", METHODS)
def test_cells_are_what_align_fit_curve_and_evaluate_give(pairs, compared, row):
    train, test = digits()
    for number, (a, b) in enumerate(pairs):
        with modeconn.tools.rng.seeded(0):  # as compare does: the order in which activations are summed up
            permutation = modeconn.align(a, b, train, method=METHODS[row]).permutation
        line = Connection.straight_between(a, permutation.apply(b), training=TrainingData(train))
        curve = modeconn.fit_curve(a, b, train, align=permutation, recipe=RECIPE)
        profiles = {
            "line": line.evaluate(test, num_points=5),
            "repaired": line.evaluate(test, num_points=5, repair=True),
            "curve": curve.evaluate(test, num_points=5),
        }
        for column, profile in profiles.items():
            assert compared.values[row][column][number] == pytest.approx(profile.barrier, abs=1e-7)
            lost = compared.values[row][f"{column} accuracy lost"][number]
            assert lost == pytest.approx(profile.accuracy_drop, abs=1e-9)
        assert compared.values[row]["seconds"][number] > 0


def test_identity_is_b_as_it_is_and_random_another_relabelling_for_each_pair(pairs, compared):
    train, test = digits()
    straight = [Connection.straight_between(*pair).evaluate(test, num_points=5).barrier for pair in pairs]
    assert compared.values["identity"]["line"] == pytest.approx(straight)
    same = compare([pairs[0], pairs[0]], {}, train, test, num_points=5, repair=False).values
    assert same["identity"]["line"][0] == same["identity"]["line"][1]
    assert same["random"]["line"][0] != same["random"]["line"][1]
    moved = compare([pairs[0]], {}, train, test, num_points=5, repair=False, seed=1).values["random"]["line"][0]
    assert moved == pytest.approx(same["random"]["line"][1])


def test_without_recalibration_running_statistics_lie_on_the_line_too():
    inputs = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    train, ends = TensorLoader(inputs, torch.arange(40) % 3, batch_size=20), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(models.train(Residual(), train, recipe=replace(RECIPE, epochs=60), seed=seed))
    found = compare([ends], {}, train, train, num_points=5).values["identity"]

    t, meter = torch.linspace(0, 1, 5, dtype=torch.float64), Meter(list(train), modeconn.network.loss.cross_entropy)
    for position in t.tolist():
        between, others = copy.deepcopy(ends[0]), ends[1].state_dict()
        with torch.no_grad():
            for name, tensor in between.state_dict().items():
                if tensor.is_floating_point():
                    tensor.lerp_(others[name], position)
        meter.measure(between)
    expected = Profile(t, meter.results().loss, meter.results().accuracy, arc_length=t)
    recalibrated = Connection.straight_between(*ends, training=TrainingData(train)).evaluate(train, num_points=5)
    assert found["line"][0] == pytest.approx(expected.barrier, abs=1e-6)
    assert found["repaired"][0] == pytest.approx(recalibrated.barrier, abs=1e-6)
    assert expected.barrier > recalibrated.barrier + 1e-3


def test_files_of_older_versions_have_the_names_of_today():
    text = small().to_json()
    record = json.loads(text.replace("line accuracy lost", "line accuracy"))
    del record["sha256"]  # as in files that were changed on purpose
    assert "line accuracy" in record["values"]["identity"]
    assert modeconn.Comparison.from_json(json.dumps(record)).values == small().values


def test_columns_that_are_not_asked_for_are_absent(pairs):
    found = compare(pairs, METHODS, *digits(), num_points=3, repair=False)
    assert [column for column in found.columns if column not in TIMES] == ["line", "line accuracy lost", "length"]


def test_a_list_of_methods_is_named_by_their_classes(pairs):
    found = compare(pairs[:1], [WeightMatching()], *digits(), num_points=3, repair=False)
    assert list(found.values) == ["identity", "random", "WeightMatching"]


def test_symmetries_are_discovered_once(pairs, monkeypatch):
    calls, discover = [], alignment.discover
    monkeypatch.setattr(alignment, "discover", lambda *args, **how: calls.append(args) or discover(*args, **how))
    found = compare(pairs, METHODS, *digits(), num_points=3, repair=False)
    assert len(calls) == 1
    again = compare(pairs, METHODS, *digits(), num_points=3, repair=False, spec=discover(pairs[0][0]))
    assert len(calls) == 1 and untimed(again) == untimed(found)


def test_networks_and_random_states_are_left_as_they_were(pairs):
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for pair in pairs for model in pair]
    state, python = torch.get_rng_state(), random.getstate()
    compare(pairs, METHODS, *digits(), num_points=3)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    after = [model.state_dict() for pair in pairs for model in pair]
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old)


# -- a long comparison survives


class Failing:
    """Weight matching that counts all calls, and can be stopped at one of them: neither is part of what it is."""

    calls = 0
    at = None

    def match(self, spec, model_a, model_b, loader):
        Failing.calls += 1
        if Failing.calls == Failing.at:
            raise KeyboardInterrupt
        return WeightMatching().match(spec, model_a, model_b, loader)


def test_a_killed_comparison_goes_on_where_it_stopped(pairs, tmp_path, monkeypatch):
    path, settings = tmp_path / "records", {"num_points": 3, "repair": False}
    monkeypatch.setattr(Failing, "calls", 0)
    monkeypatch.setattr(Failing, "at", 2)
    with pytest.raises(KeyboardInterrupt):
        compare(pairs, {"x": Failing()}, *digits(), checkpoint=path, **settings)
    kept = path.read_text()
    path.write_text(kept[:-20])  # killed while it wrote the last line: random of the second pair
    monkeypatch.setattr(Failing, "calls", 0)
    monkeypatch.setattr(Failing, "at", None)
    found = compare(pairs, {"x": Failing()}, *digits(), checkpoint=path, **settings)
    assert Failing.calls == 1
    assert untimed(found) == untimed(compare(pairs, {"x": Failing()}, *digits(), **settings))
    again = compare(pairs, {"x": Failing()}, *digits(), checkpoint=path, **settings)
    assert again.values == found.values  # to the last second


def test_methods_that_look_alike_are_each_measured(pairs):
    class Start:
        def __init__(self, permutation):
            self.permutation = permutation

        def match(self, spec, model_a, model_b, loader):
            return Match(self.permutation)

        def __repr__(self) -> str:
            return "Start()"

    spec = modeconn.discover(pairs[0][0])
    starts = {str(seed): Start(spec.random(torch.Generator().manual_seed(seed))) for seed in (1, 2)}
    together = compare(pairs[:1], starts, *digits(), num_points=3, repair=False, spec=spec)
    alone = compare(pairs[:1], {"2": starts["2"]}, *digits(), num_points=3, repair=False, spec=spec)
    assert together.values["2"]["line"] == alone.values["2"]["line"] != together.values["1"]["line"]


def test_methods_and_pairs_can_be_added_and_other_data_is_measured_anew(pairs, tmp_path):
    path, settings = tmp_path / "records", {"num_points": 3, "repair": False, "checkpoint": tmp_path / "records"}
    train, test = digits()

    def num_new(*args, **changes) -> int:
        before = len(path.read_text().split()) if path.exists() else 0
        compare(*args, **{**settings, **changes})
        return len(path.read_text().split()) - before

    lines = num_new(pairs[:1], {"weights": WeightMatching()}, train, test) // 3  # words in a line
    assert num_new(pairs[:1], METHODS, train, test) == lines
    assert num_new(pairs, METHODS, train, test) == 4 * lines
    assert num_new(pairs, METHODS, train, test) == 0
    assert num_new(pairs, {"weights": WeightMatching(seed=1)}, train, test) == 2 * lines
    assert num_new(pairs, METHODS, train, data.load("digits", seed=1)[1]) == 8 * lines
    assert num_new(pairs[:1], METHODS, train, test, num_points=5) == 4 * lines
    first, second, *_ = test.with_(batch_size=100)
    assert num_new(pairs[:1], METHODS, train, [first]) == 4 * lines
    assert num_new(pairs[:1], METHODS, train, [first, second]) == 4 * lines
    assert num_new(pairs[:1], METHODS, list(train)[:1], test) == 4 * lines
    assert num_new(pairs[:1], METHODS, list(train)[:2], test) == 4 * lines
    known, fewer = (modeconn.discover(pairs[0][0], freeze=names) for names in ((), ("layers.0.bias",)))
    assert num_new(pairs[:1], METHODS, train, test, spec=known) == 0
    assert num_new(pairs[:1], METHODS, train, test, spec=fewer) == 4 * lines


def test_imports_that_happen_once_are_at_no_methods_expense(pairs, monkeypatch):
    class Watching:
        def match(self, spec, model_a, model_b, loader):
            assert "scipy.optimize" in sys.modules
            return WeightMatching().match(spec, model_a, model_b)

    monkeypatch.delitem(sys.modules, "scipy.optimize", raising=False)
    compare(pairs[:1], [Watching()], *digits(), num_points=2, repair=False)


# -- the table


def small() -> Comparison:
    values = {
        "identity": {"line": [1.0, 2.0, 4.0], "line accuracy lost": [0.5, 0.5, 0.5], "seconds": [1.0, 1.0, 9.0]},
        "weights": {"line": [0.5, 0.5, 3.0], "line accuracy lost": [0.1, 0.2, 0.3], "seconds": [0.5, 1.0, 1.5]},
    }
    return Comparison(values, num_points=25, num_examples=500)


def test_a_ratio_is_that_of_the_means_with_a_paired_bootstrap():
    ratio, low, high = small().ratio("weights")
    assert ratio == pytest.approx(4 / 7)
    ours, theirs = (small().values[row]["line"] for row in ("weights", "identity"))
    draw, resampled = random.Random(0), []
    for _ in range(20_000):
        chosen = [draw.randrange(3) for _ in range(3)]
        resampled.append(sum(ours[i] for i in chosen) / sum(theirs[i] for i in chosen))
    resampled.sort()
    assert low == pytest.approx(resampled[500], abs=0.02) and high == pytest.approx(resampled[-500], abs=0.02)
    assert small().ratio("weights", column="line accuracy lost")[0] == pytest.approx(0.4)
    assert small().ratio("weights", "weights") == (1, 1, 1)


def test_ratios_to_nothing_are_errors():
    with pytest.raises(ValueError, match="no row 'activations'; there are identity, weights"):
        small().ratio("activations")
    with pytest.raises(ValueError, match="no column 'curve'; there are line"):
        small().ratio("weights", column="curve")
    flat = Comparison({"identity": {"line": [0.0]}, "weights": {"line": [0.1]}}, 25, 500)
    with pytest.raises(ValueError, match=r"the 'line' of 'identity' is 0\.0 in the mean"):
        flat.ratio("weights")


def test_one_pair_shows_no_spread():
    one = Comparison({"identity": {"line": [2.0]}, "weights": {"line": [0.5]}}, 25, 500)
    assert not {"std", "sem"} & one.summary()["weights"]["line"].keys() and "±" not in repr(one)
    ratio, *interval = one.ratio("weights")
    assert ratio == 0.25 and all(math.isnan(bound) for bound in interval)


def test_the_standard_error_of_the_mean_is_in_the_summary():
    cells, found = small().values["weights"]["line"], small().summary()["weights"]["line"]
    assert found["sem"] == pytest.approx(scipy.stats.sem(cells))
    assert found["std"] == pytest.approx(torch.tensor(cells, dtype=torch.float64).std().item())
    lacking = Comparison({"identity": {"line": [1.0, 2.0]}, "random direction": {"line": [math.nan] * 2}}, 25, 500)
    assert math.isnan(lacking.summary()["random direction"]["line"]["sem"])


def test_pairs_without_a_barrier_leave_an_interval():
    one = Comparison({"identity": {"line": [0.0, 1.0]}, "weights": {"line": [0.0, 0.5]}}, 25, 500)
    assert one.ratio("weights") == (0.5, 0.5, 0.5)
    other = Comparison({"identity": {"line": [0.0, 1.0]}, "weights": {"line": [0.5, 0.5]}}, 25, 500)
    assert other.ratio("weights") == (1.0, 0.5, math.inf)


def test_of_networks_with_batch_norm_the_repaired_line_is_what_counts(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).eval()

    found = compare([(made(1), made(2))], {"weights": WeightMatching()}, *digits(), num_points=3)
    again = Comparison.from_json(found.to_json())
    for one in (found, again):
        assert one.headline == "repaired" and "repaired" in one.plot(ax=Figure().subplots()).get_ylabel()
        assert "Line: the straight line, running statistics interpolated; repaired: with its" in repr(one)
        assert "1 pair, 3 points" in one._repr_html_() and "recalibrated" in one._repr_html_()
    record = {
        name: value for name, value in json.loads(found.to_json()).items() if name not in ("statistics", "sha256")
    }
    older = Comparison.from_json(json.dumps(record))  # of a version that did not say it
    assert older.headline == "line" and "with statistics recalibrated, or units rescaled" in repr(older)
    assert small().headline == "line"


def test_it_prints_and_is_written(tmp_path):
    one = small()
    lines = repr(one).splitlines()
    assert lines[0] == "Comparison(3 pairs, 25 points, 500 examples)"
    assert (
        lines[1].split() == "line line accuracy lost seconds".split()
        and len(lines) == 5
        and lines[-1].startswith("Barriers are those of the loss")
    )
    assert "1.3333 ± 1.4434" in lines[3] and "20.00 ± 10.00 %" in lines[3] and lines[3].endswith("  1")
    assert one._repr_html_().count("<tr>") == 3
    assert Comparison.from_json(one.to_json(tmp_path / "c.json")).values == one.values
    assert json.loads((tmp_path / "c.json").read_text())["summary"]["weights"]["line"]["mean"] == pytest.approx(4 / 3)
    rows = list(csv.DictReader(io.StringIO(one.to_csv())))
    assert len(rows) == 6 and rows[1] == {
        **{"pair": "0", "row": "weights", "line": "0.5", "line accuracy lost": "0.1", "seconds": "0.5"}
    }


def test_it_is_drawn():
    ax = small().plot(column="line accuracy lost")
    dots = [list(line.get_ydata()) for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[50, 50, 50], [10, 20, 30]]
    assert [patch.get_height() for patch in ax.patches] == pytest.approx([50, 20])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["identity", "weights"]
    assert "%" in ax.get_ylabel()
    assert [text.get_text() for text in small().plot(rows=["weights"]).get_xticklabels()] == ["weights"]
    with pytest.raises(ValueError, match="no column 'curve'"):
        small().plot(column="curve")


# -- what cannot be compared


def test_no_pair_two_architectures_and_weights_that_are_nan_are_errors(pairs):
    wider = models.mlp(64, (13, 12), 10)
    broken = copy.deepcopy(pairs[1][1])
    broken.layers[0].bias.data[3] = torch.nan
    for wrong, message in (
        ([], "pairs is empty"),
        ([pairs[0], (wider, wider)], r"\(12, 64\) in a of pair 0, \(13, 64\) in a of pair 1"),
        ([pairs[0], (pairs[1][0], broken)], "b of pair 1"),
        (
            [pairs[0], (*pairs[1], broken)],
            r"pairs\[1\] must be a list or tuple of 2, each a torch.nn.Module, got",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compare(wrong, METHODS, *digits())
    for methods in ([None], {"none": None}):
        with pytest.raises(ValueError, match=r"methods must be an object with a match\(\.\.\.\).*got None"):
            compare(pairs, methods, *digits())
    for num_points in (0, 1, 2.5):
        with pytest.raises(ValueError, match=f"num_points must be an integer.*, got num_points={num_points}"):
            compare(pairs, METHODS, *digits(), num_points=num_points)


def test_two_rows_of_one_name_are_an_error(pairs):
    with pytest.raises(ValueError, match="two rows have the name 'WeightMatching'"):
        compare(pairs, [WeightMatching(), WeightMatching(seed=1)], *digits())
    with pytest.raises(ValueError, match="two rows have the name 'identity'"):
        compare(pairs, {"identity": WeightMatching()}, *digits())


def test_the_peak_is_that_of_the_block():
    with peak_memory(torch.device("cpu")) as large:
        torch.ones(20_000_000).sum()
    with peak_memory(torch.device("cpu")) as none:
        pass
    if not os.access("/proc/self/clear_refs", os.W_OK):  # such a system cannot tell, and must not guess
        assert large.num_bytes is None and none.num_bytes is None
        return
    assert 70e6 < large.num_bytes < 100e6 and none.num_bytes < 5e6


def test_memory_that_was_free_counts_as_needed():
    """The pieces are taken from the heap, where those before them lay."""
    before = [torch.ones(5_000) for _ in range(5_000)]
    del before
    with peak_memory(torch.device("cpu")) as peak:
        after = [torch.ones(5_000) for _ in range(5_000)]
    assert len(after) == 5_000
    assert peak.num_bytes is None or peak.num_bytes > 90e6


def test_curves_of_another_family_can_be_fitted(pairs):
    train, test = digits()
    cubic, quadratic = (
        compare(pairs[:1], {}, train, test, num_points=3, repair=False, recipe=RECIPE, curve=Bezier(degree))
        for degree in (3, 2)
    )
    assert cubic.values["identity"]["curve"] != quadratic.values["identity"]["curve"]


# -- the digits experiment, small: benchmarks/compare_digits.py has it whole


def test_both_matchings_leave_at_most_8_percent_of_the_barrier_on_the_digits():
    train, test = digits()
    untrained = [models.mlp(64, (32,) * 3, 10, mean=train.mean(), std=train.std() + 0.1, seed=s) for s in range(16)]
    networks = models.train_population(untrained, train.with_(batch_size=64), recipe=models.DIGITS_RECIPE)
    pairs = [(networks[i], networks[(i + 5) % 16]) for i in range(16)]
    found = compare(pairs, METHODS, train, test, repair=False)
    assert found.summary()["identity"]["line"]["mean"] > 0.5
    assert 0.8 < found.ratio("random")[0] < 1.25
    assert all(found.ratio(row)[0] <= 0.08 for row in METHODS)


# -- references


@pytest.fixture(scope="module")
def referred(pairs) -> Comparison:
    return compare(pairs, METHODS, *digits(), num_points=5, references=True)


def test_references_come_last_and_change_no_other_row(pairs, referred):
    assert list(referred.values) == ["identity", "random", *METHODS, "random direction", "ensemble"]
    plain = compare(pairs, METHODS, *digits(), num_points=5)
    for row, columns in untimed(plain).items():
        assert columns.items() <= referred.values[row].items()
    assert set(referred.columns) - set(plain.columns) == {"tempered"}


def test_a_random_direction_goes_as_far_from_the_nearer_end_as_the_line(pairs, referred):
    _, test = digits()
    meter = Meter(list(test), modeconn.network.loss.cross_entropy)
    for number, (a, b) in enumerate(pairs):
        ends = [torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in (a, b)]
        length = float((ends[1] - ends[0]).double().norm())
        drawn = torch.randn(len(ends[0]), generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        losses = []
        for nearer, share in ((0, 0.0), (0, 0.25), (0, 0.5), (1, 0.25), (1, 0.0)):
            model = copy.deepcopy(pairs[number][nearer])
            there = ends[nearer] + share * length * (drawn / drawn.norm()).float()
            torch.nn.utils.vector_to_parameters(there, model.parameters())
            meter = Meter(list(test), modeconn.network.loss.cross_entropy)
            meter.measure(model)
            losses.append(float(meter.results().loss))
        straight = torch.linspace(losses[0], losses[-1], 5, dtype=torch.float64)
        assert referred.values["random direction"]["line"][number] == pytest.approx(
            float((torch.tensor(losses, dtype=torch.float64) - straight).max()), abs=1e-5
        )
        assert referred.values["random direction"]["length"][number] == pytest.approx(length)
        assert referred.values["identity"]["length"][number] == pytest.approx(length)


def test_the_ensemble_is_the_mean_of_both_ends_probabilities(pairs, referred):
    _, test = digits()
    inputs, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    for number, pair in enumerate(pairs):
        with torch.no_grad():
            both = [model(inputs).double().softmax(1) for model in pair]
        losses = [-p[torch.arange(len(targets)), targets].log().mean().item() for p in (*both, sum(both) / 2)]
        right = [(p.argmax(1) == targets).double().mean().item() for p in (*both, sum(both) / 2)]
        cells = {column: cells[number] for column, cells in referred.values["ensemble"].items()}
        assert cells["line"] == pytest.approx(losses[2] - sum(losses[:2]) / 2, abs=1e-6)
        assert cells["line accuracy lost"] == pytest.approx(sum(right[:2]) / 2 - right[2])
        assert all(math.isnan(cells[column]) for column in ("repaired", "tempered", "length", "seconds"))


def test_a_comparison_with_references_comes_back_from_a_file_and_a_checkpoint(pairs, referred, tmp_path):
    again = Comparison.from_json(referred.to_json())
    assert again.to_csv() == referred.to_csv() and repr(again) == repr(referred) and again.to_json()
    assert "nan" not in repr(referred)
    settings = {"num_points": 5, "references": True, "checkpoint": tmp_path / "kept"}
    first = compare(pairs, {}, *digits(), **settings)
    more = compare(pairs, METHODS, *digits(), **settings)
    assert repr({row: more.values[row] for row in first.values}) == repr(first.values)  # also of NaN, and of seconds
    plot = referred.plot(column="tempered")
    assert plot.get_ylabel() == "barrier of the loss, line, best temperatures"


def test_without_classes_there_is_a_random_direction_alone():
    ends = [nn.Linear(3, 2), nn.Linear(3, 2)]
    loader = [(torch.rand(8, 3), torch.rand(8, 2))]
    found = compare(
        [ends], {}, loader, loader, num_points=3, repair=False, loss_fn=nn.functional.mse_loss, references=True
    )
    assert list(found.values) == ["identity", "random", "random direction"] and "tempered" not in found.columns
    found = compare(
        [ends],
        {},
        loader,
        loader,
        num_points=3,
        repair=False,
        forward=lambda model, batch: model(batch[0]).square().mean(),
        references=True,
    )
    assert list(found.values) == ["identity", "random", "random direction"]


def test_classes_of_tokens_lie_along_the_last_axis():
    tokens = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    ends = [nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)) for _ in range(2)]
    loader = [(tokens, tokens)]
    found = compare([ends], {}, loader, loader, num_points=3, repair=False, references=True)
    with torch.no_grad():
        both = [model(tokens).double().softmax(-1) for model in ends]
    losses = [-p.gather(-1, tokens[..., None]).log().mean().item() for p in (*both, sum(both) / 2)]
    assert found.values["ensemble"]["line"][0] == pytest.approx(losses[2] - sum(losses[:2]) / 2, abs=1e-6)


def test_a_loss_that_takes_apart_what_a_model_returns_is_given_no_ensemble():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> dict:
            return {"logits": self.layer(x)}

    ends, loader = [Named(), Named()], [(torch.rand(8, 3), torch.arange(8) % 4)]
    settings = {"num_points": 3, "repair": False, "references": True}
    own = compare(
        [ends], {}, loader, loader, loss_fn=lambda o, y: nn.functional.cross_entropy(o["logits"], y), **settings
    )
    assert list(own.values) == ["identity", "random", "random direction"]
    assert list(compare([ends], {}, loader, loader, **settings).values)[-1] == "ensemble"


def test_networks_that_are_not_of_the_spec_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(WeightMatching, "match", lambda *given: pytest.fail("nothing is matched"))

    class Picks(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 4), nn.Linear(2, 3)
            self.register_buffer("picked", torch.tensor([first, first + 2]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x).relu()[:, self.picked])

    loader = [(torch.rand(8, 3), torch.arange(8) % 3)]
    with pytest.raises(ValueError, match="'picked', by which units are read, holds other positions"):
        compare([(Picks(0), Picks(1))], [WeightMatching()], loader, loader, num_points=3)
