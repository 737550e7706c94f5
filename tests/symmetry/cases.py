"""Written-out networks whose symmetry groups a person can derive, each with the derivation.

``groups`` lists the shape of every group's permutation: ``(n,)`` for n units, ``(h, d)`` for d units in each of h
blocks that can be exchanged themselves (which are then a group ``(h,)`` too).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.symmetry.vision_operators  # noqa: F401  (deform_conv2d and roi_align)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: list[tuple[int, ...]]
    rules: dict[Any, Any] = field(default_factory=dict)
    since: tuple[int, int] = (2, 6)  # the first version of torch that exports it

    def __str__(self) -> str:
        return self.name


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.rand(2, channels, size, size)


def tokens(length: int = 6, vocabulary: int = 11) -> Callable[[], Tensor]:
    return lambda: torch.arange(2 * length).view(2, length) % vocabulary


class Lambda(nn.Module):
    """Modules by name and a forward function of them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def conv(i: int, o: int, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **kwargs)


# ---------------------------------------------------------------- plain and convolutional


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def conv_flatten() -> nn.Module:
    """Channels reach the linear layer as channels x pixels."""
    return nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4))


def residual() -> nn.Module:
    """The stem, the sum and what reads it share one group; the inside of the branch is free."""
    return Lambda(
        lambda m, x: m.head(F.relu((h := F.relu(m.stem(x))) + m.b2(m.c2(F.relu(m.b1(m.c1(h)))))).mean((2, 3))),
        stem=conv(3, 6),
        c1=conv(6, 5),
        b1=nn.BatchNorm2d(5),
        c2=conv(5, 6),
        b2=nn.BatchNorm2d(6),
        head=nn.Linear(6, 4),
    )


def option_a_shortcut() -> nn.Module:
    """Zero-padded channels: 4 stream channels stay apart from 2 + 2 that only the branch fills."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        y = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.down(h)
        return m.head(y.relu().mean((2, 3)))

    return Lambda(forward, stem=conv(3, 4), down=nn.Conv2d(4, 8, 3, 2, 1), head=nn.Linear(8, 3))


def concatenated_skips() -> nn.Module:
    """A small U-Net: encoder channels come back beside the decoder's."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        e1 = m.e1(x).relu()
        e2 = m.e2(F.max_pool2d(e1, 2)).relu()
        up = F.interpolate(m.mid(e2).relu(), scale_factor=2.0, mode="nearest")
        return m.out(m.d1(torch.cat([up, e1], 1)).relu())

    return Lambda(forward, e1=conv(3, 4), e2=conv(4, 6), mid=conv(6, 5), d1=conv(9, 7), out=conv(7, 2, 1))


def dense_block() -> nn.Module:
    """Each layer reads all before it: one group per layer."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = [m.stem(x)]
        for layer in (m.l1, m.l2):
            h.append(layer(torch.cat(h, 1).relu()))
        return m.head(m.norm(torch.cat(h, 1)).relu().mean((2, 3)))

    return Lambda(
        forward, stem=conv(3, 4), l1=conv(4, 3), l2=conv(7, 3), norm=nn.BatchNorm2d(10), head=nn.Linear(10, 2)
    )


def depthwise_separable() -> nn.Module:
    """A depthwise convolution keeps its input's channels; with multiplier 2 each has two copies, freely ordered."""
    return nn.Sequential(
        conv(3, 6, 1), nn.ReLU(), conv(6, 12, groups=6), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 5, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def inverted_residuals() -> nn.Module:
    """MobileNetV2: wide inside each block, one narrow stream through both, no nonlinearity where it is added."""

    def block(wide: int) -> nn.Sequential:
        return nn.Sequential(
            conv(4, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            conv(wide, wide, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            conv(wide, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        for part in (m.first, m.second):
            h = h + part(h)
        return m.head(h.mean((2, 3)))

    return Lambda(forward, stem=conv(3, 4), first=block(7), second=block(9), head=nn.Linear(4, 2))


def squeeze_excitation() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        gate = m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head((h * gate).mean((2, 3)))

    return Lambda(forward, stem=conv(3, 6), down=conv(6, 2, 1), up=conv(2, 6, 1), head=nn.Linear(6, 3))


def grouped() -> nn.Module:
    """Two groups of three channels, then two of two: groups can be exchanged, channels inside each group too."""
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), conv(6, 4, groups=2), nn.ReLU(), nn.Flatten(2), nn.Conv1d(4, 5, 1), nn.Flatten(),
        nn.Linear(320, 2),
    )  # fmt: skip


def channel_shuffle() -> nn.Module:
    """c1 has 2 groups (of 3 stem channels) of 3 outputs; after the shuffle, their j-th outputs make up group j of c2.

    So the 2 groups are also the inputs of every group of c2, and the 3 outputs are its groups, with 2 outputs each.
    """
    return Lambda(
        lambda m, x: m.head(m.c2(m.dw(m.shuffle(m.c1(m.stem(x).relu()).relu()))).relu().mean((2, 3))),
        stem=conv(3, 6),
        c1=conv(6, 6, 1, groups=2),
        shuffle=nn.ChannelShuffle(2),
        dw=conv(6, 6, groups=6),
        c2=conv(6, 6, 1, groups=3),
        head=nn.Linear(6, 3),
    )


def pixel_shuffle() -> nn.Module:
    """8 channels become 2 of 2 x 2 pixels: the two can be exchanged, the pixels cannot."""
    return nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 8), nn.PixelShuffle(2), nn.ReLU(), conv(2, 3))


def group_norm() -> nn.Module:
    """4 norm groups of 2: both may be permuted."""
    return nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 2))


