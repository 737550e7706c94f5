"""Small networks with the kinds of symmetry that a person derives, each with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTATION, FIXING_ONES, PERMUTATION, FIXED = "orthogonal", "orthogonal-ones", "permutation", "fixed"


@dataclass(frozen=True)
class Rotating:
    """A network and the kinds at some places.

    Args:
        name: Of the case.
        build: Makes the network.
        inputs: Makes an example.
        kinds: By parameter and dimension, the largest kind of group there.
        untie: Whether tied weights get tensors of their own.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    kinds: dict[tuple[str, int], str]
    untie: bool = False

    def __str__(self) -> str:
        return self.name


def tokens(length: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.arange(2 * length).view(2, length) % vocabulary


class Attention(nn.Module):
    """Causal attention with ``heads`` query heads and ``shared`` key and value heads."""

    def __init__(self, width: int, heads: int, shared: int, size: int, *, norm: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, shared * size)
        self.v, self.o = nn.Linear(width, shared * size), nn.Linear(heads * size, width, bias=False)
        self.q_norm = RMSNorm(size) if norm else nn.Identity()
        self.k_norm = RMSNorm(size) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (count, self.size)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.shared), (self.v, self.shared))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.shared != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) / self.size**0.5
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class RMSNorm(nn.Module):
    """As most language models write it; ``offset`` 1 as Gemma does."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.full((width,), 1.0 - offset)), offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.offset + self.weight) if self.offset else self.weight * x


class HandLayerNorm(nn.Module):
    """Layer norm as BERT's first code wrote it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gain * (x - mean) / torch.sqrt(spread + 1e-5) + self.shift


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Layer(nn.Module):
    """One block; ``place`` says where its norms stand: "pre", "post", or "both" sides of each part."""

    def __init__(
        self, norm: Callable[[int], nn.Module], attention: nn.Module, mlp: nn.Module, width: int, place: str = "pre"
    ) -> None:
        super().__init__()
        self.attention, self.mlp, self.place = attention, mlp, place
        self.norm1, self.norm2 = norm(width), norm(width)
        if place == "both":
            self.norm3, self.norm4 = norm(width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        first, second = self.attention(self.norm1(x)), None
        x = x + (self.norm3(first) if self.place == "both" else first)
        second = self.mlp(self.norm2(x))
        return x + (self.norm4(second) if self.place == "both" else second)


class LanguageModel(nn.Module):
    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        *,
        width: int = 12,
        heads: int = 2,
        shared: int = 2,
        size: int = 6,
        gated: bool = False,
        tied: bool = False,
        place: str = "pre",
        qk_norm: bool = False,
        depth: int = 2,
        vocabulary: int = 11,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(5, width)
        self.layers = nn.Sequential(
            *(
                Layer(
                    norm,
                    Attention(width, heads, shared, size, norm=qk_norm),
                    SwiGLU(width, 14) if gated else MLP(width, 14),
                    width,
                    place,
                )
                for _ in range(depth)
            )
        )
        self.norm, self.head = norm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.layers(x)))


class Scaled(nn.Module):
    """A layer scale after each part, as CaiT has it."""

    def __init__(self, part: nn.Module, width: int) -> None:
        super().__init__()
        self.part, self.scale = part, nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.part(x)


class ViT(nn.Module):
    def __init__(self, *, scaled: bool = False, stem_norm: bool = False, width: int = 12, hidden: int = 14) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.stem = nn.LayerNorm(width) if stem_norm else nn.Identity()
        attention, mlp = Attention(width, 2, 2, 6), MLP(width, hidden)
        if scaled:
            attention, mlp = Scaled(attention, width), Scaled(mlp, width)
        self.layer = Layer(nn.LayerNorm, attention, mlp, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layer(self.stem(x)))[:, 0])


