"""Invertible maps inside of heads: which places take the inverse, the group that they form, and files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import modeconn
from modeconn import Invertible, Relabelling
from modeconn.symmetry import invertible
from modeconn.symmetry.invertible import duals_of
from modeconn.symmetry.slopes import cancelling, places
from tests.matching.test_rotations import generic
from tests.symmetry.rotating import ROTATING, LanguageModel, RMSNorm, Rotating, tokens

NETWORKS = {
    "layer norm": lambda: LanguageModel(nn.LayerNorm),
    "grouped queries": lambda: LanguageModel(RMSNorm, width=16, heads=4, shared=2, size=4, gated=True),
}
ALL_MAPS = {
    "nothing", "a number for all", "in place", "dropout", "rows rearranged", "rows of two chosen", "a smaller half",
    "rows repeated and averaged", "products that are summed",
}  # fmt: skip
"""Bottlenecks between two linear layers, with nothing there that knows lengths or single units."""


def found_in(name: str):
    model = generic(NETWORKS[name], 0)
    spec = modeconn.discover(model, tokens(), symmetries="orthogonal")
    return model, spec, duals_of(spec, model, tokens())


def drawn(spec, duals, seed: int) -> Invertible:
    generator = torch.Generator().manual_seed(seed)
    maps = {name: invertible._far_from_identity(spec[name], generator) for name in duals}
    return Invertible(spec.random(generator), maps, duals)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


OTHERS = {
    "layer norm, pre-norm", "RMS norm by hand", "grouped queries share their key's", "gains on queries and keys stay",
    "ViT", "angles of features", "over their length", "over their squares", "less their mean", "rounded",
}  # fmt: skip
CASES = [case for case in ROTATING if case.name in ALL_MAPS | OTHERS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_maps_are_found_inside_of_heads_and_bottlenecks_and_of_no_stream(case: Rotating):
    inputs = case.inputs()
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    model, given = generic(case.build, 0), tuple(x.double() if x.is_floating_point() else x for x in given)
    spec = modeconn.discover(model, given, symmetries="orthogonal", untie=case.untie)
    duals = duals_of(spec, model, given)
    inner = {group.name for group in spec.groups if group.rotates and len(group.shape) > 1}
    if case.name.startswith("ViT"):  # its first token sees itself alone, so that queries and keys change no output
        inner = {group for group in inner if "attention.v" in group}
    assert inner <= duals.keys()  # all that rotates inside of heads
    whole = {group.name for group in spec.groups if group.rotates and len(group.shape) == 1}
    assert bool(whole & duals.keys()) == (case.name in ALL_MAPS)
    if duals:
        generator = torch.Generator().manual_seed(0)
        maps = {name: invertible._far_from_identity(spec[name], generator) for name in duals}
        moved = Invertible(spec.random(generator), maps, duals).apply(model)
        torch.testing.assert_close(moved(*given), model(*given), atol=1e-9, rtol=1e-9)
        assert (weights_of(moved) - weights_of(spec.prepared(model))).abs().max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_take_the_inverse_where_queries_do_not_and_outputs_where_values_do_not(name):
    _, spec, duals = found_in(name)
    for group, flags in duals.items():
        said = {place: bool(flag) for (place, _), flag in zip(places(spec, spec[group]), flags, strict=True)}
        own = "q" if any(".q." in place for place in said) else "v"
        other = next(place for place in said if f".{'k' if own == 'q' else 'o'}.weight" in place)
        assert said[next(place for place in said if f".{own}.weight" in place)] != said[other]
        assert (
            said[next(place for place in said if f".{own}.weight" in place)]
            == (said[next(place for place in said if f".{own}.bias" in place)])
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_wrong_side_changes_the_function(name):
    model, spec, duals = found_in(name)
    for group in duals:
        index = next(i for i, (place, _) in enumerate(places(spec, spec[group])) if "weight" in place)
        wrong = {**duals, group: duals[group] ^ (torch.arange(len(duals[group])) == index)}
        assert not torch.allclose(drawn(spec, wrong, 0).apply(model)(tokens()), model(tokens()), atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_form_a_group_that_leaves_the_function(name):
    model, spec, duals = found_in(name)
    p, q = drawn(spec, duals, 1), drawn(spec, duals, 2)
    for one in (p, p @ q, p.inverse(), (p @ q).inverse()):
        torch.testing.assert_close(one.apply(model)(tokens()), model(tokens()), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(weights_of((p @ q).apply(model)), weights_of(p.apply(q.apply(model))))
    assert (p @ p.inverse()).is_identity and (p.inverse() @ p).is_identity and not p.is_identity
    assert p @ spec.identity() is p and spec.identity() @ p is p


def test_a_part_of_the_maps_composes_with_another_part():
    model, spec, duals = found_in("layer norm")
    names = list(duals)
    p, q = (drawn(spec, {name: duals[name] for name in part}, 3) for part in (names[:2], names[1:]))
    torch.testing.assert_close(weights_of((p @ q).apply(model)), weights_of(p.apply(q.apply(model))))


def test_files_hold_them(tmp_path):
    model, spec, duals = found_in("grouped queries")
    p = drawn(spec, duals, 1)
    p.save(tmp_path / "p")
    again = Relabelling.load(tmp_path / "p")
    assert again == p == Invertible.load(tmp_path / "p") and again != drawn(spec, duals, 2)
    torch.testing.assert_close(weights_of(again.apply(model)), weights_of(p.apply(model)), atol=1e-13, rtol=1e-13)


def test_what_is_no_map_is_refused():
    _, spec, duals = found_in("layer norm")
    p = drawn(spec, duals, 1)
    name = next(iter(duals))
    for maps, flags, message in (
        ({name: p.maps[name].float()}, {name: duals[name]}, "must be float64 of shape"),
        ({name: 0 * p.maps[name]}, {name: duals[name]}, "cannot be inverted"),
        ({name: p.maps[name]}, {name: duals[name][1:]}, "must be bool of shape"),
        ({"x": p.maps[name]}, {"x": duals[name]}, "maps must be of groups that rotate"),
        ({name: p.maps[name]}, {}, "maps must be of groups that rotate"),
    ):
        with pytest.raises(ValueError, match=message):
            Invertible(p.rotation, maps, flags)


def test_signs_are_those_that_cancel():
    parts = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = torch.cat([parts[:3], -(parts[0] - parts[1] + parts[2])[None]])
    assert cancelling(slopes).tolist() == [False, True, False, False]
    assert cancelling(parts) is None and cancelling(0 * parts) is None


@pytest.mark.parametrize("what", ["attention", "queries", "values and outputs"])
def test_tensors_of_several_names_are_mapped_once(what):
    model = generic(NETWORKS["layer norm"], 0)
    first, second = (layer.attention for layer in model.layers)
    if what == "attention":
        model.layers[1].attention = first
    elif what == "queries":
        second.q.weight, second.q.bias = first.q.weight, first.q.bias
    else:
        second.v.weight, second.v.bias, second.o.weight = first.v.weight, first.v.bias, first.o.weight
    spec = modeconn.discover(model, tokens(), symmetries="orthogonal")
    duals = duals_of(spec, model, tokens())
    assert duals.keys() == {group.name for group in spec.groups if group.rotates and len(group.shape) > 1}
    moved = drawn(spec, duals, 1).apply(model)
    torch.testing.assert_close(moved(tokens()), model(tokens()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("also", ["in train mode alone", "as the largest"])
def test_all_that_reads_values_counts_whatever_the_mode_and_the_type(also):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.r = (nn.Linear(6, 6) for _ in range(5))

        def forward(self, x: Tensor) -> object:
            heads = ((self.q(x) @ self.k(x).mT).softmax(-1)) @ self.v(x)
            if also == "as the largest":
                return self.o(heads), self.r(heads).argmax(-1)
            return (self.o(heads), self.r(heads)) if self.training else self.o(heads)

    torch.manual_seed(0)
    model, x = Two().double(), torch.rand(2, 5, 6, dtype=torch.float64)
    spec = modeconn.discover(model, x, symmetries="orthogonal")
    moved = drawn(spec, duals_of(spec, model, x), 0).apply(model)
    for mode in (True, False):
        ours, theirs = (pytree.tree_leaves(net.train(mode)(x)) for net in (moved, model))
        assert all(torch.allclose(y, z, atol=1e-9) for y, z in zip(ours, theirs, strict=True))
