"""Training that several processes share."""

from functools import partial

import pytest
import torch
from torch import nn

import modeconn
from modeconn import PGD, AdversarialTraining, Recipe, callbacks, models
from modeconn.data import TensorLoader
from modeconn.tools.rng import seed_of
from tests.learning.test_shared import Heard

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def network(seed=1, norm=False, dropout=0.0):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def batches(count=83, size=8):
    torch.manual_seed(0)
    inputs = torch.rand(count, 5, dtype=torch.float64)
    return TensorLoader(inputs, torch.arange(count) % 3, batch_size=size, shuffle=True)


def trained(rank, epochs, **settings):
    recipe = Recipe(epochs, SGD, weight_decay=0.01)
    return models.train(network(), batches(), recipe=recipe, seed=3, **settings).state_dict()


def naive_training(size, epochs):
    model, loader, rates = network(), batches(), Recipe(epochs)
    moves = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for epoch in range(epochs):
        torch.manual_seed(seed_of(3, epoch))
        passed = list(loader)
        steps = -(-len(passed) // size)
        for step in range(steps):
            batch = passed[step * size : (step + 1) * size]
            inputs, targets = (torch.cat(parts) for parts in zip(*batch, strict=True))
            moves.param_groups[0]["lr"] = 0.05 * rates.learning_rate_factor(epoch + step / steps)
            moves.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            moves.step()
    return model.state_dict()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one_with_larger_batches(pool, size):
    epochs = 5 * size
    expected = naive_training(size, epochs)
    for found in pool.run(size, trained, epochs):
        assert all((found[name] - tensor).abs().max() < 1e-12 for name, tensor in expected.items())


def full(rank, path=None, epochs=3, adversary=False, fail_at=None):
    settings = {"adversary": AdversarialTraining(PGD(0.1, 0.05, 2))} if adversary else {}
    loader = batches()
    if fail_at is not None and rank == 1:
        loader = Failing(loader.inputs, loader.targets, batch_size=8, shuffle=True)
        loader.left = fail_at
    recipe = Recipe(epochs, SGD)
    made = models.train(network(norm=True, dropout=0.3), loader, recipe=recipe, checkpoint=path, **settings)
    return made.state_dict()


class Failing(TensorLoader):
    """Fails after some batches."""

    left = 1 << 30

    def batch_at(self, order, number):
        self.left -= 1
        if self.left < 0:
            raise OSError("a disk that is gone")
        return super().batch_at(order, number)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("adversary", [False, True])
def test_all_processes_end_with_one_network(pool, adversary):
    first, second = pool.run(2, full, None, 3, adversary)
    assert same(first, second)
    assert first["1.running_mean"].abs().max() > 0 and first["1.num_batches_tracked"] > 0


def test_an_interrupted_training_ends_with_the_same_bits(pool, tmp_path):
    path = str(tmp_path / "run.safetensors")
    whole = pool.run(2, full)
    broken = pool.outcomes(2, full, path, 3, False, 12)
    assert [one.kind for one in broken] == ["OtherProcessError", "OSError"]
    assert all(map(same, pool.run(2, full, path), whole))


class Breaking(callbacks.Callback):
    """Raises after an epoch in one process."""

    def __init__(self, rank, epoch):
        self.rank, self.epoch = rank, epoch

    def after_epoch(self, event):
        if event.epoch == self.epoch and torch.distributed.get_rank() == self.rank:
            raise KeyError("mine")


def told(rank, folder, path=None, break_at=None, epochs=3):
    validation = callbacks.Validation(batches(30))
    log, kept = callbacks.CSVLog(f"{folder}/log{rank}.csv"), callbacks.KeepEpochs(f"{folder}/kept{rank}")
    all_of_them = [validation, callbacks.EarlyStopping("loss", patience=9), log, kept, Breaking(1, break_at)]
    recipe = Recipe(epochs, SGD)
    made = models.train(
        network(norm=True, dropout=0.3), batches(), recipe=recipe, callbacks=all_of_them, checkpoint=path
    )
    return made.state_dict(), validation.values, all_of_them[1].best, log.state()["rows"]


def but_for_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_callbacks_of_all_processes_hear_the_same_and_one_writes(pool, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = pool.run(2, told, str(tmp_path / "a"))
    assert same(whole[0][0], pool.run(2, full)[0]) and same(whole[0][0], whole[1][0])
    assert whole[0][1:3] == whole[1][1:3] and len(whole[0][1]) == 3
    assert but_for_seconds(whole[0][3]) == but_for_seconds(whole[1][3])
    last = models.load(tmp_path / "a" / "kept0" / "epoch_3.safetensors", network(norm=True)).state_dict()
    assert same(last, whole[0][0])
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == ["kept0", "kept1", "log0.csv"]
    assert not list((tmp_path / "a" / "kept1").iterdir())

    broken = pool.outcomes(2, told, str(tmp_path / "b"), str(tmp_path / "run"), 2)
    assert [one.kind for one in broken] == ["OtherProcessError", "KeyError"]
    assert str(broken[0]) == "process 1 of 2 failed: KeyError('mine')"
    again = pool.run(2, told, str(tmp_path / "b"), str(tmp_path / "run"))
    for found, expected in zip(again, whole, strict=True):
        assert same(found[0], expected[0]) and found[1:3] == expected[1:3]
        assert but_for_seconds(found[3]) == but_for_seconds(expected[3])


def stopped_by_one(rank):
    class Enough(callbacks.Callback):
        def after_epoch(self, event):
            return event.epoch == 2 and rank == 1

    class Note(callbacks.Callback):
        losses = ()

        def after_epoch(self, event):
            self.losses = (*self.losses, event.loss)

    note, recipe = Note(), Recipe(5, partial(torch.optim.SGD, lr=0.0))
    made = models.train(network(), batches(), recipe=recipe, callbacks=[Enough(), note])
    return made.state_dict(), note.losses, modeconn.evaluate(network().eval(), batches()).loss.item()


def test_the_wish_of_one_process_ends_the_run_in_all_and_losses_are_those_of_all_batches(pool):
    first, second = pool.run(2, stopped_by_one)
    assert same(first[0], second[0]) and first[1] == second[1] and len(first[1]) == 2
    assert first[1] == pytest.approx([first[2]] * 2)


def told_in_one(rank, whose, path=None, fail_at=None, stop_at=None):
    heard = Heard(fail_at, stop_at)
    how = {"recipe": Recipe(3, SGD), "checkpoint": path, "callbacks": [heard] if rank == whose else []}
    return models.train(network(), batches(), **how).state_dict(), heard.epochs


@pytest.mark.parametrize("whose", [0, 1])
def test_one_process_alone_may_have_callbacks(pool, tmp_path, whose):
    path = str(tmp_path / "run.safetensors")
    plain = pool.run(2, told_in_one, None)
    found = pool.run(2, told_in_one, whose)
    assert same(found[0][0], plain[0][0]) and same(found[1][0], plain[0][0])
    assert found[whose][1] == [1, 2, 3] and not found[1 - whose][1]
    kinds = [one.kind for one in pool.outcomes(2, told_in_one, whose, path, 2)]
    assert kinds[whose] == "KeyError" and kinds[1 - whose] == "OtherProcessError"
    again = pool.run(2, told_in_one, whose, path)
    assert same(again[0][0], plain[0][0]) and again[whose][1] == [1, 2, 3]  # the second is told once more
    stopped = pool.run(2, told_in_one, whose, None, None, 2)
    assert stopped[whose][1] == [1, 2] and same(stopped[0][0], stopped[1][0])
    assert not same(stopped[0][0], plain[0][0])


def cycles(rank, path):
    note = callbacks.Validation(batches(30))
    how = {"recipe": Recipe(2, SGD), "callbacks": [note], "checkpoint": path}
    made = models.train_snapshots(network(norm=True), batches(), cycles=2, **how)
    return [model.state_dict() for model in made], note.values


def test_cycles_are_shared_too(pool, tmp_path):
    first, second = pool.run(2, cycles, str(tmp_path / "k"))
    assert all(map(same, first[0], second[0])) and first[1] == second[1] and len(first[1]) == 4
    assert pool.run(2, cycles, str(tmp_path / "k"))[1][1] == first[1]


# -- populations


def population(rank, count=5, path=None, epochs=3, dropout=0.0):
    networks = [network(seed, norm=True, dropout=dropout) for seed in range(count)]
    made = models.train_population(networks, batches(), recipe=Recipe(epochs, SGD), checkpoint=path)
    return [model.state_dict() for model in made]


def close(found, expected):
    return all((found[name] - expected[name]).abs().max() < 1e-12 for name in expected)


@pytest.mark.parametrize("size", [2, 4])
def test_a_population_is_that_of_one_process(pool, size):
    (expected,) = pool.run(1, population)
    for found in pool.run(size, population):
        assert all(map(close, found, expected))


def stopped_population(rank, path):
    class Stop(Exception):
        pass

    import modeconn.models.training as training

    whole, steps = training.check_length, []

    def stop(number, expected):
        steps.append(number)
        if len(steps) == 3:
            raise Stop
        return whole(number, expected)

    training.check_length = stop
    try:
        population(rank, path=path)
    except Exception:
        return len(steps)
    finally:
        training.check_length = whole


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore:the run was interrupted with")
def test_an_interrupted_population_goes_on_with_any_number_of_processes(pool, tmp_path, before, after):
    path = str(tmp_path / "run.safetensors")
    (expected,) = pool.run(1, population)
    assert pool.run(before, stopped_population, path) == [3] * before
    for found in pool.run(after, population, 5, path):
        assert all(map(close, found, expected))


def masks(rank):
    """Return the first weights of networks whose only difference could be dropout."""
    networks = [network(1, dropout=0.5) for _ in range(2)]
    made = models.train_population(networks, batches(), recipe=Recipe(1, SGD), seeds=[0, 0])
    return [model[0].weight.detach() for model in made]


def test_networks_of_different_processes_drop_other_units(pool):
    first, second = pool.run(2, masks)[0]
    assert not torch.equal(first, second)


def test_more_processes_than_networks_are_refused(pool):
    found = pool.outcomes(4, population, 3)
    assert {str(one) for one in found} == {"there are 4 processes for 3 networks. Start at most one for each network."}
