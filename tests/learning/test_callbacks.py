"""Callbacks see every moment, change nothing, and go through checkpoints."""

from __future__ import annotations

import csv
import functools
import itertools
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch

import modeconn
from modeconn import PAM, Bezier, Connection, Recipe, WeightMatching, data, metrics, models
from modeconn.learning.callbacks import Callback, CSVLog, EarlyStopping, KeepEpochs, TensorBoardLog, Validation
from modeconn.refinement import ProximalLinear, pam
from modeconn.tools import files
from modeconn.tools.callbacks import Callbacks
from modeconn.tools.progress import progress_bar


@pytest.fixture(scope="module")
def networks():
    train, test = data.load("digits")
    recipe = Recipe(epochs=1)
    a, b = (models.train(models.mlp(64, (12,), 10, seed=s), train, recipe=recipe, seed=s) for s in (1, 2))
    return a, b, train.with_(batch_size=250), test


class Note(Callback):
    """Writes down every moment, and disturbs every random generator."""

    def __init__(self) -> None:
        self.steps, self.epochs, self.moves, self.points = [], [], [], []

    def _disturb(self) -> None:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  # what users draw from
        torch.manual_seed(99)

    def after_step(self, event):
        self._disturb()
        self.steps.append((event.epoch, event.step, event.t, float(event.loss)))

    def after_epoch(self, event):
        self._disturb()
        self.epochs.append((event.epoch, event.loss, event.connection()))

    def after_move(self, event):
        self._disturb()
        self.moves.append(event)

    def after_point(self, event):
        self.points.append((event.t, event.num_measured, event.num_points))


def fit(networks, epochs=3, **settings):
    a, b, train, _ = networks
    how = {"align": WeightMatching(), "curve": Bezier(2), "seed": 4, **settings}
    return modeconn.fit_curve(a, b, train, recipe=Recipe(epochs=epochs), **how)


def exact(networks, **settings):
    a, b, train, _ = networks
    few = train.subset(torch.arange(100)).with_(shuffle=False)
    refine = PAM(iterations=2, exact=True, num_points=3, step=ProximalLinear(num_rounds=1, num_tries=5))
    how = {"align": WeightMatching(), "refine": refine, "recipe": Recipe(epochs=4), **settings}
    return modeconn.fit_curve(a, b, few, **how)


def train(networks, **settings):
    return models.train(networks[0], networks[2], recipe=Recipe(epochs=4), **settings)


VERBS = {"fit_curve": functools.partial(fit, epochs=4), "exact PAM": exact, "models.train": train}


