"""The built-in attack: its laws, its closed forms, its naive twin, and that it leaves all else as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modeconn import PGD, data, models
from modeconn.attacks.pgd import _NORMS
from modeconn.models.training import DIGITS_RECIPE
from modeconn.network.attack import under_attack
from modeconn.network.loss import per_example
from tests.cases import CASE, CASES, DEVICE

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A perceptron that knows the digits, and the test set."""
    train, test = data.load("digits")
    model = models.mlp(64, (32, 32), 10, mean=train.mean(), std=train.std() + 0.1, seed=1)
    recipe = replace(DIGITS_RECIPE, epochs=10)
    return models.train(model, train, recipe=recipe, seed=1), test.inputs, test.targets


def problem(name: str = "mlp", dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 1, 2, 4, generator=generator, dtype=dtype)
    return CASE[name].make(seed, dtype), x.to(DEVICE), torch.randint(3, (6,), generator=generator).to(DEVICE)


def lengths(moved: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(moved.flatten(1), ord=2 if norm == "l2" else float("inf"), dim=1)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


LOSSES = {
    "in one call": F.cross_entropy,
    "indexed": lambda o, y: (o.max(1).values - o[torch.arange(len(y)), y]).mean(),
    "one hot": lambda o, y: ((1 - F.one_hot(y)) * o).mean() if y.amax() > 9 else F.cross_entropy(o, y),
    "with a mask": lambda o, y: o[o > o.mean()].mean(),
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES.keys())
def test_a_loss_of_each_example_is_that_of_a_batch_of_one(loss_fn):
    model, x, y = problem()
    outputs = model(x).detach()
    expected = torch.stack([loss_fn(outputs[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    torch.testing.assert_close(per_example(loss_fn, outputs, y), expected)
    torch.testing.assert_close(per_example(lambda o, y: loss_fn(o[0], y), (outputs, outputs), y), expected)
    assert PGD(0.1, 0.1, 1, num_restarts=2, loss_fn=loss_fn)(model, x, y).shape == x.shape


# ---------------------------------------------------------------- laws


@NORMS
def test_float16_does_not_lose_the_gradient_of_a_network_that_is_sure(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    model[1].bias.data = torch.tensor([16.0, 0.0, 0.0])
    x, attack = torch.full((32, 1, 2, 4), 0.5), PGD(0.1, 0.1, 1, norm=norm, random_start=False)
    y = torch.zeros(32, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        found = attack(model, x, y)
    assert (lengths(found - x, norm) > 0.09).all()
    torch.testing.assert_close(found, attack(model, x, y), rtol=0, atol=5e-3)


@settings(deadline=None, max_examples=40)
@given(
    eps=st.floats(0, 2),
    step=st.floats(1e-3, 3),
    num_steps=st.integers(0, 3),
    norm=st.sampled_from(["linf", "l2"]),
    start=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 5),
)
def test_every_example_stays_in_its_ball_and_in_the_pixel_range(eps, step, num_steps, norm, start, dtype, seed):
    model, x, y = problem("residual", dtype, seed)
    x_adv = PGD(eps, step, num_steps, norm=norm, random_start=start, seed=seed)(model, x, y)
    assert lengths(x_adv - x, norm).max() <= eps + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1
    assert x_adv.dtype == x.dtype and x_adv.shape == x.shape and not x_adv.requires_grad


@NORMS
def test_without_a_radius_inputs_come_back_bit_for_bit(norm):
    model, x, y = problem()
    assert torch.equal(PGD(0.0, 0.1, 3, norm=norm)(model, x, y), x)


@NORMS
def test_more_restarts_never_lower_a_loss_and_begin_with_the_same_attacks(norm):
    model, x, y = problem()
    before = None
    for num_restarts in range(1, 6):
        torch.manual_seed(0)
        attack = PGD(0.3, 0.1, 2, norm=norm, num_restarts=num_restarts)
        now = torch.stack([losses(model, attack(model, x, y), y) for _ in range(2)])  # the second call begins alike too
        assert before is None or (now >= before).all()
        before = now
    torch.manual_seed(0)
    one = losses(model, PGD(0.3, 0.1, 2, norm=norm)(model, x, y), y)
    assert (before[0] >= one).all() and (before[0] > one).any()


@NORMS
def test_restarts_keep_the_worst_of_the_single_attacks(norm):
    model, x, y = problem()
    attack = PGD(0.3, 0.1, 2, norm=norm, seed=7)
    generator = torch.Generator().manual_seed(7)
    single = [losses(model, attack._attack(model, x, y, generator), y) for _ in range(4)]
    torch.testing.assert_close(
        losses(model, replace(attack, num_restarts=4)(model, x, y), y), torch.stack(single).amax(0)
    )


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_a_linear_model_has_a_closed_form(num_steps):
    """Cross entropy of two classes rises straight along the difference of their weights."""
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(5, 2, bias=False).double()
    model.weight.data = weight
    x, y = torch.full((3, 5), 0.5, dtype=torch.float64), torch.tensor([0, 1, 1])
    away = torch.stack([weight[1 - label] - weight[label] for label in y])
    eps = 0.1
    for norm, step in (("linf", eps * away.sign()), ("l2", eps * away / away.norm(dim=1, keepdim=True))):
        found = PGD(eps, eps / num_steps, num_steps, norm=norm, random_start=False)(model, x, y)
        torch.testing.assert_close(found, x + step)


def test_a_targeted_attack_lowers_the_loss_of_its_target():
    model, x, _ = problem()
    for target in range(3):
        y = torch.full((6,), target)
        found = PGD(0.2, 0.05, 5, targeted=True, random_start=False)(model, x, y)
        assert (losses(model, found, y) < losses(model, x, y)).all()
        worst = losses(model, PGD(0.2, 0.05, 1, targeted=True, seed=0)(model, x, y), y)
        best = losses(model, PGD(0.2, 0.05, 1, targeted=True, seed=0, num_restarts=5)(model, x, y), y)
        assert (best <= worst).all() and (best < worst).any()


@NORMS
def test_random_starts_fill_the_ball(norm):
    x = torch.zeros(4000, 3, dtype=torch.float64)
    start = _NORMS[norm].random(x, 0.5, torch.Generator().manual_seed(0))
    inside = (lengths(start, norm) <= 0.25).double().mean()
    assert lengths(start, norm).max() <= 0.5
    torch.testing.assert_close(inside, torch.tensor(1 / 8, dtype=torch.float64), rtol=0, atol=0.02)  # 4 deviations
    torch.testing.assert_close(start.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0.025)


def test_without_steps_only_the_random_start_is_left():
    model, x, y = problem()
    found = PGD(0.1, 0.0, 0, seed=3)(model, x, y)
    noise = torch.empty_like(x).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, (x + noise).clamp(0, 1))


# ---------------------------------------------------------------- twins


def naive(model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, num_steps: int, norm: str) -> Tensor:
    """One example at a time, with a graph through everything."""
    out = []
    for one, label in zip(x, y, strict=True):
        point = one
        for _ in range(num_steps):
            point = point.detach().clone().requires_grad_()
            F.cross_entropy(model(point[None]), label[None]).backward()
            g = point.grad
            delta = point.detach() + step * (g.sign() if norm == "linf" else g / g.norm()) - one
            delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1, eps / float(delta.norm()))
            point = (one + delta).clamp(0, 1)
        out.append(point)
    model.zero_grad()
    return torch.stack(out)


@NORMS
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "residual", "tied"])
def test_it_equals_its_naive_twin(name, norm):
    model, x, y = problem(name)
    expected = naive(model, x, y, 0.2, 0.07, 5, norm)
    found = PGD(0.2, 0.07, 5, norm=norm, random_start=False)(model, x, y)
    torch.testing.assert_close(found, expected)


@NORMS
def test_robust_accuracy_is_that_of_torchattacks(digits, norm):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = digits
    eps, step, steps = (0.08, 0.02, 10) if norm == "linf" else (0.4, 0.1, 10)
    other = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    x4 = x[:, :, None, None]  # it asks for images
    flat = nn.Sequential(nn.Flatten(), model).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = other(flat, eps=eps, alpha=step, steps=steps, random_start=True)(x4, y)
    ours = PGD(eps, step, steps, norm=norm, seed=0)(model, x, y)
    with torch.no_grad():
        right = [(m(z).argmax(1) == y).double() for m, z in ((model, ours), (flat, theirs))]
    clean = (model(x).argmax(1) == y).double().mean()
    difference, p = abs(right[0].mean() - right[1].mean()), right[1].mean()
    assert difference <= 2 * (p * (1 - p) / len(y)).sqrt()
    assert 0.02 < p < clean - 0.1  # neither attack is idle, neither is hopeless


# ---------------------------------------------------------------- what stays


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_its_flags_and_the_random_state_stay_as_they_were(case, training):
    model = case.make(0).train(training)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    x, y = torch.rand(6, 1, 2, 4), torch.randint(3, (6,))
    tracked = {m: m.track_running_stats for m in model.modules() if hasattr(m, "track_running_stats")}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.get_rng_state()
    PGD(0.1, 0.05, 3, num_restarts=2, seed=1)(model, x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in model.modules())
    assert {m: m.track_running_stats for m in tracked} == tracked
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_an_exception_leaves_is_as_before():
    model, x, y = problem("batch_norm")
    model.train()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("lost")

    with pytest.raises(ValueError, match="RuntimeError: lost"):
        PGD(0.1, 0.1, 1, loss_fn=loss_fn)(model, x, y)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[2].track_running_stats


def test_no_gradient_of_a_weight_is_ever_computed():
    """Layers say which gradients are asked of them."""
    asked = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x @ weight

        @staticmethod
        def backward(ctx, gradient):
            asked.append(ctx.needs_input_grad)
            return gradient @ ctx.saved_tensors[0].T, None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return Spy.apply(x, self.weight)

    PGD(0.1, 0.1, 2)(Net(), torch.rand(5, 4), torch.zeros(5, dtype=torch.int64))
    assert asked == [(True, False)] * 2


def test_in_train_mode_batch_norm_uses_the_batch_and_dropout_is_off():
    model, x, y = problem("batch_norm")
    twin = copy.deepcopy(model)
    twin[2].track_running_stats, twin[2].running_mean, twin[2].running_var = False, None, None
    attack = PGD(0.2, 0.1, 3, seed=0)
    expected = attack(twin.eval(), x, y)
    assert torch.equal(attack(model.train(), x, y), expected)
    assert not torch.allclose(attack(model.eval(), x, y), expected)


def test_frozen_batch_norm_stays_frozen_in_train_mode():
    model, x, y = problem("batch_norm")
    attack = PGD(0.2, 0.1, 3, seed=0)
    expected = attack(model.eval(), x, y)
    model.train()
    model[2].eval()
    assert torch.equal(attack(model, x, y), expected)


def test_auxiliary_heads_are_not_attacked():
    model = models.googlenet(3, image_size=8, seed=0).train()
    with under_attack(model):
        assert isinstance(model(model.example_input()), Tensor)


def test_it_works_where_gradients_are_off_and_on_inputs_that_have_one():
    model, x, y = problem()
    attack = PGD(0.1, 0.05, 2, seed=0)
    with torch.no_grad():
        expected = attack(model, x, y)
    held = x.clone().requires_grad_()
    assert torch.equal(attack(model, held, y), expected) and held.grad is None


def test_without_a_seed_calls_differ_and_follow_the_global_generator():
    model, x, y = problem()
    attack = PGD(0.3, 0.01, 1)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first, second = attack(model, x, y), attack(model, x, y)
        torch.manual_seed(4)
        assert torch.equal(attack(model, x, y), first) and not torch.equal(first, second)


# ---------------------------------------------------------------- what it says


def test_its_repr_tells_settings_apart():
    assert repr(PGD(8 / 255, 2 / 255, 5)) == "PGD(eps=8/255, step_size=2/255, num_steps=5)"
    assert repr(PGD(0.5, 0.1, 20, norm="l2", num_restarts=3, clip=None, loss_fn=F.mse_loss)) == (
        "PGD(eps=0.5, step_size=0.1, num_steps=20, norm='l2', num_restarts=3, "
        "loss_fn=torch.nn.functional.mse_loss, clip=None)"
    )
    assert repr(PGD(8 / 255 + 1e-9, 0.1, 1)) != repr(PGD(8 / 255, 0.1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -0.1}, r"eps must be a finite number, 0 or more, got eps=-0\.1"),
        ({"eps": float("nan")}, "got eps=nan"),
        ({"step_size": 0.0}, r"step_size must be positive and finite, got step_size=0\.0 for num_steps=5"),
        ({"num_steps": -1}, "num_steps must be at least 0, got num_steps=-1"),
        ({"eps": "8/255"}, "eps must be a number, got eps='8/255'"),
        ({"num_steps": 5.0}, r"num_steps must be an integer, got num_steps=5\.0"),
        ({"num_restarts": 2.0}, r"num_restarts must be an integer, got num_restarts=2\.0"),
        ({"norm": "l3"}, "norm must be 'linf' or 'l2', got norm='l3'"),
        ({"num_restarts": 0}, "num_restarts must be at least 1, got num_restarts=0"),
        ({"num_restarts": 2, "random_start": False}, "num_restarts=2 without random_start would repeat one attack"),
        ({"clip": (1.0, 0.0)}, r"clip must be the lowest and the highest value of a pixel, got clip=\(1\.0, 0\.0\)"),
    ],
)
def test_settings_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PGD(**{"eps": 0.1, "step_size": 0.1, "num_steps": 5, **arguments})


