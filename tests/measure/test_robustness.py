"""What attacks leave along a curve: against a naive twin, through interruptions, and what is refused or doubted."""

from __future__ import annotations

import csv
import io
import json
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

from modeconn import PGD, AdversarialExamples, Connection, Ensemble, RobustProfile, data, models, plot, robustness
from modeconn.cli.app import app
from modeconn.measure.curvature import largest_eigenvalue
from modeconn.measure.robust_profile import pack_bits, pack_floats, unpack_bits, unpack_floats
from modeconn.network.loss import TrainingData
from tests.cases import CASE, DEVICE

STRONG, WEAK = PGD(0.3, 0.1, 4, seed=3), PGD(0.1, 0.05, 1, seed=3)


def examples(num_examples: int = 24, batch_size: int = 10, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_examples, 1, 2, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (num_examples,), generator=generator)
    return list(zip(x.to(DEVICE).split(batch_size), y.to(DEVICE).split(batch_size), strict=True))


def connect(name: str = "mlp", loader: object = None) -> Connection:
    a, b = (CASE[name].make(seed, torch.float64).eval() for seed in (1, 2))
    return Connection.straight_between(a, b, training=TrainingData(loader))


def naive(model: nn.Module, attack: PGD | None, data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Whether each example is answered right, and its loss."""
    moved = [(x if attack is None else attack(model, x, y), y) for x, y in data]
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y, reduction="none") for x, y in moved]
        return torch.cat([model(x).argmax(1) == y for x, y in moved]), torch.cat(losses)


# -- numbers


def test_a_profile_is_what_each_network_and_attack_give_by_themselves():
    connection, data = connect(), examples()
    profile = connection.robustness(data, {"strong": STRONG, "weak": WEAK}, num_points=3)
    for place, t in enumerate((0.0, 0.5, 1.0)):
        every = []
        for row, attack in (("clean", None), ("strong", STRONG), ("weak", WEAK)):
            correct, losses = naive(connection.model_at(t), attack, data)
            assert torch.equal(profile.correct[row][place], correct)
            torch.testing.assert_close(profile.losses[row][place], losses.float())
            assert profile.accuracy[row][place] == correct.double().mean()
            every.append((correct, losses))
        right, losses = (torch.stack(parts) for parts in zip(*every, strict=True))
        assert profile.accuracy["worst"][place] == right.all(0).double().mean()
        torch.testing.assert_close(profile.loss["worst"][place], losses.amax(0).mean(), rtol=1e-6, atol=0)
    assert profile.num_examples == 24
    assert profile.accuracy["strong"].mean() < profile.accuracy["clean"].mean()


def test_the_clean_row_is_the_ordinary_profile_and_barriers_are_its():
    connection, data = connect(), examples()
    profile, ordinary = connection.robustness(data, [STRONG], num_points=5), connection.evaluate(data, num_points=5)
    torch.testing.assert_close(profile.loss["clean"], ordinary.loss, rtol=1e-6, atol=0)
    assert torch.equal(profile.accuracy["clean"], ordinary.accuracy)
    assert profile.barrier["clean"] == pytest.approx(ordinary.barrier, abs=1e-6)
    assert profile.accuracy_drop["clean"] == pytest.approx(ordinary.accuracy_drop)
    robust = replace(ordinary, loss=profile.loss[repr(STRONG)])
    assert profile.barrier[repr(STRONG)] == pytest.approx(robust.barrier)


def test_without_a_radius_an_attack_leaves_the_clean_numbers_exactly():
    profile = connect().robustness(examples(), {"zero": PGD(0.0, 0.1, 3)}, num_points=3)
    assert torch.equal(profile.correct["zero"], profile.correct["clean"])
    assert torch.equal(profile.losses["zero"], profile.losses["clean"])


def test_only_the_first_examples_are_attacked_if_so_many_are_asked_for():
    data = examples()
    profile = connect().robustness(data, [WEAK], t=[0.25], num_examples=13)
    (correct, _) = naive(connect().model_at(0.25), None, data)
    assert torch.equal(profile.correct["clean"][0], correct[:13])


def test_intervals_are_those_of_wilson():
    right = torch.arange(40) < torch.tensor([[0], [7], [40]])
    profile = RobustProfile(torch.tensor([0, 0.5, 1.0]), {"clean": right}, {"clean": right.float()})
    for count, (low, high) in zip((0, 7, 40), profile.interval["clean"].tolist(), strict=True):
        expected = stats.binomtest(count, 40).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("name", ["batch_norm", "residual"])
def test_batch_norm_is_recalibrated_at_every_point_as_evaluation_does(name):
    train, data = examples(seed=1), examples()
    profile = connect(name, train).robustness(data, [WEAK], num_points=3)
    for place, t in enumerate((0.0, 0.5, 1.0)):
        model = connect(name).model_at(t, recalibrate=train)
        assert torch.equal(profile.correct["clean"][place], naive(model, None, data)[0])
    plain = connect(name, train).evaluate(data, num_points=3)
    torch.testing.assert_close(profile.loss["clean"], plain.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(profile.accuracy["clean"], plain.accuracy)
    assert profile.statistics == plain.statistics != "" and plain.statistics in repr(profile)
    read = RobustProfile.from_json(profile.to_json())
    assert read.statistics == profile.statistics
    everywhere = connect(name).robustness(data, [WEAK], num_points=3, recalibrate=train)
    recalibrated = connect(name).model_at(0, recalibrate=train)
    torch.testing.assert_close(everywhere.losses["clean"][0], naive(recalibrated, None, data)[1].float())
    own = AdversarialExamples(train, STRONG)
    attacked = connect(name).robustness(data, [WEAK], t=[0.5], recalibrate=own)
    expected = naive(connect(name).model_at(0.5, recalibrate=own), None, data)[1]
    torch.testing.assert_close(attacked.losses["clean"][0], expected.float())
    assert not torch.equal(attacked.losses["clean"][0], everywhere.losses["clean"][1])


def test_transfer_holds_the_accuracy_at_each_t_on_what_was_found_at_each_other():
    connection, data = connect(), examples()
    profile = connection.robustness(data, {"strong": STRONG}, num_points=3, transfer=True)
    models = [connection.model_at(t) for t in (0, 0.5, 1)]
    for made, source in enumerate(models):
        found = [(STRONG(source, x, y), y) for x, y in data]
        for tried, model in enumerate(models):
            assert profile.transfer["strong"][made, tried] == naive(model, None, found)[0].double().mean()
    assert torch.equal(profile.transfer["strong"].diagonal(), profile.accuracy["strong"])
    assert connection.robustness(data, [STRONG], num_points=3).transfer is None


def test_every_point_costs_one_clean_pass_the_attack_and_one_look_at_what_it_found():
    connection, data, passes = connect(), examples(), []
    connection._path.template.register_forward_hook(lambda *_: passes.append(1))
    connection.robustness(data, [STRONG], num_points=4)
    assert len(passes) == 4 * len(data) * (1 + STRONG.num_steps + 1)


def test_random_state_and_flags_stay_and_the_seed_decides():
    connection, data = connect(), examples()
    attack, before = PGD(0.2, 0.1, 0), torch.get_rng_state()
    one, again, other = (connection.robustness(data, [attack], num_points=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.losses[repr(attack)], again.losses[repr(attack)])
    assert not torch.equal(one.losses[repr(attack)], other.losses[repr(attack)])


# -- interruptions


class Breaking:
    """An attack that counts all calls, and can be stopped at one of them: neither is part of what it is."""

    calls = 0
    stop_at: int | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        Breaking.calls += 1
        if Breaking.calls == Breaking.stop_at:
            raise KeyboardInterrupt
        return PGD(0.3, 0.1, 2)(model, x, y)


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    connection, data, kept = connect(), examples(), tmp_path / "kept"
    whole = connection.robustness(data, {"it": Breaking(), "weak": WEAK}, num_points=3)
    monkeypatch.setattr(Breaking, "calls", 0)
    monkeypatch.setattr(Breaking, "stop_at", 6)
    with pytest.raises(KeyboardInterrupt):
        connection.robustness(data, {"it": Breaking(), "weak": WEAK}, num_points=3, checkpoint=kept)
    with kept.open("a") as file:
        file.write('\n{"the line at which')
    monkeypatch.setattr(Breaking, "calls", 0)
    monkeypatch.setattr(Breaking, "stop_at", None)
    resumed = connection.robustness(data, {"it": Breaking(), "weak": WEAK}, num_points=3, checkpoint=kept)
    assert Breaking.calls == 9 - 5
    for row in ("clean", "it", "weak"):
        assert torch.equal(resumed.correct[row], whole.correct[row])
        assert torch.equal(resumed.losses[row], whole.losses[row])


def test_what_is_known_is_not_measured_again_but_for_another_network_data_seed_or_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(Breaking, "calls", 0)
    kept, attack = tmp_path / "kept", Breaking()
    settings = {"t": [0.5], "checkpoint": kept}
    connect().robustness(examples(), [attack], **settings)
    connect().robustness(examples(), {"another name": attack, "weak": WEAK}, **settings, transfer=False)
    assert Breaking.calls == 3
    connect("residual", examples()).robustness(examples(), [attack], **settings)
    connect().robustness(examples(seed=1), [attack], **settings)
    connect().robustness(examples(), [attack], **settings, seed=1)
    connect().robustness(examples(), [attack], t=[0.25], checkpoint=kept)
    assert Breaking.calls == 3 * 5


@pytest.mark.parametrize("kept", [None, "kept"])
def test_attacks_that_look_alike_are_each_measured(tmp_path, kept):
    def moved_by(eps: float):
        return lambda model, x, y: PGD(eps, eps / 2, 3)(model, x, y)

    settings = {"t": [0.5], "checkpoint": kept and tmp_path / kept}
    found = connect().robustness(examples(), {"weak": moved_by(0.01), "strong": moved_by(0.3)}, **settings)
    alone = connect().robustness(examples(), {"strong": moved_by(0.3)}, **settings)
    assert torch.equal(found.losses["strong"], alone.losses["strong"])
    assert (found.losses["strong"] > found.losses["weak"]).any()


# -- what is refused


@dataclass(frozen=True)
class Faulty:
    """An attack that goes wrong at the second point."""

    fault: str
    eps: float = 0.1
    norm: str = "linf"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if torch.equal(next(model.parameters()), next(connect().model_at(0).parameters())):
            return x
        return {
            "nan": lambda: x * torch.nan,
            "ball": lambda: torch.where(x > 0.5, x - 0.11, x + 0.11),
            "range": lambda: x + 0.09,
            "shape": lambda: x[:1],
            "none": lambda: None,
            "dtype": lambda: x.float(),
            "own": lambda: PGD(0.1, 0.1, 1)(model, x * 9, y),
        }[self.fault]()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("nan", FloatingPointError, r"it at t=0.5 returned NaN"),
        ("ball", ValueError, r"it at t=0.5 left its ball: an example moved by 0.11 in the norm linf, eps is 0.1"),
        ("range", ValueError, r"it at t=0.5 left the pixel range \[0, 1\]: its examples go from .* to 1.0"),
        ("shape", ValueError, r"it at t=0.5 returned a shape of \(1, 1, 2, 4\) for inputs of shape \(10, 1, 2, 4\)"),
        ("none", ValueError, r"it at t=0.5 must return a tensor, but returned NoneType"),
        ("dtype", ValueError, r"it at t=0.5 returned torch.float32 for inputs of torch.float64"),
        ("own", ValueError, r"it at t=0.5: inputs of an attack must lie in \[0, 1\]"),
    ],
)
def test_an_attack_that_goes_wrong_is_named_and_what_was_computed_stays(fault, error, message, tmp_path):
    kept = tmp_path / "kept"
    with pytest.raises(error, match=message):
        connect().robustness(examples(), {"it": Faulty(fault)}, num_points=3, checkpoint=kept)
    labels = [next(iter(json.loads(line).values()))["label"] for line in kept.read_text().split("\n") if line]
    assert labels == ["clean at t=0"] * 3 + ["it at t=0"] * 3 + ["clean at t=0.5"] * 3


def test_a_ball_has_a_tolerance_but_one_of_radius_0_has_none():
    data = [(torch.full((4, 1, 2, 4), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))]

    @dataclass(frozen=True)
    class By:
        eps: float
        excess: float
        norm: str = "linf"

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return x + self.eps + self.excess

    connect().robustness(data, [By(0.1, 9e-7)], t=[0.5])
    with pytest.raises(ValueError, match="left its ball"):
        connect().robustness(data, [By(0.1, 2e-6)], t=[0.5])
    with pytest.raises(ValueError, match="left its ball"):
        connect().robustness(data, [By(0.0, 1e-9)], t=[0.5])


def test_an_attack_in_place_changes_no_data_and_is_held_to_its_ball():
    @dataclass(frozen=True)
    class InPlace:
        eps: float
        share: float
        norm: str = "linf"

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return x.lerp_(torch.full_like(x, 0.5), self.share)

    data, untouched = examples(), examples()
    profile = connect().robustness(data, {"in place": InPlace(0.5, 0.5), "weak": WEAK}, t=[0.5])
    assert all(torch.equal(x, x0) and torch.equal(y, y0) for (x, y), (x0, y0) in zip(data, untouched, strict=True))
    assert torch.equal(profile.losses["weak"], connect().robustness(data, {"weak": WEAK}, t=[0.5]).losses["weak"])
    with pytest.raises(ValueError, match="left its ball"):
        connect().robustness(data, [InPlace(0.1, 0.5)], t=[0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"got values from .* They look like images in \[0, 255\]: divide by 255"),
        (lambda x: (x - 0.5) / 0.25, "They look like normalised data: put the normalisation inside the model"),
        (lambda x: (x * 255).byte(), r"must be floating point in \[0, 1\], got torch.uint8: divide pixels by 255"),
        (lambda x: x * torch.nan, "must lie in .*, but some are NaN. Look at the data"),
    ],
)
def test_inputs_outside_the_pixel_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        connect().robustness([(change(x), y) for x, y in examples()], [WEAK])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t": [0.5, 0.5]}, "t must hold rising positions in"),
        ({"t": [1.5]}, "t must hold rising positions in"),
        ({"t": []}, "t must hold rising positions in"),
        ({"num_points": 1}, "num_points must be at least 2"),
        ({"num_examples": 0}, "num_examples must be at least 1"),
        ({"attacks": {"clean": WEAK}}, "two rows have the name 'clean'"),
        ({"attacks": [WEAK, WEAK]}, "two rows have the name 'PGD"),
        ({"attacks": [PGD(0.1, 0.1, 1, targeted=True)]}, "is targeted: .* Measure with targeted=False"),
        (
            {"attacks": {"it": Faulty("own", norm="Linf")}},
            "it must have one of the norms linf, l2, l1, got norm='Linf'",
        ),
        ({"attacks": ["pgd20"]}, "cannot be called as .*; modeconn.attacks.build makes attacks from their names"),
        ({"attacks": [PGD]}, "cannot be called as .*; modeconn.attacks.build makes attacks from their names"),
        ({"loader": []}, "loader is empty"),
        (
            {"loader": [(torch.rand(3, 1, 2, 4).double(), torch.tensor([0, 1, 7]))]},
            "targets of loader must lie in 0..2",
        ),
        (
            {"loader": [(torch.rand(3, 1, 2, 4).double(), torch.rand(3))]},
            "attacks are measured on examples of one class each",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        connect().robustness(**{"loader": examples(), "attacks": [WEAK], **settings})


def test_a_network_in_train_mode_is_refused():
    model = CASE["batch_norm"].make(0, torch.float64).eval()
    robustness(model, examples(), [WEAK])
    model[2].train()
    with pytest.raises(ValueError, match=r"the model is in train mode \(in '2'\).* Call model.eval\(\) first"):
        robustness(model, examples(), [WEAK])


def test_a_network_that_answers_nan_is_no_robust_one():
    model = CASE["mlp"].make(0, torch.float64).eval()
    next(model.parameters()).data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="clean at t=0: the network answers NaN"):
        robustness(model, examples(), [WEAK])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_dtype_are_attacked_in_their_ball(dtype):
    model = CASE["mlp"].make(0, dtype).eval()
    data = [(x.to(dtype), y) for x, y in examples()]
    for norm in ("linf", "l2"):
        attack = PGD(8 / 255, 2 / 255, 3, norm=norm, seed=0)
        profile = robustness(model, data, attack)
        assert profile.loss[repr(attack)] > profile.loss["clean"]
        with pytest.raises(ValueError, match="left its ball"):
            robustness(model, data, {"it": Claims(replace(attack, eps=0.1, step_size=0.1), norm)})


@dataclass(frozen=True)
class Claims:
    """An attack with a smaller ball in its name."""

    attack: PGD
    norm: str
    eps: float = 8 / 255

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.attack(model, x, y)


def test_a_network_without_weights_can_be_attacked():
    profile = robustness(nn.Flatten().eval(), examples(), [WEAK])
    assert profile.loss[repr(WEAK)] > profile.loss["clean"]


# -- what is doubted


def doubtful(correct: dict[str, Tensor], **attacks: dict[str, object]) -> list[str]:
    facts = {
        row: {"settings": {}, "kind": "PGD", "eps": 0.1, "norm": "linf", "black_box": False, **about}
        for row, about in attacks.items()
    }
    shown = {row: right[None] for row, right in correct.items()}
    return RobustProfile(
        torch.tensor([0.5]), shown, {row: right.float() for row, right in shown.items()}, facts
    ).warnings


def first(count: int, of: int = 100) -> Tensor:
    return torch.arange(of) < count


@pytest.mark.parametrize("name", ["num_steps", "eps", "0.n_queries"])
def test_an_attack_that_finds_less_with_more_to_spend_is_weak(name):
    settings = {"few": {"settings": {name: 1, "alpha": 1}}, "many": {"settings": {name: 2, "alpha": 2}}}
    rows = {"clean": first(100), "few": first(40), "many": first(50)}
    assert doubtful(rows, **settings) == [
        "many is a weak attack: at t=0.5 it leaves 50.00% right, few, with less to spend, 40.00%."
    ]
    assert doubtful({**rows, "many": first(43)}, **settings) == []  # 3 of 100: 1.7 standard errors
    assert doubtful({**rows, "many": first(30)}, **settings) == []
    other = {"few": settings["few"], "many": {"settings": {name: 2, "loss": "dlr"}}}
    assert doubtful(rows, **other) == []


def test_an_attack_that_leaves_more_than_clean_examples_do_is_weak():
    (doubt,) = doubtful({"clean": first(80), "pgd": first(90)}, pgd={})
    assert doubt == "pgd is a weak attack: at t=0.5 it leaves 90.00% right, clean, with less to spend, 80.00%."
    assert doubtful({"clean": first(80), "pgd": first(83)}, pgd={}) == []


@pytest.mark.parametrize("num_points", [1, 11, 61])
def test_equally_strong_attacks_are_seldom_doubted_at_however_many_points(num_points):
    generator = torch.Generator().manual_seed(0)
    facts = {"kind": "PGD", "eps": 0.1, "norm": "linf", "black_box": False}
    attacks = {row: {**facts, "settings": {"num_steps": steps}} for row, steps in (("few", 10), ("many", 20))}
    t, doubted = torch.linspace(0, 1, num_points, dtype=torch.float64), 0
    for _ in range(300):
        rows = {row: torch.rand(num_points, 400, generator=generator) < 0.5 for row in attacks}
        rows["clean"] = torch.ones(num_points, 400, dtype=torch.bool)
        losses = {row: right.float() for row, right in rows.items()}
        doubted += bool(RobustProfile(t, rows, losses, attacks).warnings)
    assert doubted <= 300 * 0.05


def test_a_black_box_that_finds_more_than_gradients_do_is_a_sign_of_masking():
    attacks = {"one": {}, "two": {}, "square": {"black_box": True, "kind": "Square"}}
    rows = {"clean": first(100), "one": first(60), "two": first(50), "square": first(40)}
    (doubt,) = doubtful(rows, **attacks)
    assert doubt == (
        "gradients may be masked: at t=0.5 square, which sees none, leaves 40.00% right, one and two 50.00%."
    )
    assert doubtful({**rows, "square": first(55)}, **attacks) == []
    assert doubtful(rows, **{**attacks, "square": {"black_box": True, "eps": 0.2}}) == []  # a larger ball may
    both = {**attacks, "autoattack": {"black_box": None, "kind": "Cascade"}}
    assert doubtful({**rows, "autoattack": first(40)}, **both) == [doubt]  # its black box says nothing for gradients


def test_real_attacks_are_compared_by_their_settings():
    """Masked gradients on purpose: the network answers in steps, whose slope is zero."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2, bias=False)
            self.layer.weight.data = torch.tensor([[1.0], [-1.0]])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x.mean((1, 2, 3))[:, None] - 0.5).sign()) + 0 * self.layer(x[:, 0, 0, :1])

    @dataclass(frozen=True)
    class Dark:
        eps: float = 0.2
        norm: str = "linf"
        black_box: bool = True

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return x - self.eps

    data = [(torch.full((50, 1, 2, 2), 0.6), torch.zeros(50, dtype=torch.int64))]
    attacks = {"few": PGD(0.2, 0.05, 2, random_start=False), "many": PGD(0.2, 0.05, 9, random_start=False)}
    profile = robustness(Steps().eval(), data, {**attacks, "dark": Dark()})
    assert profile.accuracy["few"] == 1 and profile.accuracy["dark"] == 0
    assert ["gradients may be masked" in doubt for doubt in profile.warnings] == [True]


