"""Graphs inside of graphs are written out: regions, conditions and maps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from modeconn import PermutationSpec, VerificationError, discover
from modeconn.symmetry import lower
from modeconn.symmetry.explore import Exploration
from tests.symmetry.cases import Lambda
from tests.symmetry.oracle import largest_change


def two_layers(act, **parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(act, first=nn.Linear(5, 8), second=nn.Linear(8, 6), third=nn.Linear(6, 3), **parts)


def without_gradients(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.first(x).relu()
    with torch.no_grad():
        features = m.second(h)
    return m.third(features), features


def in_single_precision(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.first(x).relu()
    with torch.autocast("cpu", enabled=False):
        features = m.second(h)
    return m.third(features), features


def of_both_branches(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.first(x).relu()
    features = torch.cond(h.sum() > 1, lambda h: m.second(h), lambda h: m.second(h).tanh(), (h,))
    return m.third(features), features


def mapped(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.vmap(m.second)(m.first(x).relu())
    return m.third(features), features


def test_no_map_over_examples_stays_open_where_one_cannot_be_written_out(monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("this cannot be traced")

    write_out = lower._write_out

    def write_out_in_part(module: Any, graph: Any, region: list[Any]) -> None:
        layer = next(node for node in region if node.target is torch.ops.aten.linear.default)
        layer.target = fail
        write_out(module, graph, region)
        layer.target = torch.ops.aten.linear.default

    monkeypatch.setattr(lower, "_write_out", write_out_in_part)
    model, x = two_layers(mapped), torch.randn(4, 5)
    with pytest.warns(UserWarning, match="no symmetry rule for"):
        discover(model, x)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    torch.rand(2)  # in a map that is left open, torch refuses to draw


def read_by_position(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A map that reads a tensor at mapped positions, as masks of attention are made."""
    keep = x.amax(0) > 0
    with TransformGetItemToIndex():
        mask = torch.vmap(lambda i: keep[i] & (i >= 0))(torch.arange(5))
    features = m.second(m.first(x * mask).relu())
    return m.third(features), features


ACTS = [without_gradients, in_single_precision, of_both_branches, mapped, read_by_position]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.filterwarnings("ignore:the outputs")
def test_an_output_that_a_graph_inside_makes_stays(act) -> None:
    model, x = two_layers(act), torch.randn(4, 5)
    spec = discover(model, x)
    assert [(group.name, group.shape) for group in spec.groups] == [("first", (8,))]
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12
    assert not spec.unknown and spec.traces[0].graph.free_batch


def test_an_output_that_moves_is_no_proof(monkeypatch) -> None:
    monkeypatch.setattr(Exploration, "_fix_output", lambda *args: None)
    model, x = two_layers(without_gradients), torch.randn(4, 5)
    with pytest.raises(VerificationError, match=r"group 'second' changes the function: .* moves the output '\[1\]'"):
        discover(model, x).verify(model, x)


def other_branch(m: nn.Module, x: Tensor) -> Tensor:
    """One branch gates each unit by one of its own, the other one reads unit 0 of the six as a number."""
    h = m.first(x).relu()
    yes, no = (lambda h: m.second(h) * m.gate), (lambda h: m.second(h) + m.second(h)[:, :1])
    return m.third(torch.cond(x.sum() > 100, yes, no, (h,)))


def test_both_branches_of_a_condition_constrain() -> None:
    model, x = two_layers(other_branch), torch.randn(4, 5)
    model.gate = nn.Parameter(torch.rand(6))
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(5,), (8,)]
    assert spec.verify(model, x) < 1e-12
    assert largest_change(spec, model, x) < 1e-12 and largest_change(spec, model, x + 100) < 1e-12


class Nested(nn.Module):
    """Three tables of which the largest product counts, for each example: the tables may be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tables, self.last = nn.Linear(5, 8), nn.Parameter(torch.randn(3, 8, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        def of_one(h: Tensor) -> Tensor:
            return torch.vmap(lambda table: F.relu(h @ table))(self.tables).amax(0)

        return self.last(torch.vmap(of_one)(self.first(x).relu()))


class Stacked(nn.Module):
    """Four networks as stacks of their tensors: they may be exchanged, and each has units of its own."""

    def __init__(self) -> None:
        super().__init__()
        networks = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(4)]
        stacks, _ = torch.func.stack_module_state(networks)
        self.one = [networks[0]]
        self.stacks = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.detach()) for k, v in stacks.items()})

    def forward(self, x: Tensor) -> Tensor:
        def of_one(stack: dict[str, Tensor]) -> Tensor:
            state = {name.replace("_", "."): tensor for name, tensor in stack.items()}
            return torch.func.functional_call(self.one[0], state, (x,))

        return torch.vmap(of_one)(dict(self.stacks.items())).mean(0)


@pytest.mark.parametrize(
    ("build", "groups"), [(Nested, [(3,), (6,), (8,)]), (Stacked, [(4,), (4, 8)])], ids=["nested", "stacked"]
)
def test_what_is_mapped_moves_as_if_it_were_written_for_batches(build, groups) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(4, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == groups and not spec.unknown
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_derivatives_inside_a_map_are_recorded() -> None:
    def jacobians(m: nn.Module, x: Tensor) -> Tensor:
        return torch.vmap(torch.func.jacrev(lambda v: m.third(m.second(m.first(v)).tanh())))(x)

    model, x = two_layers(jacobians), torch.randn(4, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(6,), (8,)] and spec.one_path
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12


def test_the_spec_of_a_mapped_model_is_read_in_another_process(tmp_path) -> None:
    model, x = Nested(), torch.randn(4, 5)
    path = tmp_path / "spec"
    discover(model, x).save(path)
    code = (
        "import sys, torch, modeconn\n"
        "from tests.symmetry.test_lower import Nested\n"
        "print(modeconn.PermutationSpec.load(sys.argv[1]).verify(Nested(), torch.randn(4, 5)) < 1e-12)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True"]


def test_an_unknown_function_has_the_same_name_in_every_process(monkeypatch) -> None:
    monkeypatch.setattr("modeconn.symmetry.lower._write_out", lambda *args: None)
    with pytest.warns(UserWarning, match="no symmetry rule"):
        spec = discover(Nested(), torch.randn(4, 5))
    assert all(" at 0x" not in unknown.operator for unknown in spec.unknown)
    assert "torch._functorch.predispatch._add_batch_dim" in {unknown.operator for unknown in spec.unknown}
    assert PermutationSpec.from_json(spec.to_json()) == spec
