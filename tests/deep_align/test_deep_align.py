"""Deep-Align: relabelling its inputs relabels its answer, whatever it has learned; and it learns."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import modeconn
from modeconn import (
    Checkpoint,
    DeepAlign,
    Permutation,
    PermutationSpec,
    Sinkhorn,
    WeightMatching,
    data,
    discover,
    models,
    refinement,
)
from modeconn.cli.app import app
from modeconn.deep_align import WeightAugmentation
from modeconn.deep_align.augmentation import rescale
from modeconn.deep_align.encoder import Block
from modeconn.deep_align.training import EncoderTraining, PopulationNetwork, supervised_loss
from modeconn.matching import match_units
from modeconn.matching.soft import SoftPermutation
from modeconn.network.batch_norm import norm_layers
from modeconn.network.recipe import Recipe
from modeconn.tools import files
from tests.cases import Residual, batches, same_bits
from tests.deep_align.reference import UNITS, DWSLayer, block_by_loops, relabel, weight_features
from tests.symmetry.cases import CASES

BY_NAME = {case.name: case for case in CASES}
SMALL = DeepAlign(features=16, depth=2, num_steps=20, batch_size=8, num_validation_pairs=4, validate_every=10)


def images(num: int = 2) -> Tensor:
    return torch.rand(num, 1, 2, 4, generator=torch.Generator().manual_seed(3))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def convolutions() -> nn.Module:
    """Its second convolution reads 4 channels by 9 taps, its linear layer 5 channels by 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


