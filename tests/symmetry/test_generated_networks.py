"""Discovery on networks that nobody wrote: random graphs of operators, each proved at every tensor.

``MODECONN_EXAMPLES=5000 pytest tests/symmetry/test_generated_networks.py`` tries more of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modeconn import WeightMatching, align, discover
from modeconn.symmetry import UnknownOperatorWarning
from tests.symmetry.oracle import largest_change

EXAMPLES = int(os.environ.get("MODECONN_EXAMPLES", "24"))
CHANNELS = (2, 3, 4, 6, 8)


class Generated(nn.Module):
    """A program: steps that append a tensor to a list, from tensors that are already there.

    A step is handed its layers: those in its closure would be no copy's own, and discovery looks at a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Callable[..., Tensor]]] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (_, step), layers in zip(self.steps, self.layers, strict=True):
            values.append(step(values, *layers))
        return values[-1]

    def __repr__(self) -> str:
        return " -> ".join(name for name, _ in self.steps)


class Builder:
    """Draws the steps of a network over images ``(N, C, H, W)`` or tokens ``(N, T, C)``, keeping track of shapes."""

    def __init__(self, draw: Callable, net: Generated, shape: tuple[int, ...]) -> None:
        self.draw, self.net, self.shapes = draw, net, [shape]

    def add(self, name: str, step: Callable[..., Tensor], *layers: nn.Module) -> None:
        self.net.layers.append(nn.ModuleList(layers))
        self.net.steps.append((name, step))
        values = [torch.zeros(shape) for shape in self.shapes]
        with torch.no_grad():
            training = self.net.training
            self.net.eval()
            self.shapes.append(tuple(step(values, *layers).shape))
            self.net.train(training)

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def one_of_same_shape(self) -> int:
        same = [i for i, shape in enumerate(self.shapes) if shape == self.shapes[-1]]
        return self.draw(st.sampled_from(same))


def elementwise(b: Builder) -> None:
    f = b.pick(F.relu, F.gelu, torch.tanh, F.softplus, torch.sigmoid, torch.abs, F.hardswish)
    b.add(f.__name__, lambda v: f(v[-1]))


def combine(b: Builder) -> None:
    i = b.one_of_same_shape()
    f = b.pick(torch.add, torch.mul, torch.maximum, torch.sub)
    b.add(f"{f.__name__} {i}", lambda v: f(v[-1], v[i]))


def in_place(b: Builder) -> None:
    i = b.one_of_same_shape()
    b.add(f"in place {i}", lambda v: v[-1].clone().add_(v[i]).mul_(0.7).relu_())


# ---------------------------------------------------------------- images


def conv(b: Builder) -> None:
    c = b.shapes[-1][1]
    out = b.pick(*CHANNELS)
    groups = b.pick(*[g for g in (1, 2, 3, 4, 6, 8) if c % g == 0 and out % g == 0])
    layer = nn.Conv2d(c, out, b.pick(1, 3), padding="same", groups=groups, bias=b.pick(True, False))
    b.add(f"conv {c}-{out}/{groups}", lambda v, layer: layer(v[-1]), layer)


def depthwise(b: Builder) -> None:
    c = b.shapes[-1][1]
    m = b.pick(1, 2)
    layer = nn.Conv2d(c, c * m, 3, padding=1, groups=c)
    b.add(f"depthwise x{m}", lambda v, layer: layer(v[-1]), layer)


def transposed(b: Builder) -> None:
    c, size = b.shapes[-1][1], b.shapes[-1][-1]
    groups = b.pick(*[g for g in (1, 2) if c % g == 0])
    layer = nn.ConvTranspose2d(c, b.pick(2, 4), 3, padding=1, groups=groups)
    assert size
    b.add(f"transposed /{groups}", lambda v, layer: layer(v[-1]), layer)


def image_norm(b: Builder) -> None:
    c = b.shapes[-1][1]
    groups = [g for g in (1, 2, 3, 4, c) if c % g == 0]
    layer = b.pick(nn.BatchNorm2d(c), nn.GroupNorm(b.pick(*groups), c), nn.InstanceNorm2d(c, affine=True))
    b.add(str(layer), lambda v, layer: layer(v[-1]), layer)


def concatenate(b: Builder) -> None:
    i = b.draw(st.sampled_from([i for i, s in enumerate(b.shapes) if s[2:] == b.shapes[-1][2:]]))
    b.add(f"cat {i}", lambda v: torch.cat([v[i], v[-1]], 1))


