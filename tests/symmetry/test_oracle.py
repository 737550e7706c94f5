"""Specs judged by the modules themselves, see `tests.symmetry.oracle`: written-out networks, misleading ones too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

import modeconn
from modeconn import RULES, discover
from modeconn.symmetry import UnknownOperatorWarning, VerificationError
from tests.symmetry.cases import CASES, Case
from tests.symmetry.oracle import largest_change


@pytest.mark.parametrize("case", CASES, ids=str)
def test_relabelled_modules_return_the_same(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    spec = discover(model, inputs)
    for training in (False, True):
        assert largest_change(spec, model, inputs, training=training) < 1e-9


def test_the_oracle_sees_a_wrong_spec() -> None:
    spec = discover(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(4, 5))

    class Other(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)).cumsum(-1))

    assert largest_change(spec, Other(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(4, 5)) > 0.01


@dataclass(slots=True)
class Slotted:
    logits: Tensor
    hidden: Tensor


@library.custom_op("modeconn_test::sum_up_", mutates_args=("x",))
def sum_up_(x: Tensor) -> None:
    x.copy_(x.cumsum(-1))


@sum_up_.register_fake
def _(x: Tensor) -> None:
    return None


class Net(nn.Module):
    """Hidden units ``h (N, 8)`` of which ``middle(net, h, x)`` makes the outputs."""

    def __init__(self, middle: Callable[..., Any], **more: Any) -> None:
        super().__init__()
        self.middle, self.a, self.b, self.c = middle, nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        for name, value in more.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.middle(self, self.a(x), x)


def written_through(h: Tensor) -> Tensor:
    z = h.clone()
    torch.ops.modeconn_test.sum_up_(z)
    return z


def copied_in_a_list(h: Tensor) -> Tensor:
    z = [torch.zeros_like(h)]
    torch._foreach_copy_(z, [h])
    return z[0]


def chosen(h: Tensor, x: Tensor) -> Tensor:
    number = x[0].argmax().item()
    torch._check(number >= 0)
    torch._check(number < 8)
    return h.select(1, number)[:, None]


def matrix_norm(order: Any) -> Callable[..., Tensor]:
    return lambda m, h, x: x.sum(-1) * torch.linalg.norm(h.view(-1, 2, 4), ord=order, dim=(-2, -1))


STAYS, MOVES = [], [(8,)]
MISLEADING: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "a position is returned": (lambda: Net(lambda m, h, x: (m.b(h), h.argmax(-1))), STAYS),
    "positions are returned": (lambda: Net(lambda m, h, x: (m.b(h), h.topk(3).indices)), STAYS),
    "positions are left": (lambda: Net(lambda m, h, x: m.b(h) * h.topk(3).values.sum(-1, keepdim=True)), MOVES),
    "outputs in slots": (lambda: Net(lambda m, h, x: Slotted(m.b(h), h)), STAYS),
    "an operator returns nothing": (lambda: Net(lambda m, h, x: m.b(written_through(h))), STAYS),
    "a list is written to": (lambda: Net(lambda m, h, x: m.b(copied_in_a_list(h))), STAYS),
    "norm of columns": (lambda: Net(matrix_norm(1)), [(4,), (4, 2)]),
    "smallest norm of columns": (lambda: Net(matrix_norm(-1)), [(4,), (4, 2)]),
    "spectral norm": (lambda: Net(matrix_norm(2)), STAYS),
    "bernoulli": (lambda: Net(lambda m, h, x: m.b(h) + m.c(torch.bernoulli(h.sigmoid()))), STAYS),
    "bernoulli in place": (
        lambda: Net(lambda m, h, x: m.b(h) + m.c(torch.zeros_like(h).bernoulli_(h.sigmoid()))),
        STAYS,
    ),
    "normal": (lambda: Net(lambda m, h, x: m.b(torch.normal(0.0, h.exp()))), STAYS),
    "noise": (lambda: Net(lambda m, h, x: m.b(h + torch.normal(0.0, 1.0, size=(8,)))), STAYS),
    "random slopes": (lambda: nn.Sequential(nn.Linear(5, 8), nn.RReLU(), nn.Linear(8, 3)), MOVES),
    "a branch": (
        lambda: Net(lambda m, h, x: m.b(torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,)))),
        MOVES,
    ),
    "a mask": (lambda: Net(lambda m, h, x: m.b(F.pad(h[:, m.mask], (0, 4))), mask=torch.arange(8) < 4), STAYS),
    "a value as number": (lambda: Net(lambda m, h, x: m.b(h) * h.argmax().item()), STAYS),
    "a unit that a value chooses": (lambda: Net(lambda m, h, x: m.b(h) * chosen(h, x)), STAYS),
    "numbers without axes": (
        lambda: Net(lambda m, h, x: m.b(h) * h.sum().softmax(0) * h.sum().cumsum(0) * h.sum().max(0)[0]),
        MOVES,
    ),
    "two results by entry": (lambda: Net(lambda m, h, x: m.b(torch.frexp(h)[0])), MOVES),
    "complex in between": (
        lambda: Net(lambda m, h, x: m.b(h) + h.to(torch.complex128).sum(-1, keepdim=True).real),
        MOVES,
    ),
    "identity": (
        lambda: Net(lambda m, h, x: m.b(h @ (m.w @ m.w.T + 0.1 * torch.eye(8))), w=nn.Parameter(torch.randn(8, 4))),
        [(8,), (4,)],
    ),
}


@pytest.mark.filterwarnings("ignore::modeconn.symmetry.UnknownOperatorWarning", "ignore:the outputs .* come after")
@pytest.mark.parametrize("name", MISLEADING)
def test_what_may_mislead_is_read_right(name: str) -> None:
    torch.manual_seed(0)
    build, groups = MISLEADING[name]
    model, x = build(), torch.randn(4, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == sorted(groups)
    assert spec.verify(model, x) < 1e-9
    assert largest_change(spec, model, x) < 1e-9


@pytest.mark.parametrize("write", ["written_through", "copied_in_a_list"])
def test_an_operator_that_returns_nothing_is_named(write: str) -> None:
    with pytest.warns(UnknownOperatorWarning, match="no symmetry rule for"):
        discover(Net(lambda m, h, x: m.b(globals()[write](h))), torch.randn(4, 5))


def test_states_of_a_recurrence_belong_to_the_entries_of_its_batch() -> None:
    """A GRU over units, with a first state for each of them."""

    class OverUnits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gru, self.b = nn.Linear(5, 8), nn.GRU(1, 6), nn.Linear(48, 3)
            self.first = nn.Parameter(torch.randn(1, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.gru(self.a(x).unsqueeze(-1), self.first)[0].flatten(1))

    model, x = OverUnits(), torch.randn(4, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(6,), (8,)]
    assert largest_change(spec, model, x) < 1e-9


def test_keys_may_have_fewer_dimensions_than_queries() -> None:
    class SharedKeys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(5, 8), nn.Linear(8, 2)
            self.k, self.v = (nn.Parameter(torch.randn(2, 7, 4)) for _ in "kv")

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(-1, 6, 2, 4).transpose(1, 2)
            return self.o(F.scaled_dot_product_attention(q, self.k, self.v).transpose(1, 2).flatten(2))

    model, x = SharedKeys(), torch.randn(2, 6, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(2,), (2, 4), (2, 4), (2, 7)]
    assert spec.verify(model, x) < 1e-9 and largest_change(spec, model, x) < 1e-9


def test_complex_weights_move_too() -> None:
    """A Fourier neural operator (Li et al., 2021): channels of the stream, and those inside."""

    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Linear(2, 8), nn.Linear(8, 1)
            self.w = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            h = self.p(x).transpose(1, 2)
            f = torch.fft.rfft(h)
            out = torch.zeros(*f.shape, dtype=torch.cfloat)
            out[:, :, :3] = torch.einsum("bix,iox->box", f[:, :, :3], self.w)
            return self.q(torch.fft.irfft(out, n=h.shape[-1]).relu().transpose(1, 2))

    model, x = Fourier(), torch.randn(2, 16, 2)
    spec = discover(model, x)
    assert [group.shape for group in spec.groups] == [(8,), (8,)]
    assert spec.verify(model, x) < 1e-9
    moved = spec.random(torch.Generator().manual_seed(1)).apply(model)
    torch.testing.assert_close(moved(x), model(x), rtol=1e-3, atol=1e-5)


class Averaging(nn.Module):
    """A running mean that is not saved: zero at first, and something else later."""

    def __init__(self, by_halves: bool) -> None:
        super().__init__()
        self.by_halves = by_halves
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            for mean, seen in zip(*(x.chunk(1 + self.by_halves, -1) for x in (self.mean, h.detach())), strict=True):
                mean.mul_(0.9).add_(0.1 * seen.mean(0))
        return self.b((h - self.mean).relu())


@pytest.mark.parametrize("by_halves", [False, True])
def test_a_constant_that_train_mode_writes_to_is_none(by_halves: bool) -> None:
    x, fresh, trained = torch.randn(4, 5), Averaging(by_halves), Averaging(by_halves)
    spec = discover(fresh, x)
    trained.train()(x)
    assert spec.groups == () and spec.verify(trained, x) < 1e-9
    fresh.train()(x)
    assert spec.verify(fresh, x) < 1e-9


def test_a_model_that_computes_something_else_is_not_proved() -> None:
    class Summing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)).cumsum(-1))

    layers = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)
    model, x = nn.Sequential(*layers), torch.randn(4, 5)
    spec = discover(model, x)
    assert spec.verify(copy.deepcopy(model), x) < 1e-9
    with pytest.raises(ValueError, match="of another model: Summing does not compute what the model does"):
        spec.verify(Summing(*layers), x)


def test_integers_must_agree_too() -> None:
    """A wrong rule for the place of the largest unit, which only a tensor of integers shows."""
    rules = {**RULES, torch.ops.aten.argmax: lambda walk, input, dim: [input.axes[0]]}
    model, x = Net(lambda m, h, x: (m.b(h), h.argmax(-1))), torch.randn(4, 5)
    spec = discover(model, x, rules=rules)
    assert [group.shape for group in spec.groups] == [(8,)]
    with pytest.raises(VerificationError, match="tensor 'argmax' differs"):
        spec.verify(model, x)


def test_statistics_of_any_shape_are_redrawn_positive() -> None:
    """A batch norm by hand: behind the root of a negative variance everything is NaN, and all NaN are alike."""
    model = Net(lambda m, h, x: m.b(h / m.variance.sqrt()), variance=torch.ones(1, 8))
    spec, x = discover(model, torch.randn(4, 5)), torch.randn(4, 5)
    assert [group.shape for group in spec.groups] == [(8,)] and spec.verify(model, x) < 1e-9


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda m, h, x: m.b(h) * (-m.w.square().sum()).sqrt(), "on redrawn weights tensor 'sqrt' is NaN"),
        (
            lambda m, h, x: m.b(h) @ torch.linalg.cholesky(m.w[:3, :3]),
            "on redrawn weights the model fails with .*cholesky",
        ),
    ],
)
def test_what_cannot_be_run_on_redrawn_weights_is_not_called_proved(middle: Any, message: str) -> None:
    model, x = Net(middle, w=nn.Parameter(torch.eye(4) - 0.1)), torch.randn(4, 5)
    with pytest.raises(VerificationError, match=f"cannot be proved: {message}"):
        discover(model, x).verify(model, x)


def test_inputs_stay_in_their_range() -> None:
    """Targets of a loss that are probabilities."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.binary_cross_entropy(self.b(self.a(x)).sigmoid(), target)

    for target in (torch.full((4, 3), 0.5), torch.ones(4, 3), torch.zeros(4, 3), torch.rand(4, 3)):
        inputs = (torch.randn(4, 5), target)
        assert discover(Loss(), inputs).verify(Loss(), inputs) < 1e-9


