"""Groups that rotate: kinds derived by hand, laws of relabellings, folding, and mutation of what rules declare.

``MODECONN_MUTATIONS=all`` forgets each thing in each network instead of a sample.
"""

from __future__ import annotations

import functools
import os
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn import RULES, Orthogonal, PermutationSpec, Relabelling, VerificationError
from modeconn.symmetry.explore import Exploration, example_for
from modeconn.symmetry.export import export
from modeconn.symmetry.groups import without_ones
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL, PERMUTATION
from modeconn.symmetry.walk import Walk
from tests.symmetry.rotating import ROTATING, LanguageModel, RMSNorm, Rotating, ViT, tokens

CALL = {"symmetries": "orthogonal"}


def redrawn(case: Rotating) -> nn.Module:
    """Return the network with generic weights in double precision."""
    torch.manual_seed(0)
    model = case.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3 + (parameter.dim() == 1))
    return model.eval()


def as_double(inputs: Any) -> tuple[Any, ...]:
    return tuple(
        x.double() if x.is_floating_point() else x for x in (inputs if isinstance(inputs, tuple) else (inputs,))
    )


@pytest.mark.parametrize("case", ROTATING, ids=str)
def test_kinds_are_those_derived_by_hand_and_proved(case):
    model, inputs = redrawn(case), case.inputs()
    spec = modeconn.discover(model, as_double(inputs), untie=case.untie, **CALL)
    found = {place: group.kind.name for group in spec.groups for place in group.places}
    inner = {place: group.kind.name for group in spec.groups if group.parents for place in group.places}
    assert {
        place: (inner | found if place not in inner else inner).get(place, "fixed") for place in case.kinds
    } == case.kinds
    assert spec.verify(model, as_double(inputs)) < 1e-9
    turned = spec.random(torch.Generator().manual_seed(1)).apply(model)
    before, after = (network(*as_double(inputs)) for network in (model, turned))
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-9)
    assert list(turned.state_dict()) == list(model.state_dict()) and type(turned) is type(model)


@pytest.fixture(scope="module")
def grouped() -> tuple[nn.Module, PermutationSpec]:
    case = next(case for case in ROTATING if case.name.startswith("grouped"))
    model = redrawn(case)
    return model, modeconn.discover(model, tokens(), **CALL)


def test_relabellings_form_a_group(grouped):
    model, spec = grouped
    generator = torch.Generator().manual_seed(0)
    p, q, r = (spec.random(generator) for _ in range(3))
    assert isinstance(p, Orthogonal) and not p.is_identity
    assert (p @ p.inverse()).is_identity and (p.inverse() @ p).is_identity and spec.identity().is_identity
    left, right = (p @ q) @ r, p @ (q @ r)
    folded = spec.prepared(model)
    for one, other in ((left.apply(model), right.apply(model)), ((p @ q).apply(model), p.apply(q.apply(folded)))):
        for x, y in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(x, y, atol=1e-10)


def test_many_composed_stay_orthogonal(grouped):
    _, spec = grouped
    step = spec.random(torch.Generator().manual_seed(0))
    found = step
    for _ in range(300):
        found = step @ found
    for element in found.elements.values():
        if element.is_floating_point():
            assert torch.allclose(element @ element.mT, torch.eye(element.shape[-1], dtype=torch.float64), atol=1e-13)


def test_permutations_among_rotations_move_entries_as_they_are(grouped):
    model, spec = grouped
    moved = spec.random(torch.Generator().manual_seed(0))
    still = spec.identity().elements
    only = {name: e if not e.is_floating_point() else still[name] for name, e in moved.elements.items()}
    one = Orthogonal(spec, only).apply(model)
    weights = [spec.prepared(model).state_dict()["layers.0.mlp.up.weight"], one.state_dict()["layers.0.mlp.up.weight"]]
    assert torch.allclose(weights[0].sort(0).values, weights[1].sort(0).values, atol=1e-12)


def test_files_keep_relabelling_and_spec(grouped, tmp_path):
    _, spec = grouped
    moved = spec.random(torch.Generator().manual_seed(3))
    moved.save(tmp_path / "r.safetensors")
    again = Relabelling.load(tmp_path / "r.safetensors")
    assert again == moved and again.spec == spec and Orthogonal.load(tmp_path / "r.safetensors") == moved
    spec.save(tmp_path / "s.safetensors")
    read = PermutationSpec.load(tmp_path / "s.safetensors")
    assert read == spec and read.folds == spec.folds and read.symmetries == "orthogonal"
    assert [group.kind for group in read.groups] == [group.kind for group in spec.groups]
    assert modeconn.symmetry.report.SymmetryReport.from_json(spec.report().to_json()).dimension == spec.dimension > 0
    with pytest.raises(ValueError, match=r"is of the kind orthogonal, not permutation: use Orthogonal\.load"):
        modeconn.Permutation.load(tmp_path / "r.safetensors")