def convnext_block() -> nn.Module:
    """Layer scale and layer norm belong to the stream."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        y = m.fc2(F.gelu(m.fc1(m.norm(m.dw(h).permute(0, 2, 3, 1)))))
        h = h + (m.scale.weight[0] * y).permute(0, 3, 1, 2)
        return m.head(h.mean((2, 3)))

    return Lambda(
        forward,
        stem=conv(3, 6),
        dw=conv(6, 6, groups=6),
        norm=nn.LayerNorm(6),
        fc1=nn.Linear(6, 10),
        fc2=nn.Linear(10, 6),
        scale=nn.Embedding(1, 6),
        head=nn.Linear(6, 3),
    )


def transposed_and_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU(),
        nn.ConvTranspose3d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv3d(6, 2, 1),
    )  # fmt: skip


# ---------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head self-attention, its query, key and value spelled in different ways."""

    def __init__(self, width: int, heads: int, spelling: str, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.spelling, self.causal = heads, width // heads, spelling, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h, d = self.heads, self.size
        fused = self.qkv(x)
        if self.spelling == "3hd":
            q, k, v = fused.reshape(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
        elif self.spelling == "h3d":
            q, k, v = fused.reshape(b, t, h, 3, d).permute(3, 0, 2, 1, 4).unbind(0)
        elif self.spelling == "hd3":
            q, k, v = fused.view(b, t, h, d, 3).transpose(1, 2).unbind(-1)
        elif self.spelling == "h(q+k+v)":
            q, k, v = fused.view(b, t, h, 3 * d).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (z.view(b, t, h, d).transpose(1, 2) for z in fused.chunk(3, -1))
        if self.spelling == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k) / d**0.5
            y = torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v)
        elif self.spelling == "matmul":
            y = (q @ k.transpose(-2, -1) / d**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, h * d))


SPELLINGS = ("3hd", "h3d", "hd3", "h(q+k+v)", "chunk", "einsum", "matmul")
ATTENTION = [(4,), (4, 2), (4, 2)]  # heads, query-key units in each, value-output units in each


def attention(spelling: str) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Attention(8, 4, spelling), nn.Linear(8, 3))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class TinyGPT(nn.Module):
    """Tied input and output embedding, RMS norm, rotary positions on request, grouped key and value heads."""

    def __init__(self, rotary: bool = False, vocabulary: int = 11, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, n, bias=False) for n in (16, 8, 8))
        self.o = nn.Linear(16, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.heads, self.rotary = heads, rotary

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.embed(ids)
        y = self.norms[0](x)
        q, k, v = (f(y).view(b, t, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            q, k = (z * angle.cos() + torch.cat([-z[..., 2:], z[..., :2]], -1) * angle.sin() for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x))


def ordered_heads() -> nn.Module:
    """A bias by head (as in ALiBi) fixes the heads; the units of each are still free."""

    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(self.embed(x)).view(b, t, 4, 3, 2).unbind(3)
            scores = torch.einsum("bthd,bshd->bhts", q, k) * torch.tensor([1.0, 0.5, 0.25, 0.125]).view(4, 1, 1)
            return self.head(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))

    return Ordered()


def vit() -> nn.Module:
    """Patches, a class token, learned positions: all of the stream."""

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, 4)
            self.cls = nn.Parameter(torch.rand(1, 1, 8))
            self.pos = nn.Parameter(torch.rand(1, 5, 8))
            layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
            return self.head(self.encoder(x)[:, 0])

    return ViT()