class Recurrent(nn.Module):
    """One weight under two names, from a group of units to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.again(x.flatten(1)).tanh()).tanh()).tanh())


MAKERS = [perceptron, convolutions, Residual, Recurrent]


def network(make, seed: int, dtype=torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                nn.init.uniform_(buffer, 0.5, 2.0)
    return model.eval()


@cache
def untrained(make) -> DeepAlign:
    population = [network(make, seed) for seed in range(4)]
    return replace(SMALL, num_steps=0, connectivity=0).fit(population, example_input=images().double())


def random(spec: PermutationSpec, seed: int) -> Permutation:
    return spec.random(torch.Generator().manual_seed(seed))


def digits_population(count: int = 8, hidden: tuple[int, ...] = (16, 16)) -> tuple[list[nn.Module], data.TensorLoader]:
    train, _ = data.load("digits")
    start = [models.mlp(64, hidden, 10, mean=train.mean(), std=train.std() + 0.1, seed=seed) for seed in range(count)]
    return models.train_population(start, train, recipe=replace(models.DIGITS_RECIPE, epochs=3)), train


@pytest.fixture(scope="module")
def digits() -> tuple[list[nn.Module], data.TensorLoader]:
    return digits_population()


@pytest.fixture(scope="module")
def aligner(digits) -> DeepAlign:
    return SMALL.fit(*digits)


# ---------------------------------------------------------------- laws, whatever was learned


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_relabelling_both_networks_relabels_rows_and_columns(make, seed):
    aligner = untrained(make)
    spec = aligner.fitted.encoder.graph.spec
    a, b, p, q = network(make, seed), network(make, seed + 1), random(spec, seed), random(spec, seed + 1)
    before, after = aligner.similarities(a, b), aligner.similarities(p.apply(a), q.apply(b))
    for name in before:
        expected = before[name][p.perms[name]][:, q.perms[name]]
        assert float((after[name] - expected).abs().max()) < 1e-9
        assert float(before[name].std()) > 1e-3  # not all alike, of which this would be true anyway


@pytest.mark.parametrize("make", MAKERS)
def test_exchanging_the_networks_inverts_the_answer(make):
    aligner = untrained(make)
    spec = aligner.fitted.encoder.graph.spec
    a, b = network(make, 11), network(make, 12)
    there, back = aligner.similarities(a, b), aligner.similarities(b, a)
    assert all(torch.allclose(there[name], back[name].T, rtol=0, atol=1e-12) for name in there)
    assert aligner.match(spec, b, a).permutation == aligner.match(spec, a, b).permutation.inverse()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_relabelled_copy_is_recovered_completely_even_by_an_untrained_encoder(make, dtype):
    aligner = untrained(make)
    spec = aligner.fitted.encoder.graph.spec
    a = network(make, 21, dtype)
    for seed in range(5):
        p = random(spec, seed)
        assert (aligner.match(spec, a, p.apply(a)).permutation @ p).num_moved == 0


def with_norm(tensors: dict[str, Tensor], seed: int) -> nn.Module:
    """A network whose norm layer holds these tensors."""
    model = network(convolutions, seed, torch.float32)
    model[1].load_state_dict(tensors, strict=False)
    return model


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_is_constant_in_the_population_may_vary_in_other_networks(value):
    constant = {name: torch.full((4,), value) for name in ("weight", "bias", "running_mean", "running_var")}
    population = [with_norm(constant, seed) for seed in range(4)]
    aligner = replace(SMALL, num_steps=2, connectivity=0).fit(population, example_input=images())
    torch.manual_seed(0)
    spec = aligner.fitted.encoder.graph.spec
    for scale in (0.0, 1.0, 100.0):
        a = with_norm({name: tensor + scale * torch.rand(4) for name, tensor in constant.items()}, 9)
        for p in (random(spec, seed) for seed in range(5)):
            assert (aligner.match(spec, a, p.apply(a)).permutation @ p).num_moved == 0


NAMES = [
    "plain", "conv flatten", "residual", "dense block", "inverted residuals", "u-net", "siamese", "lstm cells",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_network_whose_units_move_one_by_one_can_be_read(name):
    torch.manual_seed(0)
    model, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
    aligner = replace(SMALL, num_steps=1, batch_size=2, connectivity=0).fit(
        [model, BY_NAME[name].build()], example_input=inputs
    )
    spec = aligner.fitted.encoder.graph.spec
    p, q = random(spec, 1), random(spec, 2)
    before, after = aligner.similarities(model, model), aligner.similarities(p.apply(model), q.apply(model))
    assert all(torch.allclose(after[name], before[name][p.perms[name]][:, q.perms[name]], atol=1e-3) for name in before)


CHANNELS = {"W1": 2, "W2": 1, "W3": 2, "b1": 1, "b2": 1}


def relabellings(first: int, second: int):
    for p, q in product(permutations(range(first)), permutations(range(second))):
        yield {1: torch.tensor(p), 2: torch.tensor(q)}


def unit_features(sizes: dict[int, int]) -> list[dict[str, Tensor]]:
    """A basis of all weights and biases."""
    shapes = {name: (*(sizes[g] for g in groups), CHANNELS[name]) for name, groups in UNITS.items()}
    flat = torch.eye(sum(prod(shape) for shape in shapes.values()), dtype=torch.float64)
    parts = flat.split([prod(shape) for shape in shapes.values()], 1)
    return [{n: x[k].view(shapes[n]) for n, x in zip(shapes, parts, strict=True)} for k in range(len(flat))]


def flat(x: dict[str, Tensor], names=UNITS) -> Tensor:
    return torch.cat([x[name].flatten() for name in names])


@pytest.mark.parametrize(("targets", "number"), [(("b1", "b2"), 22), (tuple(UNITS), None)])
def test_the_literal_layer_of_the_paper_is_every_linear_map_that_commutes_with_relabelling(targets, number):
    """Their dimension is the mean, over all relabellings, of the product of the traces by which they act on both."""
    basis = unit_features({1: 2, 2: 3})
    traces = [
        [sum(float(flat(x, n) @ flat(relabel(x, perms), n)) for x in basis) for n in (UNITS, targets)]
        for perms in relabellings(2, 3)
    ]
    dimension = round(sum(a * b for a, b in traces) / len(traces))
    assert number in (None, dimension)
    layer = DWSLayer(CHANNELS, CHANNELS, torch.mean).double()
    weights = [linear.weight for key, linear in layer.maps.items() if key.split()[1] in targets]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        spanned = []
        for entry in (weight.view(-1)[k : k + 1] for weight in weights for k in range(weight.numel())):
            entry.fill_(1)
            spanned.append(torch.cat([flat(layer(x), targets) for x in basis]))
            entry.zero_()
    assert len(spanned) == dimension == torch.linalg.matrix_rank(torch.stack(spanned))


@pytest.mark.parametrize("pool", [torch.mean, torch.amax])
def test_layers_of_the_paper_are_equivariant_and_so_is_our_reading_of_them(pool):
    """With the paper's own encoder in ours' place the same law holds: it is one of weight spaces, not of ours."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    spec = discover(made, images().double())
    between = dict.fromkeys(UNITS, 4)
    layers = DWSLayer({**CHANNELS, "W1": 8, "W3": 3}, between, pool), DWSLayer(between, between, pool)
    for layer in layers:
        for parameter in layer.double().parameters():
            nn.init.normal_(parameter)

    def encoded(model: nn.Module) -> dict[str, Tensor]:
        x = weight_features(model[1].weight, model[3].weight, model[5].weight, model[1].bias, model[3].bias)
        return layers[1]({name: value.relu() for name, value in layers[0](x).items()})

    with torch.no_grad():
        for seed in range(5):
            p = random(spec, seed)
            expected = relabel(encoded(made), {1: p.perms["1"], 2: p.perms["3"]})
            for name, found in encoded(p.apply(made)).items():
                torch.testing.assert_close(found, expected[name])
                assert float(found.std()) > 0.1


# ---------------------------------------------------------------- what is fast against what is obvious


def test_a_block_is_what_loops_over_units_and_edges_make():
    torch.manual_seed(0)
    sizes, ends = (3, 4), [(1, 0), (0, 0), (1, 0)]
    block = Block(2, ends, features=6, edge_features=2).double()
    units = [torch.randn(2, n, 6, dtype=torch.float64) for n in sizes]
    edges = [torch.randn(2, 2, sizes[r], sizes[c], dtype=torch.float64) for r, c in ends]
    with torch.no_grad():
        found = block(units, edges)
        for number in range(2):
            expected = block_by_loops(block, [x[number] for x in units], [e[number].movedim(0, -1) for e in edges])
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[number], theirs)


