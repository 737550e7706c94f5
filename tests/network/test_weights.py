from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from modeconn.network.weights import WeightSpace, Workspace, load_buffers, named_buffers
from tests.cases import CASE, CASES, DEVICE, batches, clone, same_bits

parametrize_cases = pytest.mark.parametrize("case", CASES, ids=str)


@parametrize_cases
def test_flattening_and_loading_bring_a_model_back_bit_for_bit(case):
    source, target = case.make(0), case.make(1)
    space = WeightSpace(target)
    space.load(space.flatten(source), target)
    load_buffers(named_buffers(source), target)
    assert same_bits(source, target)


@parametrize_cases
def test_unflatten_returns_views_and_each_weight_once(case):
    model = case.make(0)
    space = WeightSpace(model)
    theta = space.flatten(model)
    views = space.unflatten(theta)
    assert all(view.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr() for view in views.values())
    theta.copy_(torch.arange(space.num_parameters))
    seen = torch.cat([view.flatten() for view in views.values()])
    assert torch.equal(seen.sort().values.cpu(), torch.arange(space.num_parameters, dtype=seen.dtype))


@parametrize_cases
def test_the_network_named_by_a_vector_is_the_model(case):
    model = case.make(0)
    space = WeightSpace(model)
    inputs = batches()[0][0]
    outputs = functional_call(model, space.unflatten(space.flatten(model)), (inputs,))
    torch.testing.assert_close(outputs, model(inputs), rtol=1e-6, atol=1e-6)


@parametrize_cases
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_workspace_gathers_the_gradient_of_loss_and_penalty_in_one_vector(case, weight_decay):
    model = case.make(0, torch.float64)
    workspace = Workspace(model)
    inputs, targets = batches(dtype=torch.float64)[0]
    nn.functional.cross_entropy(workspace.model(inputs), targets).backward()
    gradients = workspace.space.unflatten(workspace.gather_grad(weight_decay=weight_decay))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    penalty = weight_decay / 2 * sum((parameter**2).sum() for parameter in trainable)
    (nn.functional.cross_entropy(model(inputs), targets) + penalty).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected)


@parametrize_cases
def test_writing_into_a_workspace_moves_its_model_and_leaves_the_original(case):
    model, other = case.make(0), case.make(1)
    before = clone(model)
    workspace = Workspace(model)
    workspace.theta.copy_(workspace.space.flatten(other))
    load_buffers(named_buffers(other), workspace.model)
    inputs = batches()[0][0]
    torch.testing.assert_close(workspace.model(inputs), other(inputs), rtol=1e-6, atol=1e-6)
    assert same_bits(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_add_up_until_they_are_zeroed_and_go_where_they_are_wanted():
    workspace = Workspace(CASE["tied"].make(0))
    buffer = torch.full_like(workspace.theta, torch.nan)
    inputs, targets = batches()[0]
    nn.functional.cross_entropy(workspace.model(inputs), targets).backward()
    once = workspace.gather_grad().clone()
    nn.functional.cross_entropy(workspace.model(inputs), targets).backward()
    torch.testing.assert_close(workspace.gather_grad(), 2 * once)
    workspace.gather_in(buffer)
    workspace.zero_grad()
    assert workspace.gather_grad() is buffer and not buffer.any()


def test_tied_parameters_are_counted_once_and_every_name_is_known():
    space = WeightSpace(CASE["tied"].make(0))
    assert space.num_parameters == 8 * 8 + 8 + 8 + 8 * 3 + 3
    assert space.aliases == {
        "second.weight": "first.weight",
        "again.weight": "first.weight",
        "again.bias": "first.bias",
    }


def test_frozen_parameters_are_part_of_the_vector_and_marked():
    space = WeightSpace(CASE["frozen"].make(0))
    marks = space.unflatten(space.trainable)
    assert {name: bool(mark.all()) for name, mark in marks.items()} == {
        "1.weight": False,
        "1.bias": True,
        "3.weight": True,
        "3.bias": True,
    }
    assert not marks["1.weight"].any() and not space.all_trainable
    assert WeightSpace(CASE["mlp"].make(0)).all_trainable


def test_weights_of_a_channels_last_model_stay_channels_last():
    model = CASE["channels_last"].make(0)
    workspace = Workspace(model)
    conv = workspace.model.conv
    assert not conv.weight.is_contiguous() and conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_files_hold_a_vector_that_does_not_depend_on_the_memory_format():
    plain, last = CASE["residual"].make(0), CASE["channels_last"].make(0)
    spaces = WeightSpace(plain), WeightSpace(last)
    thetas = spaces[0].flatten(plain), spaces[1].flatten(last)
    assert not torch.equal(*thetas)
    assert torch.equal(spaces[0].to_canonical(thetas[0]), spaces[1].to_canonical(thetas[1]))
    assert torch.equal(spaces[1].from_canonical(thetas[0]), thetas[1])


def test_one_space_flattens_models_of_any_memory_format_alike():
    plain, last = CASE["residual"].make(0), CASE["channels_last"].make(0)
    space = WeightSpace(last)
    assert torch.equal(space.flatten(plain), space.flatten(last))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)),
            r"endpoints differ at '1\.weight': \(8, 8\) in a, \(9, 8\) in b\. Both must come from one architecture",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 8)), r"parameter '3\.weight' is in a but not in b"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3)),
            r"parameter '4\.weight' is in b but not in a",
        ),
        (lambda: CASE["mlp"].make(1).double(), r"'1\.weight': torch\.float32 in a, torch\.float64 in b"),
        (lambda: CASE["mlp"].make(1).to("meta"), rf"'1\.weight': {DEVICE.type}(:0)? in a, meta in b"),
    ],
)
def test_the_first_difference_between_two_architectures_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        other = change()
        other = other if next(other.parameters()).is_meta else other.to(DEVICE)
        WeightSpace(CASE["mlp"].make(0)).flatten(other, name="b")