@pytest.mark.parametrize("refine", [None, PAM(iterations=2, num_batches=4)], ids=["fit", "pam"])
def test_a_run_with_callbacks_ends_with_the_same_bits_as_one_without(networks, refine):
    plain, note = fit(networks, refine=refine), Note()
    watched = fit(networks, refine=refine, callbacks=[note])
    assert torch.equal(watched.control_points, plain.control_points)
    assert watched.permutation == plain.permutation and watched.history.loss == plain.history.loss
    batches = len(networks[2])
    assert [step[:2] for step in note.steps] == [(n // batches, n) for n in range(3 * batches)]
    assert [epoch[:2] for epoch in note.epochs] == list(enumerate(plain.history.loss, 1))
    last = note.epochs[-1][2]
    assert torch.equal(last.control_points, plain.control_points) and last.permutation == plain.permutation
    assert not torch.equal(note.epochs[0][2].control_points, plain.control_points)
    for t in (0.0, 1.0):
        for ours, theirs in zip(last.model_at(t).parameters(), plain.model_at(t).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_every_move_of_pam_is_told_with_what_is_planned(networks):
    note = Note()
    step = ProximalLinear(num_rounds=3, num_tries=20)
    found = fit(networks, refine=PAM(iterations=2, num_batches=4, step=step), callbacks=[note])
    for turn in found.history.turns:
        moves = [move for move in note.moves if move.epoch == turn["epoch"]]
        assert [move.num_tried for move in moves] == list(range(1, turn["num_tried"] + 1))
        assert moves[-1].num_accepted == turn["num_accepted"] and moves[-1].loss == turn["loss_after"]
        assert moves[-1].num_planned >= moves[-1].num_tried and moves[-1].num_planned <= 3 * 20
        assert moves[0].num_planned <= 20
    exact = Note()
    a, b, _, test = networks
    small = [next(iter(test))]
    refine = PAM(iterations=1, exact=True, num_points=3, step=ProximalLinear(num_rounds=1, num_tries=5))
    modeconn.fit_curve(a, b, small, align=WeightMatching(), recipe=Recipe(epochs=1), refine=refine, callbacks=[exact])
    assert len(exact.moves) == exact.moves[-1].num_tried >= 1


def test_pam_shows_a_bar_that_moves(networks, capsys, monkeypatch):
    monkeypatch.setattr(pam, "progress_bar", functools.partial(progress_bar, mininterval=0))  # every update is shown
    refine = PAM(iterations=1, num_batches=2, step=ProximalLinear(num_rounds=1, num_tries=5))
    fit(networks, epochs=1, refine=refine, progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"PAM before epoch 0: .*[1-5]/[1-5] .*accepted=\d, loss=", shown)


def test_validation_is_what_evaluate_says_of_the_curve_after_each_epoch(networks):
    *_, test = networks
    note, validation = Note(), Validation(test, t=[0.25, 0.5], every=2)
    found = fit(networks, epochs=4, callbacks=[note, validation])
    assert [one["epoch"] for one in validation.values] == [2, 4]
    for one in validation.values:
        profile = note.epochs[one["epoch"] - 1][2].evaluate(test, t=[0.25, 0.5])
        for place, t in enumerate((0.25, 0.5)):
            assert one[f"validation loss, t={t:g}"] == profile.loss[place]
            assert one[f"validation accuracy, t={t:g}"] == profile.accuracy[place]
    assert [bool(values) for values in found.history.values] == [False, True, False, True]


def test_evaluate_takes_positions_and_tells_of_each(networks, tmp_path):
    *_, test = networks
    note, line = Note(), fit(networks, epochs=1)
    part = line.evaluate(test, t=[0.2, 0.5], callbacks=[note])
    assert note.points == [(0.2, 1, 2), (0.5, 2, 2)]
    whole = line.evaluate(test, num_points=11)
    torch.testing.assert_close(part.loss, whole.loss[[2, 5]])
    assert part.own_loss is None and part.barrier != part.barrier  # NaN: no ends, no barrier
    assert "own" not in repr(part) and modeconn.Profile.from_json(part.to_json()).t.tolist() == [0.2, 0.5]


def test_a_run_stops_early_by_what_another_callback_measured(networks):
    class Worse(Callback):
        def after_epoch(self, event):
            event.values["made up"] = float(event.epoch)

    stopping = EarlyStopping("made up", patience=2)
    found = fit(networks, epochs=9, callbacks=[Worse(), stopping])
    assert len(found.history.loss) == 3 and stopping.best == 1
    assert [one["made up"] for one in found.history.values] == [1, 2, 3]
    rising = EarlyStopping("made up", patience=2, higher_is_better=True)
    assert len(fit(networks, epochs=4, callbacks=[Worse(), rising]).history.loss) == 4


class _Stop(Exception):
    pass


class MadeUp(Callback):
    """Adds a value after some epochs, and says nothing of it."""

    def __init__(self, name="made up", value=1.0, every=1):
        self.name, self.value, self.every = name, value, every

    def after_epoch(self, event):
        if event.epoch % self.every == 0:
            event.values[self.name] = self.value


class Says(MadeUp):
    """Adds the value and says so."""

    def measured_names(self, kind):
        return [self.name]


def test_a_value_that_nothing_measured_is_told_at_once_and_at_the_end(networks):
    stopping = EarlyStopping("speed")
    with pytest.warns(UserWarning) as told:
        assert len(fit(networks, callbacks=[MadeUp(every=2), stopping]).history.loss) == 3
    assert [str(one.message) for one in told] == [
        "EarlyStopping watches 'speed', which was not measured after epoch 2; there are 'loss', 'made up'. If it never "
        "is, the run goes on to its last epoch, 3.",
        "EarlyStopping watched 'speed', which was never measured; there is 'loss'.",
    ]
    fit(networks, callbacks=[MadeUp(), Says("speed", every=3), stopping])  # no warning: it is to come


@pytest.mark.parametrize("verb", VERBS)
def test_a_value_that_will_never_be_measured_is_refused_before_the_run(networks, verb, tmp_path):
    class Steps(Callback):
        def after_step(self, event):
            pytest.fail("work was done")

    place = "" if verb == "models.train" else ", t=0.5"
    there = "there are " + ", ".join(
        map(repr, ["loss", *(f"validation {n}{place}" for n in ("loss", "accuracy", "b"))])
    )
    validation = Validation(networks[3], metrics={"b": metrics.top_k(2)})
    told = [EarlyStopping("speed"), Steps(), validation, CSVLog(tmp_path / "log"), KeepEpochs(tmp_path / "kept")]
    with pytest.raises(ValueError, match=f"would watch 'speed', which no callback of this run measures; {there}. Pass"):
        VERBS[verb](networks, callbacks=told)
    for right in ("loss", f"validation accuracy{place}", f"validation b{place}"):
        Callbacks([EarlyStopping(right), validation], trained="network" if verb == "models.train" else "curve")
    Callbacks([EarlyStopping("speed"), Says("speed")], trained="curve")
    with pytest.raises(ValueError, match="there are 'loss', 'other'"):
        Callbacks([EarlyStopping("speed"), Says("other")], trained="curve")


@pytest.mark.parametrize("verb", ["fit_curve", "models.train"])
def test_the_order_of_callbacks_does_not_matter_also_where_a_run_goes_on(networks, verb, tmp_path):
    class Killer(Callback):
        def after_epoch(self, event):
            if event.epoch == 2:
                raise _Stop

    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

    place, found = "" if verb == "models.train" else ", t=0.5", []
    for number, order in enumerate(itertools.permutations(range(4))):
        if number % 5:  # all take long
            continue
        writer, log = Writer(), tmp_path / f"log{number}.csv"
        told = [Validation(networks[3]), EarlyStopping(f"validation loss{place}", margin=9, patience=2), CSVLog(log)]
        told.append(TensorBoardLog(writer))
        kept = {"checkpoint": tmp_path / f"run{number}"}
        with pytest.raises(_Stop):
            VERBS[verb](networks, callbacks=[*(told[place] for place in order), Killer()], **kept)
        VERBS[verb](networks, callbacks=[told[place] for place in reversed(order)], **kept)
        rows = [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(log.read_text().splitlines())
        ]
        assert [row["epoch"] for row in rows] == ["1", "2", "3"] and all(map(all, map(dict.values, rows)))
        found.append((rows, told[0].values, told[1].state(), sorted(set(writer.rows))))
    assert len(found) == 5 and all(one == found[0] for one in found)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["epoch", "loss", "seconds"])
def test_names_of_what_every_epoch_has_are_refused(networks, verb, name, tmp_path):
    with pytest.raises(ValueError, match=rf"event\.values\['{name}'\] has the name of what is known of every epoch"):
        VERBS[verb](networks, callbacks=[CSVLog(tmp_path / "log.csv"), MadeUp(name)])
    assert not (tmp_path / "log.csv").exists()


def test_positions_are_named_as_tables_write_them(networks):
    validation = Validation(networks[3], t=[0, 0.1 + 0.2, 1 / 3, 1.0])
    (values,) = fit(networks, epochs=1, callbacks=[validation]).history.values
    places = ["t=0", "t=0.3", "t=0.333333333333", "t=1"]
    assert list(values) == [f"validation {name}, {t}" for name in ("loss", "accuracy") for t in places]
    assert set(values) == set(validation.measured_names("curve"))


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])])
def test_validation_measures_after_epochs_that_its_interval_divides_and_the_last(networks, every, epochs):
    validation = Validation(networks[3], every=every)
    train(networks, callbacks=[validation])
    assert [one["epoch"] for one in validation.values] == epochs