def pieces(b: Builder) -> None:
    c = b.shapes[-1][1]
    if c == 1:
        return
    cut = b.draw(st.integers(1, c - 1))
    b.add(
        f"pieces {cut}",
        b.pick(
            lambda v: torch.cat([v[-1][:, cut:], v[-1][:, :cut]], 1),
            lambda v: v[-1][:, :cut].mean(1, keepdim=True) * v[-1],
            lambda v: F.pad(v[-1], (0, 0, 0, 0, 1, 2)),
        ),
    )


def chunks(b: Builder) -> None:
    c = b.shapes[-1][1]
    if c % 2:
        return
    b.add(
        "chunks",
        b.pick(
            lambda v: F.glu(v[-1], 1),
            lambda v: torch.cat(v[-1].chunk(2, 1)[::-1], 1),
            lambda v: torch.stack(v[-1].chunk(2, 1), 1).amax(1),
            lambda v: F.channel_shuffle(v[-1], 2),
            lambda v: v[-1].unflatten(1, (c // 2, 2)).softmax(2).flatten(1, 2),
            lambda v: v[-1].unflatten(1, (2, c // 2)).sum(1),
            lambda v: torch.stack([v[-1].unflatten(1, (2, c // 2))[:, i] * (i + 1) for i in range(2)], 2).flatten(1, 2),
            lambda v: v[-1][:, ::2] * v[-1][:, 1::2],
        ),
    )


def pooling(b: Builder) -> None:
    b.add(
        "pooling",
        b.pick(
            lambda v: F.max_pool2d(v[-1], 3, 1, 1),
            lambda v: F.avg_pool2d(v[-1], 3, 1, 1),
            lambda v: v[-1] * v[-1].mean((2, 3), keepdim=True).sigmoid(),
            lambda v: F.interpolate(F.max_pool2d(v[-1], 2), scale_factor=2.0),
            lambda v: F.pixel_unshuffle(F.interpolate(v[-1], scale_factor=2.0), 2),
            lambda v: v[-1].flip(3) + v[-1].roll(1, 2),
        ),
    )


def expand_excite(b: Builder) -> None:
    c = b.shapes[-1][1]
    down, up = nn.Linear(c, 3), nn.Linear(3, c)
    b.add(
        "excite", lambda v, down, up: v[-1] * up(down(v[-1].mean((2, 3))).relu()).sigmoid()[:, :, None, None], down, up
    )


IMAGE_STEPS = (
    conv, conv, depthwise, transposed, image_norm, concatenate, pieces, chunks, pooling, expand_excite, elementwise,
    combine, in_place,
)  # fmt: skip


def image_head(b: Builder) -> None:
    _, c, h, w = b.shapes[-1]
    if b.pick(True, False):
        layer = nn.Linear(c * h * w, 2)
        b.add("flatten, linear", lambda v, layer: layer(v[-1].flatten(1)), layer)
    else:
        layer = nn.Linear(c, 2)
        b.add("pool, linear", lambda v, layer: layer(v[-1].mean((2, 3))), layer)


# ---------------------------------------------------------------- tokens


def linear(b: Builder) -> None:
    layer = nn.Linear(b.shapes[-1][-1], b.pick(4, 6, 8), bias=b.pick(True, False))
    b.add(f"linear {layer.in_features}-{layer.out_features}", lambda v, layer: layer(v[-1]), layer)


def token_norm(b: Builder) -> None:
    c = b.shapes[-1][-1]
    layer = b.pick(nn.LayerNorm(c), nn.RMSNorm(c))
    b.add(str(layer), lambda v, layer: layer(v[-1]), layer)


def attend(b: Builder) -> None:
    c = b.shapes[-1][-1]
    heads = b.pick(*[h for h in (1, 2, 3, 4) if c % h == 0])
    d = c // heads
    qkv = nn.Linear(c, 3 * c)
    read = b.pick(
        lambda z: z.reshape(*z.shape[:2], 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0),
        lambda z: z.reshape(*z.shape[:2], heads, 3, d).permute(3, 0, 2, 1, 4),
        lambda z: z.reshape(*z.shape[:2], heads, d, 3).transpose(1, 2).unbind(-1),
        lambda z: tuple(y.unflatten(-1, (heads, d)).transpose(1, 2) for y in z.chunk(3, -1)),
        lambda z: z.unflatten(-1, (heads, 3 * d)).transpose(1, 2).split(d, -1),
    )
    mix = b.pick(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
        lambda q, k, v: torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(1), v),
    )
    b.add(f"attend {heads}x{d}", lambda v, qkv: mix(*read(qkv(v[-1]))).transpose(1, 2).flatten(2), qkv)


def gated(b: Builder) -> None:
    c = b.shapes[-1][-1]
    both = nn.Linear(c, 12)
    b.add("gated", lambda v, both: F.silu(both(v[-1])[..., :6]) * both(v[-1])[..., 6:], both)


def experts(b: Builder) -> None:
    c = b.shapes[-1][-1]
    first, second = nn.Linear(c, 5), nn.Linear(c, 5)
    router = nn.Linear(c, 2)
    b.add(
        "experts",
        lambda v, first, second, router: (
            router(v[-1]).softmax(-1)[..., None, :] * torch.stack([first(v[-1]), second(v[-1])], -1)
        ).sum(-1),
        first,
        second,
        router,
    )


def recurrent(b: Builder) -> None:
    c = b.shapes[-1][-1]
    kind = b.pick(nn.LSTM, nn.GRU, nn.RNN)
    layer = kind(c, 4, b.pick(1, 2), batch_first=True, bidirectional=b.pick(True, False))
    b.add(kind.__name__, lambda v, layer: layer(v[-1])[0], layer)


def token_views(b: Builder) -> None:
    t, c = b.shapes[-1][1:]
    b.add(
        "views",
        b.pick(
            lambda v: v[-1] - 0.5 * v[-1].mean(-1, keepdim=True),
            lambda v: v[-1] + v[-1][:, :1],
            lambda v: v[-1].cumsum(1),
            lambda v: v[-1] @ v[-1].transpose(1, 2) @ v[-1],
            lambda v: torch.cat([v[-1], v[-1].amax(-1, keepdim=True)], -1),
            lambda v: v[-1].repeat_interleave(2, -1),
            lambda v: v[-1].repeat(1, 1, 2),
            lambda v: v[-1] * v[-1].topk(2, -1).values.sum(-1, keepdim=True),
            lambda v: torch.where(v[-1] > 0, v[-1], v[-1].logsumexp(-1, keepdim=True)),
            lambda v: v[-1].reshape(v[-1].shape[0], -1).reshape(v[-1].shape[0], t, c),
            lambda v: v[-1].transpose(1, 2).reshape(v[-1].shape[0], t, c),
        ),
    )


def by_number(b: Builder) -> None:
    t = b.shapes[-1][1]
    to = torch.arange(1, t + 1) % (t - 1)  # one place is met twice
    spread = to[None, :, None]
    b.add(
        "by number",
        b.pick(
            lambda v: v[-1].index_add(1, to, v[-1].tanh()),
            lambda v: v[-1].scatter_add(1, spread.expand_as(v[-1]), v[-1].tanh()),
            lambda v: v[-1].scatter_reduce(1, spread.expand_as(v[-1]), v[-1].tanh(), "amax", include_self=False),
            lambda v: v[-1].scatter(1, spread[:, 1:].expand(v[-1].shape[0], -1, v[-1].shape[2]), v[-1][:, 1:].tanh()),
            lambda v: v[-1].clone().index_put_((torch.arange(2)[:, None], to), v[-1][:2].tanh(), accumulate=True),
            lambda v: v[-1].index_copy(1, to[:2], v[-1][:, :2].tanh()).index_fill(1, to[2:3], 0.5),
            lambda v: v[-1].masked_scatter((v[-1][..., :1] > 0).expand_as(v[-1]), v[-1].tanh()),
            lambda v: torch.where(v[-1].index_put((v[-1].mean(-1) > 0,), v[-1][0, 0]) > 0, v[-1], 0.1),
            lambda v: v[-1] * torch.zeros_like(v[-1]).scatter(2, v[-1].topk(2, -1).indices, 1.0),
            lambda v: v[-1] + F.one_hot(v[-1].argmax(-1), v[-1].shape[-1]),
            lambda v: v[-1] * torch.bucketize(v[-1], torch.arange(3.0) - 1) * v[-1].histc(5, -1, 1)[2:3].exp(),
            lambda v: v[-1] + torch.searchsorted(torch.arange(3.0) - 1, v[-1]),
        ),
    )


def by_position(b: Builder) -> None:
    """Units of a table that could be others at each position, until something mixes or reorders these."""
    t = b.shapes[-1][1]
    write, mix, read = nn.Linear(6, t), nn.Linear(t, t), nn.Linear(6, t)
    between = b.pick(
        lambda h, mix: h,
        lambda h, mix: h.flip(1),
        lambda h, mix: h.roll(1, 1),
        lambda h, mix: h.cumsum(1),
        lambda h, mix: h[:, torch.arange(t).roll(1)],
        lambda h, mix: h * h[:, [t - 1]],
        lambda h, mix: mix(h.transpose(1, 2)).transpose(1, 2),
        lambda h, mix: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
        lambda h, mix: F.pad(h, (0, 0, 1, -1)),
        lambda h, mix: F.interpolate(h.transpose(1, 2), scale_factor=2.0, mode="linear").transpose(1, 2)[:, 1::2],
        lambda h, mix: h @ h.transpose(1, 2) @ h,
        lambda h, mix: h.index_add(1, torch.arange(t).roll(1), h.tanh()),
    )

    def step(v: list[Tensor], write: nn.Linear, mix: nn.Linear, read: nn.Linear) -> Tensor:
        x = v[-1].mean(-1, keepdim=True)
        h = between(x * write.weight, mix) + x
        return v[-1] + (h.relu() * read.weight).sum(-1, keepdim=True)

    b.add("by position", step, write, mix, read)


def token_combine(b: Builder) -> None:
    i = b.draw(st.sampled_from(range(len(b.shapes))))
    b.add(f"cat {i}", lambda v: torch.cat([v[-1], v[i]], -1))


TOKEN_STEPS = (
    linear, linear, token_norm, attend, attend, gated, experts, recurrent, token_views, token_views, token_combine,
    elementwise, combine, in_place,
)  # fmt: skip
LOOKUP_STEPS = (by_number, by_number, by_position, linear, token_combine, elementwise, in_place)


def token_head(b: Builder) -> None:
    layer = nn.Linear(b.shapes[-1][-1], 2)
    b.add("head", lambda v, layer: layer(v[-1].mean(1)), layer)


@st.composite
def networks(draw: Callable, lookups: bool = False) -> tuple[Generated, Tensor]:
    torch.manual_seed(0)
    net = Generated()
    if lookups:
        steps, head, shape, first = LOOKUP_STEPS, token_head, (2, 4, 5), linear
    elif draw(st.booleans()):
        steps, head, shape, first = IMAGE_STEPS, image_head, (2, 3, 4, 4), conv
    else:
        steps, head, shape, first = TOKEN_STEPS, token_head, (2, 4, 5), linear
    builder = Builder(draw, net, shape)
    first(builder)
    for _ in range(draw(st.integers(1, 7))):
        if max(builder.shapes[-1][1], builder.shapes[-1][-1]) > 40:
            break
        draw(st.sampled_from(steps))(builder)
    head(builder)
    return net, torch.rand(shape)


COMMON = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check_that_no_tensor_changes(net: Generated, x: Tensor) -> bool:
    """Return whether the network has units to relabel."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownOperatorWarning)
        spec = discover(net, x)
    assert spec.verify(net, x) < 1e-9
    assert largest_change(spec, net, x) < 1e-6
    return bool(spec.groups)


def test_no_relabelling_of_a_generated_network_changes_any_tensor_and_most_have_units_to_relabel() -> None:
    found = []

    @COMMON
    @given(networks())
    def look(drawn: tuple[Generated, Tensor]) -> None:
        found.append(check_that_no_tensor_changes(*drawn))

    look()
    assert sum(found) > len(found) / 2


@settings(COMMON, max_examples=max(EXAMPLES // 2, 1))
@given(networks(lookups=True))
def test_no_relabelling_changes_what_is_written_by_number_or_position(drawn: tuple[Generated, Tensor]) -> None:
    check_that_no_tensor_changes(*drawn)


@settings(COMMON, max_examples=max(EXAMPLES // 4, 1))
@given(networks(), st.integers(0, 2**31))
def test_permutations_of_generated_networks_form_a_group(drawn: tuple[Generated, Tensor], seed: int) -> None:
    net, x = drawn
    spec = discover(net, x)
    generator = torch.Generator().manual_seed(seed)
    p, q = spec.random(generator), spec.random(generator)
    once, twice = (p @ q).apply(net), p.apply(q.apply(net))
    assert all(torch.equal(u, v) for u, v in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert p @ p.inverse() == spec.identity()


@settings(COMMON, max_examples=max(EXAMPLES // 4, 1))
@given(networks(), st.integers(0, 2**31))
def test_weight_matching_never_moves_a_generated_network_away(drawn: tuple[Generated, Tensor], seed: int) -> None:
    net, x = drawn
    net = net.double()
    spec = discover(net, x.double())
    moved = spec.random(torch.Generator().manual_seed(seed)).apply(net)
    result = align(net, moved, method=WeightMatching(), spec=spec)
    history = result.history
    assert list(history) == sorted(history)
    assert discover(result.model_b, x.double()) == spec
