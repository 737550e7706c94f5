"""Attacks of torchattacks by name: what is read, what they are allowed to change, and the reference AutoAttack."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modeconn import PGD, AdversarialTraining, Connection, data, models
from modeconn.attacks import Cascade, TorchAttack, autoattack, build
from modeconn.attacks.torch_attacks import _classes, _defaults
from modeconn.models.training import DIGITS_RECIPE
from modeconn.network.attack import under_attack
from modeconn.network.loss import TrainingData
from modeconn.tools.rng import rng_state
from tests.cases import CASE

torchattacks = pytest.importorskip("torchattacks")

COLOUR_ONLY = ("PIFGSM", "PIFGSMPP", "TIFGSM")  # their filters have three channels
BOUNDED = [name for name in _classes() if "eps" in _defaults(name) and name not in (*COLOUR_ONLY, "AutoAttack")]
FEW = {"steps": 2, "n_queries": 5, "nb_iter": 2}


def few(name: str, **arguments: object) -> TorchAttack:
    """The attack with few steps."""
    known = _defaults(name)
    return TorchAttack(name, {**{key: value for key, value in FEW.items() if key in known}, **arguments}, seed=1)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small perceptron that knows the digits, and the test set."""
    train, test = data.load("digits")
    model = models.mlp(64, (16,), 10, mean=train.mean(), std=train.std() + 0.1, seed=1)
    return models.train(model, train, recipe=replace(DIGITS_RECIPE, epochs=6), seed=1), test.inputs, test.targets


def robust(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


# -- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchattacks:PGD(eps=8/255, steps=20)", TorchAttack("PGD", {"eps": 8 / 255, "steps": 20})),
        ("torchattacks:FGSM", TorchAttack("FGSM")),
        ("torchattacks:CW(c=2*(1+1), lr=1e-2)", TorchAttack("CW", {"c": 4, "lr": 0.01})),
        ("torchattacks:FAB(norm='L2', seed=3)", TorchAttack("FAB", {"norm": "L2"}, 3)),
        ("torchattacks:Pixle(x_dimensions=(1, 5))", TorchAttack("Pixle", {"x_dimensions": (1, 5)})),
        ("torchattacks:Square(n_queries=-1+3)", TorchAttack("Square", {"n_queries": 2})),
        ("torchattacks:PGD(random_start=False)", TorchAttack("PGD", {"random_start": False})),
        ("apgd", TorchAttack("APGD", {"norm": "Linf", "eps": 8 / 255, "steps": 100})),
        ("square", TorchAttack("Square", {"norm": "Linf", "eps": 8 / 255, "n_queries": 5000})),
        ("autoattack-10", TorchAttack("AutoAttack", {"norm": "Linf", "eps": 8 / 255})),
        ("autoattack", autoattack(8 / 255)),
        ("pgd20", PGD(8 / 255, 2 / 255, 20)),
        ("pgd100", PGD(8 / 255, 2 / 255, 100)),
    ],
)  # fmt: skip
def test_names_become_attacks(text, expected):
    assert build(text) == expected


@pytest.mark.parametrize("name", ["PGD", "Square", "FAB", "PGDL2", "CW", "Pixle"])
def test_what_an_attack_is_called_is_read_as_the_same_attack(name):
    for attack in (TorchAttack(name), few(name), few(name, **({"eps": 0.3} if "eps" in _defaults(name) else {}))):
        assert build(repr(attack)) == attack
    assert repr(build("torchattacks:PGD(eps=8/255,alpha=1/255)")) == "torchattacks:PGD(eps=8/255, alpha=1/255)"


def test_radius_norm_and_seed_are_set_where_the_text_is_silent_and_the_attack_has_them():
    attack = build("torchattacks:APGD(eps=0.5)", eps=0.1, norm="l2", seed=4)
    assert (attack.eps, attack.norm, attack.seed) == (0.5, "l2", 4)
    assert build("torchattacks:FAB", eps=0.1).eps == 0.1
    assert build("torchattacks:CW", eps=0.1, norm="l2") == TorchAttack("CW")
    assert build("torchattacks:PIFGSM", eps=0.1).eps == 0.1
    assert (build("torchattacks:PGDL2").norm, build("torchattacks:CW").eps) == ("l2", None)
    assert build("pgd20", eps=0.2, norm="l2", seed=4) == PGD(0.2, 0.05, 20, norm="l2", seed=4)
    assert build("autoattack", eps=0.2, norm="l2").norm == "l2"
    assert build("pgd20", eps=0.0).eps == 0


