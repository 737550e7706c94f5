"""Training of endpoints and populations goes on from its checkpoint with the same bits."""

from __future__ import annotations

import csv
import dataclasses
from functools import partial

import pytest
import torch

import modeconn
from modeconn import FreeAdversarialTraining, Recipe, data, models
from modeconn.models import training
from tests.cases import CASE, batches, same_bits

ADAM = Recipe(epochs=3, optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=modeconn.one_cycle)
SGD = Recipe(epochs=3, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9))


class _Stop(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Let runs end after the first epoch that they save, until told otherwise."""
    save, is_on = training.RunFile.save, [True]

    def saving(file, *parts):
        save(file, *parts)
        if is_on[0] and file.is_kept:
            raise _Stop

    monkeypatch.setattr(training.RunFile, "save", saving)
    return is_on


@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm"])
def test_a_killed_training_ends_with_the_bits_of_a_whole_one(name, recipe, killed, tmp_path):
    loader = data.load("digits")[0].with_(batch_size=500)
    torch.manual_seed(1)
    between = {"mlp": [], "dropout": [torch.nn.Dropout(0.3)], "batch norm": [torch.nn.BatchNorm1d(9)]}[name]
    network = torch.nn.Sequential(torch.nn.Linear(64, 9), *between, torch.nn.ReLU(), torch.nn.Linear(9, 10))
    expected = models.train(network, loader, recipe=recipe, seed=3)
    for _ in range(recipe.epochs):
        with pytest.raises(_Stop):
            models.train(network, loader, recipe=recipe, seed=3, checkpoint=tmp_path / "k")
    killed[0] = False
    again = models.train(network, loader, recipe=recipe, seed=3, checkpoint=tmp_path / "k")
    assert same_bits(again, expected)


def test_free_adversarial_training_goes_on_with_its_perturbation(killed, tmp_path):
    loader = data.load("digits")[0].with_(batch_size=500)
    network, how = models.mlp(64, (9,), 10), {"recipe": SGD, "adversary": FreeAdversarialTraining(0.1, num_replays=2)}
    expected = models.train(network, loader, **how)
    with pytest.raises(_Stop):
        models.train(network, loader, checkpoint=tmp_path / "k", **how)
    killed[0] = False
    assert same_bits(models.train(network, loader, checkpoint=tmp_path / "k", **how), expected)


def test_a_killed_population_ends_with_the_bits_of_a_whole_one(killed, tmp_path):
    loader = data.load("digits")[0].with_(batch_size=500)

    def make(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(64, 9), torch.nn.BatchNorm1d(9), torch.nn.ReLU(), torch.nn.Linear(9, 10)
        )

    networks = [make(seed) for seed in range(3)]
    expected = models.train_population(networks, loader, recipe=ADAM, seeds=[5, 6, 7])
    with pytest.raises(_Stop):
        models.train_population(networks, loader, recipe=ADAM, seeds=[5, 6, 7], checkpoint=tmp_path / "k")
    killed[0] = False
    again = models.train_population(networks, loader, recipe=ADAM, seeds=[5, 6, 7], checkpoint=tmp_path / "k")
    assert all(same_bits(one, other) for one, other in zip(again, expected, strict=True))
    with pytest.raises(ValueError, match="is of another run: seeds is"):
        models.train_population(networks, loader, recipe=ADAM, seeds=[5, 6, 8], checkpoint=tmp_path / "k")


def test_a_checkpoint_of_another_run_is_refused_and_info_describes_it(tmp_path):
    from typer.testing import CliRunner

    from modeconn.cli.app import app

    network, loader = CASE["mlp"].make(0), batches()
    models.train(network, loader, recipe=SGD, checkpoint=tmp_path / "k")
    for change, named in (
        ({"seed": 4}, "seed"),
        ({"recipe": dataclasses.replace(SGD, epochs=4)}, "recipe.epochs"),
        ({"loss_fn": torch.nn.functional.nll_loss}, "loss"),
    ):
        with pytest.raises(ValueError, match=f"is of another run: {named} is"):
            models.train(network, loader, **{"recipe": SGD, **change}, checkpoint=tmp_path / "k")
    with pytest.raises(ValueError, match="another run: the digest of what is trained"):
        models.train(CASE["mlp"].make(1), loader, recipe=SGD, checkpoint=tmp_path / "k")
    with pytest.raises(ValueError, match=r"is a checkpoint of models\.train, not a checkpoint of fit_curve"):
        modeconn.fit_curve(network.eval(), CASE["mlp"].make(1).eval(), loader, checkpoint=tmp_path / "k")
    assert "3 epochs" in CliRunner().invoke(app, ["info", str(tmp_path / "k")]).stdout


def test_a_checkpoint_inside_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this run saves itself at its own moments, after each epoch"):
        models.train(CASE["mlp"].make(0), batches(), checkpoint=modeconn.Checkpoint(tmp_path / "k", every_batches=2))


def test_the_command_goes_on_where_it_was_stopped_and_leaves_no_checkpoint(killed, tmp_path):
    from typer.testing import CliRunner

    from modeconn.cli.app import app

    def command(name):
        settings = ["--data", "digits", "--model", "mlp", "--model-arg", "hidden=8,", "--epochs", "2", "--seed", "1"]
        return CliRunner().invoke(app, ["train", str(tmp_path / name), *settings])

    assert isinstance(command("a").exception, _Stop) and (tmp_path / "a.checkpoint").exists()
    killed[0] = False
    assert command("a").exit_code == command("b").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert same_bits(models.load(tmp_path / "a"), models.load(tmp_path / "b"))


def test_the_command_loses_nothing_that_it_measured_or_kept_before_it_was_stopped(killed, tmp_path):
    from typer.testing import CliRunner

    from modeconn.cli.app import app

    def command(name):
        settings = ["--data", "digits", "--model", "mlp", "--model-arg", "hidden=8,", "--epochs", "3"]
        watch = ["--validation", "100", "--validate-every", "1", "--keep-every", "1"]
        return CliRunner().invoke(app, ["train", str(tmp_path / name), *settings, *watch])

    def left(name):
        rows = list(csv.DictReader((tmp_path / f"{name}.log.csv").read_text().splitlines()))
        seconds = [float(row.pop("seconds")) for row in rows]
        assert seconds == sorted(seconds)
        kept = {path.name: models.load(path) for path in (tmp_path / f"{name}.epochs").iterdir()}
        return rows, {file: one.state_dict() for file, one in kept.items()}

    for _ in range(2):
        assert isinstance(command("a").exception, _Stop)
    killed[0] = False
    last = command("a")
    assert last.exit_code == command("b").exit_code == 0
    assert [line[:23] for line in last.stderr.splitlines()] == ["modeconn: epoch 3 of 3;"]
    (rows, networks), (expected, others) = left("a"), left("b")
    assert rows == expected and [row["epoch"] for row in rows] == ["1", "2", "3"] and all(rows[0].values())
    assert sorted(networks) == sorted(others) == [f"epoch_{epoch}.safetensors" for epoch in (1, 2, 3)]
    for name, state in networks.items():
        assert all(torch.equal(tensor, others[name][key]) for key, tensor in state.items())
