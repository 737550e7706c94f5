from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

import modeconn
from modeconn import PAM, Bezier, Line, PolyChain, ProximalLinear, Recipe, RelaxedStep, SinkhornStep, models
from modeconn.curves.loss import CurveLoss
from modeconn.curves.path import Path
from modeconn.matching import match_units
from modeconn.matching.birkhoff import decompose
from modeconn.matching.learned import SoftWeights
from modeconn.models.preresnet import PreActivationResNet, bottleneck
from modeconn.models.zoo import Images
from modeconn.network.loss import supervised
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.refinement import relaxed_step
from modeconn.refinement.exact import Descent
from modeconn.refinement.moves import Move, cycles, exchanges, gain, linear_costs, proximal_proposals
from modeconn.refinement.pam import draw_sample
from modeconn.refinement.relabelled import Relabelled
from modeconn.refinement.relaxed_step import project
from modeconn.symmetry.spec import Permutation
from tests.cases import CASE, DEVICE, batches, same_bits
from tests.learning.resume_worker import fit, loader
from tests.learning.test_resume import Breaking
from tests.symmetry import cases as symmetry_cases

SYMMETRIES = {case.name: case for case in symmetry_cases.CASES}
ONCE = ["plain", "residual", "dense block", "channel shuffle", "vit", "expert bank"]
"""Cases in which no weight holds units of one tree twice, so that the costs of moves are exactly linear."""
RECIPE = Recipe(epochs=4, optimizer=partial(torch.optim.Adam, lr=0.01), weight_decay=0.0)


def setting(name: str):
    """A model, its spec, b's parameters, and the gradient of a loss that is linear in them."""
    torch.manual_seed(0)
    case = SYMMETRIES[name]
    model = case.build()
    spec = modeconn.discover(model, case.inputs(), rules={**modeconn.RULES, **case.rules})
    theta_b = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    gradient = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    return spec, theta_b, gradient


def linear_loss(theta, gradient) -> float:
    return sum(float((theta[name] * gradient[name]).sum()) for name in gradient)


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("name", ONCE)
def test_a_move_promises_exactly_what_a_linear_loss_falls_by(name):
    spec, theta_b, gradient = setting(name)
    generator = torch.Generator().manual_seed(1)
    for tree in spec.trees():
        costs = linear_costs(spec, tree, gradient, theta_b)
        drawn = spec.random(generator).perms
        perms = {group.name: drawn[group.name] for group in tree}
        move = Move(spec, perms, gain(spec, tree, perms, costs))
        after = {**theta_b, **move.apply(theta_b)}
        whole = move.permutation.relabel(theta_b)
        assert all(torch.equal(after[name], whole[name]) for name in whole)
        fallen = linear_loss(theta_b, gradient) - linear_loss(after, gradient)
        assert move.gain == pytest.approx(fallen, abs=1e-10)


@pytest.mark.parametrize("name", [*ONCE, "grouped", "gpt, tied", "lstm"])
def test_the_cycles_of_a_relabelling_compose_to_it(name):
    spec, theta_b, gradient = setting(name)
    drawn = spec.random(torch.Generator().manual_seed(2))
    composed = spec.identity()
    for tree in spec.trees():
        costs = linear_costs(spec, tree, gradient, theta_b)
        parts = list(cycles(spec, tree, {g.name: drawn.perms[g.name] for g in tree}, costs))
        for one, other in itertools.combinations(parts, 2):
            assert one.places.isdisjoint(other.places)
        for part in parts:
            composed = part.permutation @ composed
    assert composed == drawn


@pytest.mark.parametrize("name", ["plain", "depthwise separable", "vit"])
def test_exchanges_are_the_best_of_all_pairs(name):
    spec, theta_b, gradient = setting(name)
    before = linear_loss(theta_b, gradient)
    for tree in spec.trees():
        found = list(exchanges(spec, tree, linear_costs(spec, tree, gradient, theta_b), 3))
        for group in tree:
            falls = []
            for row in itertools.product(*map(range, group.shape[:-1])):
                for i, j in itertools.combinations(range(group.size), 2):
                    perms = {n: p.clone() for n, p in spec.identity().perms.items()}
                    perms[group.name][row][[i, j]] = torch.tensor([j, i])
                    falls.append(before - linear_loss(Permutation(spec, perms).relabel(theta_b), gradient))
            best = sorted(falls, reverse=True)[:3]
            mine = [
                m.gain
                for m in found
                if not torch.equal(m.permutation.perms[group.name], spec.identity().perms[group.name])
            ]
            assert mine == pytest.approx(best, abs=1e-10)