def test_images_outside_the_pixel_range_are_errors_that_say_what_to_do():
    model, x, y = problem()
    attack = PGD(0.1, 0.1, 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values from .* Divide images in \[0, 255\] by"):
        attack(model, 255 * x, y)
    with pytest.raises(ValueError, match="put normalisation into the model"):
        attack(model, x - 0.5, y)
    with pytest.raises(ValueError, match="but some are NaN"):
        attack(model, x / 0 * 0, y)
    with pytest.raises(ValueError, match=r"must be floating point, got torch\.uint8"):
        attack(model, (255 * x).byte(), y)
    replace(attack, clip=None)(model, x - 0.5, y)


def test_an_empty_batch_stays_empty():
    model, x, y = problem()
    assert PGD(0.1, 0.1, 2, num_restarts=2)(model, x[:0], y[:0]).shape == x[:0].shape


def test_targets_outside_the_classes_are_named():
    model, x, _ = problem()
    with pytest.raises(ValueError, match=r"targets of an attack must lie in 0\.\.2, .* got a target of 3"):
        PGD(0.1, 0.1, 1)(model, x, torch.full((6,), 3))


def test_a_gradient_that_is_nan_is_named():
    model, x, y = problem()
    with pytest.raises(FloatingPointError, match=r"PGD\(eps=0\.1, .*\) met a gradient that is NaN"):
        PGD(0.1, 0.1, 2, loss_fn=lambda outputs, y: outputs.sum() * float("nan"))(model, x, y)
