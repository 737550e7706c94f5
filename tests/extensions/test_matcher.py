"""A matching method of a user's own: units in the order of the norm of their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import modeconn
from modeconn.matching import Match
from tests.cases import same_bits

# -- what the user writes


@dataclass(frozen=True)
class ByNorm:
    """Pairs the unit with the largest incoming weights with the one with the largest, and so on down."""

    order: float = 2.0

    def match(self, spec, model_a, model_b, loader) -> Match:
        perms = {}
        for group in spec.groups:
            name, dim = group.places[0]
            of_a, of_b = (
                torch.linalg.vector_norm(model.get_parameter(name).detach().movedim(dim, 0).flatten(1), self.order, 1)
                for model in (model_a, model_b)
            )
            perm = torch.empty(len(of_a), dtype=torch.int64)
            perm[of_a.argsort()] = of_b.argsort()
            perms[group.name] = perm
        return Match(modeconn.Permutation(spec, perms))


# -- what it can do


def test_it_recovers_a_planted_relabelling_and_goes_wherever_a_method_does(digits_line, tmp_path):
    a, b, train, test = digits_line
    spec = modeconn.discover(a)
    planted = spec.random(torch.Generator().manual_seed(0))
    found = modeconn.align(a, planted.apply(a), method=ByNorm(), spec=spec)
    assert found.permutation == planted.inverse() and same_bits(found.model_b, a)

    fitted = modeconn.fit_curve(a, b, train, align=ByNorm(1.0), recipe=modeconn.Recipe(epochs=1), seed=1)
    fitted.save(tmp_path / "c")
    assert modeconn.Connection.load(tmp_path / "c").permutation == fitted.permutation
    later = modeconn.align(a, b, train, method=modeconn.WeightMatching(start=ByNorm()))
    assert later.permutation.spec == spec
    compared = modeconn.compare([(a, b)], {"by norm": ByNorm()}, train, test, num_points=3, checkpoint=tmp_path / "k")
    again = modeconn.compare([(a, b)], {"by norm": ByNorm()}, train, test, num_points=3, checkpoint=tmp_path / "k")
    assert compared.values["by norm"]["line"] == again.values["by norm"]["line"]