# -- a chosen point


def test_a_point_chosen_on_one_split_is_reported_on_another():
    connection = connect()
    validation = connection.robustness(examples(seed=1), {"weak": WEAK}, num_points=5)
    test = connection.robustness(examples(), {"weak": WEAK}, num_points=5)
    best = validation.best_t()
    assert validation.accuracy["worst"].max() == validation.accuracy["worst"][int(best * 4)]
    chosen = test.chosen_by(validation)
    assert chosen.t.tolist() == [best] and chosen.accuracy["worst"][0] == test.accuracy["worst"][int(best * 4)]
    assert validation.best_t("clean") in validation.t.tolist()
    assert (
        len(repr(chosen).splitlines()) == 9 and repr(chosen).count(f"t={best:g}") == 1 and "barrier" not in repr(chosen)
    )
    with pytest.raises(ValueError, match="there is no row 'pgd'; there are clean, weak, worst"):
        validation.best_t("pgd")
    with pytest.raises(ValueError, match="must be chosen on other examples than it is reported on"):
        test.chosen_by(test)
    with pytest.raises(ValueError, match="must be chosen on other examples than it is reported on"):
        test.chosen_by(connection.robustness(examples(batch_size=7), {"weak": WEAK}, num_points=5))
    otherwise = connection.robustness(examples(seed=1), {"weak": STRONG}, num_points=5)
    for row in ("weak", "worst"):
        with pytest.raises(ValueError, match=r"'weak' differs: PGD \{.* there, PGD \{.* here"):
            test.chosen_by(otherwise, row)
    test.chosen_by(otherwise, "clean")
    with pytest.raises(ValueError, match="'weak' differs: none there"):
        test.chosen_by(connection.robustness(examples(seed=1), {}, num_points=5))
    with pytest.raises(ValueError, match=r"was not measured here. Pass t="):
        connection.robustness(examples(), {"weak": WEAK}, t=[0.123]).chosen_by(validation)