def test_callbacks_go_on_from_a_checkpoint(networks, tmp_path):
    *_, test = networks

    class Killer(Callback):
        def after_epoch(self, event):
            if event.epoch == 2:
                raise _Stop

    def callbacks(folder):
        log = CSVLog(folder / "log.csv")
        return [Validation(test), EarlyStopping("validation loss, t=0.5", patience=9), log]

    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole = callbacks(tmp_path / "whole")
    expected = fit(networks, epochs=4, callbacks=whole)
    with pytest.raises(_Stop):
        fit(networks, epochs=4, callbacks=[*callbacks(tmp_path / "parts"), Killer()], checkpoint=tmp_path / "k")
    shutil.copy(tmp_path / "k", tmp_path / "copy")
    with pytest.warns(UserWarning, match="what Validation, EarlyStopping, CSVLog knew is lost, and none begin anew"):
        fit(networks, epochs=4, checkpoint=tmp_path / "copy")
    again = [*callbacks(tmp_path / "parts"), Note()]
    found = fit(networks, epochs=4, callbacks=again, checkpoint=tmp_path / "k")
    assert torch.equal(found.control_points, expected.control_points)
    assert again[0].values == whole[0].values and again[1].best == whole[1].best
    assert [epoch[0] for epoch in again[-1].epochs] == [2, 3, 4]  # of that which failed, all are told again
    tables = []
    for name in ("whole", "parts"):
        rows = list(csv.DictReader((tmp_path / name / "log.csv").read_text().splitlines()))
        tables.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert tables[0] == tables[1] and [row["epoch"] for row in tables[0]] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_epoch_in_which_a_callback_failed_is_told_again_once(networks, verb, tmp_path):
    class Seen(Callback):
        def __init__(self, fail_at=None):
            self.epochs, self.fail_at, self.num_told = [], fail_at, 0

        def after_epoch(self, event):
            self.epochs.append((event.epoch, event.loss))
            self.num_told += 1
            if event.epoch == self.fail_at:
                raise _Stop

        def state(self):
            return {"epochs": self.epochs}

        def load_state(self, state):
            self.epochs = [tuple(epoch) for epoch in state["epochs"]]

    whole, run = Seen(), VERBS[verb]
    run(networks, callbacks=[whole])
    for fail_at, told in ((2, 2), (2, 2), (4, 4)):
        failing = Seen(fail_at)
        with pytest.raises(_Stop):
            run(networks, callbacks=[failing], checkpoint=tmp_path / "k")
        assert len(failing.epochs) == told
    for num_left in (1, 0):
        again = Seen()
        run(networks, callbacks=[again], checkpoint=tmp_path / "k")
        assert again.epochs == whole.epochs and [epoch for epoch, _ in again.epochs] == [1, 2, 3, 4]
        assert again.num_told == num_left


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_a_callback_ended_takes_no_further_epoch(networks, verb, tmp_path):
    class Enough(Callback):
        def __init__(self):
            self.epochs = []

        def after_epoch(self, event):
            self.epochs.append(event.epoch)
            return event.epoch == 3

    first, second = Enough(), Enough()
    for told in (first, second):
        VERBS[verb](networks, callbacks=[told], checkpoint=tmp_path / "k")
    assert first.epochs == [1, 2, 3] and not second.epochs