class Mixer(nn.Module):
    """The MLP over places acts on each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(12) for _ in range(3))
        self.over_places, self.over_channels, self.head = MLP(5, 9), MLP(12, 14), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.over_places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.over_channels(self.norm2(x))
        return self.head(self.norm(x).mean(1))


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8)


STREAM = ("tokens.weight", 1)
IN_HEADS = {("layers.0.attention.q.weight", 0): ROTATION, ("layers.0.attention.o.weight", 1): ROTATION}


class Cosine(nn.Module):
    """Two towers whose features are compared by their angle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(5, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (F.normalize(t, dim=-1) for t in (self.a(x), self.b(y)))
        return a @ b.T


class Scores(nn.Module):
    """Products that are only summed: attention without matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.q(x)[:, :, None] * self.k(x)[:, None]).sum(-1).softmax(-1).mean(1))


class Elementwise(nn.Module):
    """A bottleneck of two linear layers, with something in between that acts on each unit."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 9), nn.Linear(9, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def _between(name: str, between: Callable[[Tensor], Tensor], kind: str) -> Rotating:
    return Rotating(name, lambda: Elementwise(between), lambda: torch.rand(4, 6), {("a.weight", 0): kind})


MASK = torch.arange(9) % 2 == 0

ROTATING = [
    Rotating("layer norm, pre-norm", lambda: LanguageModel(nn.LayerNorm), tokens, {STREAM: FIXING_ONES} | IN_HEADS),
    Rotating("RMS norm of torch", lambda: LanguageModel(nn.RMSNorm), tokens, {STREAM: ROTATION} | IN_HEADS),
    Rotating("RMS norm by hand", lambda: LanguageModel(RMSNorm, gated=True), tokens, {STREAM: ROTATION} | IN_HEADS),
    Rotating("RMS norm of gain plus one", lambda: LanguageModel(lambda n: RMSNorm(n, 1.0)), tokens, {STREAM: ROTATION}),
    Rotating("layer norm by hand", lambda: LanguageModel(HandLayerNorm), tokens, {STREAM: FIXING_ONES}),
    Rotating(
        "grouped queries share their key's",
        lambda: LanguageModel(RMSNorm, heads=4, shared=2, size=3, gated=True),
        tokens,
        {STREAM: ROTATION, ("layers.0.attention.k.weight", 0): ROTATION},
    ),
    Rotating(
        "gains on queries and keys stay",
        lambda: LanguageModel(RMSNorm, qk_norm=True),
        tokens,
        {
            STREAM: ROTATION,
            ("layers.0.attention.q.weight", 0): PERMUTATION,
            ("layers.0.attention.o.weight", 1): ROTATION,
        },
    ),
    Rotating("post-norm", lambda: LanguageModel(nn.LayerNorm, place="post"), tokens, {STREAM: PERMUTATION} | IN_HEADS),
    Rotating("norms on both sides", lambda: LanguageModel(RMSNorm, place="both"), tokens, {STREAM: PERMUTATION}),
    Rotating("tied head", lambda: LanguageModel(nn.LayerNorm, tied=True), tokens, {STREAM: PERMUTATION} | IN_HEADS),
    Rotating(
        "tied head, untied", lambda: LanguageModel(nn.LayerNorm, tied=True), tokens, {STREAM: FIXING_ONES}, untie=True
    ),
    Rotating("ViT", ViT, images, {("places", 2): FIXING_ONES, ("patches.weight", 0): FIXING_ONES}),
    Rotating("ViT with layer scales", lambda: ViT(scaled=True), images, {("places", 2): FIXING_ONES}),
    Rotating(
        "ViT with a norm at its stem",
        lambda: ViT(stem_norm=True),
        images,
        {("patches.weight", 0): PERMUTATION, ("stem.bias", 0): PERMUTATION},
    ),
    Rotating("mixer", Mixer, lambda: torch.rand(2, 5, 8), {("first.weight", 0): PERMUTATION}),
    Rotating("angles of features", Cosine, lambda: (torch.rand(4, 6), torch.rand(3, 5)), {("a.weight", 0): ROTATION}),
    Rotating("products that are summed", Scores, lambda: torch.rand(2, 4, 6), {("q.weight", 0): ROTATION}),
    _between("nothing", lambda x: x, ROTATION),
    _between("a number for all", lambda x: -3 * x / 2, ROTATION),
    _between("a number added to all", lambda x: x + 1, FIXING_ONES),
    _between("less their mean", lambda x: x - x.mean(-1, keepdim=True), FIXING_ONES),
    _between("over their spread", lambda x: x / x.std(-1, keepdim=True), FIXING_ONES),
    _between("over their length", lambda x: x / x.norm(dim=-1, keepdim=True), ROTATION),
    _between("over the sum of their magnitudes", lambda x: x / x.norm(1, dim=-1, keepdim=True), PERMUTATION),
    _between("over their squares", lambda x: x / (x * x).sum(-1, keepdim=True), ROTATION),
    _between("times their squares", lambda x: x * x * x, PERMUTATION),
    _between("times an expanded number", lambda x: x * x.mean(-1, keepdim=True).expand_as(x), FIXING_ONES),
    _between("plus an expanded length", lambda x: x + x.norm(dim=-1, keepdim=True).expand_as(x), FIXING_ONES),
    _between("some rows set to zero", lambda x: x.masked_fill(torch.tensor([[True], [False]] * 2), 0.5), FIXING_ONES),
    _between("rows of two chosen", lambda x: torch.where(torch.tensor([[True], [False]] * 2), x, -x), ROTATION),
    _between("units set to zero", lambda x: x.masked_fill(MASK, 0.0), FIXED),
    _between("rounded", lambda x: x.round(), PERMUTATION),
    _between("to whole numbers", lambda x: (4 * x).to(torch.int64).to(x.dtype), PERMUTATION),
    _between("over whole parts", lambda x: torch.div(4 * x, 2.0, rounding_mode="floor"), PERMUTATION),
    _between("a number over them", lambda x: 1 / (x + 9), PERMUTATION),
    _between("to a power", lambda x: (x + 9) ** 1.5, PERMUTATION),
    _between("largest", lambda x: x / (x.amax(-1, keepdim=True) + 9), PERMUTATION),
    _between("softmax", lambda x: x.softmax(-1), PERMUTATION),
    _between("dropout", lambda x: F.dropout(x, 0.5, training=False), ROTATION),
    _between("in place", lambda x: x.clone().mul_(2).add_(x), ROTATION),
    _between("in place with a function", lambda x: x.clone().sigmoid_(), PERMUTATION),
    _between("rows rearranged", lambda x: x[torch.tensor([2, 0, 1, 3])], ROTATION),
    _between("rows repeated and averaged", lambda x: torch.stack([x, 2 * x]).mean(0), ROTATION),
    _between("a smaller half", lambda x: torch.cat([x[:, :4], 2 * x[:, 4:]], 1), ROTATION),
    _between("times their sum", lambda x: x * (x @ torch.ones(9, 1, dtype=x.dtype)), FIXING_ONES),
]
"""Where more than nothing may be done with units, and how much."""
