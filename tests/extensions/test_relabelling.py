"""A kind of relabelling of one's own: units of odd activations may change their sign as well as their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from typer.testing import CliRunner

import modeconn
from modeconn import PAM, Checkpoint, Connection, Permutation, PermutationSpec, Recipe, Relabelling, WeightMatching
from modeconn.cli.app import app
from modeconn.matching import Match


@dataclass(frozen=True)
class Signed(Relabelling):
    """Moves units, then turns the signs of some; for groups that are whole axes."""

    kind = "signed permutation"

    permutation: Permutation
    signs: Mapping[str, Tensor]

    @property
    def spec(self) -> PermutationSpec:
        return self.permutation.spec

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = self.permutation.relabel(tensors)
        for group in self.spec.groups:
            for name, dim in group.places:
                shape = [-1 if d == dim else 1 for d in range(moved[name].dim())]
                moved[name] = moved[name] * self.signs[group.name].view(shape).to(moved[name])
        return moved

    def inverse(self) -> Signed:
        back = self.permutation.inverse()
        return Signed(back, {name: signs[back.perms[name]] for name, signs in self.signs.items()})

    def after(self, first: Signed) -> Signed:
        signs = {name: s * first.signs[name][self.permutation.perms[name]] for name, s in self.signs.items()}
        return Signed(self.permutation @ first.permutation, signs)

    @property
    def is_identity(self) -> bool:
        return self.permutation.is_identity and all(bool((signs == 1).all()) for signs in self.signs.values())

    def tensors(self) -> dict[str, Tensor]:
        moved = {f"place.{name}": perm for name, perm in self.permutation.tensors().items()}
        return moved | {f"sign.{name}": signs for name, signs in self.signs.items()}

    @classmethod
    def restore(cls, spec: str, tensors: Mapping[str, Tensor]) -> Signed:
        parts = {
            start: {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)} for start in PARTS
        }
        return cls(Permutation.restore(spec, parts["place."]), parts["sign."])


PARTS = ("place.", "sign.")


@dataclass(frozen=True)
class SignedMatching:
    """Pairs units whose incoming weights are alike but for the sign; for networks with one hidden layer."""

    def match(self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: object) -> Match:
        (group,) = spec.groups
        a, b = (torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach() for model in (model_a, model_b))
        similarity = (a @ b.T).cpu()
        perm = torch.as_tensor(linear_sum_assignment(similarity.abs().numpy(), maximize=True)[1])
        signs = similarity.gather(1, perm[:, None])[:, 0].sign()
        return Match(Signed(Permutation(spec, {group.name: perm}), {group.name: signs}))


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, generator=generator).double(), torch.arange(8) % 3) for _ in range(3)]


@pytest.fixture(scope="module")
def spec() -> PermutationSpec:
    return modeconn.discover(network(0), loader()[0][0])


def drawn(spec: PermutationSpec, seed: int) -> Signed:
    generator = torch.Generator().manual_seed(seed)
    signs = {group.name: torch.randint(2, group.shape, generator=generator) * 2.0 - 1 for group in spec.groups}
    return Signed(spec.random(generator), signs)


def same(p: nn.Module, q: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(p.parameters(), q.parameters(), strict=True))


def test_it_is_a_group_that_leaves_the_function(spec):
    p, q, model = drawn(spec, 1), drawn(spec, 2), network(0)
    for one in (p, p @ q, p.inverse()):
        torch.testing.assert_close(one.apply(model)(loader()[0][0]), model(loader()[0][0]))
    assert same((p @ q).apply(model), p.apply(q.apply(model)))
    assert (p @ p.inverse()).is_identity and (p.inverse() @ p).is_identity and not p.is_identity
    assert p @ spec.identity() is p and spec.identity() @ p is p
    with pytest.raises(ValueError, match="a permutation and a signed permutation cannot be composed"):
        spec.random() @ p


def test_a_method_that_finds_it_aligns_compares_and_merges(spec):
    a, planted = network(1), drawn(spec, 3)
    aligned = modeconn.align(a, planted.apply(a), loader(), method=SignedMatching(), spec=spec)
    assert same(aligned.model_b, a) and (aligned.permutation @ planted).is_identity
    assert aligned.correlation == {}  # units are not paired one by one
    copies = [a, *(drawn(spec, seed).apply(a) for seed in (4, 5))]
    merged = modeconn.merge_many(copies, method=SignedMatching(), start=SignedMatching(), spec=spec)
    torch.testing.assert_close(merged.model(loader()[0][0]), a(loader()[0][0]))
    methods = {"signed": SignedMatching(), "weights": WeightMatching()}
    table = modeconn.compare([copies[:2]], methods, loader(), loader(), spec=spec, num_points=3)
    assert "signed" in repr(table)


class Breaking(list):
    """Batches that break off once, in the second epoch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            if self.passes == 3:
                raise KeyboardInterrupt
            yield batch


def test_a_curve_is_fitted_resumed_saved_and_loaded(spec, tmp_path):
    a, b = network(1), network(2)

    def fit(data, checkpoint=None):
        how = {"align": SignedMatching(), "spec": spec, "recipe": Recipe(epochs=3), "checkpoint": checkpoint}
        return modeconn.fit_curve(a, b, data, **how)

    with pytest.raises(KeyboardInterrupt):
        fit(Breaking(loader()), Checkpoint(tmp_path / "run"))
    resumed, whole = fit(loader(), Checkpoint(tmp_path / "run")), fit(loader())
    assert torch.equal(resumed.control_points, whole.control_points)
    resumed.save(tmp_path / "c")
    loaded = Connection.load(tmp_path / "c", template=a)
    assert isinstance(loaded.permutation, Signed)
    assert same(loaded.permutation.apply(b), whole.model_at(1)) and same(loaded.model_at(1), whole.model_at(1))


def test_files_hold_it_and_take_part_in_commands(spec, tmp_path):
    p, model = drawn(spec, 7), network(3)
    p.save(tmp_path / "p")
    assert same(Relabelling.load(tmp_path / "p").apply(model), p.apply(model))
    found = CliRunner().invoke(app, ["info", str(tmp_path / "p")])
    assert found.exit_code == 0 and "signed permutation" in found.stdout and "6 units" in found.stdout
    with pytest.raises(ValueError, match=r"is of the kind signed permutation, not permutation: use Signed\.load"):
        Permutation.load(tmp_path / "p")
    given = modeconn.fit_curve(network(1), model, loader(), align=Relabelling.load(tmp_path / "p"), recipe=Recipe(1))
    assert same(given.model_at(1), p.apply(model))


def test_a_file_of_a_kind_that_nobody_imported_says_what_to_import(spec, tmp_path, monkeypatch):
    drawn(spec, 7).save(tmp_path / "p")
    monkeypatch.delitem(modeconn.symmetry.relabelling._KINDS, "signed permutation")
    with pytest.raises(ValueError, match=r"'signed permutation'.*import tests\.extensions\.test_relabelling first"):
        Relabelling.load(tmp_path / "p")


def test_what_moves_whole_units_refuses_it(spec):
    a, b = network(1), network(2)
    with pytest.raises(ValueError, match="gave a relabelling of another kind, signed permutation"):
        modeconn.fit_curve(a, b, loader(), align=SignedMatching(), spec=spec, refine=PAM())
    for start in (SignedMatching(), drawn(spec, 1)):
        with pytest.raises(ValueError, match="start= is a signed permutation, and this method moves whole units"):
            modeconn.align(a, b, method=WeightMatching(start=start), spec=spec)