def test_a_norm_that_an_attack_cannot_take_is_refused():
    for name, norm, own in (("PGD", "l2", "linf"), ("FGSM", "l2", "linf"), ("PGDL2", "linf", "l2")):
        with pytest.raises(
            ValueError, match=f"{name} knows no ball but that of norm '{own}', got norm='{norm}'. Leave"
        ):
            build(f"torchattacks:{name}", eps=0.5, norm=norm)
        assert build(f"torchattacks:{name}", norm=own).norm == own
    assert build("torchattacks:APGD(norm='L2')", norm="linf").norm == "l2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg20", "there is no attack 'pdg20'; there are pgd20 .*, autoattack, apgd, square, autoattack-10, and"),
        ("torchattacks:PDG", "torchattacks has no attack 'PDG'; it has APGD, APGDT, .*, VNIFGSM"),
        ("torchattacks:MultiAttack", "torchattacks has no attack 'MultiAttack'"),
        ("torchattacks:PGD(step=3)", "torchattacks:PGD has no argument 'step'; it has eps, alpha, steps, random_start"),
        ("torchattacks:PGD(0.1)", "an attack is written torchattacks:PGD"),
        ("torchattacks:PGD(eps=0.1", "an attack is written torchattacks:PGD"),
        ("torchattacks:", "an attack is written torchattacks:PGD"),
        ("torchattacks:os.system('x')", "an attack is written torchattacks:PGD"),
        ("torchattacks:PGD(**{'eps': 1})", r"arguments are written NAME=VALUE, got \*\*"),
        ("torchattacks:PGD(eps=__import__('os'))", r"numbers, fractions or strings in quotes, got __import__\('os'\)"),
        ("torchattacks:PGD(eps=9**9**9)", r"numbers, fractions or strings in quotes, got 9 \*\* 9"),
        ("torchattacks:FAB(norm=L2)", "numbers, fractions or strings in quotes, got L2"),
        ("torchattacks:PGD(eps=8/0)", "8 / 0 is no number"),
        ("torchattacks:PGD(eps='a'*9)", "'a' \\* 9 is no number"),
        ("torchattacks:PGD(eps=8/255, eps=1/255)", "eps is given twice in 'torchattacks:PGD"),
        ("torchattacks:PGD(eps=-8/255)", "eps must be a finite number, 0 or more, got eps=-0.03"),
        ("torchattacks:PGD(eps='8/255')", r"eps must be a number, got eps='8/255' for torchattacks:PGD\(eps='8/255'\)"),
        ("torchattacks:PGD(eps=None)", "eps must be a number, got eps=None"),
        ("torchattacks:PGD(steps=-1)", "steps must be positive and finite, got steps=-1"),
        ("torchattacks:PGD(steps=0)", "steps must be positive and finite, got steps=0"),
        ("torchattacks:PGD(steps=2.5)", "steps must be a whole number, got steps=2.5"),
        ("torchattacks:PGD(steps=True)", "steps must be a whole number, got steps=True"),
        ("torchattacks:PGD(alpha=0)", "alpha must be positive and finite, got alpha=0"),
        ("torchattacks:PGD(alpha=-0.01)", "alpha must be positive and finite, got alpha=-0.01"),
        ("torchattacks:PGD(random_start='no')", "random_start must be True or False, got random_start='no'"),
        ("torchattacks:APGD(n_restarts=0)", "n_restarts must be positive and finite, got n_restarts=0"),
        ("torchattacks:APGD(seed='x')", "seed must be a whole number, got seed='x'"),
        ("torchattacks:APGD(norm=2)", "norm must be a string, got norm=2"),
        ("torchattacks:Pixle(x_dimensions=3)", "x_dimensions must be a pair, got x_dimensions=3"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        build(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("APGD(norm='L1')", r"torchattacks:APGD\(norm='L1'\) failed with AssertionError"),
        ("APGD(loss='foo')", r"torchattacks:APGD\(loss='foo'\) failed with ValueError: unknown loss"),
        ("APGDT(n_classes=20)", r"n_classes must lie in 2\.\.10, the classes of the network, got n_classes=20"),
        ("APGDT(n_classes=1)", r"n_classes must lie in 2\.\.10"),
    ],
)
def test_what_torchattacks_cannot_do_names_the_attack(text, message, digits):
    model, x, y = digits
    with pytest.raises(ValueError, match=message):
        build(f"torchattacks:{text}")(model, x[:2], model(x[:2]).argmax(1))
    for name in ("APGDT", "AutoAttack"):
        with pytest.raises(
            ValueError, match=rf"torchattacks:{name}\(\) compares 4 classes, but the network has 3\. Use"
        ):
            TorchAttack(name)(nn.Linear(64, 3), x[:2], y[:2] % 3)


def test_every_default_is_of_its_own_kind():
    for name in _classes():
        defaults = {key: value for key, value in _defaults(name).items() if value is not None}
        assert TorchAttack(name).settings == TorchAttack(name, defaults).settings
        assert TorchAttack(name, {"eps": 1} if "eps" in defaults else {})
    assert TorchAttack("PGD", {"eps": np.float32(0.5), "steps": np.int64(3)})


