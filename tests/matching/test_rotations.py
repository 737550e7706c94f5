"""Matching by rotations: planted elements are found, blocks are exact, objectives never fall, refusals are clear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modeconn
from modeconn import ActivationMatching, DeepAlign, TransportMatching, WeightMatching
from modeconn.matching.procrustes import best_rotations, best_values
from modeconn.symmetry.groups import without_ones
from modeconn.symmetry.kinds import ORTHOGONAL, ORTHOGONAL_ONES
from tests.symmetry.rotating import LanguageModel, RMSNorm, ViT, tokens

FULL_RANK = {  # embeddings, positions and head together have as many columns as the stream is wide
    "GPT": lambda: LanguageModel(nn.LayerNorm, width=16, vocabulary=37),
    "grouped queries": lambda: LanguageModel(RMSNorm, width=16, heads=4, shared=2, size=4, gated=True, vocabulary=37),
}


def generic(build, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def planted(model: nn.Module, inputs: torch.Tensor, seed: int):
    spec = modeconn.discover(model, inputs, symmetries="orthogonal")
    element = spec.random(torch.Generator().manual_seed(seed))
    found = modeconn.align(model, element.apply(model), method=WeightMatching(), spec=spec)
    rest = max(float((p - q).abs().max()) for p, q in _weights(found, spec))
    return found, element, rest


def _weights(found, spec):
    """Weights of both ends but for what layer norm erases: the part of a stream along the vector of ones."""
    erased = {group.atom for group in spec.groups if group.kind is ORTHOGONAL_ONES}
    a, b = (dict(model.named_parameters()) for model in (found.model_a, found.model_b))
    for name in a:
        x, y = a[name].detach().clone(), b[name].detach().clone()
        for tensor in (x, y):
            for piece, labels in spec.structure.pieces(tensor, spec.state[name]):
                for dim, (atom, _) in enumerate(labels):
                    if atom in erased:
                        piece -= piece.mean(dim, keepdim=True)
        yield x, y


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("build", FULL_RANK.values(), ids=FULL_RANK)
def test_a_planted_element_is_found(build, seed):
    found, element, rest = planted(generic(build, seed), tokens(), seed)
    assert rest < 1e-10
    for name, product in (found.permutation @ element).elements.items():
        if product.is_floating_point():
            identity = torch.eye(product.shape[-1], dtype=torch.float64)
            assert torch.allclose(product, identity.expand(product.shape), atol=1e-9), name
        else:
            assert torch.equal(product, torch.arange(product.shape[-1]).expand(product.shape)), name


@pytest.mark.parametrize("seed", range(2))
def test_a_planted_element_is_found_where_embeddings_say_too_little(seed):
    model = generic(lambda: ViT(width=96, hidden=160), seed)  # patches of 48 pixels, five places, seven classes
    found, _, rest = planted(model, torch.rand(2, 3, 8, 8, dtype=torch.float64), seed)
    assert rest < 1e-10 and len(found.history) < 20


def test_a_planted_element_is_found_where_heads_and_stream_say_each_other():
    model = generic(lambda: ViT(width=96), 0)
    found, _, rest = planted(model, torch.rand(2, 3, 8, 8, dtype=torch.float64), 0)
    assert rest < 1e-8 and len(found.history) < 150


@pytest.mark.parametrize("kind", [ORTHOGONAL, ORTHOGONAL_ONES], ids=lambda kind: kind.name)
def test_a_procrustes_step_is_the_best_of_its_group(kind):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    best = best_rotations(similarity, kind)
    value = (best * similarity).sum((-1, -2))
    assert torch.allclose(value, torch.from_numpy(best_values(similarity.numpy(), kind)))
    assert torch.allclose(best @ best.mT, torch.eye(6, dtype=torch.float64).expand(4, 6, 6))
    if kind is ORTHOGONAL_ONES:
        assert torch.allclose(best.sum(-1), torch.ones(4, 6, dtype=torch.float64))
    for _ in range(200):
        turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
        if kind is ORTHOGONAL_ONES:
            basis = without_ones(6)
            turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
            turn = basis @ turn @ basis.T + 1 / 6
        assert bool(((turn * similarity).sum((-1, -2)) <= value + 1e-12).all())


def test_directions_of_which_nothing_is_known_stay():
    similarity = torch.zeros(5, 5, dtype=torch.float64)
    similarity[:2, :2] = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    found = best_rotations(similarity, ORTHOGONAL)
    assert torch.allclose(found[2:, 2:], torch.eye(3, dtype=torch.float64)) and torch.allclose(
        found[:2, :2], torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize("method", [WeightMatching(), ActivationMatching()], ids=["weights", "activations"])
def test_both_ends_stay_the_functions_that_they_were(method):
    a, b = (generic(FULL_RANK["GPT"], seed) for seed in (1, 2))
    loader = [(tokens(vocabulary=37) + 3 * i, tokens()) for i in range(9)]
    loader = [(inputs % 37, targets) for inputs, targets in loader]
    found = modeconn.align(a, b, loader, method=method, symmetries="orthogonal")
    x = loader[3][0]
    assert torch.allclose(a(x), found.model_a(x), atol=1e-9) and torch.allclose(b(x), found.model_b(x), atol=1e-9)
    if found.history:
        assert min(y - x for x, y in zip(found.history, found.history[1:], strict=False)) > -1e-9
    straight, raw = (
        modeconn.fit_curve(a, b, loader, align=how, curve=modeconn.Line()).length() for how in (found, False)
    )
    assert straight < raw


def test_activations_find_a_planted_element():
    model = generic(lambda: ViT(width=8), 0)
    spec = modeconn.discover(model, torch.rand(2, 3, 8, 8).double(), symmetries="orthogonal")
    element = spec.random(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    loader = [(3 * torch.randn(32, 3, 8, 8).double(), torch.zeros(32, dtype=torch.int64)) for _ in range(8)]
    found = modeconn.align(model, element.apply(model), loader, method=ActivationMatching(), spec=spec)
    assert max(float((p - q).abs().max()) for p, q in _weights(found, spec)) < 1e-7


def test_a_curve_starts_from_the_folded_network_and_refuses_another():
    a, b, c = (generic(FULL_RANK["GPT"], seed) for seed in (1, 2, 3))
    loader = [(tokens(vocabulary=37), tokens(vocabulary=37))] * 3
    found = modeconn.align(a, b, method=WeightMatching(), example_input=tokens(), symmetries="orthogonal")
    recipe = modeconn.Recipe(epochs=1)
    connection = modeconn.fit_curve(a, b, loader, align=found, recipe=recipe)
    for name, parameter in found.model_a.named_parameters():
        assert torch.equal(parameter, connection.model_at(0).get_parameter(name))
    assert torch.allclose(connection.model_at(0)(tokens()), a(tokens()), atol=1e-9)
    with pytest.raises(ValueError, match="align= is of another network a"):
        modeconn.fit_curve(c, b, loader, align=found, recipe=recipe)


def test_curves_of_rotated_networks_are_kept_in_files(tmp_path):
    a, b = (generic(FULL_RANK["GPT"], seed) for seed in (1, 2))
    how = {"align": WeightMatching(), "symmetries": "orthogonal", "recipe": modeconn.Recipe(epochs=1)}
    connection, resumed = (
        modeconn.fit_curve(a, b, [(tokens(), tokens())] * 2, **how, checkpoint=tmp_path / "kept") for _ in range(2)
    )
    assert torch.equal(resumed.control_points, connection.control_points)
    connection.save(tmp_path / "c.safetensors")
    again = modeconn.Connection.load(tmp_path / "c.safetensors", a)
    assert again.permutation == connection.permutation
    assert torch.equal(again.model_at(0.5)(tokens()), connection.model_at(0.5)(tokens()))


def test_the_mean_of_planted_copies_is_the_network():
    model = generic(FULL_RANK["GPT"], 0)
    spec = modeconn.discover(model, tokens(), symmetries="orthogonal")
    copies = [model, *(spec.random(torch.Generator().manual_seed(s)).apply(model) for s in (1, 2))]
    merged = modeconn.merge_many(copies, spec=spec)
    assert torch.allclose(merged.model(tokens()), model(tokens()), atol=1e-7)


@pytest.mark.parametrize("method", [DeepAlign(), TransportMatching()], ids=lambda m: type(m).__name__)
def test_methods_that_move_whole_units_refuse_rotations(method):
    a, b = (LanguageModel(nn.LayerNorm) for _ in range(2))
    loader = [(tokens(), tokens())] * 2
    with pytest.raises(
        ValueError, match=f"{type(method).__name__} permutes units, and this spec has 5 groups that rot"
    ):
        modeconn.align(a, b, loader, method=method, symmetries="orthogonal")
