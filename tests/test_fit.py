from __future__ import annotations

import copy
import random
import types
import warnings
from collections import UserDict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeconn
from modeconn import PAM, ActivationMatching, Permutation, WeightMatching
from modeconn.connection import Connection
from modeconn.curves import Bezier, Line, PolyChain
from modeconn.curves.step import BLOCK, stratified_positions
from modeconn.data import TensorLoader
from modeconn.fit import fit_curve
from modeconn.learning.checkpoint import Checkpoint
from modeconn.matching.alignment import Symmetry
from modeconn.network.loss import cross_entropy
from modeconn.network.recipe import Recipe, constant, one_cycle
from modeconn.network.weights import WeightSpace
from modeconn.symmetry import discover
from modeconn.tools.rng import rng_state
from tests.cases import CASE, CASES, batches, clone, same_bits
from tests.matching.test_rotations import generic
from tests.reference import fit_by_autograd
from tests.refinement.test_turning import LOADER
from tests.symmetry.rotating import LanguageModel

CPU = torch.device("cpu")
SHORT = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), schedule=constant)
DETERMINISTIC = [case for case in CASES if case.name not in ("dropout", "batch_norm")]


def pair(name="mlp", dtype=torch.float32):
    return CASE[name].make(0, dtype), CASE[name].make(1, dtype)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("curve", [Bezier(2), Bezier(3, free_ends=True), PolyChain(3)], ids=str)
def test_steps_are_those_of_autograd_through_the_curve(case, curve):
    a, b = pair(case.name, torch.float64)
    data = batches(dtype=torch.float64)
    recipe = Recipe(
        epochs=2, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True), schedule=one_cycle
    )
    space = WeightSpace(a)
    start = curve.initial_control_points(space.flatten(a), space.flatten(b))
    positions = stratified_positions(7, 0)[: 2 * len(data)].tolist()
    expected = fit_by_autograd(a, curve, start, recipe, data, positions)
    found = fit_curve(a, b, data, align=False, curve=curve, recipe=recipe, seed=7)
    torch.testing.assert_close(found.control_points, expected)
    assert not torch.allclose(found.control_points, start)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01, foreach=True),
        partial(torch.optim.RMSprop, lr=0.01),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    ],
    ids=lambda optimizer: optimizer.func.__name__,
)
def test_any_torch_optimizer_can_be_used(optimizer):
    a, b = pair(dtype=torch.float64)
    recipe = Recipe(epochs=2, optimizer=optimizer, schedule=constant)
    space, data = WeightSpace(a), batches(dtype=torch.float64)
    start = Bezier(2).initial_control_points(space.flatten(a), space.flatten(b))
    expected = fit_by_autograd(a, Bezier(2), start, recipe, data, stratified_positions(0, 0)[:10].tolist())
    torch.testing.assert_close(fit_curve(a, b, data, align=False, recipe=recipe).control_points, expected)


def test_positions_fill_every_part_of_a_block_and_are_uniform_one_by_one():
    blocks = torch.stack([stratified_positions(3, block) for block in range(400)])
    assert torch.equal((blocks * BLOCK).long().sort(1).values, torch.arange(BLOCK).expand(400, BLOCK))
    first = blocks[:, 0].sort().values  # Kolmogorov-Smirnov: 1.63 / sqrt(400) is the 1% point
    assert (first - torch.linspace(0, 1, 400)).abs().max() < 1.63 / 20
    assert not torch.equal(blocks[0], blocks[1]) and not torch.equal(blocks[0], stratified_positions(4, 0))


def test_a_fit_lowers_the_loss_between_the_ends_and_keeps_the_ends():
    a, b = pair()
    data = batches(20)
    for model in (a, b):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for inputs, targets in 20 * data:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    recipe = Recipe(epochs=20, optimizer=partial(torch.optim.Adam, lr=0.01), weight_decay=0)
    connection = fit_curve(a, b, data, align=False, recipe=recipe)
    curved, straight = connection.evaluate(data), connection.straight().evaluate(data)
    assert curved.barrier < 0.1 * straight.barrier and straight.barrier > 0.05
    assert same_bits(connection.model_at(0), a) and same_bits(connection.model_at(1), b)
    assert connection.history.loss[-1] < connection.history.loss[0]