@pytest.mark.parametrize("width", [512, 131_072])
def test_the_rounding_of_equal_numbers_is_no_difference(width: int) -> None:
    """A batch of one is repeated, so the two outputs are equal."""
    model, x = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 1)), torch.randn(1, 5)
    assert discover(model, x).verify(model, x) < 1e-12


def test_weights_that_are_computed_are_copied() -> None:
    """`nn.utils.weight_norm` keeps its result as an attribute, which `copy.deepcopy` refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        a, b = (nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)) for _ in "ab")
    x = torch.randn(4, 5)
    a(x), b(x)
    found = modeconn.align(a, b, example_input=x)
    torch.testing.assert_close(found.model_b(x), b(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, "model must be a torch.nn.Module, got model=<function"),
        (nn.Linear, "model must be a torch.nn.Module, got model=<class"),
        (torch.jit.ScriptModule(), "got a ScriptModule"),
    ],
)
def test_what_is_no_module_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(model, torch.randn(4, 5))


def test_a_wrong_input_is_named() -> None:
    model = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=r"does not run on example_input \('abc', \{\}\), which holds no tensor"):
        discover(model, "abc")
    with pytest.raises(ValueError, match=r"Linear does not run on example_input of shape \(2, 4\)"):
        discover(model, torch.randn(2, 5)).verify(model, torch.randn(2, 4))