@pytest.mark.parametrize("make", MAKERS)
def test_stacked_states_are_relabelled_as_networks_are(make):
    graph = untrained(make).fitted.encoder.graph
    made = [network(make, seed) for seed in range(3)]
    drawn = [random(graph.spec, seed) for seed in range(3)]
    perms = [torch.stack([p.perms[group.name] for p in drawn]) for group in graph.spec.groups]
    expected = graph.read([p.apply(model) for p, model in zip(drawn, made, strict=True)])
    states = graph.read(made)
    assert torch.equal(graph.permute(states, perms), expected)
    soft = [0.5 * F.one_hot(p, p.shape[1]).double() + 0.5 / p.shape[1] for p in perms]
    mixed = graph.mix(states, soft)
    for number, model in enumerate(made):
        by_name = SoftPermutation(graph.spec, {g.name: m[number] for g, m in zip(graph.spec.groups, soft, strict=True)})
        torch.testing.assert_close(mixed[number], graph.read([by_name.apply(model)])[0])


def test_named_states_are_the_networks_tensors():
    graph = untrained(convolutions).fitted.encoder.graph
    made = [network(convolutions, seed) for seed in range(2)]
    named = graph.named(graph.read(made))
    for number, model in enumerate(made):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert all(torch.equal(stack[number], tensors[name]) for name, stack in named.items())


def test_every_entry_with_units_is_read_once_and_products_become_channels():
    graph = untrained(convolutions).fitted.encoder.graph
    shapes = {(piece.name, piece.groups): tuple(piece.index.shape) for piece in graph.pieces}
    assert shapes["3.weight", (1, 0)] == (5, 4, 9) and shapes["6.weight", (2, 1)] == (6, 5, 8)
    assert shapes["0.weight", (0,)] == (4, 9) and shapes["8.weight", (2,)] == (6, 3)
    assert shapes["1.running_var", (0,)] == (4, 1)
    entries = torch.cat([graph.fixed, *(piece.index.flatten() for piece in graph.pieces)])
    assert torch.equal(entries.sort().values, torch.arange(len(entries)))
    loop = untrained(Residual).fitted.encoder.graph
    assert [p.groups for p in loop.pieces if p.name == "conv.weight"] == [(0, 0)]  # edges from a group to itself


def test_the_supervised_loss_is_that_of_finding_units_and_copies():
    torch.manual_seed(0)
    scores, perm = torch.randn(2, 3, 3).double(), torch.tensor([[1, 2, 0], [2, 1, 0]])
    terms = []
    for pair in range(2):
        for copy, unit in enumerate(perm[pair].tolist()):
            terms.append(-scores[pair, :, copy].log_softmax(0)[unit])
            terms.append(-scores[pair, unit].log_softmax(0)[copy])
    torch.testing.assert_close(supervised_loss([scores], [perm]), torch.stack(terms).mean())


# ---------------------------------------------------------------- augmentation


def test_rescaling_keeps_the_function_of_a_relu_network():
    graph = untrained(perceptron).fitted.encoder.graph
    model = network(perceptron, 1)
    factors = [torch.rand(1, group.size).double() + 0.5 for group in graph.spec.groups]
    moved = graph.named(rescale(graph, graph.read([model]), factors))
    outputs = torch.func.functional_call(model, {name: x[0] for name, x in moved.items()}, (images().double(),))
    torch.testing.assert_close(outputs, model(images().double()))
    assert not torch.allclose(moved["1.weight"][0], model[1].weight)


def test_augmentations_change_what_they_say_and_nothing_else():
    graph = untrained(perceptron).fitted.encoder.graph
    states = graph.read([network(perceptron, seed) for seed in range(200)])
    torch.manual_seed(0)
    nothing = WeightAugmentation(noise=0, dropout=0, rescale=0, prune=0)
    assert torch.equal(nothing(graph, states), states)
    noisy = replace(nothing, noise=0.1)(graph, states) - states
    assert 0.09 < float(noisy[:, graph.slices["3.weight"]].std() / states[:, graph.slices["3.weight"]].std()) < 0.11
    dropped = replace(nothing, dropout=0.3)(graph, states)
    assert 0.28 < float((dropped == 0).double().mean()) < 0.32 and torch.equal(
        dropped[dropped != 0], states[dropped != 0]
    )
    pruned = replace(nothing, prune=0.5)(graph, states)
    part = graph.slices["3.weight"]
    assert 0.2 < float((pruned[:, part] == 0).double().mean()) < 0.3
    gone = pruned[:, part] == 0
    largest = states[:, part].abs().masked_fill(~gone, 0).amax(1)
    assert bool((largest <= states[:, part].abs().masked_fill(gone, torch.inf).amin(1)).all())


@pytest.mark.parametrize("make", [convolutions, Residual])
def test_augmentations_leave_norm_layers_and_buffers(make):
    graph = untrained(make).fitted.encoder.graph
    states = graph.read([network(make, seed) for seed in range(20)])
    torch.manual_seed(0)
    changed = WeightAugmentation(noise=0.1, dropout=0.3, prune=0.5)(graph, states)
    model = network(make, 0)
    norms = {f"{layer}.{name}" for layer in norm_layers(model) for name in model.get_submodule(layer).state_dict()}
    for name, part in graph.slices.items():
        assert torch.equal(changed[:, part], states[:, part]) == (name in norms)