def test_a_spec_of_permutations_is_as_it_was():
    model = LanguageModel(nn.LayerNorm)
    spec = modeconn.discover(model, tokens())
    assert not spec.folds and spec.dimension == 0 and '"symmetries"' not in spec.to_json()
    assert isinstance(spec.random(), modeconn.Permutation) and '"format": 1' in spec.to_json()


def test_the_basis_of_what_sums_to_zero_is_orthonormal():
    for size in (2, 3, 8):
        basis = without_ones(size)
        assert torch.allclose(basis.T @ basis, torch.eye(size - 1, dtype=torch.float64))
        assert torch.allclose(basis.sum(0), torch.zeros(size - 1, dtype=torch.float64), atol=1e-12)


def test_elements_that_are_none_are_refused(grouped):
    _, spec = grouped
    right = spec.random().elements
    stream = next(group.name for group in spec.groups if group.rotates and not group.parents)
    with pytest.raises(ValueError, match="is not orthogonal: it changes lengths"):
        Orthogonal(spec, {**right, stream: 2 * right[stream]})
    with pytest.raises(ValueError, match="must be float64 of shape"):
        Orthogonal(spec, {**right, stream: right[stream].float()})
    with pytest.raises(ValueError, match="missing from the relabelling"):
        Orthogonal(spec, {name: e for name, e in right.items() if name != stream})
    case = ROTATING[0]
    spec = modeconn.discover(case.build(), case.inputs(), **CALL)
    right = spec.random().elements
    stream = next(group.name for group in spec.groups if group.rotates and not group.parents)
    with pytest.raises(ValueError, match="does not keep the vector of ones"):
        Orthogonal(spec, {**right, stream: -right[stream]})


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("case", [c for c in ROTATING if "norm" in c.name or "ViT" in c.name], ids=str)
def test_a_folded_network_is_the_same_function_with_gains_of_one(case):
    model, inputs = redrawn(case), as_double(case.inputs())
    folded = modeconn.fold_gains(model, inputs, untie=case.untie)
    assert torch.allclose(model(*inputs), folded(*inputs), rtol=1e-10, atol=1e-10)
    spec = modeconn.discover(model, inputs, untie=case.untie, **CALL)
    state = folded.state_dict()
    for fold in spec.folds:
        assert bool((state[fold.gain] == fold.neutral).all()), fold
        if fold.shifts:
            assert not state[fold.bias].any()
    again = modeconn.fold_gains(folded, inputs, spec=spec)
    assert all(torch.equal(x, y) for x, y in zip(folded.parameters(), again.parameters(), strict=True))


def test_a_gain_of_zero_that_has_to_be_divided_by_is_refused():
    model = LanguageModel(nn.LayerNorm)
    with torch.no_grad():
        model.norm.weight[2], model.norm.bias[2] = 0.0, 1.0
    with pytest.raises(ValueError, match=r"the gain 'norm.weight' has an entry of 0.0e\+00, by which its bias"):
        modeconn.fold_gains(model, tokens())
    with torch.no_grad():
        model.norm.bias[2] = 0.0  # nothing to divide
    assert torch.allclose(modeconn.fold_gains(model, tokens())(tokens()), model(tokens()), atol=1e-5)


def test_untied_networks_have_a_tensor_for_each_name():
    model = LanguageModel(nn.LayerNorm, tied=True)
    folded = modeconn.fold_gains(model, tokens(), untie=True)
    assert folded.head.weight is not folded.tokens.weight and model.head.weight is model.tokens.weight
    tied = modeconn.fold_gains(model, tokens())
    assert tied.head.weight is tied.tokens.weight
    spec = modeconn.discover(model, tokens(), **CALL)
    assert "tied to 'head.weight': untie=True gives each a copy" in repr(spec.report())


