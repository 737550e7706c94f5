from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from modeconn.network.recipe import Recipe, constant, halving, one_cycle, piecewise_linear

SCHEDULES = [constant, piecewise_linear, halving, one_cycle]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 7, 200])
def test_a_schedule_only_lowers_the_rate_and_never_to_zero(schedule, epochs):
    factors = [schedule(step / 10, epochs) for step in range(10 * epochs)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", [piecewise_linear, halving])
def test_the_papers_schedules_change_between_epochs_alone(schedule):
    for epoch in range(50):
        assert schedule(epoch + 0.99, 50) == schedule(epoch, 50)


def test_constant_keeps_the_rate():
    assert {constant(epoch / 3, 5) for epoch in range(15)} == {1.0}


def test_piecewise_linear_is_full_then_falls_then_stays():
    factors = [piecewise_linear(epoch, 100) for epoch in range(100)]
    assert factors[:51] == [1.0] * 51
    assert factors[90:] == pytest.approx([0.01] * 10)
    steps = [before - after for before, after in pairwise(factors[50:91])]
    assert steps == pytest.approx([0.99 / 40] * 40)


def test_halving_halves_every_twenty_epochs_and_decays_in_between():
    assert [halving(epoch, 250, decay=1.0) for epoch in (0, 19, 20, 39, 40, 60)] == [1, 1, 0.5, 0.5, 0.25, 0.125]
    assert halving(21, 250) == pytest.approx(0.5 * 0.9996**21)
    assert halving(6, 10, every=3, decay=1.0) == 0.25


@pytest.mark.parametrize("epochs", [3, 30])
def test_one_cycle_is_that_of_torch(epochs):
    steps_per_epoch = 20
    total = epochs * steps_per_epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # One step more: torch spreads the cycle over total_steps - 1 intervals.
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total + 1, cycle_momentum=False)
    for step in range(total):
        # It also rounds the place of the peak to a step: at 0.3 * total - 1 of its total intervals.
        progress = step / total
        peak = (0.3 * (total + 1) - 1) / total
        ours = one_cycle(epochs * progress, epochs, warmup=peak)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_one_cycle_starts_peaks_and_ends_where_it_says():
    assert one_cycle(0, 10) == pytest.approx(1 / 25)
    assert one_cycle(3, 10) == 1.0
    assert one_cycle(10, 10) == one_cycle(11, 10) == pytest.approx(4e-6)


def test_the_default_is_nesterov_sgd():
    optimizer = Recipe().make_optimizer([torch.zeros(2, requires_grad=True)])
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD and group["nesterov"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.0)


def test_every_group_follows_the_schedule_from_its_own_rate():
    def two_groups(parameters, weight_decay):
        first, second = parameters
        groups = [{"params": [first]}, {"params": [second], "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1, weight_decay=weight_decay)

    recipe = Recipe(epochs=10, optimizer=two_groups)
    optimizer = recipe.make_optimizer([torch.zeros(1, requires_grad=True) for _ in range(2)], weight_decay=0.3)
    for epoch, factor in ((7.5, 0.505), (9.0, 0.01), (0.0, 1.0)):  # not cumulative: also back to the start
        recipe.set_learning_rate(optimizer, epoch)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.02 * factor])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_your_own_schedule_sees_fractions_of_epochs():
    recipe = Recipe(epochs=4, schedule=lambda epoch, epochs: epoch / epochs)
    assert recipe.learning_rate_factor(3.5) == 0.875


def test_any_optimizer_of_torch_will_do():
    recipe = Recipe(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    optimizer = recipe.make_optimizer([torch.zeros(2, requires_grad=True)], weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got epochs=0"),
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number, 0 or more, got weight_decay=-0\.1"),
        ({"weight_decay": math.nan}, "weight_decay must be a number, got weight_decay=nan"),
        ({"epochs": math.nan}, "epochs must be an integer, got epochs=nan"),
        ({"epochs": math.inf}, "epochs must be an integer, got epochs=inf"),
        ({"compile": 1}, "compile must be True or False, got compile=1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, 0 or more, got weight_decay=inf"),
        ({"autocast": torch.float64}, r"autocast must be None, torch\.bfloat16 or torch\.float16, got .*float64"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**setting)


def test_an_optimizer_that_takes_no_weight_decay_is_refused_in_one_sentence():
    recipe = Recipe(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(
        ValueError, match=r"It is called with the parameters and weight_decay=, such as functools.partial"
    ):
        recipe.make_optimizer([torch.zeros(1, requires_grad=True)])