def test_values_stand_at_their_epochs_also_where_a_run_began_without_callbacks(networks, tmp_path):
    class Killer(Callback):
        def after_step(self, event):
            if event.epoch == 2:
                raise _Stop

    with pytest.raises(_Stop):
        fit(networks, callbacks=[Killer()], checkpoint=tmp_path / "k")
    with pytest.warns(UserWarning, match="Said begin anew"):
        found = fit(networks, callbacks=[Said(1.0)], checkpoint=tmp_path / "k")
    assert found.history.values == [{}, {}, {"said": 1.0}]


def test_a_run_that_was_stopped_stays_so(networks, tmp_path):
    class Enough(Callback):
        def after_epoch(self, event):
            return True

    found = fit(networks, callbacks=[Enough()], checkpoint=tmp_path / "k")
    tensors, about = files.read(tmp_path / "k", "checkpoint of fit_curve")
    about["progress"]["is_stopped"] = about.pop("is_stopped")  # as files of older versions say it
    files.write(tmp_path / "older", "checkpoint of fit_curve", tensors, about)
    for kept in ("k", "older"):
        again = fit(networks, checkpoint=tmp_path / kept)
        assert len(again.history.loss) == 1 and torch.equal(again.control_points, found.control_points)
    found.save(tmp_path / "c")
    assert Connection.load(tmp_path / "c").history == found.history