def windows() -> nn.Module:
    """Swin-like: windows of 2 x 2 tokens, shifted by a roll, relative position bias per head."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 1)
            self.bias = nn.Parameter(torch.rand(9, 4))
            self.register_buffer("index", torch.arange(16).view(4, 4) % 9)
            self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x).permute(0, 2, 3, 1)
            b, height, width, c = h.shape
            z = torch.roll(h, (-1, -1), (1, 2))
            z = z.view(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
            q, k, v = self.qkv(z).view(-1, 4, 3, 4, 2).permute(2, 0, 3, 1, 4)
            bias = self.bias[self.index.view(-1)].view(4, 4, 4).permute(2, 0, 1)
            z = ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
            z = self.proj(z).view(b, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(h.shape)
            return self.head((h + torch.roll(z, (1, 1), (1, 2))).mean((1, 2)))

    return Windows()


def encoder_decoder() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(m.t(m.src(x), m.tgt(x))),
        src=nn.Linear(5, 8),
        tgt=nn.Linear(5, 8),
        t=nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        head=nn.Linear(8, 3),
    )


def multihead() -> nn.Module:
    """`nn.MultiheadAttention` with its weights, averaged over heads, among the outputs."""
    return Lambda(
        lambda m, x: m.attention((h := m.embed(x)), h, h),
        embed=nn.Linear(5, 8),
        attention=nn.MultiheadAttention(8, 4, batch_first=True),
    )


# ---------------------------------------------------------------- recurrent, shared, selected, unknown


def lstm() -> nn.Module:
    """Two layers: the units of each, the same in its four gates."""
    return Lambda(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(5, 6, 2, batch_first=True), head=nn.Linear(6, 3)
    )


def gru_both_ways() -> nn.Module:
    """Forward and backward units are two groups, concatenated."""
    return Lambda(
        lambda m, x: m.head(m.gru(x)[0].mean(1)),
        gru=nn.GRU(5, 6, bidirectional=True, batch_first=True),
        head=nn.Linear(12, 3),
    )


def lstm_cells() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for step in x.unbind(1):
            h, c = m.cell(step, (h, c))
        return m.head(h)

    return Lambda(forward, cell=nn.LSTMCell(5, 6), head=nn.Linear(6, 3))


def siamese() -> nn.Module:
    """One encoder for two inputs: one group for both."""

    def forward(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        u, v = (m.enc(z).relu() for z in (x, y))
        return m.head((u - v).abs())

    return Lambda(forward, enc=nn.Linear(5, 7), head=nn.Linear(7, 2))


def two_experts() -> nn.Module:
    """Stem, head and each expert's hidden units; the router's two outputs are read by position, so they stay."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        gate = m.router(h).softmax(-1)
        return m.head(sum(gate[:, i : i + 1] * expert(h) for i, expert in enumerate(m.experts)))

    experts = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2)]
    return Lambda(
        forward, stem=nn.Linear(5, 6), router=nn.Linear(6, 2), experts=nn.ModuleList(experts), head=nn.Linear(6, 3)
    )


class ExpertBank(nn.Module):
    """Experts in one tensor: exchangeable with the router's outputs, hidden units free inside each."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.w1 = nn.Parameter(torch.rand(3, 5, 4))
        self.w2 = nn.Parameter(torch.rand(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eih->beh", x, self.w1).relu()
        return torch.einsum("be,beh,eho->bo", self.router(x).softmax(-1), hidden, self.w2)


def glu_and_maxout() -> nn.Module:
    """GLU ties the two halves; maxout of pairs lets each pair's two members change places too."""
    return Lambda(
        lambda m, x: m.head(m.b(F.glu(m.a(x))).unflatten(-1, (4, 2)).amax(-1)),
        a=nn.Linear(5, 12),
        b=nn.Linear(6, 8),
        head=nn.Linear(4, 3),
    )


def gram() -> nn.Module:
    """Channel-by-channel products: the channels meet themselves; the two outputs are summed over, so they move too."""
    return Lambda(
        lambda m, x: m.out((h := m.c(x).flatten(2)) @ h.transpose(1, 2)).sum((1, 2)), c=conv(3, 5), out=nn.Linear(5, 2)
    )