def test_what_makes_no_sense_is_refused():
    model = ViT()
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="symmetries must be 'permutation' or 'orthogonal', got symmetries='rotation'"):
        modeconn.discover(model, images, symmetries="rotation")
    loader = [(images, torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"got symmetries='rotation'\.$"):
        modeconn.align(model, model, loader, symmetries="rotation")
    with pytest.raises(ValueError, match="spec is of permutations alone"):
        modeconn.fold_gains(model, spec=modeconn.discover(model, images))
    with pytest.raises(ValueError, match="symmetries= is for discovery"):
        modeconn.align(model, model, spec=modeconn.discover(model, images), symmetries="orthogonal")


def test_half_precision_is_relabelled_in_double_and_rounded_once():
    model = LanguageModel(RMSNorm).to(torch.bfloat16)
    spec = modeconn.discover(model, tokens(), **CALL)
    turned = spec.random(torch.Generator().manual_seed(0)).apply(model)
    exact = spec.random(torch.Generator().manual_seed(0)).apply(LanguageModel(RMSNorm))
    assert {p.dtype for p in turned.parameters()} == {torch.bfloat16} and exact is not None


# ---------------------------------------------------------------- mutation


class Lax:
    """The walk as rules see it, but one call of ``lower`` is dropped."""

    def __init__(self, walk: Walk, count: list[int], dropped: int) -> None:
        self._walk, self._count, self._dropped = walk, count, dropped

    def __getattr__(self, name: str) -> Any:
        if name != "lower":
            return getattr(self._walk, name)

        def lower(*args: Any) -> None:
            self._count[0] += 1
            if self._count[0] - 1 != self._dropped:
                self._walk.lower(*args)

        return lower


def discover_with(wrap: Callable[..., Any], model: nn.Module, graphs: list[Any]) -> PermutationSpec:
    walk = Exploration(model, {op: wrap(rule) for op, rule in RULES.items()}, top=ORTHOGONAL)
    for graph in graphs:
        walk.run(graph)
    return PermutationSpec.of(walk.finish())


def dropping(count: list[int], dropped: int) -> Callable[..., Any]:
    def wrap(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def lax(walk: Walk, *args: Any, **kwargs: Any) -> Any:
            return rule(Lax(walk, count, dropped), *args, **kwargs)

        return lax

    return wrap


def declared(mutated: Any, kind: Any) -> Callable[..., Any]:
    """Declare another kind for one rule."""

    def wrap(rule: Callable[..., Any]) -> Callable[..., Any]:
        if rule is not mutated:
            return rule

        @functools.wraps(rule)
        def other(*args: Any, **kwargs: Any) -> Any:
            return rule(*args, **kwargs)

        other.leaves = kind
        return other

    return wrap


def sample(mutations: Sequence[Any]) -> Sequence[Any]:
    """Return some of the mutations, all if they are asked for."""
    if os.environ.get("MODECONN_MUTATIONS") == "all":
        return mutations
    return random.Random(0).sample(mutations, min(2, len(mutations)))


def kinds_of(spec: PermutationSpec) -> dict[Any, str]:
    return {(group.shape, group.places): group.kind.name for group in spec.groups}


def is_noticed(wrong: PermutationSpec, model: nn.Module, inputs: Any) -> bool:
    try:
        wrong.verify(model, inputs)
    except VerificationError:
        return True
    return False


@pytest.mark.parametrize("case", ROTATING, ids=str)
def test_forgetting_to_lower_a_kind_is_noticed(case):
    model, inputs = redrawn(case), as_double(case.inputs())
    graphs = [export(model, example_for(model, inputs), training=mode) for mode in (False, True)]
    count = [0]
    right = discover_with(dropping(count, -1), model, graphs)
    for dropped in sample(range(count[0])):
        wrong = discover_with(dropping([0], dropped), model, graphs)
        if kinds_of(wrong) != kinds_of(right):
            assert is_noticed(wrong, model, inputs), f"call {dropped} of {count[0]}"


@pytest.mark.parametrize("case", [c for c in ROTATING if not c.untie], ids=str)
def test_declarations_of_rules_are_as_large_as_they_may_be(case):
    """A rule that declares more than it leaves is found by the proof; one that declares less loses a group."""
    model, inputs = redrawn(case), as_double(case.inputs())
    graphs = [export(model, example_for(model, inputs), training=mode) for mode in (False, True)]
    met: dict[Any, None] = {}

    def noting(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def noted(*args: Any, **kwargs: Any) -> Any:
            met[rule] = None
            return rule(*args, **kwargs)

        return noted

    right = discover_with(noting, model, graphs)
    for rule in sample(list(met)):
        is_declared = getattr(rule, "leaves", PERMUTATION) is LINEAR
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = discover_with(declared(rule, PERMUTATION if is_declared else LINEAR), model, graphs)
        if kinds_of(other) == kinds_of(right):
            continue
        if is_declared:
            assert other.dimension <= right.dimension and other.verify(model, inputs) < 1e-9
        else:
            assert is_noticed(other, model, inputs), rule.__qualname__


def test_whole_numbers_beyond_those_of_a_double_stay_as_they_are():
    """T5 numbers distances by logarithms, of which the least, as a whole number, is the least there is."""

    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)
            self.table = nn.Embedding(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            far = (place.float() / 4).log().to(torch.int64) + 8  # of the first place minus 2 ** 63
            return self.last(self.norm(self.first(x) + self.table(torch.where(place < 1, place, far))))

    model, x = Distances(), torch.rand(2, 5, 4)
    spec = modeconn.discover(model, x, symmetries="orthogonal")
    assert [group.kind.name for group in spec.groups] == ["orthogonal"]
    assert spec.verify(model, x) < 1e-9


def test_angles_say_by_how_much_units_are_turned():
    model, x = LanguageModel(nn.LayerNorm), tokens()
    spec = modeconn.discover(model, x, symmetries="orthogonal")
    still = spec.identity().angles()
    assert still.keys() == {group.name for group in spec.groups if group.rotates}
    assert all(not angles.any() for angles in still.values())
    moved = spec.random(torch.Generator().manual_seed(0))
    for group in spec.groups:
        if group.rotates:
            angles, matrices = moved.angles()[group.name], moved.elements[group.name]
            assert angles.shape == (*group.shape,) and bool((angles.diff() >= 0).all())
            traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close(angles.cos().sum(-1), traces)  # of eigenvalues on the unit circle
            torch.testing.assert_close(moved.inverse().angles()[group.name].sum(), angles.sum())
