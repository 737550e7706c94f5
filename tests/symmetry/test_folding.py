"""Places where a gain must not be folded, or not as it looks: constants, writes in place, views, memory, freezing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn

WIDTH = 8
WEIGHTS = torch.linspace(0.2, 1.0, 5, dtype=torch.float64)[:, None]
CONSTANT = torch.full((WIDTH,), 0.7, dtype=torch.float64)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    """A first layer, a norm and a last layer, and what a case does with them."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **more: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.LayerNorm(WIDTH)
        self._forward = forward
        for name, value in more.items():
            setattr(self, name, value)
        generator = torch.Generator().manual_seed(0)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn / 2 + (parameter.dim() == 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape))


def written_through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.norm(m.first(x))
    y[:, 0].mul_(2.0)
    return m.last(y)


def repeated_then_written(m: nn.Module, x: Tensor) -> Tensor:
    scale = (1 + x[..., :1].abs()).expand(-1, -1, WIDTH).clone()
    scale[..., :4] *= 2
    return m.last(rms(m.first(x) * scale))


def divided_by_what_was_written(m: nn.Module, x: Tensor) -> Tensor:
    scale = (1 + x[..., :1].abs()).expand(-1, -1, WIDTH).clone()
    scale[..., 3:5].neg_()
    return m.last(rms(m.first(x) / scale))


def behind_a_mask(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.norm(m.first(x)) * (x[..., :1] > 0))


def averaged(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.norm(m.first(x)) * WEIGHTS)


PLAIN = {
    "a constant added to the stream": Net(lambda m, x: m.last(rms(m.first(x) + CONSTANT))),
    "a constant added after a norm": Net(lambda m, x: m.last(m.norm(m.first(x)) + CONSTANT)),
    "products with a constant": Net(lambda m, x: m.last(rms(m.first(x))) + (rms(m.first(x)) @ CONSTANT)[..., None]),
    "a constant in place of units": Net(lambda m, x: m.last(rms(torch.where(x[..., :1] > 0, m.first(x), CONSTANT)))),
    "a constant beside the stream": Net(
        lambda m, x: m.last(rms(torch.cat([CONSTANT.expand(x.shape[0], 1, WIDTH), m.first(x)], 1)))
    ),
    "written through a view": Net(written_through_a_view),
    "repeated, then written": Net(repeated_then_written),
    "divided by what was written": Net(divided_by_what_was_written),
    "behind a mask": Net(behind_a_mask),
    "weighted by places": Net(averaged),
    "read, and scaled once more": Net(
        lambda m, x: m.last(y := m.norm(m.first(x))) + m.more(m.g * y), g=vector(WIDTH), more=nn.Linear(WIDTH, 3)
    ),
    "a layer and a norm, scaled together": Net(
        lambda m, x: m.last(rms(x + m.g * (m.more(x) + m.norm(x)))), g=vector(WIDTH), more=nn.Linear(WIDTH, WIDTH)
    ),
    "a layer that is scaled, and read": Net(
        lambda m, x: m.last(rms(x + m.g * (y := m.first(x)))) + m.more(y), g=vector(WIDTH), more=nn.Linear(WIDTH, 3)
    ),
    "a gain of two axes in another order": Net(
        lambda m, x: m.last(rms(m.first(x)) * m.g.t().reshape(-1)), g=vector(2, 4)
    ),
    "a gain in another order": Net(
        lambda m, x: m.last(rms(m.first(x)) * m.g.view(2, 4).t().reshape(-1)), g=vector(WIDTH)
    ),
    "a gain that is rounded": Net(lambda m, x: m.last(rms(m.first(x)) * m.g.to(torch.int64).add(3)), g=vector(WIDTH)),
    "a gain in half precision": Net(lambda m, x: m.last(rms(m.first(x)) * m.g.half().double()), g=vector(WIDTH)),
    "a bias of two axes": Net(
        lambda m, x: F.linear(m.norm(m.first(x)), m.w, m.b.reshape(-1)), w=vector(6, WIDTH), b=vector(2, 3)
    ),
    "a bias that is a column": Net(
        lambda m, x: F.linear(m.norm(m.first(x)), m.w, m.b.squeeze(-1)), w=vector(6, WIDTH), b=vector(6, 1)
    ),
}


def in_one_memory(net: Net, one: str, other: str) -> Net:
    net.get_parameter(other).data = net.get_parameter(one).data
    return net


PLAIN |= {
    "a gain in one memory with another vector": in_one_memory(
        Net(
            lambda m, x: m.last(F.gelu(F.gelu(m.more(m.norm(m.first(x)))) * m.b)),
            b=vector(WIDTH),
            more=nn.Linear(WIDTH, WIDTH),
        ),
        "norm.weight",
        "b",
    ),
    "biases in one memory": in_one_memory(
        Net(lambda m, x: m.last(m.norm(m.first(x))) + m.more(x), more=nn.Linear(WIDTH, 3)), "last.bias", "more.bias"
    ),
}