def test_the_scale_of_running_statistics_makes_no_difference_to_a_fit():
    """They have the scale of their inputs, and are no weights: by a power of 2, every bit is the same."""
    fits = []
    for scale in (1, 64):
        population = [network(convolutions, seed) for seed in range(4)]
        for model in population:
            model[1].running_mean.mul_(scale)
            model[1].running_var.mul_(scale)
        fits.append(replace(SMALL, num_steps=3, connectivity=0).fit(population, example_input=images().double()).fitted)
    assert fits[0].history == fits[1].history and fits[0].validation == fits[1].validation


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_unit_of_distance_is_that_of_two_different_networks(count):
    encoder = untrained(perceptron).fitted.encoder
    states = encoder.graph.read([network(perceptron, seed) for seed in range(count)])
    architecture = PopulationNetwork(perceptron(), F.cross_entropy)
    training = EncoderTraining(replace(SMALL, connectivity=0), encoder, architecture, states, states, None)
    pairs = torch.tensor([(i, j) for i in range(count) for j in range(count) if i != j])
    expected = encoder.graph.distance(states[pairs[:, 0]], states[pairs[:, 1]]).mean()
    torch.testing.assert_close(training.distance, expected)


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3))


@pytest.mark.parametrize("make", [Residual, Recurrent, transposed])
@pytest.mark.parametrize("connectivity", [0, 1])
def test_rescaling_networks_that_it_would_change_is_an_error(make, connectivity):
    population = [network(make, seed) for seed in range(3)]
    wrong = replace(SMALL, connectivity=connectivity, augmentation=WeightAugmentation(rescale=0.1))
    data = {"loader": batches(dtype=torch.float64)} if connectivity else {"example_input": images().double()}
    with pytest.raises(ValueError, match=r"rescale=0\.1 changes what these networks compute: .* along axis 0"):
        wrong.fit(population, **data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rescaling_relu_networks_is_none_whatever_their_precision(dtype):
    population = [network(perceptron, seed, dtype) for seed in range(3)]
    right = replace(SMALL, num_steps=1, augmentation=WeightAugmentation(rescale=0.1))
    assert right.fit(population, batches(dtype=dtype)).fitted.history["connectivity"][0] > 0


@pytest.mark.parametrize(
    ("name", "value"), [("dropout", 1.0), ("noise", -0.1), ("prune", 2), ("rescale", float("nan"))]
)
def test_augmentations_out_of_range_are_errors(name, value):
    with pytest.raises(ValueError, match=rf"{name} must (?:lie in \[0, .*|be a number, )got {name}="):
        WeightAugmentation(**{name: value})


# ---------------------------------------------------------------- fitting


def test_all_three_losses_fall_and_the_best_state_is_kept(digits, aligner):
    history, validation = aligner.fitted.history, dict(aligner.fitted.validation)
    for name in ("supervised", "alignment", "connectivity"):
        values = torch.tensor(history[name])
        assert len(values) == 20 and values[-5:].mean() < values[:5].mean()
    assert set(validation) == {0, 10, 20} and min(validation[10], validation[20]) < validation[0]


def test_the_state_kept_is_the_first_of_the_lowest_validation(digits):
    """Between a network and its relabelled copy every state is as good as the untrained one, or worse."""
    population, train = digits
    copied = [population[0], random(discover(population[0]), 1).apply(population[0])]
    kept, start = (
        replace(SMALL, num_steps=steps, validate_every=1).fit(population, train, validation=copied) for steps in (4, 0)
    )
    values = [value for _, value in kept.fitted.validation]
    assert len(values) == 5 and min(values) >= values[0] - 1e-6
    ours, theirs = (one.fitted.encoder.state_dict() for one in (kept, start))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_fitting_is_deterministic_and_leaves_random_state_and_networks(digits, aligner):
    population, train = digits
    before, state = [m.state_dict() for m in population], torch.get_rng_state()
    before = [{k: v.clone() for k, v in one.items()} for one in before]
    again = SMALL.fit(population, train)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(v, m.state_dict()[k]) for m, one in zip(population, before, strict=True) for k, v in one.items()
    )
    assert repr(again) == repr(aligner) and again.fitted.history == aligner.fitted.history
    assert repr(replace(SMALL, seed=1).fit(population, train)) != repr(aligner)
    assert not any(parameter.requires_grad for parameter in again.fitted.encoder.parameters())


def test_batch_norm_and_tied_networks_learn_from_the_loss_on_the_line():
    for make in (Residual, convolutions, Recurrent):
        population = [network(make, seed, torch.float32) for seed in range(4)]
        fitted = replace(SMALL, num_steps=3).fit(population, batches())
        assert all(value > 0 for value in fitted.fitted.history["connectivity"])
        spec = fitted.fitted.encoder.graph.spec
        p = random(spec, 1)
        assert (fitted.match(spec, population[0], p.apply(population[0])).permutation @ p).num_moved == 0


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(y)).relu())