# -- files and figures


@pytest.fixture(scope="module")
def profile() -> RobustProfile:
    return connect().robustness(examples(), {"strong": STRONG, "weak": WEAK}, num_points=3, transfer=True)


def test_json_keeps_every_example(profile, tmp_path):
    back = RobustProfile.from_json(profile.to_json(tmp_path / "p.json"))
    assert (tmp_path / "p.json").read_text() == profile.to_json() == back.to_json()
    assert all(torch.equal(back.correct[row], right) for row, right in profile.correct.items())
    assert all(torch.equal(back.losses[row], losses) for row, losses in profile.losses.items())
    assert repr(back) == repr(profile)
    lone = connect().robustness(examples(), [WEAK], t=[0.5])
    assert json.loads(lone.to_json(), parse_constant=pytest.fail)["summary"]["clean"]["barrier"] is None


@pytest.mark.parametrize("text", ["hello\n", "[\n1.0\n]\n", '{\n "t": [0.0]\n}\n', '{"a": 1}\n', "\x80\x00"])
def test_another_file_is_no_checkpoint_and_stays_as_it_was(text, tmp_path):
    path = tmp_path / "mine"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"mine' is no file of finished measurements\. Choose another one, or delete it"
    ):
        connect().robustness(examples(), [WEAK], num_points=2, checkpoint=path)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_ball_that_holds_every_image_is_doubted():
    huge = connect().robustness(examples(), [PGD(8.0, 2.0, 1)], num_points=2)
    assert any("eps=8 in the norm linf" in sentence for sentence in huge.warnings)
    assert not connect().robustness(examples(), [PGD(8.0, 2.0, 1, norm="l2")], num_points=2).warnings