@pytest.mark.parametrize("net", PLAIN.values(), ids=PLAIN)
def test_folded_and_rotated_networks_are_the_same_function(net):
    net.eval()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spec = modeconn.discover(net, inputs, symmetries="orthogonal")
    assert spec.verify(net, inputs) < 1e-9
    for other in (spec.random(torch.Generator().manual_seed(0)).apply(net), modeconn.fold_gains(net, spec=spec)):
        for x in (inputs, torch.randn(3, 5, WIDTH, dtype=torch.float64)):
            assert torch.allclose(net(x), other(x), rtol=1e-9, atol=1e-9)


KEEPING = {
    "a gain, then a mean over places": (lambda m, x: m.last((rms(m.first(x)) * m.g).mean(1)), "orthogonal"),
    "read twice side by side": (
        lambda m, x: m.wide(torch.cat([(y := rms(m.first(x)) * m.g)[:, 0], y.mean(1)], -1)),
        "orthogonal",
    ),
    "masked by zeros": (lambda m, x: m.last(rms(m.first(x).masked_fill(x[..., :1] > 0, 0.0))), "orthogonal"),
    "padded by zeros": (lambda m, x: m.last(rms(F.pad(m.first(x), (0, 0, 1, 0)))), "orthogonal"),
    "padded by ones": (lambda m, x: m.last(rms(F.pad(m.first(x), (0, 0, 1, 0), value=1.0))), "orthogonal-ones"),
    "rolled": (lambda m, x: m.last(rms(m.first(x).roll(1, 1))), "orthogonal"),
    "summed up": (lambda m, x: m.last(rms(m.first(x).cumsum(1))), "orthogonal"),
    "a list summed from 0": (lambda m, x: m.last(rms(sum([y := m.first(x), m.square(rms(y))]))), "orthogonal"),
    "a number added": (lambda m, x: m.last(rms(m.first(x) + 1)), "orthogonal-ones"),
    "a mean by a number": (lambda m, x: m.last(rms(torch.lerp(y := m.first(x), m.square(y), 0.3))), "orthogonal"),
    "a mean by places": (lambda m, x: m.last(rms(torch.lerp(y := m.first(x), m.square(y), WEIGHTS))), "orthogonal"),
    "one gain at two places": (
        lambda m, x: m.last(rms((y := m.first(x)) + m.square(rms(y) * m.g)) * m.g),
        "orthogonal",
    ),
    "one gain that layers read twice": (
        lambda m, x: m.last(rms((y := m.first(x)) + m.square(z := rms(y) * m.g) + m.square(z)) * m.g),
        "orthogonal",
    ),
    "nearly constant": (
        lambda m, x: m.last(rms((y := m.first(x)) / (y.norm(dim=-1, keepdim=True) + 1e-6))),
        "orthogonal",
    ),
}


@pytest.mark.parametrize(("forward", "kind"), KEEPING.values(), ids=KEEPING)
def test_what_is_linear_keeps_rotations(forward, kind):
    net = Net(forward, g=vector(WIDTH), wide=nn.Linear(2 * WIDTH, 3), square=nn.Linear(WIDTH, WIDTH)).eval()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    spec = modeconn.discover(net, inputs, symmetries="orthogonal")
    assert [group.kind.name for group in spec.groups] == [kind] and spec.verify(net, inputs) < 1e-9
    for other in (spec.random(torch.Generator().manual_seed(0)).apply(net), modeconn.fold_gains(net, spec=spec)):
        assert torch.allclose(net(inputs), other(inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_one_group_rotate(groups, affine):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, WIDTH, affine=affine)
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 2), norm, nn.AvgPool2d(2), nn.Conv2d(WIDTH, 3, 1)).double().eval()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    spec = modeconn.discover(net, images, symmetries="orthogonal")
    assert {group.kind.name for group in spec.groups} == {"orthogonal-ones" if groups == 1 else "permutation"}
    assert spec.verify(net, images) < 1e-9
    assert torch.allclose(spec.random().apply(net)(images), net(images), rtol=1e-9, atol=1e-9)


def test_nothing_is_folded_into_frozen_parameters():
    net = Net(lambda m, x: m.last(m.norm(m.first(x)))).eval()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for frozen in (["norm.weight"], ["norm.bias"], ["last.weight"], ["last.bias"]):
        spec = modeconn.discover(net, inputs, symmetries="orthogonal", freeze=frozen)
        folded = modeconn.fold_gains(net, spec=spec)
        assert torch.equal(folded.get_parameter(frozen[0]), net.get_parameter(frozen[0]))
        assert torch.allclose(folded(inputs), net(inputs), atol=1e-9)


