"""Alignment recovers what was planted, by every method, and says what it could not know."""

from __future__ import annotations

import functools
from itertools import permutations, product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn
from modeconn import (
    PGD,
    ActivationMatching,
    Permutation,
    Sinkhorn,
    StraightThrough,
    TransportMatching,
    WeightMatching,
    align,
    discover,
    models,
)
from modeconn.matching import Method, match_groups, match_units
from modeconn.matching.activation_matching import break_ties
from modeconn.matching.statistics import Moments, collect, readings
from modeconn.network.batch_norm import recalibrate
from tests.symmetry.cases import CASES

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def zoo_model(name: str) -> nn.Module:
    return models.mlp(64, (16, 12), 10, seed=1) if name == "mlp" else getattr(models, name)(seed=1)


@functools.cache
def spec_of(name: str) -> modeconn.PermutationSpec:
    """Discover the symmetries of a zoo model, once for all tests that ask for them."""
    return discover(zoo_model(name))


def has_linear(model: nn.Module) -> bool:
    """Whether there are hidden linear layers, which see one sample an image, not one a place."""
    return sum(isinstance(module, nn.Linear) for module in model.modules()) > 1


def batches(shape: tuple[int, ...], generator: torch.Generator, sizes: tuple[int, ...] = (24, 9)) -> list:
    return [(torch.rand(n, *shape, generator=generator), torch.zeros(n, dtype=torch.int64)) for n in sizes]


def blobs(generator: torch.Generator, sizes: tuple[int, ...], side: int = 32) -> list:
    """Coarse random images. On white noise the units of deep linear layers fire for one image or none, many alike."""
    return [
        (nn.functional.interpolate(inputs, (side, side), mode="bilinear"), targets)
        for inputs, targets in batches((3, 3, 3), generator, sizes)
    ]


# ---------------------------------------------------------------- recovery


LARGEST = {"googlenet", "wideresnet28x10"}
FAMILIES = [name for name in models.names() if name not in ("preresnet164", "vgg19", "vgg19_bn")]  # deeper twins


@pytest.mark.parametrize(
    ("name", "pre_activation"),
    [(name, when) for name in FAMILIES for when in (False, True) if not (when and name in LARGEST)],
    ids=lambda value: {False: "post", True: "pre"}.get(value, value),
)
def test_activations_recover_a_planted_permutation_of_every_family_of_the_zoo(
    name: str, pre_activation: bool, generator: torch.Generator
) -> None:
    """On every unit that is not constant; constant ones are counted, and only they may be misplaced.

    (A unit whose one response is at the level of rounding may count as constant in one of the two networks only: then
    one more than either has may be misplaced.)
    """
    model = zoo_model(name)
    sizes, side = (96, 65) if has_linear(model) else (12, 5), 16 if name in LARGEST else 32
    loader = batches((64,), generator) if name == "mlp" else blobs(generator, sizes, side)
    recalibrate(model, [inputs for inputs, _ in loader], forward=lambda m, inputs: m(inputs))
    model.eval()
    spec = spec_of(name)
    planted = spec.random(generator)
    result = align(
        model, planted.apply(model), loader, method=ActivationMatching(pre_activation=pre_activation), spec=spec
    )
    left = result.permutation @ planted
    for group in spec.groups:
        misplaced = int((left.perms[group.name] != torch.arange(group.size)).sum())
        constant = result.constant_units[group.name]
        assert misplaced <= max(constant) + min(1, *constant), group.name
        assert result.correlation[group.name][1] >= result.correlation[group.name][0]
    assert result.correlation.keys() == {group.name for group in spec.groups}


@pytest.mark.parametrize(
    "name", ["attention 3hd", "attention einsum", "multi-head attention", "grouped", "expert bank"]
)
def test_activations_recover_blocks_and_what_is_inside_them(name: str, generator: torch.Generator) -> None:
    case = BY_NAME[name]
    torch.manual_seed(1)
    model, example = case.build().double(), case.inputs()
    inputs = torch.rand(40, *example.shape[1:], generator=generator, dtype=torch.float64)
    spec = discover(model, example.double())
    planted = spec.random(generator)
    result = align(
        model, planted.apply(model), [(inputs, None)], method=ActivationMatching(pre_activation=True), spec=spec
    )
    assert result.permutation @ planted == spec.identity()


def test_the_inverse_would_not_pass_for_the_permutation(generator: torch.Generator) -> None:
    """Applying the inverse keeps the function too; only recovery tells them apart."""
    model = models.mlp(8, (9,), 2)
    spec = discover(model)
    planted = spec.random(generator)
    found = align(model, planted.apply(model), batches((8,), generator), spec=spec).permutation
    assert found == planted.inverse()
    assert found != planted


