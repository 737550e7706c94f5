"""Discovery on written-out networks and on the zoo: right, complete, and honest about what it leaves out."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.torch_version import TorchVersion

import modeconn
from modeconn import RULES, ActivationMatching, PermutationSpec, WeightMatching, discover, models
from modeconn.network.sketch import sketch
from modeconn.symmetry import UnknownOperatorWarning, VerificationError
from modeconn.symmetry.axes import Axis
from modeconn.symmetry.execute import _grouped_matmul
from modeconn.symmetry.explore import Exploration, example_for
from modeconn.symmetry.export import export
from modeconn.symmetry.rules.contractions import contraction
from modeconn.symmetry.walk import Traced, Walk
from tests.symmetry.cases import CASES, SPELLINGS, Case, Lambda, attention
from tests.symmetry.oracle import largest_change

ZOO = {
    "mlp": lambda: models.mlp(64, (16, 12), 10),
    **{name: getattr(models, name) for name in models.names() if name != "mlp"},
}


COUNTED = {
    # stem (shared by stage 1), one stream each for stages 2 and 3, one inside each of 3 x 5 blocks
    "resnet32": 3 + 15,
    "resnet20": 3 + 9,
    # 57 in 9 inception blocks (6 each) and 3 stem convolutions, and a convolution and a linear layer in both heads
    "googlenet": 3 + 9 * 6 + 2 * 2,
    # a group per convolution and hidden linear layer
    "vgg16_bn": 13 + 2,
    "tinyten": 8,
}
"""Groups of models of the zoo, as a person counts them."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_are_those_derived_by_hand_and_keep_every_tensor(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    spec = discover(model, inputs)
    assert sorted(group.shape for group in spec.groups) == sorted(case.groups)
    assert spec.verify(model, inputs) < 1e-10
    torch.manual_seed(0)
    drawn, inputs = sketch(case.build), case.inputs()  # a model without values, as files of any size are read with
    assert all(parameter.is_meta for parameter in drawn.parameters())
    try:
        found = discover(drawn, inputs)
    except ValueError as error:  # only a run with values can find them
        assert spec.one_path and "torch.export cannot follow" in str(error)
    else:
        assert found == spec


@pytest.mark.parametrize("name", ZOO)
def test_relabelling_a_zoo_model_keeps_every_tensor_and_moves_as_many_groups_as_a_person_counts(name: str) -> None:
    model = ZOO[name]()
    spec = discover(model)
    assert spec.groups and len(spec.groups) == COUNTED.get(name, len(spec.groups))
    assert spec.verify(model, tolerance=1e-10) < 1e-10


def test_spellings_of_one_attention_have_one_symmetry_group() -> None:
    sizes = [discover(attention(spelling), torch.rand(2, 6, 5)).log10_size for spelling in SPELLINGS]
    torch.testing.assert_close(torch.tensor(sizes), torch.full((len(sizes),), sizes[0]))


def test_a_vit_b_layer_has_10_to_the_2147_attention_relabellings() -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(3, 768), nn.MultiheadAttention(768, 12, batch_first=True))
        model = _CallsAttention(layer)
        spec = discover(model, torch.empty(2, 4, 3))
    attention = sum(group.log10_size for group in spec.groups if group.size != 768)
    assert attention == pytest.approx(2147, abs=1)  # log10 of 12! x (64!)^24


class _CallsAttention(nn.Module):
    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts[0](x)
        return self.parts[1](h, h, h, need_weights=False)[0].sum(-1)


def _forgetful(number: int) -> dict:
    """Rules that forget, at the ``number``-th linear layer met in each graph, that its input meets its weight."""
    met = [0]

    def linear(walk: Walk, input, weight, bias=None):
        met[0] += 1
        if (met[0] - 1) % 41 != number:
            return RULES[torch.ops.aten.linear](walk, input, weight, bias)
        if bias is not None:
            walk.unify(weight.axes[0], bias.axes[0])
        for tensor in (input, weight):
            walk.contract(tensor, tensor.axes[1])
        return contraction(walk, [input, weight], ["aX", "OI"], "aO")

    return {**RULES, torch.ops.aten.linear: linear}


def test_one_wrong_axis_in_40_groups_of_a_plain_network_is_seen_wherever_it_is() -> None:
    """Comparing outputs alone would miss the first ones by far: their effect on the output is 1e-16."""
    torch.manual_seed(0)
    layers = [layer for _ in range(41) for layer in (nn.Linear(6, 6), nn.ReLU())][:-1]
    model, example = nn.Sequential(*layers), torch.rand(2, 6)
    graphs = [export(model, example_for(model, example), training=mode) for mode in (False, True)]

    def spec_with(rules: dict) -> modeconn.PermutationSpec:
        walk = Exploration(model, rules)
        for graph in graphs:
            walk.run(graph)
        return PermutationSpec.of(walk.finish())

    right = spec_with(RULES)
    assert len(right.groups) == 40
    assert right.verify(model, example) < 1e-10
    for number in (1, 2, 3, 5, 8, 13, 21, 34, 39, 40):  # the first layer reads the input, which does not move
        wrong = spec_with(_forgetful(number))
        assert len(wrong.groups) == 41
        with pytest.raises(VerificationError, match=rf"group .*'{2 * number - 2}'|group .*'{2 * number}#2'"):
            wrong.verify(model, example)


