"""Training against attacks: endpoints, curves, batch-norm statistics, alignment, the command line."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn
from modeconn import (
    PGD,
    TRADES,
    AdversarialExamples,
    AdversarialTraining,
    Bezier,
    Connection,
    FreeAdversarialTraining,
    data,
    models,
)
from modeconn.attacks.training import adversary_of
from modeconn.cli import parse
from modeconn.curves.step import CurveStep
from modeconn.data import TensorLoader
from modeconn.learning.step_loss import StepLoss
from modeconn.models.training import DIGITS_RECIPE
from modeconn.network.batch_norm import calibration_batches, recalibrate
from modeconn.network.loss import cross_entropy
from modeconn.network.recipe import Recipe, constant
from modeconn.network.weights import WeightSpace, Workspace
from tests.cases import CASE, DEVICE, same_bits
from tests.cli.test_app import run
from tests.learning import test_resume
from tests.learning.resume_worker import RECIPE, fit

ATTACK = PGD(0.2, 0.1, 2)
FEW = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1), schedule=constant, weight_decay=0.0)


def pixels(num: int = 30, **settings) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(num, 1, 2, 4, generator=generator)
    return TensorLoader(inputs, torch.randint(3, (num,), generator=generator), batch_size=10, **settings).to(DEVICE)


def resumable() -> TensorLoader:
    """The data of the runs that test_resume interrupts, as pixels."""
    loader = test_resume.loader()
    return loader.with_(inputs=loader.inputs.sigmoid())


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------- objectives


def test_an_attack_alone_means_madrys_objective():
    assert adversary_of(ATTACK) == AdversarialTraining(ATTACK)
    assert adversary_of(TRADES(ATTACK)) == TRADES(ATTACK)

    class Keeps:
        def __init__(self) -> None:
            self.loss = nn.CrossEntropyLoss()

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return x

    keeps = Keeps()
    assert adversary_of(keeps) == AdversarialTraining(keeps)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_objective_mixes_clean_and_adversarial_losses(share):
    model, (x, y) = CASE["mlp"].make(0), next(iter(pixels()))
    attack = replace(ATTACK, seed=1)
    found = AdversarialTraining(attack, share).loss(model, x, y, cross_entropy)
    expected = (1 - share) * cross_entropy(model(attack(model, x, y)), y) + share * cross_entropy(model(x), y)
    torch.testing.assert_close(found, expected)
    assert found > cross_entropy(model(x), y)


def test_trades_adds_the_divergence_that_its_attack_raises():
    model, (x, y) = CASE["mlp"].make(0), next(iter(pixels()))
    found = TRADES(replace(ATTACK, seed=1), beta=2.0).loss(model, x, y, cross_entropy)

    clean = model(x).softmax(1)
    start = (x + torch.empty_like(x).uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    divergences = []
    for _ in range(3):
        start.requires_grad_()
        divergence = (clean * (clean.log() - model(start).log_softmax(1))).sum(1).mean()
        divergences.append(divergence)
        (gradient,) = torch.autograd.grad(divergence, start, retain_graph=True)
        start = (start + 0.1 * gradient.sign()).detach().clamp(x - 0.2, x + 0.2).clamp(0, 1)
    assert divergences[0] < divergences[1] < divergences[2]
    torch.testing.assert_close(found, cross_entropy(model(x), y) + 2 * divergences[2])


@pytest.mark.parametrize("adversary", [AdversarialTraining(ATTACK), AdversarialTraining(ATTACK, 0.5), TRADES(ATTACK)])
def test_in_a_step_running_statistics_see_what_the_update_sees_and_nothing_else(adversary):
    """Statistics count the passes of the update: one, or two where clean examples take part."""
    model, (x, y) = CASE["batch_norm"].make(0).train(), next(iter(pixels()))
    adversary.loss(model, x, y, cross_entropy).backward()
    assert int(model[2].num_batches_tracked) == (1 if adversary == AdversarialTraining(ATTACK) else 2)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_of_the_step_are_those_of_the_loss_on_fixed_adversarial_examples():
    model, (x, y) = CASE["mlp"].make(0), next(iter(pixels()))
    attack = replace(ATTACK, seed=1)
    moved, twin = attack(model, x, y), copy.deepcopy(model)
    cross_entropy(twin(moved), y).backward()
    AdversarialTraining(attack).loss(model, x, y, cross_entropy).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_an_attack_of_ones_own_may_be_careless():
    """One that leaves gradients, and works on whatever mode it meets, harms neither weights nor statistics."""

    def careless(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        F.cross_entropy(model(x), y).backward()
        return x.grad.sign().mul(0.1).add(x).detach()

    model, (x, y) = CASE["batch_norm"].make(0).train(), next(iter(pixels()))
    adversary_of(careless).loss(model, x, y, cross_entropy)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert int(model[2].num_batches_tracked) == 1


# ---------------------------------------------------------------- endpoints


@pytest.fixture(scope="module")
def digits():
    train, test = data.load("digits")
    recipe = replace(DIGITS_RECIPE, epochs=8)

    def trained(adversary=None):
        model = models.mlp(64, (64,), 10, mean=train.mean(), std=train.std() + 0.1, seed=1)
        return models.train(model, train, recipe=recipe, adversary=adversary, seed=1)

    return trained, test.inputs, test.targets


@pytest.mark.parametrize(
    "adversary",
    [
        PGD(0.1, 0.04, 3),
        PGD(0.1, 0.125, 1),
        AdversarialTraining(PGD(0.1, 0.04, 3), 0.5),
        TRADES(PGD(0.1, 0.04, 3)),
        FreeAdversarialTraining(0.1, num_replays=6),
    ],
    ids=["madry", "fast", "mixed", "trades", "free"],
)
def test_training_against_an_attack_makes_a_network_more_robust(digits, adversary):
    trained, x, y = digits
    ordinary, robust = trained(), trained(adversary)
    attack = PGD(0.1, 0.02, 10, seed=0)
    before, after = (accuracy(model, attack(model, x, y), y) for model in (ordinary, robust))
    assert after > before + 0.15
    assert accuracy(robust, x, y) > 0.9


def test_training_follows_its_seed_and_leaves_everything_as_it_was():
    model, loader = CASE["batch_norm"].make(0), pixels(shuffle=True)
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second, other = (models.train(model, loader, recipe=FEW, adversary=ATTACK, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert same_bits(first, second) and not torch.equal(weights(first), weights(other))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())


def test_an_attack_without_radius_is_ordinary_training():
    model, loader = CASE["mlp"].make(0), pixels()
    attacked = models.train(model, loader, recipe=FEW, adversary=PGD(0.0, 0.1, 2))
    assert torch.equal(weights(attacked), weights(models.train(model, loader, recipe=FEW)))


# ---------------------------------------------------------------- free adversarial training

FREE = FreeAdversarialTraining(0.2, 0.15, num_replays=3)


def uneven() -> list[tuple[Tensor, Tensor]]:
    """Batches of 6, 10 and 4 images, some pixels at the edge of their range."""
    x, y = (torch.cat(parts) for parts in zip(*pixels(20), strict=True))
    return list(zip(x.mul(1.2).clamp(0, 1).split([6, 10, 4]), y.split([6, 10, 4]), strict=True))


def test_free_training_is_the_papers_loop_written_out():
    model = CASE["mlp"].make(0)
    trained = models.train(model, uneven(), recipe=FEW, adversary=FREE)

    twin, perturbation = copy.deepcopy(model), torch.zeros(10, 1, 2, 4)
    for x, y in uneven() * FEW.epochs:
        for _ in range(3):
            delta = perturbation[: len(x)].clone().requires_grad_()
            parameters = list(twin.parameters())
            loss = F.cross_entropy(twin((x + delta).clamp(0, 1)), y)
            to_delta, *gradients = torch.autograd.grad(loss, [delta, *parameters])
            perturbation[: len(x)] = (delta.detach() + 0.15 * to_delta.sign()).clamp(-0.2, 0.2)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
    torch.testing.assert_close(weights(trained), weights(twin))


def test_free_training_shows_images_inside_ball_and_pixel_range():
    seen, clean = [], [x for x, _ in uneven() * FEW.epochs for _ in range(3)]

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CASE["mlp"].make(0)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.inner(x)

    models.train(Watching(), uneven(), recipe=FEW, adversary=FREE)
    assert torch.equal(seen[0], clean[0])
    moved = [(shown - x).abs().max() for shown, x in zip(seen, clean, strict=True)]
    assert max(moved) <= 0.2 + 1e-6 and min(moved[2:]) > 0.1
    assert all(0 <= x.min() and x.max() <= 1 for x in seen)


def test_free_training_without_radius_repeats_clean_batches():
    model = CASE["mlp"].make(0)
    free = models.train(model, uneven(), recipe=FEW, adversary=FreeAdversarialTraining(0.0, num_replays=3))
    thrice = [batch for batch in uneven() for _ in range(3)]
    assert torch.equal(weights(free), weights(models.train(model, thrice, recipe=FEW)))


def test_each_pass_of_free_training_has_its_own_place_on_the_curve():
    connection = fit(data=resumable(), adversary=FREE, recipe=replace(RECIPE, epochs=1))
    plain = fit(data=resumable(), recipe=replace(RECIPE, epochs=1))
    counts = [sum(value is not None for value in c.history.loss_by_t[0]) for c in (connection, plain)]
    assert counts[0] > counts[1]


def test_settings_of_free_training_are_checked():
    for settings, message in [
        ({"eps": -0.1}, r"eps must be a finite number, 0 or more, got eps=-0\.1"),
        ({"eps": 0.1, "step_size": 0.0}, r"step_size must be positive and finite, got step_size=0\.0"),
        ({"eps": 0.1, "num_replays": 0}, "num_replays must be at least 1, got num_replays=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FreeAdversarialTraining(**settings)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*Divide images in \[0, 255\] by 255"):
        models.train(CASE["mlp"].make(0), [(200 * x, y) for x, y in uneven()], recipe=FEW, adversary=FREE)
    assert repr(FreeAdversarialTraining(8 / 255)) == "FreeAdversarialTraining(eps=8/255, num_replays=4)"


def test_statistics_for_evaluation_are_those_of_clean_data_unless_asked_otherwise():
    model, loader, attack = CASE["batch_norm"].make(0), pixels(), replace(ATTACK, seed=3)
    run = partial(models.train, model, loader, recipe=FEW, adversary=attack)
    clean, running = run(), run(recalibrate=False)
    adversarial = run(recalibrate=AdversarialExamples(loader, attack))
    assert torch.equal(weights(clean), weights(running)) and torch.equal(weights(clean), weights(adversarial))

    expected = copy.deepcopy(running)
    recalibrate(expected, calibration_batches(loader, torch.device("cpu")))
    assert same_bits(clean, expected)
    recalibrate(expected, [(attack(expected, *batch), batch[1]) for batch in calibration_batches(loader, "cpu")])
    assert torch.equal(adversarial[2].running_mean, expected[2].running_mean)
    assert not torch.allclose(adversarial[2].running_mean, clean[2].running_mean)
    assert not torch.allclose(running[2].running_mean, clean[2].running_mean)


def test_ordinary_training_keeps_running_statistics_unless_asked_otherwise():
    model, loader = CASE["batch_norm"].make(0), pixels()
    running = models.train(model, loader, recipe=FEW)
    estimated = models.train(model, loader, recipe=FEW, recalibrate=True)
    assert int(running[2].num_batches_tracked) == 6 and torch.equal(weights(running), weights(estimated))
    recalibrate(running, calibration_batches(loader, torch.device("cpu")))
    assert same_bits(running, estimated)


# ---------------------------------------------------------------- curves


def test_a_curve_is_attacked_where_the_step_is_made():
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    space, curve = WeightSpace(a), Bezier(2)
    points = curve.initial_control_points(space.flatten(a), space.flatten(b))
    step = CurveStep(Workspace(a, space), curve, points, FEW)
    basis, middle = curve.basis(torch.tensor(0.3, dtype=torch.float64)).tolist(), copy.deepcopy(a)
    space.load(sum(weight * point for weight, point in zip(basis, points, strict=True)), middle)

    seen = []

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(weights(model).clone())
        return replace(ATTACK, seed=1)(model, x, y)

    x, y = next(iter(pixels()))
    expected = replace(ATTACK, seed=1)(middle, x, y)
    loss = step((x, y), basis, StepLoss(cross_entropy, adversary=attack).at(1))
    torch.testing.assert_close(seen[0], weights(middle))
    torch.testing.assert_close(loss, cross_entropy(middle(expected), y).detach())


def test_a_curve_trained_against_an_attack_is_more_robust(digits):
    trained, x, y = digits
    a, b = trained(), trained(PGD(0.1, 0.04, 3))
    train, _ = data.load("digits")
    recipe = replace(DIGITS_RECIPE, epochs=4)
    attack = PGD(0.1, 0.02, 10, seed=0)
    clean, robust = (
        modeconn.fit_curve(b, a, train, align=False, recipe=recipe, adversary=adversary).model_at(0.3)
        for adversary in (None, PGD(0.1, 0.04, 3))
    )
    assert accuracy(robust, attack(robust, x, y), y) > accuracy(clean, attack(clean, x, y), y) + 0.05


@pytest.mark.parametrize("adversary", [ATTACK, FREE], ids=["madry", "free"])
@pytest.mark.parametrize("count", [2, 5, 11])
def test_a_run_under_attack_that_is_interrupted_ends_with_the_same_bits(tmp_path, count, adversary):
    """Free training keeps its perturbation in the checkpoint."""
    settings = {"adversary": adversary, "recipe": replace(RECIPE, epochs=2)}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", test_resume.Breaking(resumable(), count), **settings)
    resumed = fit(tmp_path / "c", resumable(), **settings)
    assert test_resume.same(resumed, fit(data=resumable(), **settings))


@pytest.mark.parametrize(
    ("adversary", "message"),
    [
        (None, r"adversary is AdversarialTraining\(attack=PGD\(eps=0\.2, .*\) in it and None here"),
        (PGD(0.2, 0.1, 3), r"num_steps=2, .* in it and AdversarialTraining\(attack=PGD\(.*num_steps=3, .* here"),
        (TRADES(ATTACK), r"in it and TRADES\(attack=PGD\(.*\), beta=6\.0\) here"),
    ],
)
def test_a_checkpoint_of_another_adversary_is_an_error(tmp_path, adversary, message):
    recipe = replace(RECIPE, epochs=1)
    fit(tmp_path / "c", resumable(), adversary=ATTACK, recipe=recipe)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "c", resumable(), adversary=adversary, recipe=recipe)


def test_evaluation_recalibrates_on_clean_data_unless_asked_otherwise(tmp_path):
    a, b = (CASE["batch_norm"].make(seed) for seed in (0, 1))
    loader, attack = pixels(), replace(ATTACK, seed=3)
    connection = modeconn.fit_curve(a, b, loader, align=False, recipe=FEW, adversary=attack)
    state = torch.get_rng_state()
    clean = connection.model_at(0.4)
    adversarial = connection.model_at(0.4, recalibrate=AdversarialExamples(loader, ATTACK))
    assert torch.equal(torch.get_rng_state(), state)
    expected = copy.deepcopy(clean)
    recalibrate(expected, calibration_batches(loader, torch.device("cpu")))
    assert same_bits(clean, expected)
    assert not torch.allclose(adversarial[2].running_mean, clean[2].running_mean)
    again = connection.model_at(0.4, recalibrate=AdversarialExamples(loader, ATTACK))
    assert same_bits(adversarial, again)  # though the attack begins at random

    profiles = [
        connection.evaluate(loader, num_points=3, recalibrate=given)
        for given in (None, AdversarialExamples(loader, ATTACK))
    ]
    assert not torch.allclose(profiles[0].loss, profiles[1].loss)
    torch.testing.assert_close(profiles[0].own_loss, profiles[1].own_loss)


# ---------------------------------------------------------------- alignment


def test_networks_are_aligned_on_their_own_adversarial_examples():
    """Each network is attacked by itself; so a relabelled copy, which the same attack moves alike, is recovered."""
    model = CASE["residual"].make(0).train()
    loader = list(pixels(48).with_(batch_size=24))
    spec = modeconn.discover(model, loader[0][0])
    planted = spec.random(torch.Generator().manual_seed(0))
    attacked, state, before = [], copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        attacked.append((model, len(x), y))
        return ATTACK(model, x, y)

    method = modeconn.ActivationMatching(adversary=attack, num_examples=30)
    other = planted.apply(model)
    found = modeconn.align(model, other, loader, method=method, spec=spec)
    assert found.permutation @ planted == spec.identity()
    assert all(after > 0.999 for _, after in found.correlation.values())
    assert [(m is model, size) for m, size, _ in attacked] == [(True, 24), (False, 24), (True, 6), (False, 6)]
    assert torch.equal(attacked[-1][2], loader[1][1][:6])
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_correlations_on_adversarial_examples_are_those_of_their_activations():
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    x, y = next(iter(pixels()))
    attack = replace(ATTACK, seed=1)
    method = modeconn.ActivationMatching(adversary=attack)
    found = modeconn.align(a, b, [(x, y)], method=method)
    ((before, _),) = found.correlation.values()
    units = [model[:3](attack(model, x, y)).detach().double().T for model in (a, b)]
    pairs = torch.corrcoef(torch.cat(units))[:8, 8:].diagonal()
    torch.testing.assert_close(before, float(pairs.nan_to_num().mean()), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the command line


def test_the_command_line_trains_aligns_and_fits_under_attack(tmp_path):
    common = ("--data", "digits", "--adversary", "pgd", "--eps", "0.1", "--attack-steps", 2)
    short = ("--epochs", 1, "--optimizer", "adam:lr=0.003", "--weight-decay", 0)
    ends = [tmp_path / name for name in ("a", "b")]
    for seed, path in enumerate(ends):
        run("train", path, *common, *short, "--model", "mlp", "--model-arg", "hidden=16,", "--seed", seed)
    run("align", *ends, "--out", tmp_path / "b2", *common)
    run("fit", *ends, "--out", tmp_path / "c", "--method", "none", *common, *short)

    train, _ = data.load("digits")
    recipe, attack = Recipe(1, partial(torch.optim.Adam, lr=0.003), weight_decay=0.0), PGD(0.1, 0.025, 2)
    networks = [
        models.train(
            models.mlp(64, (16,), 10, mean=train.mean(), std=train.std() + 0.1, seed=seed),
            train,
            recipe=recipe,
            adversary=attack,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    assert all(same_bits(models.load(path), model) for path, model in zip(ends, networks, strict=True))
    method = modeconn.ActivationMatching(adversary=attack)
    assert same_bits(models.load(tmp_path / "b2"), modeconn.align(*networks, train, method=method).model_b)
    curve = modeconn.fit_curve(*networks, train, align=False, recipe=recipe, adversary=attack)
    assert torch.equal(Connection.load(tmp_path / "c").control_points, curve.control_points)


def test_adversaries_are_read():
    expected = PGD(8 / 255, 2 / 255, 5)
    assert (
        parse.adversary("pgd", "8/255") == parse.adversary("pgd", "8/255", "2/255", 5) == AdversarialTraining(expected)
    )
    assert parse.adversary("pgd:clean_weight=0.5,norm=l2", "1") == AdversarialTraining(
        PGD(1.0, 0.25, 5, norm="l2"), 0.5
    )
    assert parse.adversary("trades:beta=3", "8/255") == TRADES(expected, beta=3)
    assert parse.adversary("free", "8/255") == FreeAdversarialTraining(8 / 255)
    assert parse.adversary("free:num_replays=8", "0.1", "0.05") == FreeAdversarialTraining(0.1, 0.05, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adversary", "fab", "--eps", "0.1"), "there is no adversary 'fab'; there are free, pgd, trades"),
        (("--adversary", "pgd"), "--adversary pgd needs --eps, such as --eps 8/255"),
        (("--eps", "8/255"), "--eps, --step-size and --attack-steps are for --adversary, which is missing"),
        (("--adversary", "pgd", "--eps", "8/x"), "a number is written 0.03 or 8/255, got '8/x'"),
        (
            ("--adversary", "pgd:radius=3", "--eps", "1"),
            "adversary 'pgd:radius=3': got an unexpected keyword argument 'radius'",
        ),
        (("--adversary", "pgd:eps=3", "--eps", "1"), "got an unexpected keyword argument 'eps'"),
        (("--adversary", "free", "--eps", "0.1", "--attack-steps", "3"), "leave out --attack-steps"),
        (("--adversary", "pgd", "--eps", "-1"), "eps must be a finite number, 0 or more"),
    ],
)
def test_bad_adversaries_are_one_line_on_stderr(tmp_path, arguments, message):
    model = ("--data", "digits", "--model", "mlp", "--model-arg", "hidden=4,")
    result = run("train", tmp_path / "x", *model, *arguments, code=1)
    assert message in result.stderr and not (tmp_path / "x").exists()


def test_alignment_under_attack_looks_at_activations(tmp_path):
    for name in ("a", "b"):
        models.save(models.mlp(64, (4,), 10), tmp_path / name)
    command = ("align", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "x", "--data", "digits", "--eps", "0.1")
    result = run(*command, "--adversary", "pgd", "--method", "weight", code=1)
    assert "--adversary is for --method activation" in result.stderr
    result = run(*command, "--adversary", "trades", code=1)
    assert "networks are aligned under an attack, --adversary pgd" in result.stderr


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialTraining(ATTACK, 1.0), r"clean_weight must lie in \[0, 1\), got clean_weight=1\.0"),
        (lambda: TRADES(ATTACK, beta=0.0), r"beta must be positive and finite, got beta=0\.0"),
        (lambda: TRADES(replace(ATTACK, random_start=False)), "must have a random start and no targets, got PGD"),
        (lambda: TRADES(len), "attack must be a PGD, got attack=<built-in function len>"),
        (lambda: AdversarialTraining("pgd"), r"attack must be one such as PGD\(eps, .*, got attack='pgd'"),
        (lambda: adversary_of(PGD), "adversary must be an attack, .* got adversary=<class .*PGD"),
        (lambda: adversary_of("pgd"), "adversary must be an attack, .* got adversary='pgd'"),
    ],
)
def test_adversaries_that_make_no_sense_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_out_of_range_are_an_error_in_the_first_step():
    loader = pixels()
    with pytest.raises(ValueError, match=r"Divide images in \[0, 255\] by 255"):
        models.train(CASE["mlp"].make(0), loader.with_(inputs=255 * loader.inputs), recipe=FEW, adversary=ATTACK)


def test_an_attack_that_gives_no_examples_is_an_error_in_the_first_step():
    def nothing(model, x, y):
        return None

    with pytest.raises(ValueError, match=r"nothing.* must return a tensor, but returned NoneType"):
        models.train(CASE["mlp"].make(0), pixels(), recipe=FEW, adversary=nothing)


def test_what_an_adversary_does_not_go_with_is_an_error():
    a, b, loader = CASE["mlp"].make(0), CASE["mlp"].make(1), pixels()

    def forward(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"AdversarialTraining\(.* attacks \(inputs, targets\), of which forward="):
        models.train(a, loader, forward=forward, adversary=ATTACK)
    with pytest.raises(ValueError, match="attacks training data, so fit_curve needs it"):
        modeconn.fit_curve(a, b, adversary=ATTACK)
    with pytest.raises(ValueError, match=r"PAM\(.* moves units by the clean loss, so it does not go with PGD"):
        modeconn.fit_curve(a, b, loader, refine=modeconn.PAM(), adversary=ATTACK)
    with pytest.raises(ValueError, match="adversary must be an attack, such as PGD"):
        modeconn.ActivationMatching(adversary=TRADES(ATTACK))
    with pytest.raises(ValueError, match="one of its batches is one Tensor"):
        modeconn.align(a, b, [next(iter(loader))[0]], method=modeconn.ActivationMatching(adversary=ATTACK))
    with pytest.raises(ValueError, match="repair knows clean data alone"):
        Connection.straight_between(a, b).model_at(0.5, repair=True, recalibrate=AdversarialExamples(loader, ATTACK))
