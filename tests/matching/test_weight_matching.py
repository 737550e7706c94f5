"""Weight matching climbs, ends where its naive twin does, and recovers what was planted."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, permutations, product
from math import prod

import pytest
import torch
from torch import Tensor, nn

from modeconn import ActivationMatching, Permutation, PermutationSpec, WeightMatching, align, discover, models
from modeconn.matching import Match, match_groups, weight_matching
from modeconn.tools.memory import peak_memory
from tests.cases import clone, same_bits
from tests.symmetry.cases import CASES, ExpertBank, conv

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@cache
def pair(name: str) -> tuple[PermutationSpec, nn.Module, nn.Module]:
    """Two networks in float64, initialised independently."""
    case = BY_NAME[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        a, b = (case.build().double() for _ in range(2))
        inputs = case.inputs()
    return discover(a, inputs.double() if inputs.is_floating_point() else inputs), a, b


def moving(spec: PermutationSpec, model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.named_parameters() if name in spec.state}


def inner(spec: PermutationSpec, a: nn.Module, b: nn.Module) -> float:
    """The objective, up to what does not move."""
    ours, theirs = moving(spec, a), moving(spec, b)
    return float(sum((ours[name] * theirs[name]).sum() for name in ours))


def naive(spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, *, seed: int) -> Match:
    """Relabel all of b for every tree of groups, match it, and compare the whole objective, until a sweep is idle."""
    a, b = moving(spec, model_a), moving(spec, model_b)
    generator = torch.Generator().manual_seed(seed)
    found, history, groups = spec.identity(), [inner(spec, model_a, model_b)], spec.trees()
    idle = False
    while not idle:
        idle = True
        for number in torch.randperm(len(groups), generator=generator).tolist():
            similarities = unit_products(spec, {g.atom: g for g in groups[number]}, a, found.relabel(b))
            move = match_groups(spec, similarities).perms
            names = {g.name for g in groups[number]}
            moved = Permutation(spec, {n: move[n] if n in names else p for n, p in spec.identity().perms.items()})
            value = inner(spec, model_a, (moved @ found).apply(model_b))
            if value > history[-1] + 1e-9:
                found, idle = moved @ found, False
                history.append(value)
    return Match(found, history=tuple(history))


def unit_products(spec: PermutationSpec, groups: dict, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inner products of the weights of each unit of a with those of each unit of b, by group."""
    similarities: dict[str, Tensor] = {}
    for name, axes in spec.state.items():
        if name not in a:
            continue
        parts = (spec.structure.pieces(x[name], axes) for x in (a, b))
        for (x, labels), (y, _) in zip(*parts, strict=True):
            for dims in spec.structure.unit_dims(labels, groups):
                group = groups[labels[dims[-1]][0]]
                rows = [z.movedim(dims, list(range(len(dims)))).reshape(prod(group.shape), -1) for z in (x, y)]
                similarities[group.name] = similarities.get(group.name, 0) + rows[0] @ rows[1].T
    return similarities


# ---------------------------------------------------------------- the objective


TWINS = [
    "plain", "conv flatten", "residual", "option A shortcut", "u-net", "dense block", "depthwise separable",
    "squeeze and excitation", "convnext block", "attention 3hd", "attention chunk", "ordered heads", "expert bank",
    "windows", "lstm cells", "gru both ways", "glu and maxout", "weight norm",
]  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_skipping_settled_groups_changes_no_step(name: str) -> None:
    spec, a, b = pair(name)
    fast = WeightMatching(seed=3).match(spec, a, b)
    slow = naive(spec, a, b, seed=3)
    assert fast.permutation == slow.permutation
    fixed = inner(spec, a, b) - fast.history[0]  # weights that are known to the spec and do not move
    torch.testing.assert_close(torch.tensor(fast.history) + fixed, torch.tensor(slow.history))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_of_many_parts_in_any_memory_order_make_the_same_steps(memory_format: torch.memory_format) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (nn.Sequential(conv(3, 70), nn.ReLU(), conv(70, 130), nn.ReLU(), conv(130, 2)).double() for _ in "ab")
    spec = discover(a, torch.rand(2, 3, 4, 4).double())
    slow = naive(spec, a, b, seed=0)
    fast = WeightMatching().match(spec, a.to(memory_format=memory_format), b.to(memory_format=memory_format))
    assert fast.permutation == slow.permutation
    assert len(fast.history) == len(slow.history) > 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "gpt, tied", "lstm", "channel shuffle"])