def test_the_relabelled_model_is_the_same_function_and_b_is_untouched(generator: torch.Generator) -> None:
    a, b = (models.resnet20(seed=s).double().eval() for s in (1, 2))
    before = [p.clone() for p in b.parameters()]
    result = align(a, b, [(x.double(), y) for x, y in batches((3, 32, 32), generator)])
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(result.model_b(x), b(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(before, b.parameters(), strict=True))
    assert result.permutation.num_moved > 0


# ---------------------------------------------------------------- assignment


@pytest.mark.parametrize("n", range(1, 7))
def test_assignment_equals_brute_force(n: int, generator: torch.Generator) -> None:
    similarity = torch.randn(n, n, generator=generator, dtype=torch.float64)
    best = max(permutations(range(n)), key=lambda p: sum(similarity[i, j] for i, j in enumerate(p)))
    assert match_units(similarity).tolist() == list(best)


def test_assignment_of_blocks_equals_brute_force_over_all_relabellings(generator: torch.Generator) -> None:
    """3 experts of 4 hidden units would be 3! x 4!^3; here 3 blocks of 2 and their router."""
    case = BY_NAME["gpt, tied"]
    spec = discover(case.build(), case.inputs())
    name = next(g.name for g in spec.groups if g.shape == (2, 2))
    outer = spec[name].parents[0][0]
    similarities = {name: torch.randn(4, 4, generator=generator), outer: torch.randn(2, 2, generator=generator)}

    def value(p: tuple[int, ...], inner: tuple[tuple[int, ...], ...]) -> Tensor:
        own = sum(similarities[outer][i, j] for i, j in enumerate(p))
        return own + sum(similarities[name][2 * i + k, 2 * p[i] + inner[i][k]] for i, k in product(range(2), range(2)))

    swaps = list(permutations(range(2)))
    best = max(product(swaps, product(swaps, swaps)), key=lambda choice: value(*choice))
    found = match_groups(spec, similarities)
    assert found.perms[outer].tolist() == list(best[0])
    assert found.perms[name].tolist() == [list(row) for row in best[1]]


def test_similarity_must_be_square_and_finite() -> None:
    with pytest.raises(ValueError, match=r"similarity must be square, got shape \(2, 3\)"):
        match_units(torch.rand(2, 3))
    with pytest.raises(ValueError, match="similarity must be finite"):
        match_units(torch.tensor([[float("nan")]]))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_equal_those_of_all_samples_at_once(offset: float, generator: torch.Generator) -> None:
    """Also where the mean is ten thousand times the spread, in float32."""
    a, b = (torch.randn(5, 60, generator=generator) + offset for _ in range(2))
    moments = Moments(5)
    for start, stop, parts in ((0, 2, 1), (2, 32, 10), (32, 60, 2)):  # few and many samples a part
        moments.add(*(x[:, start:stop].unflatten(1, (parts, -1)).transpose(0, 1) for x in (a, b)))
    a, b = a.double(), b.double()
    naive = torch.corrcoef(torch.cat([a, b]))[:5, 5:]
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(moments.correlation(), naive, **tolerance)
    torch.testing.assert_close(moments.inner_product(), a @ b.T / 60, **tolerance)
    cosine = nn.functional.normalize(a) @ nn.functional.normalize(b).T
    torch.testing.assert_close(moments.cosine(), cosine, **tolerance)


def test_activations_read_from_the_graph_are_those_that_hooks_see(generator: torch.Generator) -> None:
    a, b = (models.tinyten(seed=s).eval() for s in (1, 2))
    loader = batches((3, 32, 32), generator)
    spec = discover(a)
    found = collect(spec, a, b, loader, num_examples_at_most=None, before_activation=False)
    relus = [[m for m in model.modules() if isinstance(m, nn.ReLU)] for model in (a, b)]
    seen: list[list[Tensor]] = [[], []]
    for model, kept, layers in zip((a, b), seen, relus, strict=True):
        for layer in layers:
            layer.register_forward_hook(lambda *args, kept=kept: kept.append(args[2].detach().clone()))
        with torch.no_grad():
            for inputs, _ in loader:
                model(inputs)
    per_batch = len(seen[0]) // len(loader)
    for k, moments in enumerate(found.values()):
        x, y = (
            torch.cat([kept[k + i * per_batch].transpose(0, 1).flatten(1) for i in range(len(loader))], 1).double()
            for kept in seen
        )
        naive = torch.corrcoef(torch.cat([x, y]))[: len(x), len(x) :]
        torch.testing.assert_close(moments.correlation(), naive.nan_to_num(), rtol=1e-3, atol=1e-4)


def test_a_stream_is_read_at_every_tensor_that_sums_over_it_each_once() -> None:
    spec = discover(models.resnet20())
    stem = spec.groups[0]
    read = [r.node for r in readings(spec, spec.traces[0], before_activation=False) if r.group == stem]
    assert len(read) == len(set(read)) == 4  # the stem's output and those of three blocks


def test_pooled_channels_are_read_before_the_pooling() -> None:
    spec = discover(models.resnet20())
    last = (
        spec.groups[-1] if len(spec.groups[-1].places) > 20 else max(spec.groups, key=lambda g: (g.size, len(g.places)))
    )
    nodes = [r.node for r in readings(spec, spec.traces[0], before_activation=False) if r.group == last]
    assert all(len(node.meta["val"].shape) == 4 and node.meta["val"].shape[-1] == 8 for node in nodes)


def test_units_that_never_change_are_counted_and_stay(generator: torch.Generator) -> None:
    model = models.mlp(8, (10,), 2, seed=3)
    with torch.no_grad():
        model.layers[0].bias[[2, 5, 7]] = -100.0  # never fire
    spec = discover(model)
    result = align(model, model, batches((8,), generator), spec=spec)
    assert result.constant_units == {"layers.0": (3, 3)}
    assert result.permutation == spec.identity()


def test_units_that_fire_for_one_image_only_are_told_apart_by_their_spread() -> None:
    model = models.mlp(2, (4,), 2, mean=[0.0, 0.0], std=[1.0, 1.0])
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.tensor([[1.0, 0], [2.0, 0], [3.0, 0], [4.0, 0]]))
        model.layers[0].bias.copy_(torch.tensor([-0.5, -1.0, -1.5, -2.0]))
    data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 0.3]]), None)]
    spec = discover(model)
    planted = Permutation(spec, {"layers.0": torch.tensor([2, 3, 1, 0])})
    assert align(model, planted.apply(model), data, spec=spec).permutation @ planted == spec.identity()