def test_a_writer_gets_all_values(networks):
    class Writer:
        rows = ()

        def add_scalar(self, name, value, step):
            self.rows = [*self.rows, (name, value, step)]

    writer = Writer()
    found = fit(networks, epochs=2, callbacks=[Validation(networks[3]), TensorBoardLog(writer)])
    assert [row for row in writer.rows if row[0] == "loss"] == [
        ("loss", x, n) for n, x in enumerate(found.history.loss, 1)
    ]
    assert {name for name, *_ in writer.rows} == {"loss", "validation loss, t=0.5", "validation accuracy, t=0.5"}


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [Note],
            "must be an object with one of before_run, after_step, after_epoch, after_move, after_point, got <class",
        ),
        ([print], "a callback must be an object with one of"),
        (Note(), "callbacks must be a list or tuple"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_training(networks, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(networks, callbacks=callbacks)
    with pytest.raises(ValueError, match=message):
        fit(networks, epochs=1).evaluate(networks[3], callbacks=callbacks)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="patience must be at least 1 and margin finite, at least 0, got patience=0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="every must be at least 1, got every=0"):
        Validation([], every=0)
    with pytest.raises(ValueError, match="writer must have add_scalar"):
        TensorBoardLog(object())


# ---------------------------------------------------------------- what callbacks say is kept, whatever it is


class Said(MadeUp):
    def __init__(self, value) -> None:
        super().__init__("said", value)

    def state(self):
        return {"best": float("inf")}


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), torch.tensor(1.5), np.float32(2.5), 3])
def test_numbers_of_any_kind_go_through_checkpoints_and_files(networks, value, tmp_path):
    found = fit(networks, epochs=1, callbacks=[Said(value)], checkpoint=tmp_path / "run")
    found.save(tmp_path / "c")
    kept = Connection.load(tmp_path / "c").history.values
    assert repr(kept) == repr([{"said": float(value)}])
    with pytest.raises(ValueError, match=r"event\.values\['said'\] must be a number, got 'x'"):
        fit(networks, epochs=1, callbacks=[Said("x")])


def test_an_exception_in_a_callback_loses_no_values_of_that_epoch(networks, tmp_path):
    class Fails(Callback):
        def after_epoch(self, event):
            if event.epoch == 2:
                raise RuntimeError("stop")

    how = {"checkpoint": tmp_path / "run", "epochs": 3}
    with pytest.raises(RuntimeError, match="stop"):
        fit(networks, callbacks=[Said(1.0), Fails()], **how)
    resumed = fit(networks, callbacks=[Said(1.0)], **how)
    assert resumed.history.values == 3 * [{"said": 1.0}] and len(resumed.history.loss) == 3


def test_callbacks_begin_anew_with_every_run(networks, tmp_path):
    test = networks[3]
    told = [Validation(test), EarlyStopping("loss", patience=1), CSVLog(tmp_path / "log.csv")]
    first, second = (fit(networks, epochs=2, callbacks=told) for _ in range(2))
    assert first.history.loss == second.history.loss and len(told[0].values) == 2
    rows = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert [row["epoch"] for row in rows] == ["1", "2"]