@pytest.mark.parametrize("connectivity", [0, 1])
@pytest.mark.parametrize("kind", [tuple, dict])
def test_networks_of_several_inputs_learn(connectivity, kind):
    inputs = kind(x=torch.rand(8, 4), y=torch.rand(8, 4)) if kind is dict else (torch.rand(8, 4), torch.rand(8, 4))
    loader = [(inputs, torch.arange(8) % 3)]
    fitted = replace(SMALL, num_steps=2, connectivity=connectivity).fit([TwoInputs() for _ in range(3)], loader).fitted
    assert (fitted.history["connectivity"][0] > 0) == bool(connectivity)


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.memory, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x.view(len(x), 2, 4))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_layer_that_cannot_be_run_for_many_networks_is_named(kind):
    population = [Sequence(kind) for _ in range(2)]
    loader = [(torch.rand(8, 8), torch.arange(8) % 3)]
    message = rf"'memory' \({kind.__name__}\) cannot be run for many networks at once .* DeepAlign\(connectivity=0\)"
    with pytest.raises(ValueError, match=message):
        replace(SMALL, num_steps=1).fit(population, loader)
    replace(SMALL, num_steps=1, connectivity=0).fit(population, loader)


class Masked(nn.Module):
    """A class is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).relu()) + self.mask


def test_a_mask_of_infinite_entries_is_no_sign_of_a_bad_network():
    population = [network(Masked, seed, torch.float32) for seed in range(4)]
    fitted = replace(SMALL, num_steps=3).fit(population, batches()).fitted
    values = [*fitted.history["connectivity"], *fitted.history["alignment"], *(value for _, value in fitted.validation)]
    assert torch.tensor(values).isfinite().all()
    for model, wrong in zip(population, (torch.nan, torch.inf), strict=False):
        model.b.bias.data[3] = wrong
    with pytest.warns(UserWarning, match="2 of the 4 networks in population hold NaN"):
        replace(SMALL, num_steps=1).fit(population, batches())


def test_no_data_is_needed_without_the_loss_on_the_line(digits):
    population, _ = digits
    fitted = replace(SMALL, connectivity=0).fit(population)
    assert set(fitted.fitted.history["connectivity"]) == {0.0}
    with pytest.raises(ValueError, match=r"connectivity=1\.0.*pass loader=, or use DeepAlign\(connectivity=0\)"):
        SMALL.fit(population)


def test_validation_networks_may_be_given_or_are_held_out(digits):
    population, train = digits
    given = replace(SMALL, num_steps=1).fit(population[:6], train, validation=population[6:])
    other = replace(SMALL, num_steps=1).fit(population[:6], train)
    assert given.fitted.history == other.fitted.history and given.fitted.validation != other.fitted.validation


@pytest.mark.parametrize("given", [[], [torch.float64]])
def test_validation_needs_two_networks(digits, given):
    population, train = digits
    with pytest.raises(ValueError, match=f"validation must hold at least two networks to be aligned, got {len(given)}"):
        SMALL.fit(population, train, validation=population[: len(given)])


def test_validation_networks_of_another_precision_are_converted():
    population = [network(perceptron, seed) for seed in range(4)]
    held_out = [network(perceptron, seed, torch.float32) for seed in (8, 9)]
    both = [
        replace(SMALL, num_steps=2, connectivity=0).fit(
            population, validation=[model.to(dtype) for model in held_out], example_input=images().double()
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert both[0].fitted.validation == both[1].fitted.validation


def test_half_precision_is_refused_by_its_name():
    population = [network(perceptron, seed, torch.float16) for seed in range(2)]
    with pytest.raises(ValueError, match=r"torch\.float16, in which an encoder cannot be trained.*model\.float\(\)"):
        replace(SMALL, connectivity=0).fit(population, example_input=images().half())


def sometimes_nan(bad: set[int]):
    """A loss that is NaN for some of the calls of validation, of which SMALL's makes one at each look."""
    calls = iter(range(1000))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss if torch.is_grad_enabled() or next(calls) not in bad else loss * torch.nan

    return loss_fn


def test_a_validation_that_is_not_finite_never_wins(tmp_path):
    population = [network(perceptron, seed, torch.float32) for seed in range(4)]
    often = replace(SMALL, num_steps=2, validate_every=1)
    fitted = often.fit(population, batches(), loss_fn=sometimes_nan({0}))
    assert fitted.fitted.validation[0] == (0, torch.inf)
    fitted.save(tmp_path / "aligner")
    assert DeepAlign.load(tmp_path / "aligner").fitted.validation == fitted.fitted.validation
    start = replace(often, num_steps=0).fit(population, batches()).fitted.encoder
    assert not torch.equal(fitted.fitted.encoder.embeddings[0].weight, start.embeddings[0].weight)
    with pytest.raises(FloatingPointError, match="validation networks is not finite after any of 2 steps"):
        often.fit(population, batches(), loss_fn=sometimes_nan(set(range(1000))))


def test_integers_of_numpy_are_integers(tmp_path):
    population = [network(perceptron, seed) for seed in range(2)]
    one = replace(SMALL, seed=np.int64(3), num_steps=np.int32(1), connectivity=0)
    one.fit(population, example_input=images().double()).save(tmp_path / "aligner")
    assert DeepAlign.load(tmp_path / "aligner").seed == 3 and "seed=3," in repr(one)