def test_free_ends_are_trained_too():
    a, b = pair()
    connection = fit_curve(a, b, batches(), align=False, curve=Bezier(2, free_ends=True), recipe=SHORT)
    assert not same_bits(connection.model_at(0), a) and not same_bits(connection.model_at(1), b)


@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
@pytest.mark.parametrize(("free", "fixed"), ["ab", "ba"])
def test_one_end_alone_is_trained_and_the_other_stays_the_network_that_it_was(free, fixed, name, tmp_path):
    models = dict(zip("ab", pair(name), strict=True))
    curve = Bezier(2, free_ends=free)
    fitted = fit_curve(*models.values(), batches(), align=False, curve=curve, recipe=SHORT)
    fitted.save(tmp_path / "c")
    for connection in (fitted, modeconn.Connection.load(tmp_path / "c", models["a"])):
        assert connection.curve == curve
        assert same_bits(connection.model_at("ab".index(fixed)), models[fixed])
        trained = connection.model_at("ab".index(free), recalibrate=batches())
        assert not same_bits(trained, models[free])
        own = connection.evaluate(batches(), num_points=2, recalibrate=batches()).own_loss
        expected = [modeconn.evaluate(one, batches()).loss[0] for one in (models[fixed], trained)]
        torch.testing.assert_close(own[["ab".index(fixed), "ab".index(free)]], torch.stack(expected))


@pytest.mark.parametrize("refine", [None, PAM(iterations=1, num_batches=2)], ids=str)
def test_curves_between_untied_networks_have_their_ends_as_functions(refine, tmp_path):
    a, b = (generic(lambda: LanguageModel(nn.LayerNorm, tied=True), seed).float() for seed in (0, 1))
    how = {"symmetries": "orthogonal", "untie": True, "align": WeightMatching(), "refine": refine}
    fitted = fit_curve(a, b, LOADER, recipe=Recipe(epochs=1), **how)
    fitted.save(tmp_path / "c")
    loaded = Connection.load(tmp_path / "c", fitted.model_at(0))
    for connection in (fitted, loaded):
        for t, end in ((0, a), (1, b)):
            torch.testing.assert_close(connection.model_at(t)(LOADER[0][0]), end(LOADER[0][0]), rtol=1e-4, atol=1e-4)
        assert connection.evaluate(LOADER, num_points=3).loss.isfinite().all()


@pytest.mark.parametrize("curve", [Bezier(2), Bezier(3, free_ends=True)], ids=str)
def test_frozen_parameters_stay_on_the_straight_line(curve):
    a, b = pair("frozen")
    recipe = Recipe(epochs=2, optimizer=partial(torch.optim.Adam, lr=0.1), weight_decay=0.1)
    connection = fit_curve(a, b, batches(), align=False, curve=curve, recipe=recipe)
    straight = curve.initial_control_points(*(connection.space.flatten(model) for model in (a, b)))
    frozen = ~connection.space.trainable
    assert torch.equal(connection.control_points[:, frozen], straight[:, frozen])
    assert not torch.equal(connection.control_points[:, ~frozen], straight[:, ~frozen])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_models_training_flags_and_random_states_are_left_alone(case):
    a, b = case.make(0).train(), case.make(1)
    before = clone(a), clone(b)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    state = rng_state(CPU)
    fit_curve(a, b, batches(), align=False, recipe=SHORT)
    assert same_bits(a, before[0]) and same_bits(b, before[1])
    assert all(module.training for module in a.modules()) and not any(module.training for module in b.modules())
    assert all(parameter.grad is None for parameter in a.parameters())
    after = rng_state(CPU)
    assert torch.equal(after["torch"], state["torch"]) and after["python"] == state["python"]
    assert np.array_equal(after["numpy"]["state"]["key"], state["numpy"]["state"]["key"])


