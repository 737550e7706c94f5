"""Permutations form a group, act on models as one, and survive a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeconn import Connection, Line, Permutation, PermutationSpec, Relabelling, discover, fit_curve, models
from modeconn.symmetry.groups import Group
from modeconn.symmetry.verify import telling_relabellings
from modeconn.tools import files
from tests.symmetry.cases import CASES, Case

SOME = [
    case
    for case in CASES
    if case.name in {"plain", "residual", "grouped", "channel shuffle", "expert bank", "attention 3hd"}
]


@pytest.fixture(params=SOME, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_inverse_undoes_a_permutation_from_both_sides(case: Case, generator: torch.Generator) -> None:
    spec = discover(case.build(), case.inputs())
    p = spec.random(generator)
    assert p @ p.inverse() == p.inverse() @ p == spec.identity()
    assert p != spec.identity()


def test_composition_is_application_one_after_the_other(case: Case, generator: torch.Generator) -> None:
    model = case.build()
    spec = discover(model, case.inputs())
    p, q, r = (spec.random(generator) for _ in range(3))
    once, twice = (p @ q).apply(model), p.apply(q.apply(model))
    for (name, x), y in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert (p @ q) @ r == p @ (q @ r)


def test_applying_the_inverse_gives_parameters_and_buffers_back_bit_for_bit(generator: torch.Generator) -> None:
    model = models.resnet20(seed=2)
    p = discover(model).random(generator)
    back = p.inverse().apply(p.apply(model))
    for (name, x), y in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_relabelled_model_is_the_same_function(case: Case, generator: torch.Generator) -> None:
    model, inputs = case.build().double().eval(), case.inputs().double()
    moved = discover(model, inputs).random(generator).apply(model)
    torch.testing.assert_close(moved(inputs), model(inputs), rtol=1e-10, atol=1e-12)


def test_place_i_holds_what_was_unit_perm_i(generator: torch.Generator) -> None:
    model = models.mlp(4, (6,), 2)
    p = discover(model).random(generator)
    (perm,) = p.perms.values()
    weight = model.layers[0].weight
    assert torch.equal(p.apply(model).layers[0].weight, weight.index_select(0, perm))


def test_a_saved_permutation_does_the_same(case: Case, generator: torch.Generator, tmp_path: Path) -> None:
    model = case.build()
    p = discover(model, case.inputs()).random(generator)
    p.save(tmp_path / "p.safetensors")
    loaded = Permutation.load(tmp_path / "p.safetensors")
    assert loaded == p
    assert loaded.spec == p.spec
    for x, y in zip(p.apply(model).parameters(), loaded.apply(model).parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_saved_spec_is_the_same_spec_and_still_verifies(case: Case, tmp_path: Path) -> None:
    model, inputs = case.build(), case.inputs()
    spec = discover(model, inputs)
    spec.save(tmp_path / "spec.safetensors")
    again = PermutationSpec.load(tmp_path / "spec.safetensors")
    assert again == spec
    assert repr(again) == repr(spec)
    assert again.verify(model, inputs) < 1e-10


def test_every_relabelling_of_a_group_is_drawn_equally_often() -> None:
    spec = discover(models.mlp(4, (3,), 2))
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(27)
    for _ in range(1200):
        (perm,) = spec.random(generator).perms.values()
        counts[int((perm * torch.tensor([9, 3, 1])).sum())] += 1
    assert (counts[counts > 0] - 200).abs().max() < 60  # six relabellings, 200 each, four standard deviations
    assert int((counts > 0).sum()) == 6


def test_a_spec_of_another_model_is_refused_with_what_differs() -> None:
    spec = discover(models.mlp(4, (6,), 2))
    with pytest.raises(ValueError, match=r"'layers.0.weight' has shape \(7, 4\), the spec was made for \(6, 4\)"):
        spec.identity().apply(models.mlp(4, (7,), 2))
    with pytest.raises(ValueError, match=r"spec is of another model: TinyTen has no 'layers"):
        spec.identity().apply(models.tinyten())


@pytest.mark.parametrize(
    ("perm", "message"),
    [
        (torch.tensor([0, 1, 1]), r"group 'layers.0' uses unit 1 twice; it must contain each of 0..2 once"),
        (torch.tensor([0, 1, 3]), r"group 'layers.0' uses unit 3; it must contain each of 0..2 once"),
        (torch.tensor([0, 1]), r"must be int64 of shape \(3,\), got int64 of shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"must be int64 of shape \(3,\), got float32"),
    ],
)
def test_what_is_no_permutation_is_refused(perm: torch.Tensor, message: str) -> None:
    spec = discover(models.mlp(4, (3,), 2))
    with pytest.raises(ValueError, match=message):
        Permutation(spec, {"layers.0": perm})


def test_missing_and_unknown_groups_are_named() -> None:
    spec = discover(models.mlp(4, (3,), 2))
    with pytest.raises(ValueError, match=r"group 'layers\.0' is missing from the permutation"):
        Permutation(spec, {})
    with pytest.raises(ValueError, match="group 'x' is no group of this spec"):
        Permutation(spec, {**spec.identity().perms, "x": torch.arange(3)})


def test_permutations_of_different_specs_cannot_be_composed() -> None:
    p, q = (discover(models.mlp(4, (n,), 2)).identity() for n in (3, 4))
    with pytest.raises(ValueError, match="of different specs"):
        p @ q


def test_files_from_when_permutations_were_the_only_kind_are_read(generator: torch.Generator, tmp_path: Path) -> None:
    a, b = (models.mlp(6, (5,), 3, seed=seed) for seed in (1, 2))
    permutation = discover(a).random(generator)
    about = {"spec": permutation.spec.to_json()}
    files.write(tmp_path / "p", "permutation", permutation.perms, about)
    assert Permutation.load(tmp_path / "p") == Relabelling.load(tmp_path / "p") == permutation
    connection = fit_curve(a, b, [(torch.rand(4, 6), torch.arange(4) % 3)], align=permutation, curve=Line())
    connection.save(tmp_path / "c")
    tensors, about = files.read(tmp_path / "c")
    about["permutation"] = about.pop("relabelling")["spec"]
    files.write(tmp_path / "c", about.pop("kind"), tensors, about)
    assert Connection.load(tmp_path / "c").permutation == permutation


def test_a_file_of_another_kind_is_no_permutation(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle"):
        Permutation.load(tmp_path / "pickle.pt")


def test_relabellings_tell_many_small_blocks_apart_beside_a_large_group() -> None:
    """Six hundred pairs take ten digits, and ten of a number system of 2,048 fit in no integer."""
    groups = (Group("pairs", 0, 2, (("", 600),), ()), Group("many", 1, 2048, (), ()))
    drawn = list(telling_relabellings(groups, torch.Generator().manual_seed(0)))
    assert len(drawn) < 20
    rows = torch.stack([torch.cat([perms["pairs"], torch.arange(2)[None]]) for perms in drawn], -1)
    assert all(len(place.unique(dim=0)) == 601 for place in rows.unbind(1))