def test_packing_is_undone_by_unpacking():
    right, losses = torch.rand(5, 13) < 0.5, torch.randn(5, 13)
    assert torch.equal(unpack_bits(pack_bits(right), (5, 13)), right)
    assert torch.equal(unpack_floats(pack_floats(losses), (5, 13)), losses)


def test_csv_has_a_line_for_each_point_and_row(profile):
    lines = list(csv.DictReader(io.StringIO(profile.to_csv())))
    assert [line["attack"] for line in lines] == ["clean", "strong", "weak", "worst"] * 3
    assert float(lines[1]["accuracy"]) == profile.accuracy["strong"][0]
    assert float(lines[1]["low"]) == profile.interval["strong"][0, 0]


def test_it_prints_as_a_table(profile):
    title, header, *rows, strong, weak = repr(profile).splitlines()
    spent = "PGD, norm linf, eps=0.3, step_size=0.1, num_steps=4, num_restarts=1, seed=3"
    assert strong == f"strong: {spent}" and weak.startswith("weak: PGD, norm linf, eps=")
    assert "eps=0.03137 (8/255), step" in repr(
        replace(profile, attacks={"strong": {**profile.attacks["strong"], "eps": 8 / 255}})
    )
    assert title.startswith("RobustProfile(3 points, 24 examples")
    assert header.split() == ["t=0", "t=1", "worst", "point", "95%", "interval", "at", "t", "mean", "barrier"]
    assert [row.split("  ")[0] for row in rows] == [
        f"{row} {what}" for what in ("accuracy", "loss") for row in ("clean", "strong", "weak", "worst")
    ]
    assert profile._repr_html_().count("<tr>") == 9