def test_the_result_follows_from_the_seed():
    a, b = pair("dropout")
    torch.manual_seed(1)
    first = fit_curve(a, b, batches(), align=False, recipe=SHORT, seed=3).control_points
    torch.manual_seed(2)
    again = fit_curve(a, b, batches(), align=False, recipe=SHORT, seed=3).control_points
    other = fit_curve(a, b, batches(), align=False, recipe=SHORT, seed=4).control_points
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batch_norm_and_dropout_are_in_train_mode():
    modes = []
    a, b = pair("batch_norm")
    fit_curve(
        a,
        b,
        batches(1),
        align=False,
        recipe=SHORT,
        forward=lambda model, batch: modes.append({m.training for m in model.modules()}) or model(batch[0]).sum(),
    )
    assert modes == [{True}, {True}]


def test_a_forward_of_ones_own_sees_the_model_at_t():
    a, b = pair(dtype=torch.float64)
    seen = []

    def forward(model, batch):
        seen.append(WeightSpace(model).flatten(model))
        return cross_entropy(model(batch["x"]), batch["y"])

    data = batches(1, dtype=torch.float64)
    recipe = Recipe(epochs=1)
    as_dicts = [{"x": inputs, "y": targets} for inputs, targets in data]
    own = fit_curve(a, b, as_dicts, align=False, recipe=recipe, forward=forward)
    t = stratified_positions(0, 0)[0]
    torch.testing.assert_close(seen[0], torch.lerp(own.weights_at(0), own.weights_at(1), t))
    assert torch.equal(own.control_points, fit_curve(a, b, data, align=False, recipe=recipe).control_points)


def test_the_history_holds_means_over_examples_in_all_and_by_t():
    losses = iter([1.0, 2.0, 4.0] * 2)
    data = batches(3, 12, last=6)

    def forward(model, batch):
        return model(batch[0]).sum() * 0 + next(losses)

    history = fit_curve(*pair(), data, align=False, recipe=SHORT, forward=forward).history
    assert history.loss == [pytest.approx((12 * 1 + 12 * 2 + 6 * 4) / 30)] * 2
    bins = (stratified_positions(0, 0)[:3] * 10).long().tolist()
    assert len(set(bins)) == 3  # each batch has a bin of its own
    assert [history.loss_by_t[0][index] for index in bins] == [1.0, 2.0, 4.0]
    assert history.loss_by_t[0].count(None) == 7 and history.seconds > 0


def test_learning_rates_follow_the_schedule_without_a_length():
    class Unsized:
        def __iter__(self):
            return iter(batches(4))

    epochs = []
    recipe = Recipe(epochs=2, schedule=lambda epoch, _: epochs.append(epoch) or 1.0)
    fit_curve(*pair(), Unsized(), align=False, recipe=recipe)
    assert epochs == [0, 0, 0, 0, 1, 1.25, 1.5, 1.75]
    epochs.clear()
    fit_curve(*pair(), batches(4), align=False, recipe=recipe)
    assert epochs == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_nearly_the_same_steps(dtype):
    a, b = pair()
    recipe = Recipe(epochs=2, optimizer=SHORT.optimizer, schedule=constant, weight_decay=0.3)
    plain = fit_curve(a, b, batches(), align=False, recipe=recipe).control_points
    recipe = replace(recipe, autocast=dtype)
    seen = set()

    def forward(model, batch):
        outputs = model(batch[0])
        seen.add(outputs.dtype)
        return cross_entropy(outputs, batch[1])

    cast = fit_curve(a, b, batches(), align=False, recipe=recipe, forward=forward).control_points
    assert seen == {dtype} and cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0.02)  # bfloat16 has 8 bits, and 10 steps were taken
    assert not torch.equal(cast, plain)