def test_groups_of_two_units_that_can_only_move_alike_are_told_apart_whatever_the_seed() -> None:
    """Drawn once, both would move, or neither, in half of the cases."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    def untied(walk: Walk, x: Traced, y: Traced) -> list[Axis]:
        walk.contract(y, y.axes[1])
        return list(x.axes)

    torch.manual_seed(0)
    model, x = Gated(), torch.rand(2, 3)
    wrong = discover(model, x, rules={**RULES, torch.ops.aten.mul.Tensor: untied})
    assert [group.size for group in wrong.groups] == [2, 2]
    for seed in range(20):
        with pytest.raises(VerificationError):
            wrong.verify(model, x, seed=seed)
        assert discover(model, x).verify(model, x, seed=seed) < 1e-9


def test_train_mode_constrains_what_eval_mode_does_not_show() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.auxiliary = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor):
            h = self.body(x).relu()
            return (self.head(h), self.auxiliary(h)) if self.training else self.head(h)

    model = Auxiliary()
    (group,) = discover(model, torch.rand(2, 4)).groups
    assert ("auxiliary.weight", 1) in group.places


def test_discovery_leaves_the_model_and_random_state_as_they_were() -> None:
    model = models.resnet20(seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    discover(model).verify(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_on_the_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        model = models.resnet20()
    assert discover(model) == discover(models.resnet20())


def test_half_precision_models_are_analysed_and_proved_in_float64() -> None:
    model = models.resnet20().to(torch.bfloat16)
    assert discover(model).verify(model) < 1e-10


@library.custom_op("modeconn_test::scan", mutates_args=())
def scan(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@scan.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Scanner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.ops.modeconn_test.scan(self.first(x))).relu())


def test_an_unknown_operator_costs_freedom_and_is_named_with_its_price() -> None:
    with pytest.warns(UnknownOperatorWarning, match=r"modeconn_test.scan.default .* 1 axis stays fixed \(6 units\)"):
        spec = discover(_Scanner(), torch.rand(2, 4))
    assert [group.name for group in spec.groups] == ["second"]
    assert spec.fixed["first.weight"][0] == "read by modeconn_test.scan.default, which has no rule"
    assert spec.verify(_Scanner(), torch.rand(2, 4)) < 1e-10


@pytest.mark.parametrize(
    "key", [torch.ops.modeconn_test.scan.default, torch.ops.modeconn_test.scan, "modeconn_test::scan"], ids=str
)
def test_a_rule_given_by_argument_makes_an_operator_known(key) -> None:
    def rule(walk: Walk, x):
        walk.fix(x.axes[-1], "scanned in order")
        return [*x.axes[:-1], walk.fixed(walk.shape[-1], "scanned in order")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = discover(_Scanner(), torch.rand(2, 4), rules={**RULES, key: rule})
    assert spec.unknown == ()
    assert spec.fixed["first.weight"][0] == "scanned in order"


def test_a_rule_that_returns_wrong_sizes_is_named() -> None:
    rules = {**RULES, torch.ops.modeconn_test.scan: lambda walk, x: [walk.free(3), walk.free(3)]}
    with pytest.raises(ValueError, match=r"rule for modeconn_test.scan.default returned axes of \(3, 3\) positions"):
        discover(_Scanner(), torch.rand(2, 4), rules=rules)


def test_frozen_parameters_stay_fixed_with_all_that_moves_with_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = discover(model, torch.rand(2, 4), freeze=["2.*"])
    assert spec.groups == ()
    spec = discover(model, torch.rand(2, 4), freeze=["0.bias"])
    assert [group.name for group in spec.groups] == ["2"]


def test_a_freeze_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"freeze='nose\.\*' matches no parameter or buffer. The model has '0.weight'"):
        discover(nn.Sequential(nn.Linear(2, 2)), torch.rand(2, 2), freeze=["nose.*"])


def test_parameters_in_neither_graph_are_listed_and_stay() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.used(x))

    spec = discover(Unused(), torch.rand(2, 3))
    assert spec.unread == ("unused.bias", "unused.weight")
    assert spec.fixed["unused.weight"] == ("in neither graph", "in neither graph")


def test_rows_of_a_table_that_this_input_does_not_reach_stay() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Parameter(torch.rand(9, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x[..., None] + self.table[: x.shape[1]])

    spec = discover(Positions(), torch.rand(2, 4))
    assert [group.places for group in spec.groups] == [(("table", 1), ("out.weight", 1))]
    model = Positions()
    moved = spec.random().apply(model)
    torch.testing.assert_close(moved(x := torch.rand(2, 9)), model(x))


def test_tied_weights_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).relu())

    model, ids = Tied(), torch.arange(6).view(2, 3)
    (group,) = discover(model, ids).groups
    assert group.places == (("embed.weight", 1), ("head.weight", 1))
    moved = discover(model, ids).random(torch.Generator().manual_seed(1)).apply(model)
    assert moved.head.weight is moved.embed.weight
    torch.testing.assert_close(moved(ids), model(ids))


def test_keyword_inputs_and_dictionary_outputs_are_understood() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            h = (self.a(left) + self.a(right)).relu()
            return {"logits": self.b(h), "norm": h.norm(dim=-1)}

    spec = discover(Keywords(), {"right": torch.rand(2, 3), "left": torch.rand(2, 3)})
    assert [group.shape for group in spec.groups] == [(5,)]
    assert spec.verify(Keywords(), {"right": torch.rand(2, 3), "left": torch.rand(2, 3)}) < 1e-10


@dataclass
class _Output:
    logits: Tensor
    cache: object


class _Cache:
    def __init__(self, *kept: Tensor) -> None:
        self.kept = list(kept)


def test_tensors_inside_returned_objects_are_outputs_too() -> None:
    class Remembers(nn.Module):
        def __init__(self, keep: bool) -> None:
            super().__init__()
            self.a, self.b, self.keep = nn.Linear(3, 5), nn.Linear(5, 2), keep

        def forward(self, x: Tensor) -> _Output:
            h = self.a(x).relu()
            return _Output(self.b(h), _Cache(h) if self.keep else _Cache())

    assert [group.shape for group in discover(Remembers(keep=False), torch.rand(2, 3)).groups] == [(5,)]
    with pytest.warns(
        UserWarning, match=r"the outputs \"cache\['kept'\]\[0\]\", which come after the first, keep 5 hidden"
    ):
        assert discover(Remembers(keep=True), torch.rand(2, 3)).groups == ()
    for outputs in ("logits", lambda returned: returned.logits):
        found = discover(Remembers(keep=True), torch.rand(2, 3), outputs=outputs)
        assert [group.shape for group in found.groups] == [(5,)]


def test_positions_found_by_argmax_fix_the_axis_only_where_they_are_read() -> None:
    class Best(nn.Module):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.a, self.b, self.read = nn.Linear(3, 5), nn.Linear(5, 2), read

        def forward(self, x: Tensor):
            h = self.a(x)
            values, positions = h.max(-1, keepdim=True)
            return self.b(h) + values + (positions if self.read else 0)

    x = torch.rand(2, 3)
    assert len(discover(Best(read=False), x).groups) == 1
    assert len(discover(Best(read=True), x).groups) == 0


def test_dead_code_does_not_constrain() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h[:, 2] + 1
            return self.b(h)

    assert [group.shape for group in discover(Dead(), torch.rand(2, 3)).groups] == [(5,)]


def test_a_model_without_hidden_units_has_no_group_and_aligns_by_the_identity() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert discover(a, torch.rand(2, 3)).groups == ()
    assert modeconn.align(a, b, example_input=torch.rand(2, 3)).permutation.num_moved == 0


def test_a_missing_example_input_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"Linear has to be run once .* pass example_input="):
        discover(nn.Linear(3, 2))


def test_an_example_input_of_the_wrong_shape_gives_the_models_own_error() -> None:
    with pytest.raises(
        ValueError, match=r"Linear does not run on example_input of shape \(2, 4\): RuntimeError: mat1 and"
    ):
        discover(nn.Linear(3, 2), torch.rand(2, 4))


def test_a_model_that_cannot_be_exported_says_why_and_what_helps(monkeypatch) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    # Such a model is recorded in one run, unless even that fails, as it does without values.
    monkeypatch.setattr("modeconn.symmetry.export.record", None)
    with pytest.raises(ValueError, match=r"torch.export cannot follow Branch in eval mode: .*What usually helps"):
        discover(Branch(), torch.rand(2, 4))


def test_a_model_that_exports_in_eval_mode_only_is_analysed_with_a_warning(monkeypatch) -> None:
    class DropsLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h if not self.training or torch.rand(()) > 0.5 else h.relu())

    with pytest.warns(UserWarning, match=r"cannot follow DropsLayers, so one run on the example input was recorded"):
        assert [group.shape for group in discover(DropsLayers(), torch.rand(2, 3)).groups] == [(5,)]
    monkeypatch.setattr("modeconn.symmetry.export.record", None)
    with pytest.warns(UserWarning, match=r"cannot follow DropsLayers in train mode: .* hold for eval mode only"):
        spec = discover(DropsLayers(), torch.rand(2, 3))
    assert [group.shape for group in spec.groups] == [(5,)]


def test_a_model_that_does_not_run_in_train_mode_is_an_error() -> None:
    class NeedsMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.auxiliary = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) + (self.auxiliary(h) if self.training else 0)

    with pytest.raises(ValueError, match=r"NeedsMore does not run on example_input"):
        discover(NeedsMore(), torch.rand(2, 3))


def test_looking_up_one_position_of_an_axis_fixes_it() -> None:
    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).gather(0, torch.zeros(1, 1, dtype=torch.int64)))

    assert discover(Gathers(), torch.rand(2, 3)).groups == ()


TO_OTHER_PLACES = {
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(1, 1),
    "sum up": lambda h: h.cumsum(1),
    "transform": lambda h: torch.fft.fft(h, dim=1).real,
    "index": lambda h: h[:, torch.tensor([1, 2, 3, 0])],
    "select": lambda h: h.index_select(1, torch.tensor([1, 2, 3, 0])),
    "gather": lambda h: h.gather(1, torch.tensor([1, 2, 3, 0])[None, :, None].expand_as(h)),
    "scatter": lambda h: h.scatter_add(1, torch.tensor([1, 2, 3, 0])[None, :, None].expand_as(h), h),
    "write": lambda h: h.index_put((torch.arange(2)[:, None], torch.tensor([1, 2, 3, 0])), h),
    "add": lambda h: h.index_add(1, torch.tensor([1, 2, 3, 0]), h),
    "multiply": lambda h: torch.arange(16.0).view(4, 4) @ h,
    "pool": lambda h: nn.functional.max_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "shift": lambda h: nn.functional.pad(h, (0, 0, 1, -1)),
    "slice": lambda h: torch.cat([h[:, 1:], h[:, :1]], 1),
    "resize": lambda h: nn.functional.interpolate(h.mT, scale_factor=2.0, mode="linear").mT[:, 1::2],
}


@pytest.mark.parametrize("move", TO_OTHER_PLACES.values(), ids=TO_OTHER_PLACES)
def test_units_move_alike_along_an_axis_whose_positions_are_exchanged_or_mixed(move) -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read = nn.Parameter(torch.rand(4, 6)), nn.Parameter(torch.rand(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            h = move(x[..., None] * self.write) + x[..., None]  # the sum makes the new positions those of x again
            return (h.relu() * self.read).sum((1, 2))

    spec = discover(Moves(), torch.rand(2, 4))
    assert [group.shape for group in spec.groups] == [(6,)]
    assert spec.verify(Moves(), torch.rand(2, 4)) < 1e-10


def test_units_may_differ_along_an_axis_that_stays_in_place() -> None:
    class Stays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read = nn.Parameter(torch.rand(4, 6)), nn.Parameter(torch.rand(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return ((x[..., None] * self.write + x[..., None]).relu() * self.read).sum((1, 2))

    assert [group.shape for group in discover(Stays(), torch.rand(2, 4)).groups] == [(4, 6)]


needs_grouped_products = pytest.mark.skipif(
    not hasattr(torch, "_grouped_mm"), reason="this torch has no operator for the products of several experts"
)


class _GroupedExperts(nn.Module):
    """Tokens sorted by expert, and one operator for the products of all experts: it runs in half precision only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.w1, self.w2 = nn.Parameter(torch.rand(3, 8, 16)), nn.Parameter(torch.rand(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        expert = self.router(h).argmax(-1)
        order = expert.argsort()
        ends = torch.histc(expert.float(), 3, 0, 2).cumsum(0).to(torch.int32)
        inside = torch._grouped_mm(h[order], self.w1, offs=ends).relu()
        inside, ends = self.between(inside, ends)
        return self.head(h.index_add(0, order, torch._grouped_mm(inside, self.w2, offs=ends)))

    def between(self, inside: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return inside, ends


class _InReverse(_GroupedExperts):
    """The second product takes the rows of the first one from the last to the first, so that experts mix."""

    def between(self, inside: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return inside.flip(0), ends


class _CountedAnew(_GroupedExperts):
    """The second product counts the rows off in another way than the first one."""

    def between(self, inside: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return inside, torch.tensor([1, 9, 24], dtype=torch.int32) + 0 * ends


class _Averaged(_GroupedExperts):
    """All rows are shifted by their mean, over experts too."""

    def between(self, inside: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        return inside - inside.mean(0), ends


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(_GroupedExperts, (3, 16)), (_InReverse, (16,)), (_CountedAnew, (16,)), (_Averaged, (16,))],
    ids=lambda value: getattr(value, "__name__", ""),
)
@needs_grouped_products
def test_sorted_rows_have_the_units_of_their_expert_until_rows_mix(kind: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = kind().bfloat16(), torch.randn(24, 5).bfloat16()
    spec = discover(model, x)
    assert [(group.shape, group.places[-1][0]) for group in spec.groups] == [((8,), "head.weight"), (shape, "w2")]
    assert spec.verify(model, x) < 1e-10
    moved = spec.random(torch.Generator().manual_seed(1)).apply(model)
    torch.testing.assert_close(moved(x), model(x), rtol=0.02, atol=0.02)
    assert PermutationSpec.from_json(spec.to_json()) == spec


class _BiasedExperts(nn.Module):
    """Experts with biases, which each row looks up by the number of its expert: what ``way`` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.w1, self.w2 = nn.Parameter(torch.rand(3, 8, 16)), nn.Parameter(torch.rand(3, 16, 8))
        self.b1, self.b2 = nn.Parameter(torch.rand(3, 16)), nn.Parameter(torch.rand(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        expert = self.router(h).argmax(-1)
        numbers, order = expert.sort()
        if self.way == "indexed":
            order = expert.argsort()
            numbers = expert[order]
        counts = torch.bincount(expert, minlength=3) if self.way == "counted" else torch.histc(numbers.float(), 3, 0, 2)
        ends = counts.cumsum(0).to(torch.int32)
        if self.way == "unsorted":
            numbers = expert
        if self.way == "from the largest":
            numbers = expert.sort(descending=True)[0]
        if self.way == "written":
            numbers.clamp_(max=1)
        inside = (torch._grouped_mm(h[order], self.w1, offs=ends) + self.b1[numbers]).relu()
        return self.head(h.index_add(0, order, torch._grouped_mm(inside, self.w2, offs=ends) + self.b2[numbers]))


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        ("sorted", (3, 16)),
        ("indexed", (3, 16)),
        ("counted", (3, 16)),
        ("unsorted", (16,)),
        ("from the largest", (16,)),
        ("written", (16,)),
    ],
)
@needs_grouped_products
def test_biases_by_number_move_with_their_expert_where_rows_are_sorted(way: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = _BiasedExperts(way).bfloat16(), torch.randn(24, 5).bfloat16()
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == sorted([(8,), shape])
    assert spec.verify(model, x) < 1e-10
    moved = spec.random(torch.Generator().manual_seed(1)).apply(model)
    torch.testing.assert_close(moved(x), model(x), rtol=0.02, atol=0.02)


@needs_grouped_products
def test_experts_are_aligned_by_their_weights_and_activations_say_that_they_cannot() -> None:
    torch.manual_seed(0)
    model, x = _GroupedExperts(), torch.randn(64, 5)
    spec = discover(model.bfloat16(), x.bfloat16())
    planted = spec.random(torch.Generator().manual_seed(1)).apply(model)
    found = modeconn.align(model, planted, method=WeightMatching(), spec=spec)
    assert all(torch.equal(a, b) for a, b in zip(found.model_b.parameters(), model.parameters(), strict=True))
    with pytest.warns(UserWarning, match=r"activations say nothing of 'w1' \(16 units"):
        modeconn.align(model, planted, [x.bfloat16()], method=ActivationMatching(), spec=spec)


@pytest.mark.parametrize(("left", "right"), [((8, 16), (3, 16, 8)), ((3, 8, 16), (16, 8)), ((8, 8), (8, 16))])
@needs_grouped_products
def test_grouped_products_are_the_same_in_float64(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y, ends = torch.rand(left), torch.rand(right), torch.tensor([2, 5, 8], dtype=torch.int32)
    exact = _grouped_matmul(x.double(), y.double(), ends)
    torch.testing.assert_close(torch._grouped_mm(x, y, offs=ends).double(), exact, rtol=1e-5, atol=1e-5)


REST = {
    "an inverse": lambda h, w: torch.linalg.inv(w[:, :3] @ w[:, :3].mT + torch.eye(4)) @ h,
    "distances": lambda h, w: torch.cdist(h, w).softmax(-1) @ w,
    "one distance": lambda h, w: h * torch.dist(h, h + w),
    "all of a tensor": lambda h, w: h - h.median() + h.quantile(0.5, -1, keepdim=True),
    "unequal repeats": lambda h, w: torch.repeat_interleave(h, torch.tensor([1, 0, 2, 1]), 1, output_size=4),
    "a part written": lambda h, w: h.select_scatter(w[0].expand(2, -1), 1, 0).slice_scatter(h[:, :2].exp(), 1, 1, 3),
    "unpooling": lambda h, w: nn.functional.max_unpool1d(
        *nn.functional.max_pool1d(h.mT, 2, return_indices=True), 2
    ).mT,
    "columns": lambda h, w: nn.functional.fold(
        nn.functional.unfold(h.mT.unflatten(2, (2, 2)), 3, padding=1), 2, 3, padding=1
    ).flatten(2).mT,
}  # fmt: skip


if TorchVersion(torch.__version__) < "2.12":  # whose torch.export reads a tensor's values for quantiles
    del REST["all of a tensor"]


@pytest.mark.parametrize("rest", REST.values(), ids=REST)
def test_units_move_freely_past(rest) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.w, self.head = nn.Linear(5, 6), nn.Parameter(torch.rand(4, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(rest(self.stem(x), self.w))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownOperatorWarning)
        spec = discover(Passes(), torch.rand(2, 4, 5))
    assert any(("stem.weight", 0) in group.places and group.size == 6 for group in spec.groups)
    assert spec.verify(Passes(), torch.rand(2, 4, 5)) < 1e-9


def test_bags_of_embeddings_move_their_columns() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 6), nn.Linear(6, 2))
    (group,) = discover(model, torch.arange(6).view(2, 3)).groups
    assert group.places == (("0.weight", 1), ("1.weight", 1))
    assert discover(model, torch.arange(6).view(2, 3)).verify(model, torch.arange(6).view(2, 3)) < 1e-10


def test_random_numbers_written_in_place_fix_what_they_are_written_to() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            mask = torch.zeros_like(h)
            mask.bernoulli_(0.5)
            return self.b(h * mask)

    assert discover(Masked(), torch.rand(2, 3)).groups == ()


def test_a_sum_over_an_axis_meets_one_index_of_it() -> None:
    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.rand(3, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x[:, :1] * (self.w.sum(0) + self.w[0]))

    spec = discover(Meets(), torch.rand(2, 3))
    assert (6,) in [group.shape for group in spec.groups]
    assert spec.verify(Meets(), torch.rand(2, 3)) < 1e-10


def test_a_state_made_in_forward_is_proved_in_float64_too() -> None:
    class MakesState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x, torch.zeros(x.shape[0], 5)))

    spec = discover(MakesState(), torch.rand(2, 3))
    assert [group.shape for group in spec.groups] == [(5,)]
    assert spec.verify(MakesState(), torch.rand(2, 3)) < 1e-10


def test_the_spec_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert repr(discover(model, torch.zeros(2, 4))) == (
        "PermutationSpec(1 group, 8 units)\n  0  8 units  0.weight[0]  0.bias[0]  2.weight[1]"
    )


def test_every_operator_named_in_the_rules_exists() -> None:
    assert len(RULES) > 200


def test_a_report_says_what_moves_what_does_not_and_why() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownOperatorWarning)
        report = discover(_Scanner(), torch.rand(2, 4)).report()
    text = repr(report)
    assert text.startswith("1 group, 10^2.1 relabellings; ")
    assert "read by modeconn_test.scan.default, which has no rule" in text
    assert "no rule for modeconn_test.scan.default (in the model itself)" in text
    data = json.loads(report.to_json())
    assert data["groups"][0]["shape"] == [5]
    assert data["fixed"]["output"] == [["third.weight", 0, 2], ["third.bias", 0, 2]]
    # second (35) and third.weight (10) of 77 weights move
    assert report.share_moving == pytest.approx((30 + 5 + 10) / (24 + 6 + 30 + 5 + 10 + 2))
    assert "<table>" in report._repr_html_()


# ---------------------------------------------------------------- met in published architectures


class PositionTable(nn.Module):
    """Positions go through dropout before they are cut to the length of the input: later rows wait for longer ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))
        self.first, self.last, self.dropout = nn.Linear(3, 8), nn.Linear(8, 2), nn.Dropout(0.1)

    def forward(self, x):
        return self.last((self.first(x) + self.dropout(self.table)[: x.shape[1]]).relu())


def test_rows_that_only_a_longer_input_reaches_stay():
    torch.manual_seed(0)
    model = PositionTable().double().eval()
    spec = discover(model, torch.rand(2, 5, 3, dtype=torch.float64))
    assert [group.shape for group in spec.groups] == [(8,)]
    relabelled = spec.random(torch.Generator().manual_seed(0)).apply(model)
    for length in (5, 12):
        x = torch.rand(2, length, 3, dtype=torch.float64)
        torch.testing.assert_close(relabelled(x), model(x))


class TwoTables(nn.Module):
    """One hidden axis, read at single rows of two tables of different heights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(x[:, :1] * (self.a.sum(0) + self.b.sum(0)) * self.a[0] * self.b[2])


class Blur(nn.Module):
    """One filter for all channels, repeated in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.register_buffer("filter", torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(6, 1, 1, 1), persistent=False)

    def forward(self, x):
        return self.last(nn.functional.conv2d(self.first(x), self.filter, groups=6).relu().mean((2, 3)))


class OverTime(nn.Module):
    """A convolution along time has one tap along the hidden units: they stay free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 6), nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.mix(self.first(x)[:, None])[:, 0].relu())


class Centred(nn.Module):
    """The mean of what is centred is rounding, and says nothing about a relabelling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        h = h - h.mean(-1, keepdim=True)
        return self.last(h.relu() + h.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (TwoTables(), torch.rand(2, 3)),
        (Blur(), torch.rand(2, 3, 8, 8)),
        (OverTime(), torch.rand(2, 5, 3)),
        (Centred(), torch.rand(3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_six_hidden_units_are_found(model, x):
    spec = discover(model, x)
    assert [group.shape for group in spec.groups] == [(6,)]
    assert spec.verify(model, x) < 1e-9


def test_a_second_name_of_a_tied_weight_is_not_reported_as_unread():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert discover(model, torch.rand(2, 6)).unread == ()


class DividedByOneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) / self.first.bias.exp().sum()


def test_rounding_of_a_single_number_is_measured_against_its_own_size() -> None:
    model, x = DividedByOneNumber(), torch.zeros(2, 4)
    assert modeconn.discover(model, x).verify(model, x) < 1e-13


class Masked(nn.Module):
    """An encoder with a causal mask, which torch recognises by its values unless it is told what it is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x):
        return self.head(self.encoder(self.embed(x), mask=self.mask.to(x)))


class Both(nn.Module):
    """An encoder and a decoder with a mask that is made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Transformer(8, 2, 1, 1, 12, batch_first=True, dropout=0.0), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.both(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5).to(x)))


@pytest.mark.parametrize(("make", "width"), [(Masked, 4), (Both, 8)])
def test_causal_masks_need_not_be_announced(make, width):
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.rand(2, 5, width, dtype=torch.float64)
    spec = discover(model, x)
    assert spec.verify(model, x) < 1e-9 and spec.num_units > 12
    moved = spec.random(torch.Generator().manual_seed(0)).apply(model)
    torch.testing.assert_close(moved(x), model(x))


# ---------------------------------------------------------------- sizes that depend on values


class Experts(nn.Module):
    """The textbook loop over experts: each takes the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(-1).max(-1)
        y = x.new_zeros(x.shape[0], 8)
        for k, expert in enumerate(self.experts):
            rows = torch.where(choice == k)[0]
            y.index_add_(0, rows, expert(x[rows]) * weight[rows, None])
        return self.out(y.relu())


def test_experts_that_take_the_rows_that_choose_them_are_free() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(12, 4)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(8,), (16,), (16,), (16,)]
    assert spec.verify(model, x) < 1e-12
    assert largest_change(spec, model, x) < 1e-12
    planted = spec.random(torch.Generator().manual_seed(1))
    data = [(torch.randn(200, 4), None) for _ in range(3)]
    method = WeightMatching(start=ActivationMatching())
    with pytest.warns(UserWarning, match="or only for entries that values choose"):
        found = modeconn.align(model, planted.apply(model), data, method=method)
    assert all(torch.equal(x, y) for x, y in zip(found.model_b.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:activations say nothing of")
def test_networks_whose_experts_take_other_rows_are_aligned() -> None:
    torch.manual_seed(0)
    a, b = Experts(), Experts()
    data = [(torch.randn(50, 4), None) for _ in range(3)]
    found = modeconn.align(a, b, data)
    torch.testing.assert_close(found.model_b(data[0][0]), b(data[0][0]))
    assert found.permutation.num_moved > 0


def rows_of_a_mask(h: Tensor, x: Tensor) -> Tensor:
    return h[x[:, 0] > 0]


def rows_put_back(h: Tensor, x: Tensor) -> Tensor:
    chosen, out = x[:, 0] > 0, torch.zeros_like(h)
    out[chosen] = h[chosen].tanh()
    return out


def rows_in_another_order(h: Tensor, x: Tensor) -> Tensor:
    return torch.cat([h[x[:, 0] > 0], h[x[:, 0] <= 0]])


def rows_by_number(h: Tensor, x: Tensor) -> Tensor:
    return h.index_select(0, (x[:, 0] > 0).nonzero().squeeze(1))


def rows_in_blocks(h: Tensor, x: Tensor) -> Tensor:
    return h[x[:, 0] > 0].view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)


def rows_without_doubles(h: Tensor, x: Tensor) -> Tensor:
    places, back = (2 * x[:, 0]).long().unique(return_inverse=True)
    return h * (places.to(h)[back])[:, None]


def units_of_a_mask(h: Tensor, x: Tensor) -> Tensor:
    return h + h[:, h[0] > 0].sum(1, keepdim=True)


def values_of_a_mask(h: Tensor, x: Tensor) -> Tensor:
    return h + h.masked_select(h > 0).mean()


@pytest.mark.parametrize(
    ("choose", "groups"),
    [
        *((one, [(8,)]) for one in (rows_of_a_mask, rows_put_back, rows_in_another_order, rows_by_number)),
        (rows_in_blocks, [(2,), (2, 4)]),
        (rows_without_doubles, [(8,)]),
        (units_of_a_mask, []),
        (values_of_a_mask, []),
    ],
)
def test_sizes_that_depend_on_values_fix_their_own_axis_alone(choose, groups) -> None:
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.head(choose(m.stem(x), x)), stem=nn.Linear(5, 8), head=nn.Linear(8, 2))
    x = torch.randn(12, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == groups
    assert spec.verify(model, x) < 1e-12
    assert largest_change(spec, model, x) < 1e-12


def test_what_values_leave_empty_is_not_said_to_be_proved() -> None:
    model = Lambda(lambda m, x: m.b(m.a(x)[x[:, 0] > 2]), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    x = torch.rand(6, 3)
    with pytest.warns(UserWarning, match=r"tensors hold nothing on this example, such as 'index'"):
        discover(model, x).verify(model, x)
    x[:, 0] = 3
    assert discover(model, x).verify(model, x) < 1e-12


def test_fake_quantised_units_are_free() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        scale, zero = torch.full((8,), 0.1), torch.zeros(8, dtype=torch.int32)
        return m.head(torch.fake_quantize_per_channel_affine(m.stem(x), scale, zero, 1, -128, 127).relu())

    model, x = Lambda(forward, stem=nn.Linear(5, 8), head=nn.Linear(8, 2)), torch.randn(12, 5)
    spec = discover(model, x)
    assert [group.shape for group in spec.groups] == [(8,)]
    assert spec.verify(model, x) < 1e-9
    moved = spec.random(torch.Generator().manual_seed(0)).apply(model)
    torch.testing.assert_close(moved(x), model(x))


def test_an_output_that_holds_no_tensors_is_named_with_the_way_out() -> None:
    model = Lambda(
        lambda m, x: {"y": (y := m.b(m.a(x).relu())), "again": lambda: y}, a=nn.Linear(5, 8), b=nn.Linear(8, 3)
    )
    with pytest.raises(ValueError, match=r"returns a function, in which tensors cannot be found.* Pass outputs="):
        discover(model, torch.rand(2, 5))
    assert discover(model, torch.rand(2, 5), outputs="y").num_units == 8


def test_an_input_that_is_missing_is_asked_for() -> None:
    model = Lambda(lambda m, x, mask: m.b((m.a(x) * mask).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"missing 1 required .*'mask'\. Pass example_input=, a tuple of all"):
        discover(model, torch.rand(2, 5))


class Tied(nn.Module):
    """A decoder that reads the encoder's memory, turned round or as it is, or overlapping with it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.encoder, self.bias = nn.Linear(5, 8), nn.Linear(8, 6), nn.Parameter(torch.rand(8))
        memory = self.encoder.weight.data
        self.decoder = nn.Parameter({"turned": memory.T, "same": memory, "shifted": memory.flatten()[8:32]}[way])
        self.last, self.way = nn.Linear(8, 3), way

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(self.first(x).relu()).relu()
        weight = {"turned": Tensor.clone, "same": Tensor.t, "shifted": lambda w: w.view(4, 6)}[self.way](self.decoder)
        decoded = F.linear(code, weight)
        return self.last(F.pad(decoded, (0, 8 - decoded.shape[-1])) + self.bias)


@pytest.mark.parametrize(("way", "groups"), [("turned", [6, 8]), ("same", [6, 8]), ("shifted", [])])
def test_weights_in_one_memory_move_alike_and_stay_in_one(way: str, groups: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Tied(way), torch.rand(3, 5)
    spec = discover(model, x)
    assert sorted(group.size for group in spec.groups) == groups
    moved = spec.random(torch.Generator().manual_seed(1)).apply(model)
    assert moved.decoder.data_ptr() - moved.encoder.weight.data_ptr() == (32 if way == "shifted" else 0)
    assert model.decoder.data_ptr() - model.encoder.weight.data_ptr() == (32 if way == "shifted" else 0)
    torch.testing.assert_close(moved(x), model(x))
    if groups:
        assert not torch.equal(moved.decoder, model.decoder)
        with torch.no_grad():
            moved.encoder.weight.add_(1.0)
        assert torch.equal(moved.decoder.T if way == "turned" else moved.decoder, moved.encoder.weight)


def test_sizes_that_export_only_checks_to_be_equal_are_one_size() -> None:
    """Two masks of equal entries choose as many rows, which is known at a run alone."""

    def act(m: nn.Module, x: Tensor) -> Tensor:
        h, mask = m.a(x).relu(), x[:, 0] > 0.5
        chosen = h[mask]
        return m.b(chosen + m.c(x[x[:, 0] > 0.5]).tanh()).sum(0)

    model = Lambda(act, a=nn.Linear(5, 8), b=nn.Linear(8, 3), c=nn.Linear(5, 8))
    x = torch.rand(12, 5)
    spec = discover(model, x)
    assert [group.size for group in spec.groups] == [8] and not spec.one_path
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12


class _KnowsItsClass:
    """What some language models return: tensors in an object that knows its class."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.kind = keys, _KnowsItsClass

    def longest(self) -> int:
        return self.keys.shape[0]


def test_classes_among_the_outputs_hold_no_tensors() -> None:
    model = Lambda(lambda m, x: (m.b(h := m.a(x).relu()), _KnowsItsClass(h)), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="keep 8 hidden units"):
        assert discover(model, torch.rand(2, 5)).num_units == 0
    assert discover(model, torch.rand(2, 5), outputs=0).num_units == 8


def test_positions_made_on_the_way_choose_on_the_meta_device_too() -> None:
    def first_four(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.b(h) + m.c(h[:, torch.arange(4, device=x.device)])

    with torch.device("meta"):
        model, x = Lambda(first_four, a=nn.Linear(5, 8), b=nn.Linear(8, 3), c=nn.Linear(4, 3)), torch.empty(2, 5)
    spec = discover(model, x)
    assert [group.size for group in spec.groups] == [4, 4]
    real = Lambda(first_four, a=nn.Linear(5, 8), b=nn.Linear(8, 3), c=nn.Linear(4, 3))
    assert PermutationSpec.from_json(spec.to_json()).verify(real, torch.rand(2, 5)) < 1e-12


def test_keys_and_values_may_serve_different_numbers_of_query_heads() -> None:
    def act(m: nn.Module, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (heads, 3)).transpose(1, 2)
            for part, heads in ((m.query, 4), (m.key, 2), (m.value, 4))
        )
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return m.out(attended.transpose(1, 2).flatten(2))

    sizes = {"query": 12, "key": 6, "value": 12}
    model = Lambda(act, **{name: nn.Linear(5, size) for name, size in sizes.items()}, out=nn.Linear(12, 3))
    x = torch.rand(2, 6, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(2,), (2, 2), (2, 2, 3), (2, 3)]
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_that_are_no_tensors_leave_units_in_place():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    packed = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    assert not modeconn.discover(packed, torch.randn(2, 6)).groups