def test_a_figure_shows_every_row_with_its_interval(profile):
    with matplotlib.rc_context({"backend": "agg"}):
        ax = profile.plot()
        rows = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
        assert list(rows) == ["clean", "strong", "weak", "worst"]
        assert rows["strong"].get_ydata() == pytest.approx(100 * profile.accuracy["strong"].numpy())
        assert len(ax.collections) == 4
        ax.figure.canvas.draw()
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1  # intervals fill the axes
        errors = plot.robust_profile(profile, rows=["weak"], quantity="error")
        assert errors.lines[0].get_ydata() == pytest.approx(100 - 100 * profile.accuracy["weak"].numpy())
        assert not plot.robust_profile(profile, quantity="loss").collections
        with pytest.raises(ValueError, match="there is no row 'apgd'"):
            plot.robust_profile(profile, rows=["apgd"])
        matplotlib.pyplot.close("all")


# -- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A connection of two networks that know little of the digits, in a file."""
    train, _ = data.load("digits")
    a, b = (models.mlp(64, (4,), 10, mean=train.mean(), std=train.std() + 0.1, seed=seed).eval() for seed in (1, 2))
    path = tmp_path_factory.mktemp("robustness") / "c.safetensors"
    Connection.straight_between(a, b).save(path)
    return path


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["robustness", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_does_what_the_method_does(saved, tmp_path):
    settings = ("--data", "digits", "--eps", "1/10", "--points", 3, "--examples", 70, "--seed", 4, "--transfer")
    result = command(saved, *settings, "--attack", "pgd2", "--attack", "pgd3", "--norm", "l2", "--out", tmp_path)
    attacks = {f"pgd{steps}": PGD(0.1, 0.025, steps, norm="l2") for steps in (2, 3)}
    expected = Connection.load(saved).robustness(
        data.load("digits")[1], attacks, num_points=3, num_examples=70, seed=4, transfer=True
    )
    found = RobustProfile.from_json((tmp_path / "c.robust.json").read_text())
    assert replace(found, seconds=0).to_json() == replace(expected, seconds=0).to_json()
    assert (tmp_path / "c.robust.csv").read_text() == expected.to_csv()
    assert repr(found) in result.stdout and (tmp_path / "c.robust.png").stat().st_size
    assert len(list(tmp_path.iterdir())) == 3
    for arguments in (("info", tmp_path / "c.robust.json"), ("plot", tmp_path / "c.robust.json", "--out", "x.png")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    assert (tmp_path / "x.png").exists()


def test_a_stopped_command_says_where_its_measurements_are(saved, tmp_path, monkeypatch):
    calls = []
    attack = PGD.__call__

    def stopping(self, model, x, y):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attack(self, model, x, y)

    monkeypatch.setattr(PGD, "__call__", stopping)
    settings = ("--data", "digits", "--attack", "pgd2", "--points", 2, "--examples", 128, "--out", tmp_path)
    result = command(saved, *settings, code=130)
    assert "c.robust.checkpoint; give the same command again to go on" in result.stderr
    wrong = command(saved, *settings, "--checkpoint", saved, code=1)
    assert "is no file of finished measurements" in wrong.stderr and "is kept" not in wrong.stderr
    command(saved, *settings)
    assert len(calls) == 4 + 1
    assert not (tmp_path / "c.robust.checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attack", "pdg20"), "there is no attack 'pdg20'"),
        (("--eps", "8:255"), "a number is written 0.03 or 8/255, got '8:255'"),
        (("--eps", "-1/255"), "eps must be a finite number, 0 or more"),
        (("--statistics", "own"), "--statistics must be clean or adversarial, got 'own'"),
        (("--norm", "l0"), "there is no norm 'l0'; there are l2, linf"),
        (("--attack", "autoattack"), "pip install --no-deps torchattacks"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, message, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    result = command(saved, "--data", "digits", "--out", tmp_path, *arguments, code=1)
    assert result.stderr.startswith("modeconn: error:") and message in result.stderr
    assert not list(tmp_path.iterdir())


# -- ensembles


def test_an_ensemble_averages_probabilities():
    models = [CASE["mlp"].make(seed, torch.float64).eval() for seed in (1, 2, 3)]
    (x, _), *_ = examples()
    expected = torch.stack([model(x).softmax(1) for model in models]).mean(0)
    torch.testing.assert_close(Ensemble(models)(x).exp(), expected)
    torch.testing.assert_close(Ensemble(models[:1])(x), models[0](x).log_softmax(1))
    assert not any(module.training for module in Ensemble(models).modules())
    models[1].train()
    assert Ensemble(models).training
    with pytest.raises(ValueError, match="an ensemble needs at least one network"):
        Ensemble([])


def test_an_ensemble_of_points_is_attacked_as_one_network():
    connection, data = connect(), examples()
    ensemble = Ensemble(connection.model_at(t) for t in (0, 0.5, 1))
    profile = robustness(ensemble, data, {"strong": STRONG})
    for row, attack in (("clean", None), ("strong", STRONG)):
        assert torch.equal(profile.correct[row][0], naive(ensemble, attack, data)[0])


# -- curvature


def dense(model: nn.Module, x: Tensor, y: Tensor, wrt: str) -> Tensor:
    """The eigenvalues of the Hessian itself, in ascending order; of each example's own with respect to inputs."""
    if wrt == "inputs":
        hessians = [
            torch.autograd.functional.hessian(
                lambda one, target=target: F.cross_entropy(model(one.view(1, 1, 2, 4)), target[None]), row.flatten()
            )
            for row, target in zip(x, y, strict=True)
        ]
        return torch.linalg.eigvalsh(torch.stack(hessians))
    parameters = dict(model.named_parameters())
    shapes = [parameter.shape for parameter in parameters.values()]

    def loss(theta: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(parameters, parts, strict=True)), (x,)), y)

    theta = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta))[None]


