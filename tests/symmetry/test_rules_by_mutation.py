"""Soundness by mutation: forget one thing that a rule learns, or a whole rule, and the proof must notice.

``MODECONN_MUTATIONS=all`` forgets each thing in each network instead of a sample.
"""

from __future__ import annotations

import functools
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from modeconn import RULES, PermutationSpec, VerificationError
from modeconn.symmetry.explore import Exploration, example_for
from modeconn.symmetry.export import export
from modeconn.symmetry.graph import Graph
from modeconn.symmetry.walk import Walk
from tests.symmetry.cases import CASES, Case

SAMPLE = None if os.environ.get("MODECONN_MUTATIONS") == "all" else 6

Wrap = Callable[[Any, Callable[..., Any]], Callable[..., Any]]


class Forgetful:
    """The walk as rules see it, but one call of ``unify``, ``fix`` or ``show`` is dropped, or ``fixed`` is free."""

    def __init__(self, walk: Walk, count: list[int], dropped: int | None) -> None:
        self._walk, self._count, self._dropped = walk, count, dropped

    def __getattr__(self, name: str) -> Any:
        if name not in ("unify", "fix", "fixed", "show"):
            return getattr(self._walk, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._count[0] += 1
            if self._count[0] - 1 != self._dropped:
                return getattr(self._walk, name)(*args, **kwargs)
            return self._walk.free(args[0]) if name == "fixed" else None

        return call


def discover_with(wrap: Wrap, model: nn.Module, graphs: list[Graph]) -> PermutationSpec:
    walk = Exploration(model, {op: wrap(op, rule) for op, rule in RULES.items()})
    for graph in graphs:
        walk.run(graph)
    return PermutationSpec.of(walk.finish())


def forgetting_a_call(count: list[int], dropped: int | None) -> Wrap:
    def wrap(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)  # with what it says of itself
        def forgetful(walk: Walk, *args: Any, **kwargs: Any) -> Any:
            return rule(Forgetful(walk, count, dropped), *args, **kwargs)

        return forgetful

    return wrap


def forgetting_a_rule(forgotten: Any) -> Wrap:
    """Whatever goes in, each axis that comes out is a new one, free to move."""

    def anything(walk: Walk, *args: Any, **kwargs: Any) -> Any:
        out = [[walk.free(size) for size in shape] for shape in walk.shapes]
        return out if len(out) > 1 else out[0]

    return lambda op, rule: anything if rule is forgotten else rule


def noting(met: dict[Any, None]) -> Wrap:
    """Every rule as it is, and a note of those that were asked."""

    def wrap(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def noted(walk: Walk, *args: Any, **kwargs: Any) -> Any:
            met[rule] = None
            return rule(walk, *args, **kwargs)

        return noted

    return wrap


def signature(spec: PermutationSpec) -> list[tuple]:
    return sorted((group.shape, group.places) for group in spec.groups)


def check_that_forgetting_is_noticed(model: nn.Module, inputs: Any) -> None:
    example = example_for(model, inputs)
    graphs = [export(model, example, training=mode) for mode in (False, True)]
    count, met = [0], {}
    right = discover_with(forgetting_a_call(count, None), model, graphs)
    discover_with(noting(met), model, graphs)
    assert right.verify(model, inputs) < 1e-9
    mutations = [(f"call {call} of {count[0]}", forgetting_a_call([0], call)) for call in range(count[0])]
    mutations += [(f"rule {rule.__qualname__}", forgetting_a_rule(rule)) for rule in met]
    for what, wrap in mutations if SAMPLE is None else random.Random(0).sample(mutations, min(SAMPLE, len(mutations))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = discover_with(wrap, model, graphs)
        if signature(wrong) == signature(right):
            continue  # another rule says the same, or nothing rests on it
        try:
            wrong.verify(model, inputs)
        except VerificationError:
            continue
        # with a rule goes what it showed to be in use: less is free then, and what is left is right
        assert wrong.log10_size < right.log10_size, f"{what} was dropped, and nobody noticed"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whatever_a_rule_forgets_is_harmless_or_noticed(case: Case) -> None:
    torch.manual_seed(0)
    check_that_forgetting_is_noticed(case.build(), case.inputs())


class OnTables(nn.Module):
    """An operator on two tables of four rows of six units; no other operator ties a row or a unit to a place."""

    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.a, self.b = nn.Parameter(torch.rand(4, 6) + 0.1), nn.Parameter(torch.rand(4, 6) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x.mean(-1)[:, None, None] * self.a, self.b.exp()).abs().sum()


def packed(h: Tensor, w: Tensor) -> Tensor:
    """A recurrent layer over the first four entries of one sequence and the first two of the other."""
    aten = torch.ops.aten
    rows, sizes = aten._pack_padded_sequence(h, torch.tensor([4, 2]), True)
    state = torch.zeros(1, 2, 4, dtype=h.dtype)
    rows, _ = aten.rnn_tanh.data(rows, sizes, state, [w, w @ w.mT / 9], False, 1, 0.0, False, False)
    return aten._pad_packed_sequence(rows, sizes, True, 0.0, 4)[0]


ORDER = torch.tensor([1, 2, 3, 0])
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random numbers in place": lambda h, w: h * torch.zeros_like(h).bernoulli_(0.5),
    "constant margins": lambda h, w: torch.ops.aten.constant_pad_nd(h, [0, 0, 1, -1]) * w,
    "fake quantised": lambda h, w: torch.fake_quantize_per_channel_affine(
        8 * h.flatten(0, 1), w[0], torch.zeros(6, dtype=torch.int32), 1, -128, 127
    ),
    "filled in place": lambda h, w: h.exp().fill_(0.5) * h * w,
    "convolution": lambda h, w: torch.ops.aten.convolution(
        h, w[:, :4, None], None, [1], [0], [1], False, [0], 1
    ) * w,
    "complex transform": lambda h, w: torch.ops.aten._fft_c2c(torch.complex(h, h * w), [1], 0, True).abs() * w,
    "transform": lambda h, w: torch.fft.fft(h, dim=1).real * w,
    "diagonal": lambda h, w: (h @ w.mT).diagonal(0, 1, 2),
    "side diagonal": lambda h, w: (h @ w.mT).diagonal(1, 1, 2),
    "add a product": lambda h, w: torch.baddbmm(h, h @ h.mT, w.expand_as(h)),
    "bilinear": lambda h, w: F.bilinear(h, h.tanh(), w[:, :, None] * w[0]),
    "distances": lambda h, w: torch.cdist(h, w),
    "one distance": lambda h, w: h * torch.dist(h, h + w),
    "short transform": lambda h, w: torch.stft(h.flatten(0, 1), 4, 2, 4, w[0, :4], return_complex=True).abs(),
    "inverse": lambda h, w: torch.linalg.inv(w[:, :3] @ w[:, :3].mT + torch.eye(4)) @ h,
    "determinant": lambda h, w: torch.linalg.det(h @ w.mT + torch.eye(4)),
    "solution": lambda h, w: torch.linalg.solve(w @ w.mT + torch.eye(4), h),
    "outer product": lambda h, w: torch.outer(h[0, 0], w[1]),
    "experts": lambda h, w: torch.ops.aten._grouped_mm(
        h[0].bfloat16().repeat(1, 4)[:, :16], w.bfloat16().repeat(4, 4)[None, :, :16].expand(3, 16, 16),
        torch.tensor([1, 3, 4], dtype=torch.int32),
    ),
    "triangle": lambda h, w: h.tril() * w,
    "pool 1d": lambda h, w: F.max_pool1d(h.mT, 3, 1, 1).mT * w,
    "pool 3d": lambda h, w: F.avg_pool3d(h[:, None, None], (1, 3, 3), 1, (0, 1, 1)) * w,
    "resize": lambda h, w: F.interpolate(h.mT, scale_factor=2.0, mode="linear").mT[:, 1::2] * w,
    "averages": lambda h, w: F.adaptive_avg_pool3d(h[:, None, None], (1, 2, 3)) * w[:2, :3],
    "one average": lambda h, w: F.adaptive_avg_pool3d(h[:, None, None], 1)[:, 0, 0] * w,
    "grid": lambda h, w: F.grid_sample(h[:, None], w.sigmoid()[None, ..., None].expand(2, -1, -1, 2),
                                       align_corners=False),
    "patches": lambda h, w: F.unfold(h.unflatten(2, (2, 3)), 2, padding=1) * w.sum(),
    "patches summed": lambda h, w: F.fold(h.flatten(1)[:, :16].unflatten(1, (4, 4)), 3, 2) * w[:3, :3],
    "unpooling": lambda h, w: F.max_unpool1d(*F.max_pool1d(h.mT, 2, return_indices=True), 2).mT * w,
    "unpooling 3d": lambda h, w: F.max_unpool3d(
        *F.max_pool3d(h[:, None, None], (1, 2, 2), return_indices=True), (1, 2, 2)
    ) * w,
    "windows": lambda h, w: h.unfold(1, 2, 1) * w.sum(),
    "margins": lambda h, w: F.pad(h, (1, 1, 1, -1))[..., 1:-1] * w,
    "pixels to channels": lambda h, w: F.pixel_unshuffle(h[:, None], 2) * w[:, :2, None],
    "axes moved": lambda h, w: h.movedim(1, 2).movedim(2, 1) * w,
    "repeat": lambda h, w: h.repeat(1, 2, 1) * w.repeat(2, 1),
    "each repeated": lambda h, w: h.repeat_interleave(2, 1) * w.repeat_interleave(2, 0),
    "unequal repeats": lambda h, w: torch.repeat_interleave(h, torch.tensor([1, 0, 2, 1]), 1, output_size=4) * w,
    "stack": lambda h, w: torch.stack([h, h.tanh() * w], 1),
    "a part written": lambda h, w: h.select_scatter(w[0].expand(2, -1), 1, 0).slice_scatter(h[:, :2].exp(), 1, 1, 3),
    "bags": lambda h, w: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), w) * h[:, 0],
    "bags of maxima": lambda h, w: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), w, mode="max") * h[:, 0],
    "reflections": lambda h, w: torch.linalg.householder_product(h.mT, w[:2, :4].sigmoid()).mT * w,
    "mean by weights": lambda h, w: torch.lerp(h.tanh(), h.exp(), w.sigmoid()) + torch.lerp(h, h.cos(), 0.3),
    "select": lambda h, w: h.index_select(1, ORDER) * w,
    "select what is computed": lambda h, w: h.index_select(1, ORDER + (w.sum() > 99)) * w,
    "index": lambda h, w: h[:, ORDER] * w,
    "index what is computed": lambda h, w: h[:, ORDER + (w.sum() > 99)] * w,
    "gather": lambda h, w: h.gather(1, ORDER[None, :, None].expand_as(h)) * w,
    "histogram": lambda h, w: h * w.histc(5, 0, 4)[1:2] * h.histc(5, 0, 1)[1:2],
    "found by search": lambda h, w: torch.searchsorted(w.sort(1).values, (2 * h[0]).exp()) * w,
    "boundaries": lambda h, w: torch.bucketize(h, w[0].log().sort().values) * w,
    "scatter": lambda h, w: h.scatter(1, ORDER[None, :, None].expand_as(h), h.tanh()) * w,
    "scatter added": lambda h, w: h.scatter_add(1, ORDER[None, :, None].expand_as(h), h.tanh()) * w,
    "slices added": lambda h, w: h.index_add(1, ORDER, h.tanh()) * w,
    "slices written": lambda h, w: h.index_copy(1, ORDER[:2], h[:, :2].tanh()) * w,
    "slices filled": lambda h, w: h.index_fill(1, ORDER[:2], 0.5) * w,
    "entries written": lambda h, w: h.index_put((torch.arange(2)[:, None], ORDER), h.tanh()) * w,
    "entries added": lambda h, w: h.index_put((torch.arange(2)[:, None], ORDER), h.tanh(), accumulate=True) * w,
    "masked entries": lambda h, w: h.masked_scatter((w[:, :1] > 1.6).expand_as(h), h.tanh()) * w,
    "one hot": lambda h, w: F.one_hot(h.argmax(-1), 6) * w,
    "sorted": lambda h, w: h.sort(1).values * w,
    "largest": lambda h, w: h * w * h.topk(2, -1).values.sum(-1, keepdim=True),
    "summed up": lambda h, w: h.cumsum(1) * w,
    "complex pairs": lambda h, w: torch.view_as_real(torch.view_as_complex(h.unflatten(2, (3, 2)))) * w[:, :3, None],
    "packed sequences": lambda h, w: packed(h, w) * w[:, :4],
    "slopes": lambda h, w: F.prelu(h - 0.3, w[:, 0]),
    "quantile": lambda h, w: h * w - h.quantile(0.5, -1, keepdim=True),
}  # fmt: skip


if TorchVersion(torch.__version__) < "2.12":  # whose torch.export reads a tensor's values for it
    del OPERATORS["quantile"]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_whatever_the_rule_of_an_operator_forgets_is_harmless_or_noticed(operator) -> None:
    torch.manual_seed(0)
    check_that_forgetting_is_noticed(OnTables(operator), torch.rand(2, 3) + 0.5)


def test_every_rule_is_forgotten_somewhere() -> None:
    """A rule that no network here asks could be wrong, and nobody would notice."""
    met: dict[Any, None] = {}
    networks = [(case.build(), case.inputs()) for case in CASES]
    networks += [(OnTables(operator), torch.rand(2, 3)) for operator in OPERATORS.values()]
    for model, inputs in networks:
        example = example_for(model, inputs)
        discover_with(noting(met), model, [export(model, example, training=False)])
    assert sorted({rule.__qualname__ for rule in RULES.values()} - {rule.__qualname__ for rule in met}) == []
