"""Fits that several processes share: the law that N processes are one with N batches in each step, and what fails."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import modeconn
from modeconn import PAM, Bezier, PolyChain, Recipe
from modeconn.curves.step import BLOCK, stratified_positions
from modeconn.data import TensorLoader
from modeconn.tools import files

CASES = {
    "quadratic": (Bezier(2), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "cubic": (Bezier(3), torch.optim.Adam, {"lr": 1e-2}),
    "chain": (PolyChain(2), torch.optim.SGD, {"lr": 0.05}),
}


def network(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


def ends():
    return network(1), network(2)


def batches(count=83, size=8, **settings):
    torch.manual_seed(0)
    inputs = torch.randn(count, 5, dtype=torch.float64)
    return TensorLoader(inputs, torch.arange(count) % 3, batch_size=size, shuffle=True, **settings)


def recipe(case, epochs, weight_decay=0.01):
    _, optimizer, settings = CASES[case]
    return Recipe(epochs, partial(optimizer, **settings), weight_decay=weight_decay)


def fitted(rank, case, epochs, **settings):
    made = modeconn.fit_curve(
        *ends(), batches(), align=False, curve=CASES[case][0], recipe=recipe(case, epochs), seed=3, **settings
    )
    return made.control_points, made.history


def naive_fit(case, size, epochs):
    """Fit with the mean gradient of ``size`` batches in each step, by autograd through the whole curve."""
    curve, optimizer, settings = CASES[case]
    models = ends()
    vectors = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for model in models]
    points = curve.initial_control_points(*vectors).clone()
    trained = points[1:-1].clone().requires_grad_()
    moves = optimizer([trained], **settings)
    loader, drawn = batches(), 0
    rates = Recipe(epochs)
    torch.manual_seed(3)
    for epoch in range(epochs):
        passed = list(loader)
        steps = -(-len(passed) // size)
        for step in range(steps):
            total = weight = 0.0
            for rank in range(size):
                if step * size + rank >= len(passed):
                    continue
                inputs, targets = passed[step * size + rank]
                block, place = divmod(drawn + rank, BLOCK)
                t = stratified_positions(3, block)[place : place + 1]
                theta = (curve.basis(t) @ torch.cat([points[:1], trained, points[-1:]]))[0]
                parts, at = {}, 0
                for name, parameter in models[0].named_parameters():
                    parts[name] = theta[at : at + parameter.numel()].view_as(parameter)
                    at += parameter.numel()
                outputs = torch.func.functional_call(models[0], parts, (inputs,))
                loss = nn.functional.cross_entropy(outputs, targets) + 0.005 * theta.square().sum()
                total, weight = total + len(targets) * loss, weight + len(targets)
            drawn += size
            for group in moves.param_groups:
                group["lr"] = settings["lr"] * rates.learning_rate_factor(epoch + step / steps)
            moves.zero_grad()
            (total / weight).backward()
            moves.step()
    points[1:-1] = trained.detach()
    return points


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one_with_as_many_batches(pool, size, case):
    epochs = 5 * size  # more than 50 steps, in the last of each epoch not all have a batch
    found = pool.run(size, fitted, case, epochs)
    expected = naive_fit(case, size, epochs)
    for points, history in found:
        assert torch.equal(points, found[0][0])
        assert (points - expected).abs().max() < 1e-12
        assert history.loss == found[0][1].loss and history.num_processes == size
    assert not torch.equal(expected, naive_fit(case, 1, epochs))


class Seen(modeconn.callbacks.Callback):
    """Notes every t, and stops the run in an epoch if told to."""

    def __init__(self, stop_after=None):
        self.t, self.stop_after = [], stop_after

    def after_step(self, event):
        self.t.append(event.t)

    def after_epoch(self, event):
        event.values["length"] = event.connection().length()
        return event.epoch == self.stop_after


def positions(rank):
    seen = Seen()
    modeconn.fit_curve(*ends(), batches(count=64), align=False, recipe=recipe("quadratic", 2), callbacks=[seen])
    return seen.t


def test_processes_share_one_sequence_of_positions(pool):
    found = pool.run(4, positions)
    together = [t for step in zip(*found, strict=True) for t in step]
    assert len(set(together)) == len(together) == 16
    assert together == stratified_positions(0, 0)[:16].tolist()


class Examples:
    """A loss of nothing but the numbers of examples, which it notes."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch):
        inputs, numbers = batch
        self.seen.append(numbers.tolist())
        return model(inputs).square().mean()