def test_compilation_is_handed_the_training_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    a, b = pair()
    fit_curve(a, b, batches(), align=False, recipe=Recipe(epochs=1, compile=True))
    assert len(compiled) == 1 and type(compiled[0]) is type(a)


# -- alignment


def planted(name="mlp"):
    a, b = pair(name)
    spec = discover(a, batches()[0][0])
    return a, b, spec.random(torch.Generator().manual_seed(0))


def test_a_finished_permutation_or_alignment_relabels_b():
    a, b, permutation = planted()
    for align in (permutation, types.SimpleNamespace(permutation=permutation)):
        connection = fit_curve(a, b, batches(), align=align, recipe=SHORT)
        assert connection.permutation is permutation
        assert same_bits(connection.model_at(1), permutation.apply(b)) and not same_bits(connection.model_at(1), b)


@pytest.mark.parametrize(
    ("align", "method"), [(True, ActivationMatching()), (WeightMatching(seed=3), WeightMatching(seed=3))]
)
def test_alignment_is_asked_for_with_what_the_caller_gave(monkeypatch, align, method):
    a, b, permutation = planted()
    calls = []

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        return types.SimpleNamespace(permutation=permutation, model_b=permutation.apply(b))

    monkeypatch.setattr(modeconn.fit, "find_alignment", fake)
    data = batches()
    connection = fit_curve(a, b, data, align=align, recipe=SHORT, spec=permutation.spec, example_input="x")
    ((first, second, opened, used, known), given) = calls.pop()
    assert first is a and second is b and opened.first is data[0] and used == method and not calls
    assert known == Symmetry(permutation.spec, "x", outputs=None, verify=True) and not given
    assert same_bits(connection.model_at(1), permutation.apply(b))


def test_the_alignment_does_not_move_the_order_of_the_data(monkeypatch):
    def fake(*args, **kwargs):
        torch.rand(3)
        return types.SimpleNamespace(permutation=None, model_b=args[1])

    monkeypatch.setattr(modeconn.fit, "find_alignment", fake)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    data = TensorLoader(inputs, targets, batch_size=12, shuffle=True)
    fits = [fit_curve(*pair(), data, align=align, recipe=SHORT) for align in (True, False)]
    assert torch.equal(fits[0].control_points, fits[1].control_points)


def test_without_a_loader_the_straight_connection_comes_with_one_warning(monkeypatch):
    a, b, permutation = planted("residual")
    result = types.SimpleNamespace(permutation=permutation, model_b=permutation.apply(b))
    monkeypatch.setattr(modeconn.fit, "find_alignment", lambda *args, **kwargs: result)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        connection = fit_curve(a, b, align=True)
    assert [str(warning.message)[:26] for warning in caught] == ["no curve was learned, beca"]
    assert caught[0].filename == __file__
    assert connection.curve == Line() and connection.history is None
    assert same_bits(connection.model_at(1), permutation.apply(b))


def test_a_line_is_aligned_and_remembers_its_data_but_learns_nothing():
    a, b, permutation = planted("residual")
    connection = fit_curve(a, b, batches(), align=permutation, curve=Line(), recipe=SHORT)
    assert connection.history is None and isinstance(connection, Connection)
    connection.model_at(0.5)


def test_an_aligned_connection_keeps_its_permutation_in_its_file(tmp_path):
    a, b, permutation = planted()
    connection = fit_curve(a, b, batches(), align=permutation, recipe=SHORT)
    connection.save(tmp_path / "c.safetensors")
    loaded = Connection.load(tmp_path / "c.safetensors", template=a)
    assert loaded.permutation == permutation
    assert same_bits(loaded.permutation.apply(b), loaded.model_at(1))