def test_the_objective_rises_at_every_step_and_is_that_of_the_relabelled_networks(
    name: str, dtype: torch.dtype
) -> None:
    spec, a, b = pair(name)
    a, b = clone(a).to(dtype), clone(b).to(dtype)
    result = WeightMatching(num_starts=2).match(spec, a, b)
    assert all(y > x for x, y in pairwise(result.history))
    gained = inner(spec, a, result.permutation.apply(b)) - inner(spec, a, b)
    first = WeightMatching().match(spec, a, b)
    expected = inner(spec, a, first.permutation.apply(b)) - inner(spec, a, b)
    torch.testing.assert_close(first.history[-1] - first.history[0], expected, rtol=1e-4, atol=1e-5)
    assert gained >= expected - 1e-5


def test_a_group_is_matched_again_only_after_a_neighbour_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = []
    match_tree = weight_matching.match_tree
    monkeypatch.setattr(
        weight_matching, "match_tree", lambda groups, s: matched.append(groups[0].name) or match_tree(groups, s)
    )
    a, b = (models.mlp(6, (8,), 3, seed=s) for s in (1, 2))
    result = WeightMatching().match(discover(a), a, b)
    assert (len(matched), len(result.history)) == (1, 2)
    matched.clear()
    a, b = (models.mlp(6, (8, 8, 8, 8), 3, seed=s) for s in (1, 2))
    WeightMatching().match(discover(a), a, a)
    assert sorted(matched) == [f"layers.{i}" for i in (0, 2, 4, 6)]


