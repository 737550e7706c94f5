"""Training of one network tells callbacks of its steps and epochs, and ends with the bits of one that tells nobody."""

from __future__ import annotations

import csv
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import modeconn
from modeconn import Connection, Recipe, data, metrics, models
from modeconn.learning.callbacks import Callback, CSVLog, EarlyStopping, KeepEpochs, TensorBoardLog, Validation
from modeconn.tools import files
from tests.cases import same_bits

SGD = Recipe(epochs=4, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
TRAIN, TEST = (one.with_(batch_size=300) for one in data.load("digits"))
KINDS = {"mlp": [], "dropout": [nn.Dropout(0.3)], "batch norm": [nn.BatchNorm1d(9)]}


def network(name="batch norm", seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 9), *KINDS[name], nn.ReLU(), nn.Linear(9, 10))


def train(name="batch norm", **settings):
    return models.train(network(name), TRAIN, **{"recipe": SGD, "seed": 3, **settings})


class Stop(Exception):
    pass


class Note(Callback):
    """Writes down every moment, disturbs every random generator, and breaks the network that it is shown."""

    def __init__(self, fail_at=None, stop_at=None):
        self.begun, self.steps, self.epochs, self.networks = [], [], [], []
        self.fail_at, self.stop_at = fail_at, stop_at

    def before_run(self, event):
        self.begun.append(event.num_epochs)

    def after_step(self, event):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  # what users draw from
        self.steps.append((event.epoch, event.step, event.t, float(event.loss)))

    def after_epoch(self, event):
        torch.manual_seed(99)
        assert event.connection is None
        self.epochs.append((event.epoch, event.num_epochs, event.loss))
        self.networks.append(event.model())
        nn.init.zeros_(event.model()[0].weight)
        if event.epoch == self.fail_at:
            raise Stop
        return event.epoch == self.stop_at


