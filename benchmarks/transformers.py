"""The transformers of the benchmarks: a character GPT and a small ViT, written as most people write them."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm: attention, then two layers with GELU, each added to the stream."""

    def __init__(self, width: int, num_heads: int, hidden: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream ``(B, T, width)``."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=self.is_causal)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ProductBlock(nn.Module):
    """The same function as a `Block`, with the products of its heads' weights as parameters: another architecture.

    Scores are ``[x; 1]^T P [y; 1]`` with ``P = [W_q, b_q]^T [W_k, b_k]`` of each head, and what a head adds to the
    stream is ``R [y; 1]`` with ``R = W_o [W_v, b_v]`` (Theus et al., 2025): rotations inside of heads fall out.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.num_heads, self.is_causal = block.num_heads, block.is_causal
        self.norm1, self.norm2, self.up, self.down = (
            copy.deepcopy(part) for part in (block.norm1, block.norm2, block.up, block.down)
        )
        rows = torch.cat([block.qkv.weight, block.qkv.bias[:, None]], 1).unflatten(0, (3, self.num_heads, -1))
        q, k, v = rows.detach()
        out = block.out.weight.detach().unflatten(1, (self.num_heads, -1))
        self.size = q.shape[1]
        self.scores = nn.Parameter(q.mT @ k)
        self.values = nn.Parameter(torch.einsum("ohd,hdi->hoi", out, v))
        self.bias = nn.Parameter(block.out.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream ``(B, T, width)``."""
        y = self.norm1(x)
        y = torch.cat([y, torch.ones_like(y[..., :1])], -1)
        scores = torch.einsum("bti,hij,bsj->bhts", y, self.scores, y) / self.size**0.5
        if self.is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        added = torch.einsum("bhts,bsi,hoi->bto", scores.softmax(-1), y, self.values)
        x = x + added + self.bias
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def with_products(model: nn.Module) -> nn.Module:
    """Return a transformer of this file with `ProductBlock` in place of each block: the same function."""
    twin = copy.deepcopy(model)
    twin.blocks = nn.Sequential(*(ProductBlock(block) for block in model.blocks))
    return twin.eval()


class CharGPT(nn.Module):
    """Predicts the next character; the head is not tied to the embedding."""

    def __init__(
        self, vocabulary: int, *, length: int = 64, width: int = 128, num_heads: int = 4, depth: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, 4 * width, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        _initialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters ``(B, T)`` to scores ``(B, T, V)``."""
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x)))

    def example_input(self) -> Tensor:
        """Return two windows."""
        length = self.positions.num_embeddings
        return torch.arange(2 * length).view(2, length) % self.tokens.num_embeddings


class GatedBlock(nn.Module):
    """Pre-norm as in Llama: RMS norms, no biases, grouped queries, and a gated perceptron."""

    def __init__(self, width: int, num_heads: int, num_shared: int, hidden: int) -> None:
        super().__init__()
        self.size = width // num_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, num_shared * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream ``(B, T, width)``."""
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class CharLlama(CharGPT):
    """Predicts the next character with blocks as in Llama, but with positions that are learned."""

    def __init__(
        self, vocabulary: int, *, length: int = 64, width: int = 128, num_heads: int = 4, depth: int = 4, seed: int = 0
    ) -> None:
        super().__init__(vocabulary, length=length, width=width, num_heads=num_heads, depth=0, seed=seed)
        self.blocks = nn.Sequential(*(GatedBlock(width, num_heads, 2, 3 * width) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        _initialise(self, seed)


class SmallViT(nn.Module):
    """Classifies images by patches and a class token."""

    def __init__(
        self,
        *,
        channels: int = 1,
        size: int = 28,
        patch: int = 7,
        width: int = 64,
        num_heads: int = 4,
        depth: int = 4,
        num_classes: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, 2 * width, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        _initialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to scores ``(B, classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])

    def example_input(self) -> Tensor:
        """Return two images."""
        return torch.rand(2, *self.shape, generator=torch.Generator().manual_seed(0))


def _initialise(model: nn.Module, seed: int) -> None:
    """Draw weights as GPT-2 does: normal of 0.02, biases zero, gains one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = math.prod(parameter.shape[1:]) if name == "patches.weight" else None
            spread = 0.02 if fan_in is None else fan_in**-0.5
            nn.init.normal_(parameter, 0.0, spread, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