def written_in_pieces() -> nn.Module:
    """A tensor made empty and filled by slices: the halves are two groups, as the slices have it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = x.new_empty(x.shape[0], 8)
        h[:, :3] = m.a(x)
        h[:, 3:] = m.b(x)
        return m.head(h)

    return Lambda(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 5), head=nn.Linear(8, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(7, 3)),
    )


class ByNumber(nn.Module):
    """Mixture of three experts, one for each token, with one of the ways to bring the tokens to them.

    The router's outputs and with them the experts stay, except where only a mask is made of their numbers; 9 hidden
    units are free in each.
    """

    def __init__(self, dispatch: str) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.stem, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.w1, self.w2 = nn.Parameter(torch.rand(3, 6, 9)), nn.Parameter(torch.rand(3, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        scores = self.router(h).softmax(-1)
        expert = scores.argmax(-1)
        y = getattr(self, self.dispatch)(h, expert)
        return self.head(h + y * scores.gather(1, expert[:, None]))

    def masked(self, h: Tensor, expert: Tensor) -> Tensor:
        """Switch Transformer: a one-hot mask in an einsum."""
        mask = F.one_hot(expert, 3).to(h.dtype)
        inside = torch.einsum("te,td,edf->etf", mask, h, self.w1).relu()
        return torch.einsum("te,etf,efd->td", mask, inside, self.w2)

    def in_slots(self, h: Tensor, expert: Tensor) -> Tensor:
        """Tokens in a buffer of slots per expert."""
        mask = F.one_hot(expert, 3)
        slot = ((mask.cumsum(0) - 1) * mask).sum(-1)
        slots = h.new_zeros(3, h.shape[0], 6).index_put_((expert, slot), h)
        return (slots @ self.w1).relu().bmm(self.w2)[expert, slot]

    def chosen(self, h: Tensor, expert: Tensor) -> Tensor:
        """Each expert takes two tokens and adds what it makes of them."""
        y = torch.zeros_like(h)
        for number, (w1, w2) in enumerate(zip(self.w1, self.w2, strict=True)):
            which = (expert == number).int().topk(2, sorted=False).indices
            y.index_add_(0, which, (h[which] @ w1).relu() @ w2)
        return y

    def scattered(self, h: Tensor, expert: Tensor) -> Tensor:
        """Every expert's output, then that of one."""
        every = torch.einsum("td,edf->tef", h, self.w1).relu()
        mask = h.new_zeros(h.shape[0], 3).scatter_(1, expert[:, None], 1.0)
        return torch.einsum("te,tef,efd->td", mask, every, self.w2)


def masked_tokens() -> nn.Module:
    """wav2vec 2.0 and vision-language models: one vector, or given rows, at the places of a mask of tokens."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        h[x[..., 0] > 0.5] = m.token.weight[0]
        mask = x[..., 1:2] > 0.5
        return m.head(h.masked_scatter(mask.expand_as(h), m.rows(x.flatten(0, 1))).relu())

    return Lambda(forward, stem=nn.Linear(5, 6), token=nn.Embedding(1, 6), rows=nn.Linear(5, 6), head=nn.Linear(6, 3))


def mixed_latents() -> nn.Module:
    """Four latents of six channels. A residual layer mixes the channels, so each moves its latents alike."""
    return Lambda(
        lambda m, x: m.head((h := m.latents.weight * m.stem(x)[:, None] + m.shift.weight, h + m.mix(h))[1].mean(1)),
        latents=nn.Embedding(4, 6),
        shift=nn.Embedding(4, 6),
        stem=nn.Linear(5, 1),
        mix=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )


def talking_heads() -> nn.Module:
    """Four heads of three units. The heads are mixed, residually, so their units can only move alike."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).view(-1, 4, 3)
        return m.head((h + torch.einsum("gh,bhd->bgd", m.mix.weight, h)).relu().flatten(1))

    return Lambda(forward, stem=nn.Linear(5, 12), mix=nn.Linear(4, 4), head=nn.Linear(12, 2))


def gram_of_vectors() -> nn.Module:
    """Four vectors of three units; each pair is compared unit by unit, so their units can only move alike."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).view(-1, 4, 3)
        return m.head(torch.einsum("bcd,bed->bce", h, h)).sum((1, 2))

    return Lambda(forward, stem=nn.Linear(5, 12), head=nn.Linear(4, 2))


def channels_as_tokens() -> nn.Module:
    """Eight channels at four tokens, read as four tokens of two channels at the four places.

    They are added to the input's tokens, so which pair lies where is settled. The linear layer reads all pairs alike:
    the two channels can only change places in all of them.
    """

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        pairs = m.stem(x).transpose(1, 2).reshape(-1, 4, 8)
        return m.head((m.mid(pairs) + x).relu()).sum(1)

    return Lambda(forward, stem=nn.Linear(5, 8), mid=nn.Linear(8, 5), head=nn.Linear(5, 2))


def heads_in_the_stream() -> nn.Module:
    """Two heads of four units, not projected but added to the queries and through a layer of their own, residually.

    That layer reads and writes the stream, so the units of a head may move as they like as long as all streams do.
    """

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        h = (q + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)
        return m.head(h + m.fc(h).relu()).sum(1)

    return Lambda(
        forward, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 8), fc=nn.Linear(8, 8), head=nn.Linear(8, 2)
    )


def queries_through_convolutions() -> nn.Module:
    """Convolutions of one tap read the five queries one by one, and the average takes them in any order."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)[..., None] * m.queries.weight.T
        return m.head(F.adaptive_avg_pool1d(m.b(m.a(h).relu()).relu(), 1).flatten(1))

    return Lambda(
        forward,
        stem=nn.Linear(4, 6),
        queries=nn.Embedding(5, 6),
        a=nn.Conv1d(6, 7, 1),
        b=nn.ConvTranspose1d(7, 8, 1),
        head=nn.Linear(8, 2),
    )