@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_callbacks_ends_with_the_same_bits_as_one_without(name, tmp_path):
    plain, note = train(name), Note()
    watched = train(name, callbacks=[note, Validation(TEST), KeepEpochs(tmp_path / "kept")])
    assert same_bits(watched, plain) and same_bits(note.networks[-1], plain)
    assert not any(network.training for network in note.networks)
    assert not torch.equal(note.networks[0][0].weight, plain[0].weight)
    batches = len(TRAIN)
    assert note.begun == [4] and [step[:3] for step in note.steps] == [(n // batches, n, None) for n in range(20)]
    assert [epoch[:2] for epoch in note.epochs] == [(n, 4) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_a_callback_interrupts_goes_on_with_the_same_bits_and_what_callbacks_knew(name, tmp_path):
    def told(folder, fail_at=None):
        folder.mkdir(exist_ok=True)
        log = CSVLog(folder / "log.csv")
        return [Validation(TEST), EarlyStopping("validation loss", patience=9), log, Note(fail_at)]

    whole = told(tmp_path / "whole")
    expected = train(name, callbacks=whole)
    parts = tmp_path / "parts"
    for fail_at in (1, 3):
        with pytest.raises(Stop):
            train(name, callbacks=told(parts, fail_at), checkpoint=tmp_path / "k")
    again = told(parts)
    found = train(name, callbacks=again, checkpoint=tmp_path / "k")
    assert same_bits(found, expected)
    assert again[0].values == whole[0].values and len(whole[0].values) == 4 and again[1].best == whole[1].best
    assert [epoch[0] for epoch in again[3].epochs] == [3, 4]  # of that which failed, all are told again
    assert again[3].steps == whole[3].steps[15:] and not again[3].begun
    tables = []
    for folder in (parts, tmp_path / "whole"):
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        assert all(float(row.pop("seconds")) > 0 for row in rows)
        tables.append(rows)
    assert tables[0] == tables[1] and list(tables[0][0]) == ["epoch", "loss", "validation loss", "validation accuracy"]


def test_a_file_of_an_older_version_goes_on_and_tells_callbacks(tmp_path):
    expected, kept = train(), tmp_path / "k"
    with pytest.raises(Stop):
        train(callbacks=[Note(fail_at=2)], checkpoint=kept)
    tensors, about = files.read(kept, "checkpoint of models.train")
    for name in ("num_steps", "seconds", "is_stopped", "untold", "callbacks"):
        del about[name]
    files.write(kept, "checkpoint of models.train", tensors, about)
    note = Note()
    assert same_bits(train(checkpoint=kept, callbacks=[note]), expected)
    assert [epoch[0] for epoch in note.epochs] == [3, 4]


def test_a_run_ends_early_and_stays_so(tmp_path):
    note = Note(stop_at=2)
    stopped = train(callbacks=[note], checkpoint=tmp_path / "k")
    assert len(note.epochs) == 2 and same_bits(stopped, note.networks[-1]) and not stopped.training
    assert same_bits(train(checkpoint=tmp_path / "k"), stopped)


def test_the_loss_of_an_epoch_is_the_mean_over_examples():
    note = Note()
    recipe = Recipe(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    train("mlp", recipe=recipe, callbacks=[note])
    expected = modeconn.evaluate(network("mlp").eval(), TRAIN).loss[0]
    assert note.epochs[0][2] == pytest.approx(float(expected), rel=1e-6)
    assert note.epochs[0][2] != pytest.approx(np.mean([step[3] for step in note.steps]), rel=1e-6)


def test_an_epoch_in_which_nothing_counts_is_refused():
    nothing = [(x, torch.full_like(y, -100)) for x, y in TRAIN]
    with pytest.raises(ValueError, match="no target of the loader's batches counts: the loss ignores them all"):
        models.train(network("mlp"), nothing, recipe=SGD)


# -- validation


def test_validation_is_what_evaluate_says_of_the_network_after_each_epoch():
    how = {"metrics": {"top 3": metrics.top_k(3)}}
    note, own = Note(), Validation(TEST, every=2, **how)
    anew = Validation(TEST, every=3, recalibrate=TRAIN, name="anew")
    train(callbacks=[note, own, anew])
    assert [one["epoch"] for one in own.values] == [2, 4] and [one["epoch"] for one in anew.values] == [3, 4]
    for one in own.values:
        profile = modeconn.evaluate(note.networks[one["epoch"] - 1], TEST, **how)
        assert one == {
            "epoch": one["epoch"],
            "validation loss": profile.loss[0],
            "validation accuracy": profile.accuracy[0],
            "validation top 3": profile.metrics["top 3"][0],
        }
    expected = modeconn.evaluate(note.networks[2], TEST, recalibrate=TRAIN).loss[0]
    assert anew.values[0]["anew loss"] == expected != modeconn.evaluate(note.networks[2], TEST).loss[0]


def test_validation_has_the_loss_of_the_run_unless_it_has_one_of_its_own():
    def squares(outputs, targets):
        return ((outputs - nn.functional.one_hot(targets, 10)) ** 2).mean(1).mean()

    def forward(model, batch):
        return squares(model(batch[0]), batch[1])

    by_loss, by_forward = Validation(TEST), Validation(TEST)
    entropy, again = (Validation(TEST, loss_fn=modeconn.cross_entropy, name="entropy") for _ in range(2))
    train("mlp", loss_fn=squares, callbacks=[by_loss, entropy])
    train("mlp", forward=forward, callbacks=[by_forward, again])
    losses = [[one["validation loss"] for one in each.values] for each in (by_loss, by_forward)]
    losses += [[one["entropy loss"] for one in each.values] for each in (entropy, again)]
    assert losses[0] == pytest.approx(losses[1]) and losses[2] == pytest.approx(losses[3])
    assert losses[0][0] < 0.2 < losses[2][0]


def test_a_run_stops_early_by_its_validation_and_a_writer_gets_all_values():
    class Writer:
        rows = ()

        def add_scalar(self, name, value, step):
            self.rows = [*self.rows, (name, step)]

    writer, stopping = Writer(), EarlyStopping("validation accuracy", patience=1, margin=1.0, higher_is_better=True)
    train(callbacks=[Validation(TEST), stopping, TensorBoardLog(writer)])
    names = ("loss", "validation loss", "validation accuracy")
    assert writer.rows == [(name, step) for step in (1, 2) for name in names]


class Unread:
    """Data that nobody may read."""

    def __iter__(self):
        raise AssertionError("the data was read")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Validation(TEST, t=[0.0, 0.5]), "t are positions on a curve, and here one network is trained"),
        (
            lambda: Validation(TEST, repair=True),
            "the settings of modeconn.evaluate: got an unexpected .*'repair'",
        ),
        (
            lambda: EarlyStopping("validation loss, t=0.5"),
            "would watch 'validation loss, t=0.5', which no callback of this run measures; there is 'loss'. Pass one",
        ),
        (lambda: Validation(TEST, loss_fn=None), "loss_fn must be a function, got loss_fn=None"),
        (lambda: Validation(TEST, metrics={"far": metrics.cka("b")}), "'far' compares with end 'b' of a curve"),
        (lambda: print, "a callback must be an object with one of"),
    ],
)
@pytest.mark.parametrize("verb", [models.train, partial(models.train_snapshots, cycles=2)], ids=["train", "snapshots"])
def test_callbacks_that_are_not_for_one_network_are_refused_before_anything_is_read(make, message, verb):
    with pytest.raises(ValueError, match=message):
        verb(network(), Unread(), recipe=SGD, callbacks=[make()])


# -- networks of past epochs


def test_networks_of_past_epochs_are_kept_also_where_a_run_goes_on(tmp_path):
    note, folder = Note(), tmp_path / "runs" / "kept"
    (tmp_path / "runs").mkdir()
    with pytest.raises(Stop):
        train(callbacks=[KeepEpochs(folder, every=2), Note(fail_at=3)], checkpoint=tmp_path / "k")
    assert [path.name for path in folder.iterdir()] == ["epoch_2.safetensors"]
    train(callbacks=[KeepEpochs(folder, every=2)], checkpoint=tmp_path / "k")
    train(callbacks=[note])
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_2.safetensors", "epoch_4.safetensors"]
    for epoch in (2, 4):
        found = models.load(folder / f"epoch_{epoch}.safetensors", network())
        assert same_bits(found, note.networks[epoch - 1]) and "train(" in found.made_by["call"]


def test_connections_of_past_epochs_are_kept(tmp_path):
    ends = train("mlp"), models.train(network("mlp", 2), TRAIN, recipe=SGD)
    fitted = modeconn.fit_curve(*ends, TRAIN, recipe=SGD, callbacks=[KeepEpochs(tmp_path, every=2)])
    first, last = (Connection.load(tmp_path / f"epoch_{epoch}.safetensors", ends[0]) for epoch in (2, 4))
    assert torch.equal(last.control_points, fitted.control_points) and last.permutation == fitted.permutation
    assert not torch.equal(first.control_points, fitted.control_points) and "fit_curve(" in first.made_by["call"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.* Choose a place that can be written to"):
        KeepEpochs(tmp_path / "file")
    with pytest.raises(ValueError, match="every must be at least 1, got every=0"):
        KeepEpochs(tmp_path, every=0)
    KeepEpochs(tmp_path / "new" / "one")
    assert list((tmp_path / "new" / "one").iterdir()) == []


# -- cycles


def cycles(**settings):
    recipe = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.05))
    return models.train_snapshots(network(), TRAIN, cycles=3, recipe=recipe, seed=3, **settings)