# ---------------------------------------------------------------- use


def test_align_and_other_methods_take_it(digits, aligner):
    (a, b, *_), train = digits
    found = modeconn.align(a, b, method=aligner)
    spec = discover(a)
    expected = {name: match_units(x) for name, x in aligner.similarities(a, b).items()}
    assert found.permutation == Permutation(spec, expected)
    assert modeconn.align(a, b, train, method=WeightMatching(start=aligner)).permutation.num_moved > 0
    kept = Sinkhorn(start=aligner, objective="weights", num_steps=1)
    assert modeconn.align(a, b, method=kept).history[0] == pytest.approx(
        modeconn.align(a, b, method=Sinkhorn(start=found.permutation, objective="weights", num_steps=1)).history[0]
    )
    refined = modeconn.fit_curve(
        a, b, train, align=aligner, curve=modeconn.Line(), refine=modeconn.PAM(iterations=1, num_batches=2),
        recipe=Recipe(epochs=1),
    )  # fmt: skip
    assert refined.permutation is not None


def test_it_is_saved_and_loaded_with_the_same_bits(digits, aligner, tmp_path):
    (a, b, *_), _ = digits
    aligner.save(tmp_path / "aligner.safetensors")
    again = DeepAlign.load(tmp_path / "aligner.safetensors")
    assert repr(again) == repr(aligner)
    ours, theirs = aligner.fitted.encoder.state_dict(), again.fitted.encoder.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.fitted.encoder.graph.spec == aligner.fitted.encoder.graph.spec
    assert again.fitted.history == aligner.fitted.history and again.fitted.validation == aligner.fitted.validation
    ours, theirs = aligner.similarities(a, b), again.similarities(a, b)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.match(discover(a), a, b).permutation == aligner.match(discover(a), a, b).permutation


@pytest.mark.parametrize("connectivity", [0.0, 1.0])
@pytest.mark.parametrize("left", [14, 22])
def test_a_fit_that_was_interrupted_goes_on_with_the_same_bits(left, connectivity, tmp_path, monkeypatch):
    population = [network(perceptron, seed) for seed in range(5)]
    data = [(x.double(), y) for x, y in batches()]
    how = replace(SMALL, num_steps=25, validate_every=10, connectivity=connectivity)
    whole = how.fit(population, data)
    step, num_steps = EncoderTraining._step, []

    def breaking(self, *args):
        num_steps.append(None)
        if len(num_steps) == left:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(EncoderTraining, "_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        how.fit(population, data, checkpoint=tmp_path / "run")
    resumed = how.fit(population, data, checkpoint=tmp_path / "run")
    assert len(num_steps) == left + 25 - 10 * (left // 10)
    assert repr(resumed) == repr(whole)
    assert resumed.fitted.history == whole.fitted.history and resumed.fitted.validation == whole.fitted.validation
    found = CliRunner().invoke(app, ["info", str(tmp_path / "run")])
    assert "25 steps" in found.stdout and "validate_every" in found.stdout


def test_a_checkpoint_of_another_fit_is_refused_and_so_are_moments_of_ones_own(tmp_path):
    population = [network(perceptron, seed) for seed in range(3)]
    how = replace(SMALL, num_steps=10, connectivity=0)
    how.fit(population, example_input=images().double(), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="is of another run: num_steps is 10 in it and 20 here"):
        replace(how, num_steps=20).fit(population, example_input=images().double(), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="is of another run: the digest of the population"):
        how.fit(population[1:], example_input=images().double(), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="saves itself at its own moments"):
        how.fit(population, example_input=images().double(), checkpoint=Checkpoint(tmp_path / "new", every_batches=3))


def test_aligners_that_answer_differently_are_written_differently():
    """Untrained ones of one seed have the same weights, but read networks by statistics of their populations."""
    wider = [network(perceptron, seed) for seed in range(4)]
    for model in wider:
        model.load_state_dict({name: 5 * x for name, x in model.state_dict().items()})
    settings = replace(SMALL, num_steps=0, connectivity=0)
    ours, theirs = untrained(perceptron), settings.fit(wider, example_input=images().double())
    for mine, other in zip(ours.fitted.encoder.parameters(), theirs.fitted.encoder.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert repr(ours) != repr(theirs)


# ---------------------------------------------------------------- bad input


def test_an_aligner_that_is_not_fitted_says_so(digits, tmp_path):
    (a, b, *_), _ = digits
    for use in (lambda: modeconn.align(a, b, method=DeepAlign()), lambda: DeepAlign().save(tmp_path / "x")):
        with pytest.raises(ValueError, match=r"not fitted: call \.fit\(population, loader\), or DeepAlign\.load"):
            use()


def test_networks_of_other_sizes_are_an_error_that_names_the_group(digits, aligner):
    population, train = digits
    wider = [models.mlp(64, (16, 24), 10, seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"fitted on other networks: group 'layers\.2' has 24 units, not 16"):
        modeconn.align(*wider, method=aligner)
    with pytest.raises(ValueError, match=r"a is of another architecture .* group 'layers\.2' .* has size 24, not 16"):
        aligner.similarities(*wider)
    with pytest.raises(ValueError, match=r"population\[8\] is of another .* group 'layers\.2' .* has size 24, not 16"):
        SMALL.fit([*population, wider[0]], train)
    with pytest.raises(
        ValueError, match=r"group 'layers\.4' has none, not 8 units|group 'layers\.4' has 8 units, not none"
    ):
        modeconn.align(*(models.mlp(64, (16, 16, 8), 10, seed=seed) for seed in range(2)), method=aligner)


class Tied(nn.Module):
    def __init__(self, tie: bool, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=bias)
        if tie:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ([(False, False), (False, True)], r"it has 'd\.bias', of shape \(3,\), besides"),
        ([(False, True), (False, False)], r"it has no 'd\.bias'"),
        ([(False, True), (True, True)], r"'c\.weight' is tied to 'b\.weight', not a tensor of its own"),
        ([(True, True), (False, True)], r"'c\.weight' is a tensor of its own, not tied to 'b\.weight'"),
    ],
)
def test_networks_that_differ_in_any_tensor_or_tie_are_an_error(kinds, found, tmp_path):
    ours, theirs = (Tied(*kind) for kind in kinds)
    one = replace(SMALL, num_steps=0, connectivity=0)
    with pytest.raises(ValueError, match=rf"population\[1\] is of another architecture .*: {found}"):
        one.fit([ours, theirs], example_input=torch.rand(2, 8))
    one.fit([ours, Tied(*kinds[0])], example_input=torch.rand(2, 8)).save(tmp_path / "aligner")
    with pytest.raises(ValueError, match=rf"a is of another architecture .*: {found}"):
        DeepAlign.load(tmp_path / "aligner").similarities(theirs, theirs)


@pytest.mark.parametrize("count", [0, 1])
def test_a_population_needs_two_networks(digits, count):
    population, train = digits
    with pytest.raises(ValueError, match=f"at least two networks to be aligned, got {count}"):
        SMALL.fit(population[:count], train)


def spoilt(model: nn.Module) -> nn.Module:
    model = models.mlp(64, (16, 16), 10)
    model.layers[0].weight.data[0, 0] = torch.nan
    return model


def test_networks_that_hold_nan_are_counted_and_left_out(digits, aligner):
    population, train = digits
    with pytest.warns(UserWarning, match="2 of the 10 networks in population hold NaN"):
        fitted = SMALL.fit([population[0], spoilt(population[0]), *population[1:], spoilt(population[0])], train)
    assert repr(fitted) == repr(aligner)
    with pytest.raises(ValueError, match="but 3 of its 5 hold NaN or infinite weights"):
        SMALL.fit([*population[:2], *(spoilt(population[0]) for _ in range(3))], train)


def group_norm_network():
    first = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 3))