def test_the_inner_product_minimises_the_distance_between_units(generator: torch.Generator) -> None:
    a, b = (models.mlp(6, (5,), 2, seed=s) for s in (1, 2))
    loader = batches((6,), generator)
    result = align(a, b, loader, method=ActivationMatching(statistic="inner_product"))
    (perm,) = result.permutation.perms.values()
    with torch.no_grad():
        x, y = (torch.cat([m.layers[:2](m.normalize(i)) for i, _ in loader]).T for m in (a, b))
    best = min(permutations(range(5)), key=lambda p: float((x - y[list(p)]).square().sum()))
    assert perm.tolist() == list(best)


@pytest.mark.parametrize("seed", range(3))
def test_ties_are_broken_without_a_say_in_real_differences_of_small_units(seed: int) -> None:
    """The activations of some are 100,000 times as large as those of the others."""
    generator = torch.Generator().manual_seed(seed)
    moments, scale = Moments(8), torch.tensor([1e-2] * 4 + [1e3] * 4, dtype=torch.float64)[:, None]
    a, b = (torch.randn(8, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    spread = (torch.arange(8) % 4 + 1)[:, None]
    moments.add(scale * spread * a[None], scale * spread.flip(0) * (a + b)[None])
    product = moments.inner_product()
    assert torch.equal(match_units(break_ties(product, moments)), match_units(product))


def test_only_the_first_examples_are_read() -> None:
    read = []

    class Counting(list):
        def __iter__(self):
            for batch in super().__iter__():
                read.append(len(batch[0]))
                yield batch

    generator = torch.Generator().manual_seed(0)
    a, b = (models.mlp(6, (5,), 2, seed=s) for s in (1, 2))
    loader = Counting(batches((6,), generator, (8, 8, 8, 8)))
    align(a, b, loader, method=ActivationMatching(num_examples=12), example_input=torch.rand(2, 6))
    assert read[-2:] == [8, 8]
    assert len(read) <= 2 + 1  # one more may have been read for the example


# ---------------------------------------------------------------- bad input


def test_networks_of_different_architecture_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"'layers.0.weight'.*\(5, 8\).*\(6, 8\)"):
        align(models.mlp(8, (5,), 2), models.mlp(8, (6,), 2))


def test_weights_that_are_not_finite_are_named() -> None:
    a, b = models.mlp(8, (5,), 2), models.mlp(8, (5,), 2, seed=1)
    with torch.no_grad():
        b.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.weight"):
        align(a, b)


def test_matching_by_activations_needs_data() -> None:
    with pytest.raises(ValueError, match=r"ActivationMatching compares activations, so it needs data: pass loader="):
        align(models.mlp(8, (5,), 2), models.mlp(8, (5,), 2, seed=1), method=ActivationMatching())


@pytest.mark.parametrize(
    "method",
    [ActivationMatching(), StraightThrough(), Sinkhorn(), TransportMatching(), WeightMatching(start=Sinkhorn())],
    ids=lambda method: type(method).__name__,
)
def test_missing_data_is_named_before_a_missing_example_input(method: Method) -> None:
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    for call in (
        lambda: align(a, b, method=method),
        lambda: modeconn.merge_many([a, b], method=method),
        lambda: modeconn.merge_many([a, b], start=method),
    ):
        with pytest.raises(ValueError, match="needs data: pass loader="):
            call()


@pytest.mark.parametrize(
    "loader", [[], iter([(torch.rand(2, 8), torch.zeros(2))]), torch.rand(2, 8)], ids=["empty", "one-shot", "tensor"]
)
def test_loaders_that_cannot_serve_are_refused(loader: object) -> None:
    with pytest.raises(ValueError, match=r"loader (is empty|can be read only once|must yield)"):
        align(models.mlp(8, (5,), 2), models.mlp(8, (5,), 2, seed=1), loader)


def test_an_iterator_is_refused_also_where_the_spec_is_known() -> None:
    a, b = (models.mlp(8, (5,), 2, seed=seed) for seed in (1, 2))
    spec, batch = discover(a), (torch.rand(4, 8), torch.zeros(4, dtype=torch.int64))
    for call in (
        lambda data: align(a, b, data, spec=spec),
        lambda data: align(a, b, data, spec=spec, method=WeightMatching()),
        lambda data: modeconn.merge_many([a, b], data, spec=spec),
        lambda data: modeconn.interpolate(a, b, recalibrate=data, repair=True),
        lambda data: modeconn.repair(a, [a, b], data),
        lambda data: TransportMatching().transport(spec, a, b, data),
        lambda data: ActivationMatching().match(spec, a, b, data),
    ):
        data = iter([batch, batch])
        with pytest.raises(ValueError, match="can be read only once"):
            call(data)
        assert len(list(data)) == 2  # nothing was read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_examples": 1}, "num_examples must be at least 2, or None, got num_examples=1"),
        ({"statistic": "covariance"}, "statistic must be .* got statistic='covariance'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationMatching(**settings)


def test_a_wrong_spec_is_caught_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeconn.symmetry.walk import Walk

    def skip(walk: Walk, input, weight, bias=None):
        walk.contract(input, input.axes[1])
        return [input.axes[0], weight.axes[0]]

    rules = {**modeconn.RULES, torch.ops.aten.linear: skip}
    monkeypatch.setattr(
        "modeconn.matching.alignment.discover", lambda model, x, **how: discover(model, x, rules=rules, **how)
    )
    a, b = models.mlp(8, (5,), 2), models.mlp(8, (5,), 2, seed=1)
    with pytest.raises(modeconn.VerificationError, match="changes the function"):
        align(a, b)


def test_an_alignment_prints_the_correlations(generator: torch.Generator) -> None:
    a = models.mlp(8, (5,), 2)
    text = repr(align(a, discover(a).random(generator).apply(a), batches((8,), generator)))
    assert text.startswith("Alignment(Permutation(1 group,")
    assert "layers.0  correlation" in text


def test_heads_are_compared_by_their_units_and_not_mixed_over_them() -> None:
    """The order of units inside two heads differs, so a head's samples cannot be laid side by side."""
    case = BY_NAME["attention 3hd"]
    spec = discover(case.build(), case.inputs())
    read = {r.group.shape for r in readings(spec, spec.traces[0], before_activation=False)}
    assert read == {(8,), (4, 2)}


# ---------------------------------------------------------------- random state


@pytest.mark.parametrize(
    "method",
    [
        ActivationMatching(num_examples=16),
        ActivationMatching(num_examples=16, adversary=PGD(0.1, 0.1, 1)),
        WeightMatching(),
        WeightMatching(start=ActivationMatching(num_examples=16)),
        TransportMatching(num_examples=16),
        TransportMatching(cost="weights"),
        Sinkhorn(num_steps=2, num_rounds=1),
        StraightThrough(num_steps=2, num_rounds=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_loader_that_shuffles_leaves_result_and_random_state_to_themselves(method: Method) -> None:
    a, b = (models.mlp(6, (16,), 3, seed=seed) for seed in (1, 2))
    inputs = torch.rand(400, 6, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, torch.arange(400) % 3), batch_size=8, shuffle=True)
    spec, found = discover(a), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append((align(a, b, loader, method=method), method.match(spec, a, b, loader).permutation))
        assert torch.equal(torch.get_rng_state(), before)
    (first, alone), (again, alone_again) = found
    assert first.permutation == again.permutation == alone == alone_again
    assert first.correlation == again.correlation and first.history == again.history


# ---------------------------------------------------------------- what is given by mistake


@pytest.mark.parametrize("method", [WeightMatching, "weight", 3])
def test_a_method_is_an_object(method):
    a, b = (nn.Linear(3, 2) for _ in range(2))
    with pytest.raises(ValueError, match=r"(method|align) must be an object with .*, such as WeightMatching\(\), got"):
        align(a, b, example_input=torch.rand(2, 3), method=method)
    with pytest.raises(ValueError, match=r"(method|align) must be an object"):
        modeconn.fit_curve(a, b, [(torch.rand(2, 3), torch.tensor([0, 1]))], align=method)


@pytest.mark.parametrize("method", [WeightMatching, Sinkhorn, StraightThrough])
def test_a_start_is_a_method_a_permutation_or_an_alignment(method):
    for wrong in (ActivationMatching, "activation", 3):
        with pytest.raises(ValueError, match="start must be an object with a match"):
            method(start=wrong)
    network, other = (models.mlp(4, (6,), 3, seed=seed) for seed in (1, 2))
    first = align(network, other)
    found = [align(network, other, method=WeightMatching(start=s)) for s in (first, first.permutation)]
    assert found[0].permutation == found[1].permutation and method(start=first).start is first


class ByName(nn.Module):
    """A network of two named inputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.second(z)))


def test_batches_by_name_are_read_by_name_whatever_else_they_hold():
    torch.manual_seed(0)
    a, b, x, z = ByName(), ByName(), torch.randn(40, 4), torch.randn(40, 4)
    spec = discover(a, {"x": x[:4], "z": z[:4]})
    wanted = align(a, b, [{"x": x, "z": z}], spec=spec)
    for batch in ({"z": z, "x": x}, {"y": torch.rand(40, 1), "z": z, "x": x}):
        found = align(a, b, [batch], spec=spec)
        assert found.permutation == wanted.permutation and found.correlation == wanted.correlation


def test_batches_that_are_not_the_inputs_are_refused_and_need_not_be():
    torch.manual_seed(0)
    a, b, x, z = ByName(), ByName(), torch.randn(40, 4), torch.randn(40, 4)
    by_place, by_name = (discover(a, example) for example in ((x[:4], z[:4]), {"x": x[:4], "z": z[:4]}))
    for spec, batch, message in (
        (by_place, (torch.rand(40, 4), x, z), "runs on inputs: 2 without a name, as .*, got inputs: 3 without a name"),
        (by_place, {"x": x, "z": z}, "runs on inputs: 2 without a name, as .*, got inputs: those named 'x', 'z'"),
        (by_name, {"x": x, "y": z}, "runs on inputs: those named 'x', 'z', as .*, got inputs: those named 'x', 'y'"),
        (by_name, (torch.rand(40, 4), x, z), "runs on inputs: those named 'x', 'z', as .*, got inputs: 3 without"),
    ):
        with pytest.raises(ValueError, match=message):
            align(a, b, [batch], spec=spec)
        found = align(a, b, [batch], spec=spec, method=WeightMatching())
        assert found.permutation == align(a, b, spec=spec).permutation and not found.correlation
    with pytest.raises(ValueError, match=r"does not run on .* the loader's first batch\. .* pass example_input="):
        align(a, b, [{"x": x, "y": z}])


def test_groups_that_nothing_reads_are_named() -> None:
    """The lower layer of a stacked recurrent network is read inside of one operator only."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, loader = Stacked(), [(torch.randn(50, 5, 4), torch.zeros(50, dtype=torch.int64))]
    planted = discover(model, loader[0][0]).random(torch.Generator().manual_seed(1)).apply(model)
    with pytest.warns(UserWarning, match=r"activations say nothing of 'rnn' \(6 units\).*WeightMatching\(start="):
        align(model, planted, loader)
    with pytest.warns(UserWarning, match="activations say nothing"):
        found = align(model, planted, loader, method=WeightMatching(start=ActivationMatching()))
    for x, y in zip(found.model_b.parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y)