def test_the_networks_and_the_global_generator_stay_as_they_were() -> None:
    a, b = (models.mlp(6, (8, 8), 3, seed=s) for s in (1, 2))
    copies = [models.mlp(6, (8, 8), 3, seed=s) for s in (1, 2)]
    state = torch.get_rng_state()
    WeightMatching(num_starts=3).match(discover(a), a, b)
    assert all(same_bits(left, right) for left, right in zip((a, b), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- the best and the planted


def test_one_hidden_layer_ends_at_the_best_of_all_relabellings() -> None:
    a, b = (models.mlp(3, (5,), 2, seed=s).double() for s in (1, 2))
    spec = discover(a)
    all_of_them = (Permutation(spec, {"layers.0": torch.tensor(p)}).apply(b) for p in permutations(range(5)))
    best = max(inner(spec, a, moved) for moved in all_of_them)
    assert inner(spec, a, align(a, b, spec=spec).model_b) == pytest.approx(best)


class SmallBank(ExpertBank):
    """Two experts of three units."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.router = nn.Linear(5, 2)
        self.w1 = nn.Parameter(torch.randn(2, 5, 3))
        self.w2 = nn.Parameter(torch.randn(2, 3, 2))


def test_blocks_with_units_inside_end_at_the_best_of_all_relabellings() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b, x = SmallBank().double(), SmallBank().double(), torch.rand(2, 5).double()
    spec = discover(a, x)
    outer, inside = (group.name for group in spec.groups)
    orders = [torch.tensor(p) for p in permutations(range(3))]
    best = max(
        inner(spec, a, Permutation(spec, {outer: torch.tensor(p), inside: torch.stack([q, r])}).apply(b))
        for p, q, r in product(permutations(range(2)), orders, orders)
    )
    assert inner(spec, a, align(a, b, spec=spec).model_b) == pytest.approx(best)


RECOVERABLE = [
    "plain", "conv flatten", "residual", "u-net", "dense block", "depthwise separable", "squeeze and excitation",
    "grouped", "channel shuffle", "convnext block", "attention 3hd", "attention chunk", "gpt, tied", "expert bank",
    "windows", "lstm cells",
]  # fmt: skip


@pytest.mark.parametrize("name", RECOVERABLE)
def test_a_planted_permutation_is_recovered_with_its_blocks(name: str, generator: torch.Generator) -> None:
    spec, model, _ = pair(name)
    for _ in range(3):
        planted = spec.random(generator)
        found = WeightMatching(num_starts=4).match(spec, model, planted.apply(model)).permutation
        assert found @ planted == spec.identity()


def test_groups_that_share_a_weight_inside_blocks_are_also_moved_one_by_one(generator: torch.Generator) -> None:
    """Query units and repeats of key heads meet in one weight; a wrong order of the one hides that of the other."""
    spec, model, _ = pair("gpt, tied")
    for _ in range(5):
        planted = spec.random(generator)
        assert WeightMatching().match(spec, model, planted.apply(model)).permutation @ planted == spec.identity()


def test_single_precision_recovers_a_planted_permutation_under_noise(generator: torch.Generator) -> None:
    a = models.mlp(30, (40, 40, 40), 5, seed=1)
    spec = discover(a)
    planted = spec.random(generator)
    b = planted.apply(a)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.2 * p.std() * torch.randn(p.shape, generator=generator))
    assert WeightMatching().match(spec, a, b).permutation @ planted == spec.identity()


@pytest.mark.parametrize("start", ["none", "random"])
def test_units_without_weights_are_where_b_has_them_and_are_counted(start: str, generator: torch.Generator) -> None:
    a = models.mlp(6, (12, 10), 3, seed=1)
    dead = torch.tensor([2, 5, 7])
    with torch.no_grad():
        for weight in (a.layers[0].weight, a.layers[0].bias, a.layers[2].weight.T):
            weight[dead] = 0
    spec = discover(a)
    planted = spec.random(generator).perms
    live = torch.tensor([i for i in range(12) if i not in dead])
    first = torch.arange(12)
    first[live] = live[torch.randperm(len(live), generator=generator)]
    planted = Permutation(spec, {**planted, "layers.0": first})
    method = WeightMatching(start=None if start == "none" else spec.random(generator))
    result = method.match(spec, a, planted.apply(a))
    assert result.permutation @ planted == spec.identity()
    assert result.constant_units == {"layers.0": (3, 3), "layers.2": (0, 0)}


# ---------------------------------------------------------------- starts


def test_the_seed_decides_the_result() -> None:
    spec, a, b = pair("residual")
    first, again = (WeightMatching(seed=3, num_starts=3).match(spec, a, b) for _ in range(2))
    assert (first.permutation, first.history) == (again.permutation, again.history)


def test_more_starts_are_never_worse() -> None:
    a, b = (models.mlp(8, (12, 12, 12), 3, seed=s) for s in (1, 2))
    spec = discover(a)
    ends = [WeightMatching(num_starts=n).match(spec, a, b).history[-1] for n in (1, 2, 4, 8)]
    assert ends == sorted(ends)
    assert ends[-1] > ends[0]


def test_a_chain_begins_where_the_first_method_ended_and_is_no_worse(generator: torch.Generator) -> None:
    a, b = (models.mlp(8, (12, 12), 3, seed=s).double() for s in (1, 2))
    spec = discover(a)
    loader = [(torch.rand(50, 8, generator=generator).double(), None)]
    before = ActivationMatching().match(spec, a, b, loader).permutation
    chained, given = (WeightMatching(start=s).match(spec, a, b, loader) for s in (ActivationMatching(), before))
    assert (chained.permutation, chained.history) == (given.permutation, given.history)
    gained = inner(spec, a, chained.permutation.apply(b)) - inner(spec, a, before.apply(b))
    assert gained == pytest.approx(chained.history[-1] - chained.history[0])
    assert gained > 0


@pytest.mark.parametrize("name", ["attention 3hd", "expert bank", "depthwise separable"])
def test_a_start_with_blocks_that_is_already_right_stays(name: str, generator: torch.Generator) -> None:
    spec, a, _ = pair(name)
    planted = spec.random(generator)
    result = WeightMatching(start=planted.inverse()).match(spec, a, planted.apply(a))
    assert result.permutation == planted.inverse()
    assert len(result.history) == 1


# ---------------------------------------------------------------- bad input


def test_endpoints_that_do_not_fit_are_refused() -> None:
    a, b, wide = (models.mlp(8, (n,), 2, seed=n) for n in (5, 5, 6))
    spec = discover(a)
    with pytest.raises(ValueError, match=r"'layers.0.weight'.*\(5, 8\).*\(6, 8\)"):
        WeightMatching().match(spec, a, wide)
    with pytest.raises(ValueError, match=r"spec is of another model.*\(6, 8\)"):
        WeightMatching().match(spec, wide, wide)
    with torch.no_grad():
        b.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' of b holds NaN or infinite weights \(1 of 40\)"):
        WeightMatching().match(spec, a, b)


def test_starts_that_do_not_fit_are_refused() -> None:
    a, wide = (models.mlp(8, (n,), 2) for n in (5, 6))
    with pytest.raises(ValueError, match="start= is a permutation of another spec"):
        WeightMatching(start=discover(wide).identity()).match(discover(a), a, a)
    with pytest.raises(ValueError, match="ActivationMatching compares activations, so it needs data: pass loader="):
        WeightMatching(start=ActivationMatching()).match(discover(a), a, a)


@pytest.mark.parametrize("name", ["num_sweeps", "num_starts"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {name}=0"):
        WeightMatching(**{name: 0})


def test_beside_the_weights_there_is_one_matrix_of_products_and_one_of_costs() -> None:
    def peak(num_units: int) -> int | None:
        a, b = (nn.Sequential(nn.Linear(3, num_units), nn.ReLU(), nn.Linear(num_units, 2)) for _ in range(2))
        with torch.no_grad():  # almost relabelled already: the search is short
            b[0].weight.copy_(a[0].weight)
        spec = discover(a, torch.randn(2, 3))
        with peak_memory(torch.device("cpu")) as found:
            WeightMatching(num_sweeps=1).match(spec, a, b)
        return found.num_bytes

    num_units = 2_000
    peak(4)  # what is imported once
    num_bytes = peak(num_units)
    assert num_bytes is None or num_bytes < 1.25 * (4 + 8) * num_units**2