def test_without_a_proximal_weight_the_proposal_minimises_a_linear_loss():
    spec, theta_b, gradient = setting("plain")
    (tree, _) = spec.trees()
    costs = linear_costs(spec, tree, gradient, theta_b)
    (group,) = tree
    best = min(
        linear_loss(
            Permutation(spec, {**spec.identity().perms, group.name: torch.tensor(p)}).relabel(theta_b), gradient
        )
        for p in itertools.permutations(range(group.size))
    )
    (proposal,) = proximal_proposals(tree, costs, [0.0])
    assert linear_loss(theta_b, gradient) - gain(spec, tree, proposal, costs) == pytest.approx(best)
    (held,) = proximal_proposals(tree, costs, [1e6])
    assert Permutation(spec, {**spec.identity().perms, **held}) == spec.identity()


# ---------------------------------------------------------------- the loss of the curve


@pytest.mark.parametrize("curve", [Line(), Bezier(2), Bezier(3), PolyChain(3)], ids=repr)
def test_the_loss_along_the_curve_is_that_of_its_networks_and_has_its_gradients(curve):
    a, b = (CASE["residual"].make(seed, torch.float64) for seed in (0, 1))
    space = WeightSpace(a)
    sample = [(t, batch) for t, batch in zip((0.1, 0.4, 0.8), batches(3, dtype=torch.float64), strict=True)]

    def forward(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    loss = CurveLoss(Workspace(a, space), curve, space.flatten(a), forward, sample)
    theta_b = space.flatten(b)
    bend = 0.1 * torch.randn(curve.num_control_points - 2, len(theta_b), dtype=torch.float64).to(DEVICE)

    def naive(theta_b, bend):
        points = curve.initial_control_points(space.flatten(a), theta_b)
        points = torch.cat([points[:1], points[1:-1] + bend, points[-1:]])
        model = CASE["residual"].make(0, torch.float64).train()
        total = 0.0
        for t, (x, y) in sample:
            theta = space.unflatten((curve.basis(t)[:, None] * points).sum(0))
            total = total + nn.functional.cross_entropy(torch.func.functional_call(model, theta, x), y)
        return total / len(sample)

    theta_b, bend = theta_b.requires_grad_(), bend.requires_grad_()
    expected = naive(theta_b, bend)
    expected.backward()
    value, towards_b, towards_bend = loss.gradient(theta_b.detach(), bend.detach())
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    assert loss.value(theta_b.detach(), bend.detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(towards_b, theta_b.grad)
    if len(bend):
        torch.testing.assert_close(towards_bend, bend.grad)


# ---------------------------------------------------------------- PAM


def pair(name: str = "mlp", dtype: torch.dtype = torch.float32):
    return [
        models.train(CASE[name].make(seed, dtype), batches(8, dtype=dtype), recipe=RECIPE, seed=seed) for seed in (0, 1)
    ]


@pytest.mark.parametrize("name", ["mlp", "residual", "dropout"])
def test_the_step_in_p_lowers_the_loss_and_ends_are_the_networks(name):
    a, b = pair(name)
    connection = modeconn.fit_curve(a, b, batches(8), align=False, refine=PAM(iterations=2), recipe=RECIPE)
    first, second = connection.history.turns
    assert first["epoch"] == 0 and second["epoch"] == 2
    assert first["num_accepted"] > 0 and first["num_tried"] >= first["num_accepted"]
    assert first["loss_after"] < first["loss_before"] and second["loss_after"] <= second["loss_before"]
    assert len(connection.history.loss) == RECIPE.epochs
    assert same_bits(connection.model_at(0), a)
    assert same_bits(connection.model_at(1), connection.permutation.apply(b))
    assert connection.permutation != connection.permutation.spec.identity()


def test_a_move_is_given_up_early_and_accepted_only_on_the_whole_sample(monkeypatch):
    a, b = pair(dtype=torch.float64)
    spec, space = modeconn.discover(a, batches(1, dtype=torch.float64)[0][0]), WeightSpace(a)
    generator = torch.Generator().manual_seed(0)
    sample = [(float(torch.rand((), generator=generator)), batch) for batch in batches(40, dtype=torch.float64)]
    loss = CurveLoss(Workspace(a, space), Line(), space.flatten(a), supervised(nn.functional.cross_entropy), sample)
    state = Relabelled(space, loss, space.flatten(b), torch.empty(0, space.num_parameters).double(), spec.identity())
    looked_at, values = [], CurveLoss.values

    def counted(loss, theta_b, bend, places=None):
        looked_at.append(len(range(len(loss)) if places is None else places))
        return values(loss, theta_b, bend, places)

    gradient, tried = state.gradient(), []
    (tree, *_) = spec.trees()
    for move in exchanges(spec, tree, linear_costs(spec, tree, gradient, state.parameters), 40):
        before, fallen = state.theta_b.clone(), state.value_after(move) - state.value
        looked_at.clear()
        with monkeypatch.context() as patch:
            patch.setattr(CurveLoss, "values", counted)
            accepted = state.try_move(move)
        tried.append((accepted, sum(looked_at)))
        if accepted:
            assert fallen < 0 and sum(looked_at) == len(sample)
        else:
            assert torch.equal(state.theta_b, before)
        assert state.value == pytest.approx(loss.value(state.theta_b, state.bend), rel=1e-12)
    assert {accepted for accepted, _ in tried} == {True, False}
    assert min(count for accepted, count in tried if not accepted) < len(sample)


def test_moves_that_chance_may_favour_are_refused_on_a_part_of_the_data():
    a, b = pair()
    settings = {"align": False, "curve": Line(), "recipe": Recipe(epochs=1)}
    accepted = [
        modeconn.fit_curve(
            a, b, batches(count), refine=PAM(iterations=1, num_batches=8, **given), **settings
        ).history.turns[0]["num_accepted"]
        for count, given in ((9, {"standard_errors": 1e9}), (9, {}), (9, {"standard_errors": 0.0}), (8, {}))
    ]
    assert accepted[0] == 0 < accepted[1] and accepted[3] > 0
    assert accepted[1] <= accepted[2]


def test_a_line_is_refined_alone():
    a, b = pair()
    connection = modeconn.fit_curve(a, b, batches(8), align=False, curve=Line(), refine=PAM(), recipe=RECIPE)
    assert connection.history.loss == [] and len(connection.history.turns) == 4
    naive = modeconn.fit_curve(a, b, batches(8), align=False, curve=Line())
    assert connection.evaluate(batches(8)).loss.mean() < naive.evaluate(batches(8)).loss.mean()


def test_the_middle_of_the_curve_moves_with_p():
    """With a bend held at 0 the curve stays the straight line, whatever happens to b."""
    a, b = pair(dtype=torch.float64)
    still = Recipe(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    connection = modeconn.fit_curve(
        a, b, batches(8, dtype=torch.float64), align=False, refine=PAM(iterations=1), recipe=still
    )
    assert connection.history.turns[0]["num_moved"] > 0
    points = connection.control_points
    torch.testing.assert_close(points[1], (points[0] + points[2]) / 2, rtol=0, atol=1e-14)


def test_the_exact_mode_never_raises_the_objective():
    a, b = pair("mlp", torch.float64)
    pam = PAM(iterations=3, exact=True, num_points=5, nu_curve=10.0, nu_permutation=1e4)
    connection = modeconn.fit_curve(
        a, b, batches(3, dtype=torch.float64), align=False, refine=pam, recipe=Recipe(epochs=12)
    )
    turns, losses = connection.history.turns, connection.history.loss
    path = []
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        path += [turn["loss_before"], turn["loss_after"]]
        path += losses[turn["epoch"] : following["epoch"] if following else None]
    assert len(path) == 18
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(path))
    assert path[-1] < 0.9 * path[0]


def test_the_proximal_weights_hold_permutation_and_curve():
    a, b = pair()
    free, held = (
        modeconn.fit_curve(a, b, batches(8), align=False, refine=PAM(iterations=1, **nu), recipe=RECIPE)
        for nu in ({}, {"nu_permutation": 1e-6, "nu_curve": 1e-3})
    )
    assert held.history.turns[0]["num_moved"] == 0 < free.history.turns[0]["num_moved"]
    bends = [c.control_points[1] - (c.control_points[0] + c.control_points[2]) / 2 for c in (free, held)]
    assert bends[1].norm() < 0.1 * bends[0].norm()


def test_turns_end_when_nothing_is_accepted_and_the_loss_stands_still():
    a, b = pair()
    settings = {"align": False, "curve": Line(), "recipe": Recipe(epochs=8)}
    connection = modeconn.fit_curve(
        a, b, batches(8), refine=PAM(iterations=8, tolerance=0.5, num_batches=None), **settings
    )
    turns = connection.history.turns
    assert len(turns) < 8 and turns[-1]["num_accepted"] == 0


def test_a_run_with_pam_goes_on_with_the_same_bits(tmp_path):
    path, refine = tmp_path / "run.safetensors", PAM(iterations=2)
    whole = fit(refine=refine)
    stops = (12, 15, 25, 32, 39, 44)  # after the first turn, in both epochs, in the second turn, after it, at the end
    for count in stops:
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            fit(modeconn.Checkpoint(path, every_batches=3), Breaking(loader(), count), refine=refine)
        again = fit(path, refine=refine)
        assert torch.equal(again.control_points, whole.control_points)
        assert again.permutation == whole.permutation
        assert again.history.turns == whole.history.turns
        assert again.history.loss == whole.history.loss


class Stopping(ProximalLinear):
    """The ordinary step, stopped at one of its calls."""

    calls = 0
    at: int | None = None

    def __call__(self, b: Relabelled) -> None:
        Stopping.calls += 1
        if Stopping.calls == Stopping.at:
            raise KeyboardInterrupt
        super().__call__(b)


@pytest.mark.parametrize("mode", ["line", "exact"])
def test_turns_without_training_go_on_with_the_same_bits(tmp_path, monkeypatch, mode):
    a, b = pair()
    pam = PAM(iterations=3, step=Stopping(), exact=mode == "exact", num_points=5)
    settings = {"align": False, "refine": pam, "recipe": Recipe(epochs=9)}
    if mode == "line":
        settings["curve"] = Line()
    whole = modeconn.fit_curve(a, b, batches(3), **settings)
    for at in (2, 3):
        monkeypatch.setattr(Stopping, "calls", 0)
        monkeypatch.setattr(Stopping, "at", at)
        with pytest.raises(KeyboardInterrupt):
            modeconn.fit_curve(a, b, batches(3), checkpoint=tmp_path / str(at), **settings)
        monkeypatch.setattr(Stopping, "calls", 0)
        monkeypatch.setattr(Stopping, "at", None)
        again = modeconn.fit_curve(a, b, batches(3), checkpoint=tmp_path / str(at), **settings)
        assert Stopping.calls == 3 - (at - 1)
        assert torch.equal(again.control_points, whole.control_points)
        assert again.permutation == whole.permutation
        assert again.history.loss == whole.history.loss and again.history.turns == whole.history.turns


def test_the_exact_mode_goes_on_from_between_two_steps_of_descent(tmp_path, monkeypatch):
    a, b = pair()
    settings = {"align": False, "refine": PAM(iterations=2, exact=True, num_points=5), "recipe": Recipe(epochs=8)}
    whole = modeconn.fit_curve(a, b, batches(3), **settings)
    descend, calls = Descent._descend, []

    def stopped(descent: Descent, value: float | None) -> float:
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return descend(descent, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Descent, "_descend", stopped)
        modeconn.fit_curve(a, b, batches(3), checkpoint=tmp_path / "c", **settings)
    again = modeconn.fit_curve(a, b, batches(3), checkpoint=tmp_path / "c", **settings)
    assert torch.equal(again.control_points, whole.control_points)
    assert again.history.loss == whole.history.loss and again.history.turns == whole.history.turns


def test_the_exact_mode_ends_too_when_nothing_is_accepted():
    a, b = pair()
    pam = PAM(iterations=9, exact=True, num_points=5, tolerance=0.9)
    connection = modeconn.fit_curve(a, b, batches(3), align=False, refine=pam, recipe=Recipe(epochs=9))
    assert len(connection.history.turns) < 9 and connection.history.turns[-1]["num_accepted"] == 0


def curve_loss(a, forward, sample) -> tuple[CurveLoss, torch.Tensor]:
    space = WeightSpace(a)
    return CurveLoss(Workspace(a, space), Line(), space.flatten(a), forward, sample), space.flatten(a)


def test_a_loss_that_draws_random_numbers_draws_the_same_each_time():
    a, b = pair("mlp", torch.float64)
    noisy = supervised(lambda outputs, y: nn.functional.cross_entropy(outputs + torch.randn_like(outputs), y))
    loss, theta = curve_loss(a, noisy, list(zip((0.2, 0.7), batches(2, dtype=torch.float64), strict=True)))
    theta_b, bend, before = WeightSpace(b).flatten(b), theta.new_zeros(0, len(theta)), torch.get_rng_state()
    values = loss.values(theta_b, bend)
    assert torch.equal(values, loss.values(theta_b, bend))
    assert torch.equal(values[1:], loss.values(theta_b, bend, [1]))
    assert loss.gradient(theta_b, bend)[0] == pytest.approx(float(values.mean()), rel=1e-12)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_reach_frozen_parameters_and_leave_them_frozen():
    a, b = pair("mlp", torch.float64)
    theta_b, sample = WeightSpace(b).flatten(b), [(0.5, batch) for batch in batches(2, dtype=torch.float64)]
    gradients = []
    for is_free in (True, False):
        loss, theta = curve_loss(a.requires_grad_(is_free), supervised(nn.functional.cross_entropy), sample)
        with torch.no_grad():
            gradients.append(loss.gradient(theta_b, theta.new_zeros(0, len(theta)))[1])
        parameters = list(loss._workspace.model.parameters())
        assert all(p.requires_grad == is_free and p.grad is None for p in parameters)
    assert torch.equal(*gradients) and gradients[0].abs().min() >= 0 < gradients[0].abs().max()


def test_the_loss_is_a_mean_over_examples_though_batches_differ_in_size():
    a, b = pair("mlp", torch.float64)
    ((x, y),) = batches(1, dtype=torch.float64)
    theta_b, values = WeightSpace(b).flatten(b), []
    for cut in ([len(x)], [len(x) - 1, 1]):
        sample = [(0.5, batch) for batch in zip(x.split(cut), y.split(cut), strict=True)]
        loss, theta = curve_loss(a, supervised(nn.functional.cross_entropy), sample)
        values.append(
            (
                loss.value(theta_b, theta.new_zeros(0, len(theta))),
                loss.gradient(theta_b, theta.new_zeros(0, len(theta)))[0],
            )
        )
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(
    ("available", "asked", "places"), [(1, 64, 16), (1, None, 16), (1, 3, 3), (20, 64, 20), (20, 5, 5)]
)
def test_the_curve_is_looked_at_in_enough_places_whatever_the_loader(available, asked, places):
    sample, is_part = draw_sample(batches(available), torch.device("cpu"), asked, seed=0)
    assert is_part == (asked is not None and asked < available)
    assert len(sample) == places and len({t for t, _ in sample}) == places
    assert sorted(int(t * places) for t, _ in sample) == list(range(places))


def test_best_swap_measures_what_the_fit_lowered():
    a, b = pair()
    data = [{"x": x, "y": y} for x, y in batches(4)]

    def forward(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=0.3)

    spec = modeconn.discover(a, data[0]["x"])
    fitted = modeconn.fit_curve(a, b, data, align=spec.identity(), forward=forward, recipe=Recipe(epochs=1))
    own, given = (modeconn.best_swap(fitted, loader, num_tries=5) for loader in (None, data))
    assert own == given
    other = modeconn.best_swap(fitted, batches(4), loss_fn=nn.functional.cross_entropy, num_tries=5)
    assert other.loss != own.loss
    for bad in ({"num_batches": 0}, {"num_tries": -3}, {"num_tries": 2.5}):
        with pytest.raises(ValueError, match=r"must be an integer( of at least 1,)? or None"):
            modeconn.best_swap(fitted, **bad)


ARCHITECTURES = {
    "mlp": lambda seed: (models.mlp(64, (16, 16), 10, seed=seed), (8, 64)),
    "preresnet": lambda seed: (PreActivationResNet(bottleneck, [[8, 8], [16, 16]], 10, Images(3, 16)), (4, 3, 16, 16)),
    "googlenet": lambda seed: (models.googlenet(num_classes=10, image_size=8, seed=seed), (2, 3, 8, 8)),
    "vit": lambda seed: (SYMMETRIES["vit"].build(), (8, 3, 8, 8)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_runs_on_any_architecture(name):
    torch.manual_seed(0)
    (a, shape), (b, _) = (ARCHITECTURES[name](seed) for seed in (0, 1))
    outputs = a.eval()(torch.rand(shape)).shape[1]
    data = [(torch.rand(shape), torch.arange(shape[0]) % outputs) for _ in range(2)]
    pam = PAM(iterations=1, step=ProximalLinear(num_rounds=2, num_tries=4))
    spec = modeconn.discover(a, data[0][0])
    connection = modeconn.fit_curve(
        a, b, data, align=False, spec=spec, curve=Line(), refine=pam, recipe=Recipe(epochs=1)
    )
    (turn,) = connection.history.turns
    assert 0 < turn["num_tried"] <= 8 and turn["loss_after"] <= turn["loss_before"]
    x = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(connection.model_at(1).double()(x), b.double().eval()(x), rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got iterations=0"),
        ({"num_batches": 0}, "num_batches must be at least 1"),
        ({"nu_permutation": 0.0}, "nu_permutation must be positive, got nu_permutation=0.0"),
        ({"nu_curve": -1.0}, "nu_curve must be positive"),
        ({"nu_curve": math.nan}, "nu_curve must be a number"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
        ({"standard_errors": -1.0}, "standard_errors must be at least 0"),
        ({"exact": True, "num_points": 2}, "num_points must be at least 3"),
        ({"exact": "false"}, "exact must be True or False, got exact='false'"),
        ({"nu_curve": None}, "nu_curve must be a number, got nu_curve=None"),
        ({"tolerance": "x"}, "tolerance must be a number, got tolerance='x'"),
        ({"iterations": None}, "iterations must be an integer, got iterations=None"),
        ({"step": "sinkhorn"}, r"step must be a step in P such as ProximalLinear\(\)"),
        ({"step": SinkhornStep}, "step must be a step in P"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PAM(**settings)


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        (ProximalLinear, {"weights": 0.1}, "weights must be a list or tuple, each a number, got weights=0.1"),
        (ProximalLinear, {"weights": (math.nan,)}, r"weights\[0\] must be a number, got weights\[0\]=nan"),
        (ProximalLinear, {"weights": ()}, "weights must be one or more numbers"),
        (RelaxedStep, {"penalty": -0.1}, "penalty must be at least 0, got penalty=-0.1"),
        (RelaxedStep, {"num_halvings": -1}, "num_halvings must be at least 0, got num_halvings=-1"),
        (RelaxedStep, {"seed": None}, "seed must be an integer, got seed=None"),
    ],
)
def test_settings_of_steps_out_of_range(step, settings, message):
    with pytest.raises(ValueError, match=message):
        step(**settings)


def test_what_cannot_be_refined():
    a, b = pair()
    with pytest.raises(ValueError, match=r"trains an end\. Use a curve with fixed ends"):
        modeconn.fit_curve(a, b, batches(), curve=Bezier(2, free_ends=True), refine=PAM())
    with pytest.raises(ValueError, match="divides the epochs of the recipe, which has only 2"):
        modeconn.fit_curve(a, b, batches(), refine=PAM(iterations=3), recipe=Recipe(epochs=2))
    with pytest.raises(ValueError, match="it needs data: pass loader="):
        modeconn.fit_curve(a, b, refine=PAM(), example_input=torch.zeros(2, 1, 2, 4))


def test_a_loss_that_is_not_finite_at_the_start():
    a, b = pair()
    data = [(torch.full((4, 1, 2, 4), math.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(FloatingPointError, match="the loss along the curve is nan before PAM's step in epoch 0"):
        modeconn.fit_curve(a, b, data, align=False, refine=PAM(iterations=1), recipe=RECIPE)


def test_a_model_without_free_groups(caplog):
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(8, 3)) for _ in range(2))
    connection = modeconn.fit_curve(a, b, batches(), align=False, refine=PAM(iterations=1), recipe=RECIPE)
    assert connection.history.turns[0]["num_tried"] == 0
    assert "PAM moves the curve only" in caplog.text


# ---------------------------------------------------------------- other steps, and a measure of local optimality


@pytest.mark.parametrize(
    "step", [SinkhornStep(num_steps=3, num_rounds=1), RelaxedStep(num_steps=60, num_samples=2)], ids=repr
)
def test_soft_steps_are_learned_in_single_precision_where_networks_are_of_half(step, monkeypatch):
    learned, backward = [], SoftWeights.backward

    def noted(weights, matrices, gradient):
        learned.extend(matrix.dtype for matrix in matrices.values())
        backward(weights, matrices, gradient)

    monkeypatch.setattr(SoftWeights, "backward", noted)
    a, b = (CASE["mlp"].make(seed, torch.bfloat16) for seed in (0, 1))
    data = [(x.bfloat16(), y) for x, y in batches()]
    connection = modeconn.fit_curve(
        a, b, data, align=False, curve=Line(), refine=PAM(iterations=1, step=step), recipe=Recipe(epochs=1)
    )
    assert connection.history.turns[0]["loss_after"] <= connection.history.turns[0]["loss_before"]
    assert set(learned) == {torch.float32}


@pytest.mark.parametrize(
    "step", [SinkhornStep(num_steps=40, num_rounds=4), RelaxedStep(num_steps=40, num_samples=4)], ids=repr
)
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_other_steps_keep_the_incumbent_unless_they_find_better(name, step):
    torch.manual_seed(0)
    (a, shape), (b, _) = (ARCHITECTURES[name](seed) for seed in (0, 1))
    data = [(torch.rand(shape), torch.arange(shape[0]) % 3) for _ in range(2)]
    connection = modeconn.fit_curve(
        a, b, data, align=False, curve=Line(), refine=PAM(iterations=1, step=step), recipe=Recipe(epochs=1)
    )
    (turn,) = connection.history.turns
    assert turn["num_tried"] >= 4 and turn["loss_after"] <= turn["loss_before"]
    assert same_bits(connection.model_at(1), connection.permutation.apply(b))


def test_the_projection_is_the_nearest_doubly_stochastic_matrix():
    """It is nearest if no vertex of the set, a permutation, lies further in the direction of what was cut off."""
    x = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cut, point in zip(x - project(x), project(x), strict=True):
        for perm in itertools.permutations(range(4)):
            vertex = torch.eye(4, dtype=torch.float64)[list(perm)]
            assert float((cut * (vertex - point)).sum()) < 1e-4


@pytest.mark.parametrize("noise", [0.003, 1.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 30, 120])
def test_the_projection_is_doubly_stochastic_whatever_its_size(size, noise):
    x = torch.eye(size) + noise * torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    found = project(x)
    assert found.min() >= 0
    for dim in (-1, -2):
        torch.testing.assert_close(found.sum(dim), torch.ones(2, size), rtol=0, atol=5e-5 * max(1.0, noise))
    torch.testing.assert_close(project(found), found, rtol=0, atol=5e-5 * max(1.0, noise))
    best = match_units(x[0])  # a vertex of the set
    cut, vertex = x[0] - found[0], torch.eye(size)[best]
    assert float((cut * (vertex - found[0])).sum()) <= 1e-4 * noise * size


def test_the_penalty_of_a_relaxed_step_is_that_of_power_three_quarters_and_hardens_the_matrices(monkeypatch):
    matrix = project(torch.rand(6, 6, dtype=torch.float64)).clamp(min=1e-2).requires_grad_()
    (slope,) = torch.autograd.grad((matrix**0.75).sum(), matrix)
    torch.testing.assert_close(relaxed_step._slope(matrix.detach()), slope)

    kept = {}
    draws = relaxed_step.draws

    def spy(spec, matrices, *others):
        kept["sum"] = sum(float((m.detach().clamp(min=0) ** 0.75).sum()) for m in matrices.values())
        return draws(spec, matrices, *others)

    monkeypatch.setattr(relaxed_step, "draws", spy)
    sums = []
    for penalty in (0.0, 0.3):
        fit(recipe=RECIPE, align=True, refine=PAM(iterations=1, step=RelaxedStep(30, 0.5, nu=1e6, penalty=penalty)))
        sums.append(kept["sum"])
    assert sums[1] < 0.95 * sums[0]


def test_a_decomposition_sums_to_its_matrix():
    matrix = project(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    parts = decompose(matrix, 100)
    total = sum(weight * torch.eye(6, dtype=torch.float64)[perm] for weight, perm in parts)
    torch.testing.assert_close(total, matrix, rtol=0, atol=5e-3)
    assert [weight for weight, _ in parts] == sorted((weight for weight, _ in parts), reverse=True)


def test_the_best_swap_is_the_best_of_all():
    a, b = pair(dtype=torch.float64)
    data = batches(8, dtype=torch.float64)
    straight = modeconn.fit_curve(a, b, data, curve=Line())
    found = modeconn.best_swap(straight, num_tries=None, num_batches=None)
    assert found.num_tried == found.num_swaps == 28
    sample, _ = draw_sample(data, straight.device, None, seed=0)

    def loss(b):
        line = modeconn.Connection.straight_between(a, b)
        with torch.no_grad():
            losses = [modeconn.network.loss.cross_entropy(line.model_at(t)(x), y) for t, (x, y) in sample]
        return float(torch.stack(losses).mean())

    aligned = straight.model_at(1)
    spec = straight.permutation.spec
    (group,) = spec.groups
    losses = {}
    for i, j in itertools.combinations(range(group.size), 2):
        perm = torch.arange(group.size)
        perm[[i, j]] = torch.tensor([j, i])
        losses[i, j] = loss(Permutation(spec, {group.name: perm}).apply(aligned))
    best = min(losses, key=losses.get)
    assert found.loss == pytest.approx(loss(aligned))
    if losses[best] < found.loss:
        assert (found.group, found.places) == (group.name, best)
        assert found.decrease == pytest.approx(found.loss - losses[best])
        assert f"that of {best[0]} and {best[1]}" in str(found)
    else:
        assert found.group is None and "none lowers the loss" in str(found)


def test_nothing_is_left_to_swap_after_pam():
    a, b = pair()
    step = ProximalLinear(num_tries=100)  # more than there are swaps
    pam = PAM(iterations=1, num_batches=None, step=step)
    refined = modeconn.fit_curve(a, b, batches(8), align=False, curve=Line(), refine=pam, recipe=Recipe(epochs=1))
    found = modeconn.best_swap(refined, num_batches=None, num_tries=None)
    assert found.loss == pytest.approx(refined.history.turns[0]["loss_after"], rel=1e-5)
    assert found.decrease == pytest.approx(0, abs=1e-6)


def test_a_swap_needs_a_permutation_data_and_fixed_ends():
    a, b = pair()
    with pytest.raises(ValueError, match="took b as it was, so its groups are not known"):
        modeconn.best_swap(modeconn.fit_curve(a, b, batches(), align=False, curve=Line()))
    aligned = modeconn.fit_curve(a, b, batches(), curve=Line())
    path = Path(a, Bezier(2, free_ends=True), aligned.control_points[[0, 0, 1]], aligned.buffers)
    free = modeconn.Connection(path, permutation=aligned.permutation)
    with pytest.raises(ValueError, match="remembers no training data: pass loader="):
        modeconn.best_swap(free)
    with pytest.raises(ValueError, match="has trained an end"):
        modeconn.best_swap(free, batches())