# -- bad input


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (iter(batches()), "can be read only once"),
        (torch.ones(3, 2), r"got one tensor\. Pass a DataLoader"),
        ({"x": torch.ones(3, 1, 2, 4)}, r"loader must yield batches, got one dict\. Pass a DataLoader"),
        ([torch.ones(3, 1, 2, 4)], r"must yield \(inputs, targets\) pairs, but its first batch is one Tensor"),
    ],
    ids=["empty", "one-shot", "tensor", "one batch", "no pairs"],
)
def test_unusable_data_is_an_error_and_nothing_is_written(tmp_path, loader, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(*pair(), loader, align=False, recipe=SHORT, checkpoint=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match=r"endpoints differ at '1\.weight': \(8, 8\) in a, \(16, 8\) in b"):
        fit_curve(CASE["mlp"].make(0), CASE["dropout"].make(0), batches())
    broken = CASE["mlp"].make(0)
    broken[1].bias.data[0] = torch.nan
    for models, name in (((broken, CASE["mlp"].make(1)), "a"), ((CASE["mlp"].make(1), broken), "b")):
        with pytest.raises(ValueError, match=rf"'1\.bias' of {name} holds NaN"):
            fit_curve(*models, batches())


def test_a_target_outside_the_classes_is_an_error():
    data = batches()
    data[2][1][3] = 3
    with pytest.raises(ValueError, match=r"targets of loader must lie in 0\.\.2, .* got a target of 3;"):
        fit_curve(*pair(), data, align=False, recipe=SHORT)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (nn.Linear(6, 1), torch.randn(8, 1), r"outputs of shape \(8, 1\) are no scores of two or more classes"),
        (nn.Linear(6, 1), torch.zeros(8).long(), r"outputs of shape \(8, 1\) are no scores of two or more classes"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), torch.randn(8), r"outputs of shape \(8,\) are no scores"),
        (nn.Linear(6, 3), torch.randn(8, 3), r"targets of loader are real numbers, of shape \(8, 3\): neither classes"),
        (nn.Linear(6, 3), torch.rand(8), r"targets of loader are real numbers, of shape \(8,\): neither classes"),
    ],
)
def test_cross_entropy_is_not_taken_where_it_means_nothing(model, targets, message):
    data = [(torch.rand(8, 6), targets)]
    other, way_out = copy.deepcopy(model), r".*Pass loss_fn=, such as torch\.nn\.functional\.mse_loss"
    for call in (
        lambda: fit_curve(model, other, data, align=False, recipe=SHORT),
        lambda: Connection.straight_between(model, other).evaluate(data),
    ):
        with pytest.raises(ValueError, match=message + way_out):
            call()
    if targets.is_floating_point() and targets.shape == model(data[0][0]).shape:
        fit_curve(model, other, data, align=False, recipe=SHORT, loss_fn=F.mse_loss).evaluate(data)


