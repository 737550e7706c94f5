"""The curvature of a network against the whole Hessian of each example or of the mean loss, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeconn.measure.curvature import largest_eigenvalue

X = torch.rand(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(7) % 3


def net(seed=0, last=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, last)).double().eval()


def of_each_example(model, loss_fn, x, y):
    """The mean over examples of the largest eigenvalue that each has by itself."""
    found = []
    for one, target in zip(x, y, strict=True):
        hessian = torch.autograd.functional.hessian(
            lambda flat, t=target: loss_fn(model(flat.reshape(1, *x.shape[1:])), t[None]), one.reshape(-1)
        )
        found.append(torch.linalg.eigvalsh(hessian)[-1])
    return float(torch.stack(found).mean())


WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
LOSSES = {
    "cross entropy": (F.cross_entropy, CLASSES),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), CLASSES),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
    "squares": (nn.MSELoss(), X[:, :3]),
    "squares by hand": (lambda outputs, targets: F.mse_loss(outputs, targets), X[:, :3]),
    "halved": (lambda outputs, targets: F.cross_entropy(outputs, targets) / 2, CLASSES),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [7, 3])
def test_each_input_has_the_curvature_of_its_own_mean_loss(name, size):
    loss_fn, y = LOSSES[name]
    found, count = largest_eigenvalue(
        net(), list(zip(X.split(size), y.split(size), strict=True)), wrt="inputs", loss_fn=loss_fn, tolerance=1e-9
    )
    assert count == 7 and found == pytest.approx(of_each_example(net(), loss_fn, X, y), rel=1e-6)


def test_places_of_an_image_count_as_its_own_mean():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 3, padding=1).double().eval()
    model = nn.Sequential(model, nn.Tanh(), nn.Conv2d(3, 3, 1).double())
    x, y = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.randint(3, (3, 4, 4))
    found, _ = largest_eigenvalue(model.eval(), [(x, y)], wrt="inputs", tolerance=1e-9)
    assert found == pytest.approx(of_each_example(model, F.cross_entropy, x, y), rel=1e-6)


def of_both(model, loss_fn, x, y):
    """The Hessian of the mean loss over all parameters that are not frozen and all inputs, written out."""
    moving = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    sizes = [tensor.numel() for tensor in moving.values()]

    def loss(flat):
        *parts, inputs = flat.split([*sizes, x.numel()])
        weights = {name: part.view_as(moving[name]) for name, part in zip(moving, parts, strict=True)}
        return loss_fn(torch.func.functional_call(model, weights, (inputs.view_as(x),)), y)

    return torch.autograd.functional.hessian(
        loss, torch.cat([*(tensor.flatten() for tensor in moving.values()), x.flatten()])
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_inputs_together_have_the_curvature_of_one_hessian(name, frozen):
    (loss_fn, y), model = LOSSES[name], net()
    model[2].requires_grad_(not frozen)
    hessian = of_both(model, loss_fn, X, y)
    batches = list(zip(X.split(3), y.split(3), strict=True))
    found, count = largest_eigenvalue(model, batches, wrt="both", loss_fn=loss_fn, tolerance=1e-9, num_steps=200)
    assert count == 7 and found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)
    in_weights, _ = largest_eigenvalue(model, batches, loss_fn=loss_fn, tolerance=1e-9, num_steps=200)
    block = hessian[: -X.numel(), : -X.numel()]
    assert in_weights == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6) and in_weights < found
    assert not X.requires_grad


def test_both_needs_inputs_to_differentiate_by_and_a_loss_of_outputs():
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double().eval()
    with pytest.raises(ValueError, match="one dense floating-point tensor for wrt='both', got Tensor of int64"):
        largest_eigenvalue(tokens, [(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())], wrt="both")
    with pytest.raises(ValueError, match="not known which inputs belong to which example"):
        largest_eigenvalue(net(), [(X, CLASSES)], wrt="both", forward=lambda model, batch: model(batch[0]).mean())


def test_examples_whose_target_does_not_count_are_left_out():
    y = CLASSES.clone()
    y[2:5] = -100
    found, count = largest_eigenvalue(net(), [(X[:4], y[:4]), (X[4:], y[4:])], wrt="inputs", tolerance=1e-9)
    kept = y != -100
    assert count == 4 and found == pytest.approx(of_each_example(net(), F.cross_entropy, X[kept], y[kept]), rel=1e-6)
    with pytest.raises(ValueError, match="no target of loader counts"):
        largest_eigenvalue(net(), [(X, torch.full((7,), -100))], wrt="inputs")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_normalised_weights_have_the_curvature_of_the_same_network_written_out(norm):
    """The second derivative of torch's own operator is wrong, by half."""
    model = net()
    norm(model[0])
    model.eval()
    parameters = list(model.parameters())
    g, v = ((p for p in model[0].parameters() if p.ndim == 2 and p.shape[1] == size).__next__() for size in (1, 4))

    def loss(flat):
        parts = dict(zip(map(id, parameters), flat.split([p.numel() for p in parameters]), strict=True))
        bias, size, way = (parts[id(p)].reshape(p.shape) for p in (model[0].bias, g, v))
        hidden = torch.tanh(X @ (way * size / way.norm(dim=1, keepdim=True)).T + bias)
        last = [parts[id(p)].reshape(p.shape) for p in (model[2].weight, model[2].bias)]
        return F.cross_entropy(hidden @ last[0].T + last[1], CLASSES)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.detach().reshape(-1) for p in parameters]))
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    found, _ = largest_eigenvalue(model, [(X, CLASSES)], tolerance=1e-9, num_steps=200)
    assert found == pytest.approx(expected, rel=1e-6)