def test_a_buffer_that_only_one_model_has_is_named():
    model = CASE["mlp"].make(0)
    other = clone(model)
    other.register_buffer("scale", torch.ones(2))
    with pytest.raises(ValueError, match="buffer 'scale' is in b but not in a"):
        WeightSpace(model).check(other)


def test_a_module_of_another_class_is_named():
    def network(*layers):
        return nn.Sequential(nn.Linear(3, 4), *layers)

    space = WeightSpace(network(nn.ReLU()))
    with pytest.raises(ValueError, match="module '1' is ReLU in a, Tanh in b"):
        space.check(network(nn.Tanh()))
    with pytest.raises(ValueError, match="module '1' is ReLU in a, missing in b"):
        space.check(network())
    with pytest.raises(ValueError, match="module '2' is missing in a, ReLU in b"):
        space.check(network(nn.ReLU(), nn.ReLU()))
    space.check(network(nn.ReLU(inplace=True)))
    WeightSpace(network(nn.Dropout(0.1))).check(network(nn.Dropout(0.5)))
    shared = nn.ReLU()
    WeightSpace(network(shared, shared)).check(network(nn.ReLU(), nn.ReLU()))


def test_differently_tied_parameters_are_an_error():
    model, other = CASE["mlp"].make(0), CASE["mlp"].make(0)
    for one, second_name in ((model, "y"), (other, "z")):
        one.register_parameter("x", nn.Parameter(torch.ones(3, device=DEVICE)))
        one.register_parameter(second_name, one.x)
    with pytest.raises(ValueError, match=r"tie different parameters: \{'y': 'x'\} in a, \{'z': 'x'\} in b"):
        WeightSpace(model).check(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = CASE["mlp"].make(0)
    model[1].weight.data[2, 3] = value
    with pytest.raises(ValueError, match=r"'1\.weight' of b holds NaN or infinite weights \(1 of 64\)"):
        WeightSpace(CASE["mlp"].make(0)).flatten(model, name="b")


def test_several_floating_dtypes_are_an_error():
    model = CASE["mlp"].make(0)
    model[3].double()
    with pytest.raises(ValueError, match=r"'1\.weight' is torch\.float32 and '3\.weight' is torch\.float64"):
        WeightSpace(model)


def test_a_parameter_that_is_no_floating_number_is_an_error():
    model = nn.Module()
    model.register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match=r"'codes' is torch\.int64"):
        WeightSpace(model)


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        WeightSpace(nn.ReLU())


def test_a_vector_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"theta must have shape \(99,\), got \(3,\)"):
        WeightSpace(CASE["mlp"].make(0)).unflatten(torch.zeros(3))