def test_probabilities_of_classes_are_targets():
    data = [(torch.rand(8, 1, 2, 4), torch.rand(8, 3).softmax(1)) for _ in range(2)]
    assert fit_curve(*pair(), data, align=False, recipe=SHORT).evaluate(data).accuracy is None


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), r"a tensor of shape \("),
        (lambda model, batch: 0.5, "got float"),
    ],
)
def test_a_forward_that_gives_no_loss_is_an_error(forward, message):
    with pytest.raises(ValueError, match=f"forward= must return the mean loss of a batch, .*{message}"):
        fit_curve(*pair(), batches(), align=False, recipe=SHORT, forward=forward)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_seed_is_a_number_of_0_or_more(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer.*, got seed="):
        fit_curve(*pair(), batches(), align=False, recipe=SHORT, seed=seed)


def test_a_loader_that_dries_up_is_an_error():
    class Dry:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(batches() if self.passes < 3 else [])

    with pytest.raises(ValueError, match="loader yielded nothing on this pass"):
        fit_curve(*pair(), Dry(), align=False, recipe=SHORT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_epoch_and_t_and_leaves_the_last_checkpoint(tmp_path, value):
    path = tmp_path / "c.safetensors"
    data, calls = batches(4), []

    def loss_fn(outputs, targets):
        calls.append(len(calls))
        return cross_entropy(outputs, targets) * (value if len(calls) == 7 else 1.0)

    t = stratified_positions(0, 0)[6].item()
    message = rf"training loss became {value} in epoch 1 at t={t:.4f}; .* last good checkpoint is kept in '.*c\.safe"
    with pytest.raises(FloatingPointError, match=message):
        fit_curve(
            *pair(), data, align=False, recipe=SHORT, loss_fn=loss_fn, checkpoint=Checkpoint(path, every_batches=1)
        )
    connection = fit_curve(*pair(), data, align=False, recipe=SHORT, loss_fn=loss_fn, checkpoint=path)
    assert torch.isfinite(connection.control_points).all() and len(calls) == 7 + 2


def test_weights_that_stop_being_finite_are_an_error():
    recipe = Recipe(epochs=1, optimizer=partial(torch.optim.SGD, lr=1e300), schedule=constant)
    with pytest.raises(FloatingPointError, match=r"control points stopped being finite in epoch 0 at t="):
        fit_curve(
            *pair(dtype=torch.float64),
            batches(1, dtype=torch.float64),
            align=False,
            recipe=recipe,
            loss_fn=lambda outputs, targets: 1e10 * cross_entropy(outputs, targets),
        )


# ---------------------------------------------------------------- nothing twice


class Counted:
    """A loader that counts its passes."""

    def __init__(self, data: list) -> None:
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


@pytest.mark.parametrize("refine", [None, PAM(iterations=2, num_batches=2)], ids=["fit", "with PAM"])
@pytest.mark.parametrize("name", ["batch_norm", "residual"])
def test_a_fit_reads_looks_and_relabels_once(name, refine, monkeypatch):
    """Before training one pass over the data, one weight space, one relabelled copy of b; then a pass an epoch."""
    a, b, _ = planted(name)
    spaces, copies = [], []
    init, apply = WeightSpace.__init__, Permutation.apply
    monkeypatch.setattr(WeightSpace, "__init__", lambda space, model: (spaces.append(model), init(space, model))[1])
    monkeypatch.setattr(Permutation, "apply", lambda p, model: (copies.append(model), apply(p, model))[1])
    loader = Counted(batches())
    connection = fit_curve(a, b, loader, align=True, recipe=Recipe(epochs=3, weight_decay=0.0), refine=refine)
    turns = 0 if refine is None else refine.iterations  # each draws a sample of its own
    assert loader.passes == 1 + 3 + turns
    assert len(spaces) == 1 and len(copies) == 1
    monkeypatch.undo()
    assert same_bits(connection.model_at(1), connection.permutation.apply(b))


def test_aligning_reads_the_data_once():
    a, _, permutation = planted()
    loader = Counted(batches())
    aligned = modeconn.align(a, permutation.apply(a), loader)
    assert aligned.permutation @ permutation == permutation.spec.identity()
    assert loader.passes == 1


def test_an_alignment_that_continues_a_pass_is_that_of_a_fresh_one():
    a, b, _ = planted("residual")
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    shuffling = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=7, shuffle=True)
    spec = modeconn.discover(a, inputs[:2])
    method = ActivationMatching(num_examples=20)
    alone = method.match(spec, a, b, shuffling)  # reads the loader itself
    within = modeconn.align(a, b, shuffling, method=method)
    assert within.permutation == alone.permutation and within.correlation == alone.correlation


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_batches_by_name_are_one_thing_whatever_mapping_holds_them(kind):
    a, b, _ = planted()

    def forward(model, batch):
        return F.cross_entropy(model(batch["pixels"]), batch["labels"])

    data = [kind(pixels=x, labels=y) for x, y in batches()]
    settings = {"align": WeightMatching(), "example_input": batches()[0][0], "recipe": SHORT}
    named = fit_curve(a, b, data, forward=forward, **settings)
    pairs = fit_curve(a, b, batches(), **settings)
    assert torch.equal(named.control_points, pairs.control_points)
    assert torch.equal(named.evaluate(data, num_points=3).loss, pairs.evaluate(batches(), num_points=3).loss)