BLOCKED = {
    **{name: (BY_NAME[name].build, BY_NAME[name].inputs) for name in ("attention 3hd", "grouped")},
    "group norm": (group_norm_network, lambda: torch.rand(2, 1, 8, 8)),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_units_in_blocks_are_refused_by_the_name_of_their_group_and_may_be_frozen(name):
    torch.manual_seed(0)
    build, inputs = BLOCKED[name]
    population = [build() for _ in range(2)]
    aligner = replace(SMALL, num_steps=0, connectivity=0)
    every = discover(population[0], inputs())
    with pytest.raises(ValueError, match=r"those of group '.*' lie in blocks \(.* in each of ") as refused:
        aligner.fit(population, example_input=inputs())
    frozen = ast.literal_eval(str(refused.value).partition("freeze=")[2].removesuffix(")."))
    spec = discover(population[0], inputs(), freeze=frozen)
    blocks = {name for group in every.groups for name, _ in group.parents}
    outside = {group.name for group in every.groups if not group.parents and group.name not in blocks}
    assert outside and {group.name for group in spec.groups} == outside
    found = aligner.fit(population, example_input=inputs(), spec=spec).similarities(*population)
    assert list(found) == [group.name for group in spec.groups]


def test_a_spec_of_rotations_is_refused_before_anything_is_learned():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    spec = discover(build(), torch.randn(2, 3), symmetries="orthogonal")
    with pytest.raises(ValueError, match=r"DeepAlign permutes units, and this spec has \d groups that rotate them"):
        replace(SMALL, connectivity=0).fit([build() for _ in range(2)], spec=spec)


def test_where_all_units_lie_in_blocks_nothing_is_left_to_align():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    with pytest.raises(ValueError, match=r"lie in blocks .*; use WeightMatching or ActivationMatching\.$"):
        replace(SMALL, connectivity=0).fit([model, model], example_input=torch.rand(2, 1, 8, 8))


def test_nothing_to_relabel_is_an_error():
    population = [nn.Linear(8, 3) for _ in range(2)]
    with pytest.raises(ValueError, match="no group of units that may be relabelled"):
        replace(SMALL, connectivity=0).fit(population, example_input=torch.rand(2, 8))


def test_files_of_another_version_or_kind_are_errors(aligner, tmp_path):
    path = tmp_path / "aligner.safetensors"
    aligner.save(path)
    tensors, about = files.read(path)
    files.write(path, about.pop("kind"), tensors, {**about, "format": 2})
    with pytest.raises(ValueError, match="has format 2; this version of modeconn reads 3"):
        DeepAlign.load(path)
    models.save(models.mlp(64, (8,), 10), path)
    with pytest.raises(ValueError, match="is a model, not a deep align"):
        DeepAlign.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be positive, got depth=0"),
        ({"num_steps": -1}, "num_steps must be at least 0, got num_steps=-1"),
        ({"alignment": float("nan")}, "alignment must be a number"),
        ({"supervised": 0, "alignment": 0, "connectivity": 0}, "all of them are 0"),
        ({"num_steps": 2.5}, r"num_steps must be an integer, got num_steps=2\.5"),
        ({"seed": "abc"}, "seed must be an integer, got seed='abc'"),
        ({"learning_rate": "abc"}, "learning_rate must be a number, got learning_rate='abc'"),
        ({"supervised": "abc"}, "supervised must be a number, got supervised='abc'"),
        ({"features": 10}, "features must be a multiple of edge_features=4, got features=10"),
    ],
)
def test_settings_out_of_range_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepAlign(**changes)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (WeightMatching, "num_starts"),
        (modeconn.ActivationMatching, "num_examples"),
        (modeconn.TransportMatching, "num_examples"),
        (Sinkhorn, "num_steps"),
        (modeconn.StraightThrough, "num_rounds"),
        (modeconn.PAM, "iterations"),
        (refinement.ProximalLinear, "num_tries"),
        (refinement.RelaxedStep, "num_halvings"),
        (refinement.SinkhornStep, "num_rounds"),
    ],
)
def test_numbers_of_things_are_integers_for_every_method(method, name):
    for value in (2.5, "abc", torch.tensor(2.5)):
        with pytest.raises(ValueError, match=f"{name} must be an integer(?: or None)?, got {name}="):
            method(**{name: value})
    made = getattr(method(**{name: np.int64(2)}), name)
    assert made == 2 and type(made) is int