def test_settings_of_callbacks_fail_before_the_run(networks, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        CSVLog(tmp_path / "missing" / "log.csv")
    with pytest.raises(ValueError, match="t must"):
        Validation(networks[3], t=[1.5])
    with pytest.raises(ValueError, match="a callback must be"):
        fit(networks, callbacks=[3], curve=modeconn.Line())


def test_exact_pam_tells_of_its_steps_and_may_be_stopped_and_resumed(networks, tmp_path):
    class Stops(Callback):
        def __init__(self, at) -> None:
            self.at, self.ends = at, []

        def after_epoch(self, event):
            self.ends.append(event.connection().model_at(1))
            if event.epoch == self.at == 2:
                raise KeyboardInterrupt
            return event.epoch == self.at

    a, b, train, _ = networks
    few = train.subset(torch.arange(100)).with_(shuffle=False)
    how = {"align": WeightMatching(), "refine": PAM(iterations=2, exact=True, num_points=3), "recipe": Recipe(epochs=4)}
    stops = Stops(3)
    found = modeconn.fit_curve(a, b, few, callbacks=[stops, Said(1.0)], **how)
    assert len(found.history.loss) == len(found.history.values) == len(stops.ends) == 3
    with pytest.raises(KeyboardInterrupt):
        modeconn.fit_curve(a, b, few, callbacks=[Stops(2), Said(1.0)], checkpoint=tmp_path / "run", **how)
    resumed = modeconn.fit_curve(a, b, few, callbacks=[Stops(3), Said(1.0)], checkpoint=tmp_path / "run", **how)
    assert torch.equal(resumed.control_points, found.control_points) and len(resumed.history.values) == 3


def test_what_a_callback_does_to_the_connection_it_is_shown_stays_its_own(networks):
    class Breaks(Callback):
        def after_epoch(self, event):
            connection = event.connection()
            connection.control_points.zero_()
            for buffer in connection.buffers[0].values():
                buffer.zero_()

    plain, broken = fit(networks, epochs=2), fit(networks, epochs=2, callbacks=[Breaks()])
    assert torch.equal(plain.control_points, broken.control_points)
    for name, buffer in plain.buffers[0].items():
        assert torch.equal(buffer, broken.buffers[0][name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Validation(3), "loader must be an iterable"),
        (lambda: Validation(iter([1])), "loader can be read only once"),
        (lambda: Validation([], t=0.5), "t must be a list or tuple, each a number, or None, got t=0.5"),
        (lambda: Validation([], every="x"), "every must be an integer, got every='x'"),
        (lambda: Validation([], nothing=3), "takes the settings of Connection.evaluate: got an unexpected .*'nothing'"),
        (lambda: Validation([], repair=3), "repair must be True or False, got repair=3"),
        (lambda: EarlyStopping(patience=None), "patience must be an integer, got patience=None"),
        (lambda: EarlyStopping(patience=math.nan), "patience must be an integer, got patience=nan"),
        (lambda: EarlyStopping(margin="x"), "margin must be a number, got margin='x'"),
        (lambda: EarlyStopping(3), "monitor must be a string, got monitor=3"),
        (lambda: CSVLog(None), "path must be a string or a path, got path=None"),
    ],
)
def test_settings_of_another_kind_are_refused_where_they_are_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("answer", [np.True_, torch.tensor(True)], ids=["numpy", "torch"])
def test_any_true_answer_ends_a_run(networks, answer):
    class Stop(Callback):
        def after_epoch(self, event):
            return answer

    assert len(fit(networks, callbacks=[Stop()]).history.loss) == 1
    told = Epochs()
    models.train(networks[0], networks[2], recipe=Recipe(epochs=3), callbacks=[Stop(), told])
    assert told.seen == [1]


class Epochs(Callback):
    def __init__(self):
        self.seen = []

    def before_run(self, event):
        self.seen = []

    def after_epoch(self, event):
        self.seen.append(event.epoch)

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = list(state["seen"])


def test_a_callback_that_wipes_the_loss_of_a_step_changes_no_epoch(networks):
    class Wipe(Callback):
        def after_step(self, event):
            event.loss.zero_()

    losses = []

    class Read(Callback):
        def after_epoch(self, event):
            losses.append(event.loss)

    assert fit(networks, callbacks=[Wipe()]).history.loss == fit(networks).history.loss
    for told in ([Wipe(), Read()], [Read()]):
        models.train(networks[0], networks[2], recipe=Recipe(epochs=3), callbacks=told)
    assert losses[:3] == losses[3:]


def test_a_callback_that_joins_a_run_forgets_what_it_knew_of_another(networks, tmp_path):
    class Fail(Callback):
        def after_epoch(self, event):
            raise KeyboardInterrupt

    def trained(**settings):
        models.train(networks[0], networks[2], recipe=Recipe(epochs=3), **settings)

    for run in (functools.partial(fit, networks), trained):
        told = Epochs()
        run(callbacks=[told])
        assert told.seen == [1, 2, 3]
        with pytest.raises(KeyboardInterrupt):
            run(callbacks=[Fail()], checkpoint=tmp_path / "c")
        with pytest.warns(UserWarning, match="begin anew"):
            run(callbacks=[told], checkpoint=tmp_path / "c")
        assert told.seen == [1, 2, 3]
        (tmp_path / "c").unlink()


def test_two_validations_need_names_of_their_own(networks):
    loader = networks[2]
    two = [Validation(loader), Validation(list(loader)[:1])]
    with pytest.raises(ValueError, match=r"two callbacks measure 'validation loss, t=0\.5'.* name='second'"):
        fit(networks, callbacks=two)
    two[1] = Validation(list(loader)[:1], name="first batch")
    values = fit(networks, callbacks=two).history.values[-1]
    assert {"validation loss, t=0.5", "first batch loss, t=0.5"} <= values.keys()
