"""A Llama written out, with the names and shapes of tensors that its published checkpoints have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """The sizes; by default some 990 million weights.

    Args:
        layers: Blocks.
        width: Of the residual stream.
        hidden: Gated units of each block.
        heads: Query heads of each block.
        key_heads: Key and value heads, each read by as many query heads.
        vocabulary: Tokens.
        tied: Whether the head is the embedding.
    """

    layers: int = 19
    width: int = 2048
    hidden: int = 5632
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 32_000
    tied: bool = False


SMALL = Config(layers=2, width=24, hidden=40, heads=4, key_heads=2, vocabulary=50)


class Attention(nn.Module):
    """Causal attention with rotary positions, in which several heads of queries share one of keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.shape = (-1, config.width // config.heads)
        keys = config.key_heads * self.shape[1]
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, keys, bias=False)
        self.v_proj = nn.Linear(config.width, keys, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map ``(N, length, width)`` to the same."""
        q, k, v = (
            project(x).unflatten(-1, self.shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (one * cosines + _quarter_turned(one) * sines for one in (q, k))
        shared = q.shape[1] // k.shape[1]
        k, v = (one.repeat_interleave(shared, 1) for one in (k, v))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(found.transpose(1, 2).flatten(2))


def _quarter_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class GatedUnits(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, length, width)`` to the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and gated units, each behind a norm and beside the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedUnits(config)
        self.input_layernorm = nn.RMSNorm(config.width)
        self.post_attention_layernorm = nn.RMSNorm(config.width)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map ``(N, length, width)`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """All before the head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        size = config.width // config.heads
        frequencies = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, length)`` to ``(N, length, width)``."""
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        cosines, sines = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cosines, sines)
        return self.norm(x)


class Llama(nn.Module):
    """A language model; without arguments, of some 990 million weights."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        config = Config() if config is None else config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def example_input(self) -> Tensor:
        """Return tokens, ``(2, 8)``."""
        return torch.zeros(2, 8, dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(N, length)`` to logits ``(N, length, vocabulary)``."""
        return self.lm_head(self.model(tokens))


def small() -> Llama:
    """Return one of the same form with few weights."""
    return Llama(SMALL)