def bytes_as_numbers() -> nn.Module:
    """Neighbours are read as one complex number, and by their bits; each pair moves, the parts of a pair do not."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        z = m.pairs(x)
        h = (z.view(z.dtype.to_complex()) * 2j).view(z.dtype)
        bits = m.bits(x).view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        return m.head(m.mid(h).relu() * (bits > 0))

    return Lambda(forward, pairs=nn.Linear(5, 8), mid=nn.Linear(8, 6), bits=nn.Linear(5, 6), head=nn.Linear(6, 2))


def chosen_by_values() -> nn.Module:
    """Rows that a mask chooses, changed and put back; units that one chooses stay where they are."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, rows = m.free(x), x[:, 0] > 0.3
        out = torch.zeros_like(h)
        out[rows] = h[rows].tanh()
        fixed, places = m.fixed(x), m.fixed.bias > 0
        counted = fixed[:, places].sum(1, keepdim=True) + fixed[:, places.nonzero()[:, 0]].cumsum(1).mean(
            1, keepdim=True
        )
        return m.head(out) * counted

    return Lambda(forward, free=nn.Linear(5, 8), fixed=nn.Linear(5, 6), head=nn.Linear(8, 2))


def split_as_values_say() -> nn.Module:
    """Rows in the order of their expert, split by how many each has; they are put together, weighted and added back."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        order = m.router(x).argmax(-1).sort()[1]
        counts = torch.histc(m.router(x).argmax(-1).float(), 3, 0, 2).long().tolist()
        rows = zip(h[order].split(counts), m.write, m.read, strict=True)
        out = torch.cat([(part @ write).relu() @ read for part, write, read in rows])
        weighted = out * x[order, :1] + m.shift.repeat(sum(counts), 1)
        return m.head(torch.zeros_like(h).index_add(0, order, weighted))

    experts = {"write": nn.Parameter(torch.rand(3, 8, 6)), "read": nn.Parameter(torch.rand(3, 6, 8))}
    model = Lambda(forward, stem=nn.Linear(5, 8), router=nn.Linear(5, 3), head=nn.Linear(8, 2))
    for name, parameter in {**experts, "shift": nn.Parameter(torch.rand(8))}.items():
        model.register_parameter(name, parameter)
    return model


def columns_of_ones() -> nn.Module:
    """The time beside the units, as in neural differential equations: a column that is made in the shape of another."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        time = torch.ones_like(h[:, :1]) * 0.3 + torch.zeros_like(h.tanh()[:, 0])[:, None]
        return m.head(h + m.field(torch.cat([time, h], 1)).tanh())

    return Lambda(forward, stem=nn.Linear(5, 8), field=nn.Linear(9, 8), head=nn.Linear(8, 2))


def sparse_codes() -> nn.Module:
    """A sparse autoencoder: the largest units are found, and written back to their places."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.encode(x).relu()
        values, places = h.topk(3, -1)
        best = h.argmax(1, keepdim=True)
        return m.decode(torch.zeros_like(h).scatter(-1, places, values)) + h.gather(1, best)

    return Lambda(forward, encode=nn.Linear(5, 8), decode=nn.Linear(8, 2))


def rare_operators() -> nn.Module:
    """Conjugates, distances of rows, extremes by number, memory read as it lies."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        spectrum = torch.fft.fft(h, dim=0).conj().abs()
        seen = torch.bincount((4 * x[:, 0]).long(), minlength=4).to(h).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: it may change
            largest = torch.zeros_like(h).index_reduce(0, torch.arange(len(h), device=h.device) // 2, h, "amax")
        y = m.b(h.contiguous().as_strided(h.shape, (h.shape[1], 1))) + m.b(largest) + m.b(spectrum)
        return y + F.pdist(h).mean() + seen

    return Lambda(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 2))