def test_classes_are_counted_in_train_mode_too():
    model = nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4)).train()
    x = torch.rand(8, 9, generator=torch.Generator().manual_seed(0))
    assert few("APGDT", eps=1e-6)(model, x, model(x).argmax(1)).shape == x.shape


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    for text in ("torchattacks:PGD", "autoattack", "square"):
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps torchattacks"):
            build(text)
    assert isinstance(build("pgd20"), PGD)


# -- laws


@pytest.mark.parametrize("name", BOUNDED)
def test_examples_stay_in_the_ball_and_the_pixel_range_and_nothing_else_changes(name, digits):
    model, x, y = digits
    x, y, attack = x[:5], y[:5], few(name, eps=0.15)
    before = rng_state(x.device)
    x_adv, again = attack(model, x, y), attack(model, x, y)
    order = math.inf if attack.norm == "linf" else 2
    assert torch.linalg.vector_norm(x_adv - x, ord=order, dim=1).max() <= 0.15 + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1 and x_adv.shape == x.shape and not x_adv.requires_grad
    assert torch.equal(x_adv, again)
    assert str(rng_state(x.device)) == str(before) and torch.equal(torch.get_rng_state(), before["torch"])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(TorchAttack(name, {"eps": 0})(model, x, y), x)


@pytest.mark.parametrize("name", ["GN", "VANILA", "CW"])
def test_attacks_without_a_ball_run_too(name, digits):
    model, x, y = digits
    assert few(name).eps is None
    assert few(name)(model, x[:3], y[:3]).shape == (3, 64)


@pytest.mark.parametrize("name", ["APGD", "APGDT", "Square", "PGD"])
def test_a_seed_decides_and_none_draws_from_the_global_generator(name, digits):
    model, x, y = digits
    x, y = x[:8], y[:8]

    def found(state: int) -> Tensor:
        torch.manual_seed(state)
        return replace(few(name, eps=0.3), seed=None)(model, x, y)

    with torch.random.fork_rng():
        assert torch.equal(found(0), found(0))
        assert not torch.equal(found(0), found(1))
        attack = replace(few(name, eps=0.3), seed=None)
        assert not torch.equal(attack(model, x, y), attack(model, x, y))  # as one batch of training after the other


@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 3, 4), (3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_any_shape_and_dtype_can_be_attacked(shape, dtype):
    size = math.prod(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 5)).to(dtype)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = model(x).argmax(1)
    for name in ("APGD", "Square", "FAB", "PGD"):
        x_adv = few(name, eps=0.2)(model, x, y)
        assert x_adv.shape == x.shape and x_adv.dtype == dtype
        assert (x_adv - x).abs().max() <= 0.2 + 1e-6