def examples_read(rank, kind, count, epochs):
    inputs, numbers = torch.zeros(count, 5, dtype=torch.float64), torch.arange(count)
    settings = {}
    if kind == "tensor":
        loader = TensorLoader(inputs, numbers, batch_size=4, shuffle=True)
    elif kind == "sampler":
        data = TensorDataset(inputs, numbers)
        loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=1))
    else:
        mine = numbers[rank :: torch.distributed.get_world_size()]
        loader = DataLoader(TensorDataset(inputs[mine], mine), batch_size=4, shuffle=True)
        settings = {"sharded": True}
    told = Examples()
    made = modeconn.fit_curve(
        *ends(), loader, align=False, forward=told, recipe=Recipe(epochs, weight_decay=0.0), **settings
    )
    return told.seen, made.control_points


@pytest.mark.parametrize("kind", ["tensor", "sampler", "sharded"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_example_is_read_once_an_epoch(pool, kind, size):
    count = 42 if kind != "sampler" else 44  # which a DistributedSampler fills up
    found = pool.run(size, examples_read, kind, count, 1)
    read = sorted(number for seen, _ in found for batch in seen for number in batch)
    assert read == list(range(count))
    assert all(torch.equal(points, found[0][1]) for _, points in found)


def test_a_distributed_sampler_is_told_of_epochs(pool):
    (seen, _), _ = pool.run(2, examples_read, "sampler", 44, 2)
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]


def draws(rank):
    """Return what dropout and augmentation draw in a process."""
    drawn = []

    def augment(images):
        drawn.append(float(torch.rand(())))
        return images

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            drawn.append(float(torch.rand(())))
            return self.layer(x)

    def model(seed):
        torch.manual_seed(seed)
        return Noisy()

    loader = batches(count=32).with_(augment=(augment,))
    modeconn.fit_curve(model(1), model(2), loader, align=False, recipe=recipe("quadratic", 2))
    return drawn


def test_processes_draw_other_numbers(pool):
    found = [number for drawn in pool.run(2, draws) for number in drawn]
    assert len(found) == 16
    assert len(set(found)) == len(found)


# -- interrupted runs


class Broken(Exception):
    """What ends a run."""


class Breaking(modeconn.callbacks.Callback):
    """Raises after some steps, in one process."""

    def __init__(self, rank, which, step):
        self.step = step if rank == which else None

    def after_step(self, event):
        if event.step == self.step:
            raise Broken("as a test wants it")


def dropout_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def kept_fit(rank, path, every=None, break_at=None, adversary=None):
    loader = batches(count=83, augment=(jitter,))
    settings = {"align": False, "recipe": recipe("quadratic", 3), "seed": 5, "adversary": adversary}
    checkpoint = None if path is None else modeconn.Checkpoint(path, every_batches=every)
    breaking = [] if break_at is None else [Breaking(rank, 1, break_at)]
    made = modeconn.fit_curve(
        dropout_net(1), dropout_net(2), loader, checkpoint=checkpoint, callbacks=breaking, **settings
    )
    return made.control_points, made.history.loss


def jitter(inputs):
    return inputs + 0.1 * torch.rand_like(inputs)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_an_interrupted_run_ends_with_the_same_bits(pool, tmp_path, size, every):
    whole = pool.run(size, kept_fit, None)
    path = str(tmp_path / "run.safetensors")
    broken = pool.outcomes(size, kept_fit, path, every, 2 * -(-11 // size) - 2)
    assert [one.kind for one in broken] == ["Broken" if rank == 1 else "OtherProcessError" for rank in range(size)]
    assert "process 1 of" in str(broken[0]) and "as a test wants it" in str(broken[0])
    for (points, loss), (expected, losses) in zip(pool.run(size, kept_fit, path, every), whole, strict=True):
        assert torch.equal(points, expected) and loss == losses


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("every", [None, 1])
def test_another_number_of_processes_goes_on(pool, tmp_path, before, after, every):
    path = str(tmp_path / "run.safetensors")
    steps = -(-11 // before)
    broken = pool.outcomes(before, kept_fit if before > 1 else kept_alone, path, every, steps + 1)
    assert broken[-1].kind in ("Broken", "OtherProcessError")
    found = pool.run(after, warned_fit, path, every)
    assert all(torch.equal(points, found[0][0][0]) for (points, _), _ in found)
    first, *others = [messages for _, messages in found]
    counted = [f"{n} process{'es' if n > 1 else ''}" for n in (before, after)]
    assert f"interrupted with {counted[0]} and goes on with {counted[1]}" in first[0]
    assert len(first) == 1 + (every is not None) and not any(others)


def kept_alone(rank, path, every, break_at):
    loader = batches(count=83, augment=(jitter,))
    checkpoint = modeconn.Checkpoint(path, every_batches=every)
    settings = {"align": False, "recipe": recipe("quadratic", 3), "seed": 5}
    return modeconn.fit_curve(
        dropout_net(1), dropout_net(2), loader, checkpoint=checkpoint, callbacks=[Breaking(0, 0, break_at)], **settings
    )


def warned_fit(rank, path, every):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = kept_fit(rank, path, every)
    return found, [str(one.message) for one in caught]


def test_free_training_carries_a_perturbation_for_each_process(pool, tmp_path):
    path, adversary = str(tmp_path / "run.safetensors"), modeconn.FreeAdversarialTraining(0.1, num_replays=2, clip=None)
    whole = pool.run(2, kept_fit, None, None, None, adversary)
    assert pool.outcomes(2, kept_fit, path, 2, 17, adversary)[1].kind == "Broken"
    for (points, loss), (expected, losses) in zip(pool.run(2, kept_fit, path, 2, None, adversary), whole, strict=True):
        assert torch.equal(points, expected) and loss == losses


def stopped_early(rank):
    seen = Seen(stop_after=1 if rank == 1 else None)
    made = modeconn.fit_curve(*ends(), batches(), align=False, recipe=recipe("quadratic", 3), callbacks=[seen])
    return made.history


def test_a_callback_of_any_process_ends_the_run(pool):
    for history in pool.run(2, stopped_early):
        assert len(history.loss) == 1 and history.values[0]["length"] > 0


# -- what comes before


def aligned_fit(rank, refine, own_data=False, exact=False):
    loader, settings = batches(), {}
    if own_data:
        mine = slice(rank, None, torch.distributed.get_world_size())
        loader = DataLoader(TensorDataset(loader.inputs[mine], loader.targets[mine]), batch_size=8)
        settings = {"sharded": True}
    pam = PAM(iterations=2, exact=exact) if refine else None
    made = modeconn.fit_curve(*ends(), loader, **settings, recipe=recipe("quadratic", 4), refine=pam)
    relabelling = made.permutation.tensors()
    return made.control_points, [tensor.tolist() for tensor in relabelling.values()], made.history.turns


@pytest.mark.parametrize("refine", [False, True])
def test_all_processes_relabel_alike(pool, refine):
    found = pool.run(2, aligned_fit, refine)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    (alone,) = pool.run(1, aligned_fit, refine)
    if refine:
        first, before = found[0][2][0], alone[2][0]  # the same moves are tried, on the same sample
        assert first["num_tried"] == before["num_tried"] and first["num_accepted"] == before["num_accepted"]
        assert first["loss_before"] == pytest.approx(before["loss_before"], rel=1e-12)
    else:
        assert found[0][1] == alone[1]


@pytest.mark.parametrize("exact", [False, True])
def test_all_processes_refine_alike_on_data_of_their_own(pool, exact):
    found = pool.run(2, aligned_fit, True, True, exact)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def exact_fit(rank):
    pam = PAM(iterations=2, exact=True, num_points=4)
    made = modeconn.fit_curve(*ends(), batches(), recipe=recipe("quadratic", 6), refine=pam)
    return made.control_points, made.history.loss


def test_exact_refinement_is_that_of_one_process(pool):
    (alone,) = pool.run(1, exact_fit)
    found = pool.run(2, exact_fit)
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][0] - alone[0]).abs().max() < 1e-12
    assert found[0][1] == pytest.approx(alone[1], rel=1e-12)


# -- what is refused


def not_finite_in_one(model, batch):
    return model(batch[0]).sum() * (float("nan") if torch.distributed.get_rank() == 1 else 1.0)


def refused(rank, what):
    loader, settings = batches(), {"align": False, "recipe": recipe("quadratic", 1)}
    if what == "seed":
        settings["seed"] = rank
    elif what == "data":
        loader = TensorLoader(loader.inputs + rank, loader.targets, batch_size=8)
    elif what == "network":
        return modeconn.fit_curve(network(1), network(2 + rank), loader, **settings)
    elif what == "list":
        loader = list(loader)
    elif what == "batches":
        loader = batches(count=20)
    elif what == "sampler":
        data = TensorDataset(loader.inputs, loader.targets)
        loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, num_replicas=3, rank=rank))
    elif what == "shape" and rank == 1:
        loader = TensorLoader(loader.inputs[:, :4], loader.targets, batch_size=8)
    elif what == "loss":
        settings["forward"] = not_finite_in_one
    return modeconn.fit_curve(*ends(), loader, **settings)