class Crooked(torch.autograd.Function):
    """A square whose second derivative is that of another function."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return (x**2).sum(1, keepdim=True)

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * (2 * x + 3 * x.roll(1, 1) ** 2)


def test_a_second_derivative_that_is_not_symmetric_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1, 4, dtype=torch.float64))

        def forward(self, x):
            return Crooked.apply(x * self.scale)

    with pytest.raises(ValueError, match=r"the second derivative of the loss is not symmetric, by .*operators wrongly"):
        largest_eigenvalue(Model().eval(), [(X, X[:, :1])], loss_fn=nn.MSELoss())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X[0], CLASSES[0]), "must yield a target for each example"),
        ((X[:4], CLASSES[:3]), "must yield a target for each example"),
        ((X, X[:, :3] * 9), "neither classes nor probabilities"),
        ((X, CLASSES + 1), "must lie in 0..2"),
    ],
)
def test_every_batch_is_looked_at(batch, message):
    with pytest.raises(ValueError, match=message):
        largest_eigenvalue(net(), [(X, CLASSES), batch], wrt="inputs")


def test_outputs_of_any_kind_have_a_curvature():
    from collections import namedtuple

    kind = namedtuple("kind", "logits attention")

    class Named(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return kind(self.part(x), None)

    expected, _ = largest_eigenvalue(net(), [(X, CLASSES)], wrt="inputs")
    found, _ = largest_eigenvalue(Named(net()).eval(), [(X, CLASSES)], wrt="inputs")
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1, 100, 300])
def test_networks_that_are_sure_have_a_curvature(scale):
    """The Hessian of an example of which a network is sure is nothing but rounding."""
    model = net().float()
    with torch.no_grad():
        model[2].weight *= scale
    x, y = X.float(), model(X.float()).argmax(1)
    y[0] = (y[0] + 1) % 3
    found, _ = largest_eigenvalue(model, [(x, y)], wrt="inputs", tolerance=1e-6)
    exact, _ = largest_eigenvalue(model.double(), [(X, y)], wrt="inputs", tolerance=1e-9)
    assert found == pytest.approx(exact, rel=1e-3)


def test_a_loss_that_is_no_mean_is_told_of():
    with pytest.warns(UserWarning, match="the loss is no mean over the examples of a batch"):
        largest_eigenvalue(net(), [(X, CLASSES)], loss_fn=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