def windows_of_memory() -> nn.Module:
    """Windows of four of eight steps, two apart, as views of one memory: units move as long as they are read whole."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).contiguous()
        windows = h.as_strided((len(x), 3, 4, 6), (48, 12, 6, 1))
        overlapping = m.overlapping(x).contiguous().as_strided((len(x), 7, 4, 2), (32, 4, 1, 2))
        return m.head(m.mid(windows).relu().sum((1, 2))) + overlapping.relu().cumsum(2).mean((1, 2, 3)).unsqueeze(1)

    return Lambda(
        forward,
        stem=nn.Linear(5, 6),
        mid=nn.Linear(6, 7),
        head=nn.Linear(7, 3),
        overlapping=nn.Linear(5, 4),
    )


def tables_of_limited_norm() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6, max_norm=0.5), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


def deformed(use_mask: bool) -> nn.Module:
    """Six channels whose halves are moved by offsets of their own: halves x channels, which are made of eight."""

    def act(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        offset, mask = m.offset(h).tanh(), m.mask(h).sigmoid()
        h = torch.ops.torchvision.deform_conv2d(
            m.mid(h), m.weight, offset, mask, m.bias, 1, 1, 1, 1, 1, 1, 1, 2, use_mask
        )
        return m.head(h.relu().mean((2, 3)))

    model = Lambda(act, stem=conv(3, 8), offset=conv(8, 36), mask=conv(8, 18), mid=conv(8, 6), head=nn.Linear(5, 3))
    model.weight, model.bias = nn.Parameter(torch.randn(5, 6, 3, 3) / 7), nn.Parameter(torch.randn(5))
    return model


def cut_out() -> nn.Module:
    """Boxes of each image, flattened as channels x places."""

    def act(m: nn.Module, x: Tensor) -> Tensor:
        boxes = torch.tensor([[0.0, 1, 1, 5, 6], [1, 0, 2, 4, 5], [1, 2, 2, 6, 6]], dtype=x.dtype)
        return m.head(torch.ops.torchvision.roi_align(m.stem(x), boxes, 1.0, 2, 2, 1, False).flatten(1))

    return Lambda(act, stem=conv(3, 8), head=nn.Linear(32, 3))


def multi_query(way: str) -> nn.Module:
    """Four query heads, one key and one value head, all of one matrix as Falcon has them: what cuts them apart."""

    def act(m: nn.Module, x: Tensor) -> Tensor:
        h = m.embed(x)
        heads = m.qkv(h).unflatten(-1, (6, 4)).transpose(1, 2)
        if way == "positions":
            query, key, value = heads[:, :-2], heads[:, [-2]], heads[:, [-1]]
        elif way == "selection":
            query, key, value = heads[:, :-2], heads[:, -2].unsqueeze(1), heads[:, -1].unsqueeze(1)
        else:
            query, key, value = heads.split([4, 1, 1], 1)
        key, value = key.expand_as(query), value.expand_as(query)
        return m.head(h + m.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))

    return Lambda(act, embed=nn.Linear(5, 8), qkv=nn.Linear(8, 24), out=nn.Linear(16, 8), head=nn.Linear(8, 3))


def grouped_query() -> nn.Module:
    """Two groups of three query heads with one key and one value head, all of one matrix."""

    def act(m: nn.Module, x: Tensor) -> Tensor:
        h = m.embed(x)
        heads = m.qkv(h).view(*x.shape[:2], 2, 5, 4)
        query, key, value = heads[..., :3, :], heads[..., -2, :], heads[..., -1, :]
        query = query.flatten(2, 3).transpose(1, 2)
        key, value = (part.transpose(1, 2).repeat_interleave(3, 1) for part in (key, value))
        return m.head(h + m.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))

    return Lambda(act, embed=nn.Linear(5, 8), qkv=nn.Linear(8, 40), out=nn.Linear(24, 8), head=nn.Linear(8, 3))


def flexible(num_heads: int) -> nn.Module:
    """Scores that fall with distance, by a number for each of four heads, which stay; two or four heads of keys."""
    from torch.nn.attention.flex_attention import flex_attention

    def act(m: nn.Module, x: Tensor) -> Tensor:
        query = m.query(x).unflatten(-1, (4, 4)).transpose(1, 2)  # older torch takes powers of two alone
        key, value = (part(x).unflatten(-1, (num_heads, 4)).transpose(1, 2) for part in (m.key, m.value))
        attended = flex_attention(
            query, key, value, lambda s, b, h, i, j: s - 0.1 * (h + 1) * (i - j).abs(), enable_gqa=num_heads < 4
        )
        return m.out(attended.transpose(1, 2).flatten(2))

    sizes = {"query": 16, "key": 4 * num_heads, "value": 4 * num_heads}
    return Lambda(act, **{name: nn.Linear(5, size) for name, size in sizes.items()}, out=nn.Linear(16, 3))


def some_of_eight() -> nn.Module:
    """Units 0, 2 and 3 once more, by number; 1 stays alone between them, and 4 to 7 are the rest."""
    return Lambda(
        lambda m, x: m.head(h := m.stem(x).relu()) + m.side(h[:, [0, 2, 3]]),
        stem=nn.Linear(5, 8), head=nn.Linear(8, 3), side=nn.Linear(3, 3),
    )  # fmt: skip


def every_third() -> nn.Module:
    """Units 1, 4 and 7 of nine once more, by number: the first, second and third of each block of three move apart.

    The other six might move as one; an axis that is cut into blocks has no name for that.
    """
    return Lambda(
        lambda m, x: m.head(h := m.stem(x).relu()) + m.side(h[:, [1, 4, -2]]),
        stem=nn.Linear(5, 9), head=nn.Linear(9, 3), side=nn.Linear(3, 3),
    )  # fmt: skip


def lengths_and_spreads() -> nn.Module:
    """One group: what is read of its units are sums over all of them, or over tokens."""

    def forward(m, x):
        h = m.norm(m.a(x).relu())
        h = h / (1 + h.norm(dim=-1, keepdim=True)) + h.var(-1, keepdim=True)
        return m.b(h / (1 + h.std(1, keepdim=True)))

    return Lambda(forward, a=nn.Linear(5, 8), norm=nn.RMSNorm(8), b=nn.Linear(8, 3))


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
_ALL = [
    Case("plain", plain, lambda: torch.rand(2, 5), [(7,), (6,)]),
    Case("conv flatten", conv_flatten, image(), [(6,)]),
    Case("residual", residual, image(), [(6,), (5,)]),
    Case("option A shortcut", option_a_shortcut, image(), [(4,), (2,), (2,)]),
    Case("u-net", concatenated_skips, image(), [(4,), (6,), (5,), (7,)]),
    Case("dense block", dense_block, image(), [(4,), (3,), (3,)]),
    Case("depthwise separable", depthwise_separable, image(), [(6,), (6, 2), (5,)]),
    Case("inverted residuals", inverted_residuals, image(), [(4,), (7,), (9,)]),
    Case("squeeze and excitation", squeeze_excitation, image(), [(6,), (2,)]),
    Case("grouped", grouped, image(), [(2,), (2, 3), (2, 2), (5,)]),
    Case("channel shuffle", channel_shuffle, image(), [(2,), (2, 3), (3,), (3, 2)]),
    Case("pixel shuffle", pixel_shuffle, image(), [(5,), (2,)]),
    Case("group norm", group_norm, image(), [(4,), (4, 2)]),
    Case("convnext block", convnext_block, image(), [(6,), (10,)]),
    Case("transposed and 3d", transposed_and_3d, lambda: torch.rand(2, 1, 4, 4, 4), [(2,), (2, 2), (2, 3)]),
    *(
        Case(f"attention {s}", lambda s=s: attention(s), lambda: torch.rand(2, 6, 5), [(8,), *ATTENTION, (8,)])
        for s in SPELLINGS
    ),
    # 16 query units are 4 heads; 2 key and value heads serve 2 query heads each: kv heads x repeats x units
    Case("gpt, tied", TinyGPT, tokens(), [(8,), (2,), (2, 2), (2, 4), (2, 4), (12,)]),
    # rotation pairs unit i with i + 2 at frequency i: nothing inside a query or key head can move
    Case("gpt, rotary", lambda: TinyGPT(rotary=True), tokens(), [(8,), (2,), (2, 2), (2, 4), (12,)]),
    Case("ordered heads", ordered_heads, lambda: torch.rand(2, 6, 5), [(8,), (4, 2), (4, 2)]),
    Case("vit", vit, image(), [(8,), (2,), (2, 4), (2, 4), (12,)]),
    Case("windows", windows, image(size=4), [(8,), (4,), (4, 2), (4, 2)]),
    # one stream: cross-attention reads source and target through the columns of one weight; three attentions; two
    # feed-forward layers
    Case(
        "encoder-decoder",
        encoder_decoder,
        lambda: torch.rand(2, 6, 5),
        [(8,), *[(2,), (2, 4), (2, 4)] * 3, (12,), (12,)],
    ),
    Case("multi-head attention", multihead, lambda: torch.rand(2, 6, 5), [(8,), *ATTENTION]),
    Case("lstm", lstm, lambda: torch.rand(2, 4, 5), [(6,), (6,)]),
    Case("gru both ways", gru_both_ways, lambda: torch.rand(2, 4, 5), [(6,), (6,)]),
    Case("lstm cells", lstm_cells, lambda: torch.rand(2, 3, 5), [(6,)]),
    Case("siamese", siamese, lambda: (torch.rand(2, 5), torch.rand(2, 5)), [(7,)]),
    Case("two experts", two_experts, lambda: torch.rand(2, 5), [(6,), (6,), (9,), (9,)]),
    Case("expert bank", ExpertBank, lambda: torch.rand(2, 5), [(3,), (3, 4)]),
    *(
        Case(f"experts {way}", lambda way=way: ByNumber(way), lambda: torch.rand(4, 5), [(6,), (3, 9)])
        for way in ("in_slots", "scattered")
    ),
    Case("experts masked", lambda: ByNumber("masked"), lambda: torch.rand(4, 5), [(6,), (3,), (3, 9)]),
    Case("experts chosen", lambda: ByNumber("chosen"), lambda: torch.rand(4, 5), [(6,), (9,), (9,), (9,)]),
    Case("masked tokens", masked_tokens, lambda: torch.rand(2, 4, 5), [(6,)]),
    Case("mixed latents", mixed_latents, lambda: torch.rand(2, 5), [(4,), (6,)]),
    Case("talking heads", talking_heads, lambda: torch.rand(2, 5), [(4,), (3,)]),
    Case("gram of vectors", gram_of_vectors, lambda: torch.rand(2, 5), [(4,), (3,), (2,)]),
    Case("channels as tokens", channels_as_tokens, lambda: torch.rand(2, 4, 5), [(2,)]),
    Case("heads in the stream", heads_in_the_stream, lambda: torch.rand(2, 6, 5), [(2,), (2, 4)]),
    # the inside of the queries' convolutions, the queries themselves
    Case("queries", queries_through_convolutions, lambda: torch.rand(2, 4), [(6,), (5,), (7,), (8,)]),
    Case("glu and maxout", glu_and_maxout, lambda: torch.rand(2, 5), [(6,), (4,), (4, 2)]),
    Case("gram matrix", gram, image(), [(5,), (2,)]),
    Case("written in pieces", written_in_pieces, lambda: torch.rand(2, 5), [(3,), (5,)]),
    Case("chosen by values", chosen_by_values, lambda: torch.rand(6, 5), [(8,)]),
    Case("split as values say", split_as_values_say, lambda: torch.rand(6, 5), [(6,), (6,), (6,), (8,), (8,)]),
    Case("columns of ones", columns_of_ones, lambda: torch.rand(6, 5), [(8,)]),
    Case("sparse codes", sparse_codes, lambda: torch.rand(6, 5), [(8,)]),
    Case("rare operators", rare_operators, lambda: torch.rand(6, 5), [(8,)], since=(2, 7)),
    Case("windows of memory", windows_of_memory, lambda: torch.rand(2, 8, 5), [(6,), (7,)]),
    Case("tables of limited norm", tables_of_limited_norm, tokens(), [(6,), (7,)]),
    Case("bytes as numbers", bytes_as_numbers, lambda: torch.rand(2, 5), [(4,), (6,)]),
    Case("deformed", lambda: deformed(False), image(), [(8,), (2,), (2, 3), (5,)]),
    Case("deformed and masked", lambda: deformed(True), image(), [(8,), (2,), (2, 3), (5,)]),
    Case("regions", cut_out, image(), [(8,)]),
    # the stream, the query heads, units of queries with keys, units of values
    *(
        Case(
            f"multi-query by {way}", lambda way=way: multi_query(way), lambda: torch.rand(2, 6, 5), [(8,), *[(4,)] * 3]
        )
        for way in ("positions", "selection", "split")
    ),
    Case("grouped query", grouped_query, lambda: torch.rand(2, 6, 5), [(8,), (2,), (2, 3), (2, 4), (2, 4)]),
    Case("flexible attention", lambda: flexible(4), lambda: torch.rand(2, 6, 5), [(4, 4), (4, 4)], since=(2, 7)),
    Case("flexible, grouped", lambda: flexible(2), lambda: torch.rand(2, 6, 5), [(2, 4), (2, 4)], since=(2, 7)),
    Case("some of eight", some_of_eight, lambda: torch.rand(2, 5), [(2,), (4,)]),
    Case("every third", every_third, lambda: torch.rand(2, 5), [(3,), (3,), (3,)]),
    Case("lengths and spreads", lengths_and_spreads, lambda: torch.rand(4, 6, 5), [(8,)]),
    Case("weight norm", weight_normed, lambda: torch.rand(2, 5), [(7,)]),
]
CASES = [case for case in _ALL if case.since <= TORCH]