def test_flags_of_the_network_stay_and_training_sees_the_network_it_updates():
    model = CASE["batch_norm"].make(0).train()
    seen = []
    model[2].register_forward_hook(lambda layer, *_: seen.append((layer.training, layer.track_running_stats)))
    x = torch.rand(6, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    with under_attack(model):
        y = model(x).argmax(1)  # right, so that the cascade attacks a whole batch
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for attack in (TorchAttack("PGD", {"steps": 2}), Cascade((PGD(1e-6, 1e-6, 1),))):
        attack(model, x, y)
    assert set(seen) == {(True, False)} and all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert AdversarialTraining(TorchAttack("PGD", {"steps": 2})).loss(model, x, y, nn.functional.cross_entropy) > 0


def test_ours_and_theirs_agree_at_equal_settings(digits):
    model, x, y = digits
    ours = PGD(0.1, 0.025, 10, seed=1)(model, x, y)
    theirs = TorchAttack("PGD", {"eps": 0.1, "alpha": 0.025, "steps": 10}, seed=2)(model, x, y)
    difference = robust(model, ours, y).double() - robust(model, theirs, y).double()
    assert 0.05 < robust(model, ours, y).double().mean() < 0.8
    assert difference.mean().abs() <= 2 * difference.std() / len(y) ** 0.5 + 1e-12
    exact = PGD(0.1, 0.025, 10, random_start=False)(model, x, y)
    their_exact = TorchAttack("PGD", {"eps": 0.1, "alpha": 0.025, "steps": 10, "random_start": False})(model, x, y)
    torch.testing.assert_close(exact, their_exact, rtol=0, atol=1e-6)


# -- cascades and AutoAttack


@dataclass(frozen=True)
class Breaks:
    """Moves those examples whose first pixel is below a level, and remembers how many it saw."""

    level: float
    seen: list
    eps: float = 0.5
    norm: str = "linf"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(len(x))
        return torch.where(x[:, :1] < self.level, -torch.ones_like(x), x)


def test_a_cascade_shows_each_attack_only_what_is_left():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    x, y = torch.linspace(0.1, 1, 10).repeat(2, 1).T, torch.zeros(10, dtype=torch.int64)
    seen: list[int] = []
    attack = Cascade((Breaks(0.35, seen), Breaks(0.75, seen), Breaks(0.0, seen)))
    x_adv = attack(model, x, y)
    assert seen == [10, 7, 3]
    assert robust(model, x_adv, y).sum() == 3 and torch.equal(x_adv[7:], x[7:])
    everything: list[int] = []
    Cascade((Breaks(2.0, everything), Breaks(0.0, everything)))(model, x, y)
    assert everything == [10]
    with pytest.raises(ValueError, match="attacks is empty"):
        Cascade(())


def test_attacks_with_a_black_box_among_them_are_neither():
    square, apgd = TorchAttack("Square"), TorchAttack("APGD")
    assert (square.black_box, apgd.black_box, TorchAttack("AutoAttack").black_box) == (True, False, None)
    assert Cascade((PGD(0.1, 0.1, 1), apgd)).black_box is False and Cascade((square, square)).black_box is True
    assert Cascade((apgd, square)).black_box is None and Cascade((autoattack(0.1), autoattack(0.1))).black_box is None


def test_autoattack_is_the_reference_version():
    attack = build("autoattack", eps=0.1, seed=5)
    assert [part.name for part in attack.attacks] == ["APGD", "APGDT", "FAB", "Square"]
    apgd, apgdt, fab, square = (part.settings for part in attack.attacks)
    assert (apgd["steps"], apgd["loss"], apgd["n_restarts"], apgd["rho"]) == (100, "ce", 1, 0.75)
    assert (apgdt["steps"], fab["steps"], fab["multi_targeted"]) == (100, 100, True)
    assert (fab["eta"], fab["beta"], fab["alpha_max"]) == (1.05, 0.9, 0.1)
    assert (square["n_queries"], square["p_init"]) == (5000, 0.8)
    assert {part.eps for part in attack.attacks} == {0.1} and {part.seed for part in attack.attacks} == {5}
    assert (attack.eps, attack.norm, repr(attack)) == (0.1, "linf", "autoattack(eps=0.1, norm='linf', seed=5)")
    assert repr(build("autoattack", norm="l2")) == "autoattack(eps=8/255, norm='l2')"


@pytest.mark.parametrize(("num_classes", "expected"), [(4, 3), (10, 9), (30, 9)])
def test_autoattack_leads_to_nine_targets_or_to_all_there_are(num_classes, expected, monkeypatch):
    model, targets = nn.Linear(9, num_classes), []
    single_run = torchattacks.APGDT.attack_single_run

    def spy(self: object, x: Tensor, y: Tensor) -> object:
        targets.append(self.target_class)
        return single_run(self, x, y)

    monkeypatch.setattr(torchattacks.APGDT, "attack_single_run", spy)
    x = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    few("APGDT", eps=1e-6)(model, x, model(x).argmax(1))
    assert targets == list(range(2, expected + 2))


def test_autoattack_breaks_what_its_parts_break_and_asks_for_four_classes(digits):
    model, x, y = digits
    x, y = x[:6], y[:6]
    full = autoattack(0.1, seed=1)
    quick = replace(
        full,
        attacks=tuple(
            replace(part, arguments={**part.arguments, **{k: v for k, v in FEW.items() if k in part.arguments}})
            for part in full.attacks
        ),
    )
    left = robust(model, quick(model, x, y), y)
    assert not (left & ~robust(model, quick.attacks[0](model, x, y), y)).any()
    assert not (left & ~robust(model, x, y)).any()
    with pytest.raises(ValueError, match=r"compares 4 classes, but the network has 3\. Use pgd100 or apgd and square"):
        full(nn.Linear(64, 3), x, y % 3)


def test_along_a_curve_real_attacks_are_told_apart_by_what_they_spend(digits):
    model, x, y = digits
    connection = Connection.straight_between(model, model, training=TrainingData())
    small, large = (few("APGD", eps=eps) for eps in (0.05, 0.1))
    attacks = {"small": small, "large": large, "square": few("Square", eps=0.1)}
    profile = connection.robustness([(x[:40], y[:40])], attacks, t=[0.0])
    assert profile.accuracy["large"] < profile.accuracy["small"] <= profile.accuracy["clean"]
    assert profile.warnings == []
    swapped = {**profile.attacks, "small": profile.attacks["large"], "large": profile.attacks["small"]}
    (doubt,) = replace(profile, attacks=swapped).warnings
    assert doubt.startswith("small is a weak attack: at t=0")
    assert profile.attacks["square"]["black_box"] and not profile.attacks["large"]["black_box"]