def test_cycles_are_one_run_to_callbacks_also_where_they_are_interrupted(tmp_path):
    plain, note, validation = cycles(), Note(), Validation(TEST)
    watched = cycles(callbacks=[note, validation])
    assert all(map(same_bits, watched, plain))
    assert all(map(same_bits, note.networks[1::2], plain))
    assert note.begun == [6] and [epoch[:2] for epoch in note.epochs] == [(n, 6) for n in range(1, 7)]
    assert [step[:2] for step in note.steps] == [(n // 5, n) for n in range(30)]
    with pytest.raises(Stop):
        cycles(callbacks=[Validation(TEST), Note(fail_at=3)], checkpoint=tmp_path / "k")
    again = [Validation(TEST), Note()]
    found = cycles(callbacks=again, checkpoint=tmp_path / "k")
    assert all(map(same_bits, found, plain)) and again[0].values == validation.values
    assert [epoch[0] for epoch in again[1].epochs] == [3, 4, 5, 6] and again[1].steps == note.steps[15:]


def test_a_callback_ends_all_cycles(tmp_path):
    for _ in range(2):
        found = cycles(callbacks=[Note(stop_at=3)], checkpoint=tmp_path / "k")
        assert len(found) == 2 and not same_bits(found[1], cycles()[1])