@pytest.mark.parametrize("wrt", ["weights", "inputs"])
def test_the_largest_eigenvalue_is_that_of_the_dense_hessian(wrt):
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    data = examples(9, 4)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    found, count = largest_eigenvalue(model, data, wrt=wrt, num_steps=2000, tolerance=1e-9)
    assert found == pytest.approx(dense(model, x, y, wrt)[:, -1].mean().item(), rel=1e-3)
    assert count == 9
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_hessian_that_bends_down_most_still_gives_its_largest_eigenvalue():
    """The Hessian of each example is diagonal, and its eigenvalue of largest size is negative."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False)).double().eval()
    model[1].weight.data = torch.eye(8, dtype=torch.float64)
    bends = torch.linspace(-5, 1, 8, dtype=torch.float64)
    settings = {"wrt": "inputs", "num_steps": 2000, "tolerance": 1e-10}
    found, _ = largest_eigenvalue(
        model, examples(4), loss_fn=lambda outputs, _: (bends * outputs**2).sum(1).mean() / 2, **settings
    )
    assert found == pytest.approx(1.0, rel=1e-3)


class Point(nn.Module):
    """A network whose answer to everything is its weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


SPECTRA = {
    "as far below zero as above": [1.0, -1.0, 0.5, 0.2, -0.3] + [0.0] * 20,
    "nearly as far": [1.0, -0.999, 0.5, 0.2, -0.3] + [0.0] * 20,
    "far below": [-10.0, 1.0, 0.5] + [0.0] * 50,
    "far below, and close ones": [-10.0, 0.1, 0.05] + [0.0] * 7,
    "one before a crowd": [1.0] + [0.9] * 1000,
    "none above zero": [-3.0, -2.0, -1.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_the_largest_eigenvalue_of_any_spectrum_is_found_from_any_seed(spectrum):
    eigenvalues = torch.tensor(spectrum, dtype=torch.float64)
    model, data = Point(len(spectrum)).eval(), [(torch.rand(4, 1), torch.zeros(4).long())]
    for seed in range(5):
        found, _ = largest_eigenvalue(
            model, data, loss_fn=lambda outputs, _: (eigenvalues * outputs**2).sum(1).mean() / 2, seed=seed
        )
        assert found == pytest.approx(max(spectrum), rel=1e-3)


def test_a_saddle_bends_up_along_its_diagonal():
    data = [(torch.rand(4, 1), torch.zeros(4).long())]
    found, _ = largest_eigenvalue(Point(2).eval(), data, loss_fn=lambda outputs, _: outputs.prod(1).mean())
    assert found == pytest.approx(1)


@pytest.mark.parametrize("wrt", ["weights", "inputs"])
def test_trained_networks_have_the_largest_eigenvalue_of_the_dense_hessian_from_any_seed(wrt):
    train, _ = data.load("digits")
    images = [(x[:16].unflatten(1, (8, 8))[:, None, :2, :4], y[:16] % 3) for x, y in train][:2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(100):
        for x, y in images:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    expected = dense(deepcopy(model).double().eval(), x.double(), y, wrt)[:, -1].mean().item()
    for seed in range(3):
        found, _ = largest_eigenvalue(model.eval(), images, wrt=wrt, seed=seed)
        assert found == pytest.approx(expected, rel=1e-3)


def test_curvature_along_a_curve_is_that_of_each_network():
    connection, data = connect("mlp"), examples()
    before = torch.get_rng_state()
    curvature = connection.curvature(data, wrt="inputs", t=[0.0, 0.5], tolerance=0.1)
    assert torch.equal(before, torch.get_rng_state())
    for value, t in zip(curvature.eigenvalue.tolist(), (0.0, 0.5), strict=True):
        assert value == largest_eigenvalue(connection.model_at(t), data, wrt="inputs", tolerance=0.1)[0]
    assert "largest eigenvalue, inputs" in repr(curvature) and curvature._repr_html_().count("<tr>") == 2
    assert float(curvature.arc_length[1]) == pytest.approx(connection.length() / 2)
    assert json.loads(curvature.to_json())["t"] == [0.0, 0.5]


def test_flat_losses_have_no_curvature_and_wrong_settings_are_refused():
    model = CASE["mlp"].make(0, torch.float64).eval()
    assert (
        largest_eigenvalue(model, examples(), loss_fn=lambda outputs, targets: outputs.sum(1).mean(), wrt="inputs")[0]
        == 0
    )
    with pytest.raises(ValueError, match="wrt must be 'weights' or 'inputs' or 'both', got wrt='x'"):
        largest_eigenvalue(model, examples(), wrt="x")
    with pytest.raises(ValueError, match="num_steps must be at least 1 and tolerance positive"):
        largest_eigenvalue(model, examples(), num_steps=0)
    with pytest.warns(UserWarning, match="did not settle in 1 steps"):
        largest_eigenvalue(model, examples(), num_steps=1)
    x, y = examples()[0]
    with pytest.raises(ValueError, match=r"does not run on the inputs of a batch, Tensor of uint8 \(10, 1, 2, 4\)"):
        largest_eigenvalue(model, [(x.byte(), y)])
    with pytest.raises(ValueError, match=r"must be one dense floating-point tensor .*, got Tensor of uint8"):
        largest_eigenvalue(model, [(x.byte(), y)], wrt="inputs")
    with pytest.raises(ValueError, match=r"targets of loader must lie in 0\.\.2"):
        largest_eigenvalue(model, [(x, y + 9)])
    with pytest.raises(FloatingPointError, match="the Hessian is NaN or infinite"):
        largest_eigenvalue(model, [(x * torch.nan, y)], wrt="inputs")
    with pytest.raises(ValueError, match="the model is in train mode"):
        largest_eigenvalue(model.train(), examples())


@pytest.mark.parametrize("wrt", ["weights", "inputs"])
def test_attention_has_a_curvature_too(wrt):
    """The fused ways to compute attention have no second derivative on the CPU."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x).mean(1))

    model, x, y = Attends().double().eval(), torch.rand(1, 3, 8).double(), torch.tensor([1])
    found, _ = largest_eigenvalue(model, [(x, y)], wrt=wrt, num_steps=400, tolerance=1e-6)
    if wrt == "inputs":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            dense = torch.autograd.functional.hessian(lambda x: F.cross_entropy(model(x), y), x)
        assert found == pytest.approx(float(torch.linalg.eigvalsh(dense.reshape(24, 24))[-1]), rel=1e-4)
    assert found > 0


def test_token_models_have_a_curvature_in_their_weights_and_frozen_ones_none():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double().eval()
    data = [(torch.randint(7, (4, 5)), torch.randint(7, (4, 5))) for _ in range(2)]
    whole, _ = largest_eigenvalue(model, data)
    model[0].requires_grad_(False)
    head, _ = largest_eigenvalue(model, data)
    twin = nn.Linear(4, 7).double().eval()
    twin.load_state_dict(model[1].state_dict())
    pairs = [(model[0](x), y) for x, y in data]
    assert head == pytest.approx(largest_eigenvalue(twin, pairs)[0], rel=1e-3) and head < whole
    with pytest.raises(ValueError, match=r"must be one dense floating-point tensor .*, got Tensor of int64"):
        largest_eigenvalue(model, data, wrt="inputs")