def test_the_way_out_of_a_gain_of_zero_works():
    net = Net(lambda m, x: m.more(m.norm(m.first(x))), more=nn.Linear(WIDTH, 2, bias=False)).eval()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for zero in (2, slice(None)):  # one of them, or all: there is no largest one to compare with
        with torch.no_grad():
            net.norm.weight[zero] = 0
        with pytest.raises(ValueError, match=r"Pass freeze=\['norm.bias'\] to modeconn.discover"):
            modeconn.fold_gains(net, inputs)
    spec = modeconn.discover(net, inputs, symmetries="orthogonal", freeze=["norm.bias"])
    assert torch.allclose(spec.random().apply(net)(inputs), net(inputs), atol=1e-9)


def test_a_gain_that_is_not_finite_is_named():
    net = Net(lambda m, x: m.last(m.norm(m.first(x)))).eval()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        net.norm.weight[2] = torch.inf
    with pytest.raises(ValueError, match=r"the gain 'norm\.weight' holds NaN or infinite entries"):
        modeconn.fold_gains(net, inputs)


def test_networks_without_data_are_folded():
    net = Net(lambda m, x: m.last(m.norm(m.first(x)))).to("meta")
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64, device="meta")
    spec = modeconn.discover(net, inputs, symmetries="orthogonal")
    assert all(p.is_meta for p in spec.random().apply(net).parameters())


class Embedded(nn.Module):
    """Tokens and a head that may be one tensor."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(7, 8), nn.RMSNorm(8), nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(x)))


@pytest.mark.parametrize("saved", [False, True])
def test_a_spec_of_weights_of_their_own_is_refused_by_a_network_that_ties_them(saved):
    x = torch.tensor([[1, 2, 3]])
    spec = modeconn.discover(Embedded(tied=False), x, symmetries="orthogonal")
    spec = modeconn.PermutationSpec.from_json(spec.to_json()) if saved else spec
    tied = Embedded(tied=True)
    for call in (spec.random().apply, lambda net: modeconn.fold_gains(net, spec=spec)):
        with pytest.raises(ValueError, match=r"'tokens\.weight' and 'head\.weight' are one tensor here, and were two"):
            call(tied)
    untied = modeconn.discover(tied, x, symmetries="orthogonal", untie=True)
    assert torch.allclose(untied.random().apply(tied)(x), tied(x), atol=1e-5)
    both, apart = modeconn.discover(tied, x, symmetries="orthogonal"), Embedded(tied=False)
    assert torch.allclose(both.random().apply(apart)(x), apart(x), atol=1e-5)


def test_permutations_of_layers_of_their_own_are_refused_by_a_network_that_ties_them():
    def build(tied: bool) -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        if tied:
            net[2].weight = net[0].weight
        return net

    spec = modeconn.discover(build(tied=False), torch.rand(2, 8))
    with pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' are one tensor here"):
        spec.random().apply(build(tied=True))


class Normed(nn.Module):
    """Two blocks whose norms may share a gain."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first, self.norms = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.inner, self.last = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), nn.Linear(WIDTH, 3)
        if shared:
            self.norms[1].weight = self.norms[0].weight
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, inner in zip(self.norms, self.inner, strict=False):
            x = x + inner(norm(x))
        return self.last(self.norms[2](x))


@pytest.mark.parametrize("saved", [False, True])
def test_a_spec_of_a_shared_gain_is_refused_by_a_network_with_two(saved):
    x = torch.rand(4, WIDTH)
    spec = modeconn.discover(Normed(shared=True), x, symmetries="orthogonal")
    spec = modeconn.PermutationSpec.from_json(spec.to_json()) if saved else spec
    free = Normed(shared=False)
    for call in (spec.random().apply, lambda net: modeconn.fold_gains(net, spec=spec)):
        with pytest.raises(
            ValueError, match=r"'norms\.0\.weight' and 'norms\.1\.weight' are two tensors here, and were one"
        ):
            call(free)


class Read(nn.Module):
    """A stream with a norm whose head is read in one more way."""

    def __init__(self, further: Callable[[nn.Module, Tensor], Tensor], two_names: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.pool = nn.Module()
        self.pool.forward = lambda y: F.softmax(y @ y.mT, -1).mean()
        self.further = further
        if two_names:
            self.other = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        return self.head(y) + self.further(self, x, y)


@pytest.mark.parametrize(
    ("further", "two_names", "why"),
    [
        (
            lambda m, x, y: m.norm.weight.square().mean(),
            False,
            r"'norm\.weight' is also read by (pow|square) in the model itself",
        ),
        (lambda m, x, y: m.pool(y), False, "read by a product of two computed tensors in 'pool'"),
        (lambda m, x, y: m.other(x), True, r"'head\.weight' and 'other\.weight' are one, as a module has two names"),
    ],
    ids=["another operator", "a product", "a module of two names"],
)
def test_a_report_names_what_keeps_a_gain_from_being_folded(further, two_names, why):
    spec = modeconn.discover(Read(further, two_names), torch.rand(2, 4, WIDTH), symmetries="orthogonal", untie=True)
    assert [group.kind.name for group in spec.groups] == ["permutation"]
    assert re.search(f"the gain 'norm.weight' cannot be folded, since .*{why}", repr(spec.report()))
