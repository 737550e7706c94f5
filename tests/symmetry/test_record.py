"""Models whose values steer what they do: one run is recorded, and what it reads stays where it is."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import modeconn
from modeconn import PermutationSpec, discover
from modeconn.symmetry import RULES, VerificationError
from modeconn.symmetry.export import ExportError
from tests.symmetry.cases import CASES as SYMMETRIES
from tests.symmetry.cases import Case, Lambda
from tests.symmetry.oracle import largest_change


def model_of(act) -> nn.Module:
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(2))
    parts = {"stem": nn.Linear(5, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 2), "gate": nn.Linear(5, 2)}
    gru = nn.GRU(8, 4, batch_first=True, bidirectional=True)
    return Lambda(lambda m, x: act(m, m.stem(x).relu(), x), **parts, experts=experts, gru=gru)


def parted(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    count = int((x[:, 0] > 0).sum())
    return m.head(h[:count]).sum(0) - m.head(h[count:]).sum(0)


def scaled(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return m.head(h / float(h.mean()))


def branched(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return m.head(h * 2 if h.mean() > 0.1 else h.tanh())


def repeated(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    steps = 0
    while h.norm() > 1 and steps < 20:
        h, steps = h / 2, steps + 1
    return m.head(h)


def early_exit(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    for _ in range(3):
        h = h + 0.1 * m.mid(h).tanh()
        if m.head(h).softmax(1).max() > 0.9:
            break
    return m.head(h)


def as_many_as_said(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    largest = h.topk(min(int(3 * x[0, 0].abs()) + 1, 8), dim=1).values
    return m.head(h * largest.sum(1, keepdim=True))


def skipped_experts(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    chosen, out = m.gate(x).argmax(1), torch.zeros_like(h)
    for number, expert in enumerate(m.experts):
        rows = (chosen == number).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        out[rows] = expert(h[rows])
    return m.head(out)


def read_one(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return m.head(h * 2 if h[0, 0] > 0.1 else h)


def read_list(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    sums = h.sum(0).tolist()
    return m.head(h) + h[:, [sums.index(max(sums))]]


def read_array(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = np.asarray(h.sum(0).detach()).argsort().copy()
    return m.head(h) + h[:, torch.from_numpy(order)].cumsum(1).mean(1, keepdim=True)


def read_largest(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return m.head(h * max(h.sum(0)))


def forces(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(m.head(m.stem(x).tanh()).sum(), x, create_graph=True)
    return force


def packed(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    lengths = (x[:, 0] > 0).view(3, 4).sum(1).clamp(min=1)
    rows = pack_padded_sequence(h.view(3, 4, 8), lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(m.gru(rows)[0], batch_first=True)
    return m.head(m.mid(out.sum(1)).relu())


CASES = [
    *((one, [(8,)]) for one in (parted, scaled, branched, repeated, early_exit, as_many_as_said)),
    (packed, [(4,), (4,), (8,), (8,)]),  # forwards, backwards, what is read, what reads
    (forces, [(2,), (8,)]),  # the sum of both outputs alone has a gradient
    (skipped_experts, [(6,), (6,), (8,), (8,)]),
    (read_one, [(7,)]),
    *((one, []) for one in (read_list, read_array, read_largest)),
]


@pytest.mark.parametrize(("act", "groups"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_values_steer_is_recorded_and_what_is_read_stays(act, groups) -> None:
    model, x = model_of(act), torch.randn(12, 5)
    with pytest.warns(UserWarning, match="one run on the example input was recorded") as told:
        spec = discover(model, x)
    assert len(told) == 1 and spec.one_path and "of one path" in repr(spec)
    assert sorted(group.shape for group in spec.groups) == groups
    assert spec.verify(model, x) < 1e-12
    assert largest_change(spec, model, x) < 1e-12


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_a_recorded_run_is_no_proof_for_inputs_of_another_path():
    def forked(m, h, x):
        return m.head(h) if h.abs().mean() < 20 else m.head(m.mid(h).relu())

    model, x = model_of(forked), torch.randn(12, 5)
    spec = discover(model, x)
    assert spec.verify(model, x) < 1e-12 and spec.verify(model, x / 2) < 1e-12
    with pytest.raises(ValueError, match=r"this Lambda on these inputs, where .* takes another path than"):
        spec.verify(copy.deepcopy(model), 1000 * x)
    assert spec.verify(copy.deepcopy(model), x) < 1e-12
    with pytest.raises(VerificationError, match="takes another path than in the run that was recorded"):
        spec.verify(model, 1000 * x)


ACTIVATIONS = [torch.tanh, F.silu, F.gelu, F.softplus, torch.sin, torch.square, lambda h: h * torch.sigmoid(h)]


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_what_an_operator_keeps_for_its_derivative_is_no_constant(activation) -> None:
    def energy_forces(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_(True)
            return torch.autograd.grad(m.head(activation(m.stem(place))).sum(), place, create_graph=True)[0]

    model, x = model_of(energy_forces), torch.randn(12, 5)
    spec = discover(model, x)
    assert sorted(group.shape for group in spec.groups) == [(2,), (8,)]
    assert spec.verify(model, x) < 1e-12 and largest_change(spec, model, x) < 1e-12


LOSSES = {
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "binary_cross_entropy": lambda y, z: F.binary_cross_entropy(y.sigmoid(), z.sigmoid()),
    "cross_entropy": lambda y, z: F.cross_entropy(y, z.softmax(-1)),
    "of_classes": lambda y, z: F.cross_entropy(y, torch.arange(12) % 8),
    "kl_div": lambda y, z: F.kl_div(y.log_softmax(-1), z.softmax(-1), reduction="batchmean"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_operators_that_consist_of_others_have_the_same_groups_exported_and_recorded(loss) -> None:
    def exported(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        return m.head(h) + loss(m.mid(h), h)

    x = torch.randn(12, 5)
    wanted = discover(model_of(exported), x)
    with pytest.warns(UserWarning, match="one run on the example input was recorded") as told:
        spec = discover(model_of(lambda m, h, x: exported(m, h * (1 + 0 * float(x.sum())), x)), x)
    assert len(told) == 1 and not wanted.one_path and spec.one_path
    assert spec.groups == wanted.groups and len(spec.groups) == 1


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
@pytest.mark.parametrize("case", SYMMETRIES[::6], ids=str)
def test_a_recorded_network_has_the_groups_of_the_exported_one(case: Case, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise DataDependentError

    monkeypatch.setattr(modeconn.symmetry.export, "_exported", refuse)
    torch.manual_seed(0)
    spec = discover(case.build(), case.inputs(), rules={**RULES, **case.rules})
    assert spec.one_path and sorted(group.shape for group in spec.groups) == sorted(case.groups)


class DataDependentError(Exception):
    """In place of what export raises where values decide."""


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_a_recorded_model_is_aligned_saved_and_joined() -> None:
    model = model_of(branched)
    data = [(x := torch.randn(n, 5), x.argmax(1) % 2) for n in (64, 64, 20)]
    spec = discover(model, data[0][0])
    planted = spec.random(torch.Generator().manual_seed(1)).apply(model)
    found = modeconn.align(model, planted, data)
    assert all(torch.equal(a, b) for a, b in zip(found.model_b.parameters(), model.parameters(), strict=True))
    again = PermutationSpec.from_json(spec.to_json())
    assert again == spec and again.one_path and again.verify(planted, data[0][0]) < 1e-12
    line = modeconn.fit_curve(model, planted, data, recipe=modeconn.Recipe(epochs=1), spec=spec)
    assert line.evaluate(data, t=[0, 1]).loss[0] == pytest.approx(float(line.evaluate(data, t=[1]).loss[0]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_batches_that_take_another_path_are_left_out_with_a_word() -> None:
    def act(m: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        chosen = h[x[:, 0] > 0]
        return m.head(chosen.view(len(chosen), 2, 4).flatten(1))

    model = model_of(act)
    data = [(torch.randn(40, 5), None) for _ in range(3)]
    with pytest.warns(UserWarning, match="batches are left out of the statistics"):
        modeconn.align(model, model_of(act), data)


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_a_wrong_group_of_a_recorded_run_is_found_out() -> None:
    def forgetful(walk, input, dim, index):
        return input.without(dim)

    rules = {**modeconn.RULES, torch.ops.aten.select: forgetful}
    model, x = model_of(lambda m, h, x: m.head(h * 2 if h.mean() > 0.1 else h) * h[:, 0, None]), torch.randn(12, 5)
    with pytest.raises(VerificationError, match="relabelling group 'stem' changes the function"):
        discover(model, x, rules=rules).verify(model, x)


def test_what_can_be_neither_exported_nor_recorded_is_refused(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("modeconn.symmetry.export.record", fail)
    with pytest.raises(ExportError, match=r"torch\.export cannot follow Lambda in eval mode"):
        discover(model_of(branched), torch.randn(12, 5))


def test_what_can_be_exported_is_not_recorded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not discover(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)).one_path