def test_a_target_that_is_no_class_is_an_error(digits):
    population, train = digits
    wrong = [(inputs, targets + 5) for inputs, targets in train]
    with pytest.raises(ValueError, match=r"targets of loader must lie in 0\.\.9"):
        SMALL.fit(population, wrong)


def test_a_loss_that_is_not_finite_says_which(digits):
    population, train = digits

    def never(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * torch.nan

    with pytest.raises(
        FloatingPointError, match=r"became nan in step 1 of 20 \(.*connectivity nan\); lower learning_rate"
    ):
        SMALL.fit(population, train, loss_fn=never)


# ---------------------------------------------------------------- command line


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def test_the_command_line_fits_evaluates_and_aligns(digits, aligner, tmp_path):
    population, _ = digits
    files = [tmp_path / f"{number}.safetensors" for number in range(len(population))]
    for model, file in zip(population, files, strict=True):
        models.save(model, file)
    out = tmp_path / "aligner.safetensors"
    given = "features=16,depth=2,num_steps=20,batch_size=8,num_validation_pairs=4,validate_every=10"
    said = run("deepalign", "fit", *files, "--data", "digits", "--out", out, "--settings", given)
    assert repr(DeepAlign.load(out)) == repr(aligner) and f"Wrote {out}" in said.output
    assert "loss in the middle" in said.output
    without = run(
        "deepalign", "fit", *files, "--data", "digits", "--out", tmp_path / "d", "--settings", f"{given},connectivity=0"
    )
    assert "squared distance of parameters" in without.output and "loss" not in without.output
    table = run("deepalign", "evaluate", out, *files[:4], "--data", "digits", "--points", 3)
    assert "Deep-Align" in table.output and "2 pairs" in table.output
    assert "Fitted(" in run("info", out).output
    aligned = tmp_path / "aligned.safetensors"
    run("align", *files[:2], "--out", aligned, "--method", f"deep_align:{out}")
    assert same_bits(models.load(aligned), modeconn.align(*population[:2], method=aligner).model_b)


def test_the_command_line_trains_a_population(tmp_path):
    out, kept = tmp_path / "aligner.safetensors", tmp_path / "networks"
    run(
        "deepalign", "fit", "--networks", 4, "--model", "mlp", "--model-arg", "hidden=8,", "--epochs", 1,
        "--keep", kept, "--data", "digits", "--out", out, "--settings", "features=8,depth=1,num_steps=2",
    )  # fmt: skip
    assert len(list(kept.glob("*.safetensors"))) == 4 and DeepAlign.load(out).num_steps == 2
    wrong = run("deepalign", "fit", "--data", "digits", "--out", out, code=1)
    needs = "needs networks: name their files, or train some with --networks and --model"
    assert needs in wrong.output
    files = sorted(kept.glob("*.safetensors"))
    assert needs in run("deepalign", "fit", *files[:2], "--networks", 2, "--out", out, code=1).output
    for wrong, message in (
        ("num_steps=1e3", "num_steps must be an integer, got num_steps=1000.0"),
        ("features=abc", "features must be an integer, got features='abc'"),
        ("noise=abc", "noise must be a number, got noise='abc'"),
    ):
        assert message in run("deepalign", "fit", *files, "--out", out, "--settings", wrong, code=1).output
