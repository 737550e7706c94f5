"""Laws of every kind of result along a curve."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import modeconn
from modeconn.measure.along import AlongCurve, Quantity
from modeconn.measure.curvature import Curvature
from modeconn.measure.profile import Profile
from modeconn.measure.robust_profile import RobustProfile

T = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
WAVE = torch.tensor([1.0, 3.0, math.inf, 2.0], dtype=torch.float64)
RISING = torch.tensor([0.5, 0.25, 0.75, 1.0], dtype=torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Sharpness(AlongCurve):
    """A kind of result that the package does not know."""

    t: Tensor
    sharpness: Tensor
    radius: float = 0.1

    @property
    def values(self) -> dict[str, Tensor]:
        return {"sharpness": self.sharpness}

    def quantity(self, name: str) -> Quantity:
        return Quantity("{:.1f}", higher_is_better=False, unit="per radius")


RIGHT = torch.tensor([[True, False, True]] * 4)
RESULTS = {
    "values": AlongCurve(T, {"flat": T * 0, "wave": WAVE}, own={"wave": WAVE[:2]}, higher_is_better={"wave": False}),
    "bare": AlongCurve(T[:1], {"one": T[:1]}),
    "loss alone": Profile(T, RISING, None, None),
    "profile": Profile(
        T,
        RISING,
        RISING,
        3 * T**2,
        RISING[:2],
        RISING[1:3],
        500,
        1.5,
        {"ece": T / 7, "nothing": T * math.nan},
        {"ece": T[:2]},
        {"ece": False},
    ),
    "robust": RobustProfile(
        T,
        {"clean": RIGHT, "pgd": RIGHT & (torch.arange(4) != 1)[:, None]},
        {"clean": RIGHT.float(), "pgd": 2 - RIGHT.float()},
        {"pgd": {"settings": {"steps": 3}, "kind": "PGD", "eps": 0.1, "norm": "linf", "black_box": False}},
    ),
    "curvature": Curvature(T, WAVE, "inputs", 10, arc_length=2 * T, seconds=0.5),
    "curvature in both": Curvature(T, WAVE, "both", 10),
    "a user's": Sharpness(T, RISING, radius=0.5),
}
each_result = pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)


@each_result
def test_json_gives_back_the_same_kind_with_every_value(result):
    text = result.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for read in (AlongCurve.from_json, type(result).from_json):
        copy = read(text)
        assert type(copy) is type(result) and copy.to_json() == text and repr(copy) == repr(result)
        assert copy.values.keys() == result.values.keys() and copy.own.keys() == result.own.keys()
        for name, values in result.values.items():
            torch.testing.assert_close(copy.values[name], values, rtol=0, atol=0, equal_nan=True)


@each_result
def test_csv_holds_every_value(result, tmp_path):
    text = result.to_csv(tmp_path / "result.csv")
    assert (tmp_path / "result.csv").read_text() == text
    written = [float(cell) for row in csv.DictReader(text.splitlines()) for cell in row.values() if _is_number(cell)]
    for values in (result.t, *result.values.values()):
        assert all(math.isnan(value) or value in written for value in values.tolist())


@each_result
def test_npz_holds_every_value_under_its_name(result, tmp_path):
    result.to_npz(tmp_path / "result.npz")
    held = np.load(tmp_path / "result.npz")
    expected = {f"{kind}/{n}": value for kind in ("values", "own") for n, value in getattr(result, kind).items()}
    expected |= {"t": result.t}
    expected |= {} if result.arc_length is None else {"arc_length": result.arc_length}
    for name, values in expected.items():
        assert held[name].dtype == np.float64
        np.testing.assert_array_equal(held[name], values)
    intervals = getattr(result, "interval", {})
    for row, bounds in intervals.items():
        np.testing.assert_array_equal(np.stack([held[f"values/{row} low"], held[f"values/{row} high"]], 1), bounds)
    assert len(held.files) == len(expected) + 2 * len(intervals)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "own/loss", "t", "arc_length"])
def test_no_name_of_a_metric_meets_another_array(name, tmp_path):
    profile = Profile(T, WAVE, None, 2 * T, metrics={} if name in ("t", "arc_length") else {name: RISING})
    profile.to_npz(tmp_path / "result.npz")
    held = np.load(tmp_path / "result.npz")
    np.testing.assert_array_equal(held["values/loss"], WAVE)
    np.testing.assert_array_equal(held["t"], T)
    if f"values/{name}" in held:
        np.testing.assert_array_equal(held[f"values/{name}"], RISING)


@each_result
def test_every_quantity_has_a_figure(result):
    if isinstance(result, RobustProfile):
        names = ["loss", "accuracy", "error"]
    else:
        names = list(result.values)
    for name in (None, *names):
        ax = Figure().subplots()
        assert result.plot(quantity=name, ax=ax) is ax
        assert (name or names[0 if not isinstance(result, RobustProfile) else 1]) in ax.get_ylabel()


@each_result
def test_table_and_html_show_the_same(result):
    header, rows = result._table()
    assert str(result).startswith(type(result).__name__) and result._repr_html_().count("<tr>") == 1 + len(rows)
    for name, *cells in rows:
        assert name in repr(result) and len(cells) == len(header) - 1
        assert all(cell in repr(result) and f">{cell}</td>" in result._repr_html_() for cell in cells)


@each_result
def test_summary_and_barrier_agree_with_their_definitions(result):
    summary = result.summary()
    assert summary.keys() == result.values.keys()
    for name, values in result.values.items():
        if values.isfinite().all():
            assert summary[name]["min"] == min(values.tolist()) and summary[name]["max"] == max(values.tolist())
        better, found = result.quantity(name).higher_is_better, result.barrier_of(name)
        if better is None or len(values) == 1 or not values.isfinite().all():
            continue
        first, last = values[0].item(), values[-1].item()
        over = [v - ((1 - t) * first + t * last) for t, v in zip(result.t.tolist(), values.tolist(), strict=True)]
        assert found == pytest.approx(max(-rise if better else rise for rise in over), abs=1e-15) and found >= 0


def test_nothing_is_said_of_what_was_not_measured():
    part = AlongCurve(T[1:], {"wave": RISING[1:]}, higher_is_better={"wave": False})
    assert math.isnan(part.barrier_of("wave")) and math.isnan(part.summary()["wave"]["arc_mean"])
    assert json.loads(part.to_json())["barriers"] == {"wave": None}
    with pytest.raises(ValueError, match="there is no 'speed' here; there is 'wave'"):
        part.barrier_of("speed")


def test_wrong_values_and_files_are_refused():
    with pytest.raises(ValueError, match="t must hold rising positions"):
        AlongCurve(T.flip(0), {})
    with pytest.raises(ValueError, match="'wave' must have one value for each of 4 positions, got a shape of"):
        AlongCurve(T, {"wave": WAVE[:2]})
    with pytest.raises(ValueError, match="this is a Curvature, not a Profile"):
        Profile.from_json(RESULTS["curvature"].to_json())
    for text in ("[1]", "{}", "no JSON", '{"kind": "Unknown"}', '{"kind": "Profile"}'):
        with pytest.raises(
            ValueError,
            match=r"of the kind Unknown, .* one whose class nobody imported|this is no (AlongCurve|Profile)",
        ):
            AlongCurve.from_json(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_every_kind_of_result_is_saved_and_loaded(tmp_path):
    compared = modeconn.Comparison({"identity": {"line": [0.5]}, "weights": {"line": [0.25]}}, 25, 500)
    along = AlongCurve(torch.tensor([0.0, 1.0]), {"sharpness": torch.tensor([1.0, 3.0])})
    report = modeconn.discover(modeconn.models.mlp(4, (3,), 2, seed=1)).report()
    for result in (compared, along, report):
        assert result.save(tmp_path / "result.json") is None
        assert (tmp_path / "result.json").read_text() == result.to_json()
        assert repr(type(result).load(tmp_path / "result.json")) == repr(result)
    with pytest.raises(ValueError, match=r"result\.json': this is a SymmetryReport, no comparison"):
        modeconn.Comparison.load(tmp_path / "result.json")
    with pytest.raises(ValueError, match="of the kind Comparison, which is no result along a curve"):
        compared.save(tmp_path / "compared.json")
        Profile.load(tmp_path / "compared.json")
    (tmp_path / "mine.py").write_text("import modeconn")
    with pytest.raises(ValueError, match=r"mine\.py' holds no Profile: it is no JSON"):
        Profile.load(tmp_path / "mine.py")
    with pytest.raises(FileNotFoundError):
        AlongCurve.load(tmp_path / "nowhere.json")