REFUSED = {
    "seed": (2, "processes differ: seed is 0 in process 0 and 1 in process 1"),
    "data": (2, "processes differ: the digest of loader is"),
    "network": (2, "processes differ: the digest of network b is"),
    "list": (2, "loader would yield the same batches in each of 2 processes. Give the DataLoader a "),
    "batches": (4, "there are 4 processes and fewer batches in an epoch"),
    "sampler": (2, "the DistributedSampler of loader is for process 0 of 3, and this is 0 of 2."),
    "shape": (2, "processes differ: the digest of loader is"),
    "loss": (2, "the training loss became nan in epoch 0 at t="),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_together_is_refused_in_all_processes(pool, what):
    size, said = REFUSED[what]
    found = pool.outcomes(size, refused, what)
    assert any(str(one).startswith(said) for one in found), found
    assert {one.kind for one in found} <= {"ValueError", "OtherProcessError", "FloatingPointError"}


class FailingAfterEpoch(modeconn.callbacks.Callback):
    """Raises after the first epoch in process 1."""

    def after_epoch(self, event):
        if torch.distributed.get_rank() == 1:
            raise KeyError("mine")


def failing_after_an_epoch(rank, path):
    return modeconn.fit_curve(
        *ends(), batches(), align=False, recipe=recipe("quadratic", 3), callbacks=[FailingAfterEpoch()], checkpoint=path
    )


def test_a_callback_that_fails_in_one_process_loses_no_epoch(pool, tmp_path):
    path = str(tmp_path / "run.safetensors")
    first, second = pool.outcomes(2, failing_after_an_epoch, path)
    assert (second.kind, first.kind) == ("KeyError", "OtherProcessError")
    assert str(first) == "process 1 of 2 failed: KeyError('mine')"
    assert files.read(path)[1]["progress"]["epoch"] == 1


class Heard(modeconn.callbacks.Callback):
    """Notes every epoch, and fails or ends the run if told to."""

    def __init__(self, fail_at=None, stop_at=None):
        self.epochs, self.fail_at, self.stop_at = [], fail_at, stop_at

    def after_epoch(self, event):
        self.epochs.append(event.epoch)
        if event.epoch == self.fail_at:
            raise KeyError("mine")
        return event.epoch == self.stop_at

    def state(self):
        return {"epochs": self.epochs}

    def load_state(self, state):
        self.epochs = list(state["epochs"])


EXACT = PAM(iterations=1, exact=True, num_points=3)


def told_in_one(rank, whose, refine=None, path=None, fail_at=None, stop_at=None):
    heard = Heard(fail_at, stop_at)
    how = {"recipe": recipe("quadratic", 3), "checkpoint": path, "callbacks": [heard] if rank == whose else []}
    align = refine is not None
    made = modeconn.fit_curve(*ends(), batches(), align=align, refine=refine, **how)
    return made.control_points, heard.epochs, len(made.history.loss)


@pytest.mark.parametrize("refine", [None, EXACT], ids=["fit", "exact"])
@pytest.mark.parametrize("whose", [0, 1])
def test_one_process_alone_may_have_callbacks(pool, tmp_path, whose, refine):
    path = str(tmp_path / "run.safetensors")
    plain = pool.run(2, told_in_one, None, refine)
    found = pool.run(2, told_in_one, whose, refine)
    assert all(torch.equal(one[0], plain[0][0]) for one in found)
    assert found[whose][1] == [1, 2, 3] and not found[1 - whose][1]
    kinds = [one.kind for one in pool.outcomes(2, told_in_one, whose, refine, path, 2)]
    assert kinds[whose] == "KeyError" and kinds[1 - whose] == "OtherProcessError"
    again = pool.run(2, told_in_one, whose, refine, path)
    assert torch.equal(again[0][0], plain[0][0]) and again[whose][1] == [1, 2, 3]  # the second is told once more
    stopped = pool.run(2, told_in_one, whose, refine, None, None, 2)
    assert stopped[whose][1] == [1, 2] and [one[2] for one in stopped] == [2, 2]


def evaluating_in_the_first(rank):
    class Evaluating(modeconn.callbacks.Callback):
        def after_epoch(self, event):
            if rank == 0:
                event.connection().evaluate(batches(), num_points=3)

    return modeconn.fit_curve(*ends(), batches(), align=False, recipe=recipe("quadratic", 2), callbacks=[Evaluating()])


def test_a_verb_that_one_process_calls_by_itself_is_told(pool):
    for one in pool.outcomes(2, evaluating_in_the_first):
        assert one.kind == "OtherProcessError" and "with modeconn.alone():" in str(one)


def penalised(rank, epochs):
    """Fit on three batches, of which only the second counts: in the second step, none, and process 1 has no batch."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(20, 5, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    targets[8:16] = torch.arange(8) % 2 + 1
    recipe = Recipe(epochs, partial(torch.optim.SGD, lr=0.1), schedule=modeconn.constant, weight_decay=0.1)
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    loader = TensorLoader(inputs, targets, batch_size=8)
    return modeconn.fit_curve(*ends(), loader, align=False, loss_fn=loss_fn, recipe=recipe).control_points


def naive_penalty(epochs):
    """Do the same with autograd: the penalty is that of the process that counts, or of the one that had a batch."""
    models = ends()
    vectors = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for model in models]
    torch.manual_seed(0)
    inputs, curve = torch.randn(20, 5, dtype=torch.float64)[8:16], Bezier(2)
    points = curve.initial_control_points(*vectors)
    middle = points[1].clone()
    for step in range(2 * epochs):
        middle.requires_grad_()
        t = stratified_positions(0, 0)[2 * step : 2 * step + 2]
        theta = curve.basis(t)[1 - step % 2] @ torch.stack([points[0], middle, points[-1]])
        loss = 0.05 * theta.square().sum()
        if step % 2 == 0:
            parts, place = {}, 0
            for name, parameter in models[0].named_parameters():
                parts[name] = theta[place : place + parameter.numel()].view_as(parameter)
                place += parameter.numel()
            outputs = torch.func.functional_call(models[0], parts, (inputs,))
            loss = loss + nn.functional.cross_entropy(outputs, torch.arange(8) % 2 + 1)
        (gradient,) = torch.autograd.grad(loss, middle)
        middle = (middle - 0.1 * gradient).detach()
    return middle


def test_a_step_in_which_nothing_counts_decays_as_one_process_would(pool):
    expected = naive_penalty(3)
    assert all((points[1] - expected).abs().max() < 1e-12 for points in pool.run(2, penalised, 3))


def fit_of_a_data_loader(rank, path, break_at=None):
    loader = batches()
    data = TensorDataset(loader.inputs, loader.targets)
    shared = torch.distributed.get_world_size() > 1
    sampler = DistributedSampler(data) if shared else None
    reader = DataLoader(data, batch_size=8, sampler=sampler, shuffle=not shared)
    breaking = [] if break_at is None else [Breaking(rank, 0, break_at)]
    made = modeconn.fit_curve(
        *ends(), reader, align=False, recipe=recipe("quadratic", 3), checkpoint=path, callbacks=breaking
    )
    return made.history


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_of_a_data_loader_goes_on_with_another_number_of_processes(pool, tmp_path, before, after):
    path = str(tmp_path / "run.safetensors")
    assert pool.outcomes(before, fit_of_a_data_loader, path, 13)[0].kind == "Broken"
    for history in pool.run(after, fit_of_a_data_loader, path):
        assert len(history.loss) == 3 and history.num_processes == after
