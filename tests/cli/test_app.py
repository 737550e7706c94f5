from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import modeconn
from modeconn import (
    PAM,
    PGD,
    AdversarialExamples,
    Bezier,
    Connection,
    Curvature,
    Line,
    Permutation,
    PolyChain,
    Profile,
    Recipe,
    RobustProfile,
    data,
    models,
)
from modeconn.cli import parse
from modeconn.cli.app import app
from modeconn.cli.demo import on_threads
from modeconn.data import TensorLoader
from modeconn.network.recipe import halving, one_cycle
from tests.cases import CASE, batches, same_bits

ADAM = ["--optimizer", "adam:lr=0.003", "--schedule", "one_cycle", "--weight-decay", "0"]
MLP = ["--data", "digits", "--model", "mlp", "--model-arg", "hidden=16,"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks and a connection, made on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("a", 1), ("b", 2)):
        run("train", folder / f"{name}.safetensors", *MLP, "--seed", seed, "--epochs", 3, *ADAM)
    run("fit", *ends(folder), "--out", folder / "c.safetensors", "--data", "digits", "--epochs", 2, *ADAM, "--seed", 5)
    return folder


def ends(folder):
    return folder / "a.safetensors", folder / "b.safetensors"


def test_fit_refines_the_relabelling_too(folder, tmp_path):
    out = tmp_path / "refined.safetensors"
    refine = "pam:iterations=1,step=relaxed,num_batches=2"
    run("fit", *ends(folder), "--out", out, "--data", "digits", "--epochs", 1, *ADAM, "--refine", refine)
    (turn,) = Connection.load(out).history.turns
    assert turn["epoch"] == 0 and turn["num_tried"] > 0


def the_same_in_python():
    train, _ = data.load("digits")
    recipe = Recipe(3, parse.optimizer("adam:lr=0.003"), one_cycle, 0.0)
    network = [models.mlp(64, (16,), 10, mean=train.mean(), std=train.std() + 0.1, seed=seed) for seed in (1, 2)]
    a, b = (models.train(model, train, recipe=recipe, seed=seed) for model, seed in zip(network, (1, 2), strict=True))
    return a, b, train


# -- what the commands do is what the functions do


def test_train_and_fit_do_what_the_functions_do(folder):
    a, b, train = the_same_in_python()
    assert same_bits(models.load(folder / "a.safetensors"), a) and same_bits(models.load(folder / "b.safetensors"), b)
    recipe = Recipe(2, parse.optimizer("adam:lr=0.003"), one_cycle, 0.0)
    expected = modeconn.fit_curve(a, b, train, recipe=recipe, seed=5)
    found = Connection.load(folder / "c.safetensors")
    assert torch.equal(found.control_points, expected.control_points)
    assert found.permutation == expected.permutation


def test_a_finished_fit_leaves_only_a_checkpoint_that_was_asked_for(folder, tmp_path):
    assert not (folder / "c.safetensors.checkpoint").exists()
    kept = tmp_path / "kept"
    common = ("--data", "digits", "--epochs", 1, "--method", "none", "--curve", "polychain:3")
    run("fit", *ends(folder), "--out", tmp_path / "c", "--checkpoint", kept, *common)
    assert kept.exists() and Connection.load(tmp_path / "c").curve == PolyChain(3)


def test_align_relabels_b_and_writes_what_it_is_asked_for(folder, tmp_path):
    out, permutation, report = (tmp_path / name for name in ("b.safetensors", "p.safetensors", "r.json"))
    result = run(
        "align", *ends(folder), "--out", out, "--permutation", permutation, "--report", report, "--data", "digits"
    )
    a, b, train = the_same_in_python()
    expected = modeconn.align(a, b, train)
    assert same_bits(models.load(out), expected.model_b) and Permutation.load(permutation) == expected.permutation
    assert json.loads(report.read_text())["correlation"] == {k: list(v) for k, v in expected.correlation.items()}
    assert repr(expected) in result.stdout

    run("fit", *ends(folder), "--out", tmp_path / "c", "--data", "digits", "--method", permutation, "--curve", "line")
    assert same_bits(Connection.load(tmp_path / "c").model_at(1), expected.model_b)


def test_align_without_data_matches_weights(folder, tmp_path):
    run("align", *ends(folder), "--out", tmp_path / "b")
    a, b, _ = the_same_in_python()
    assert same_bits(models.load(tmp_path / "b"), modeconn.align(a, b).model_b)


@pytest.mark.parametrize("on", ["test", "train"])
def test_evaluate_prints_a_table_and_writes_every_point(folder, tmp_path, on):
    result = run(
        *("evaluate", folder / "c.safetensors", "--data", "digits", "--out", tmp_path / "p", "--points", 5, "--on", on)
    )
    profile = Profile.from_json((tmp_path / "p.json").read_text())
    loaders = dict(zip(("train", "test"), data.load("digits"), strict=True))
    expected = Connection.load(folder / "c.safetensors").evaluate(loaders[on], num_points=5)
    torch.testing.assert_close(profile.loss, expected.loss)
    assert profile.num_examples == expected.num_examples
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + 5
    assert repr(profile) in result.stdout


def test_evaluate_recalibrates_batch_norm_on_training_data(tmp_path):
    write_idx_files(tmp_path)
    train, test = data.load("mnist", tmp_path)
    ends = (models.tinyten(in_channels=1, image_size=28, seed=seed) for seed in (0, 1))
    Connection.straight_between(*ends).save(tmp_path / "c.safetensors")
    run("evaluate", tmp_path / "c.safetensors", "--data", "mnist", "--root", tmp_path, "--points", 3)
    found = Profile.from_json((tmp_path / "c.json").read_text())
    on_train, on_test = (
        Connection.load(tmp_path / "c.safetensors").evaluate(test, num_points=3, recalibrate=loader)
        for loader in (train, test)
    )
    torch.testing.assert_close(found.loss, on_train.loss)
    assert not torch.allclose(found.loss, on_test.loss)


def test_curvature_is_written_and_drawn_like_every_result(folder, tmp_path):
    settings = ("--data", "digits", "--points", 3, "--steps", 10, "--wrt", "inputs", "--out", tmp_path / "h")
    result = run("curvature", folder / "c.safetensors", *settings)
    found = Curvature.from_json((tmp_path / "h.json").read_text())
    train, test = data.load("digits")
    expected = Connection.load(folder / "c.safetensors").curvature(
        test, wrt="inputs", num_points=3, num_steps=10, recalibrate=train
    )
    torch.testing.assert_close(found.eigenvalue, expected.eigenvalue)
    assert repr(found) in result.stdout and len((tmp_path / "h.csv").read_text().splitlines()) == 1 + 3
    assert f"h.json: curvature\n{found!r}" in run("info", tmp_path / "h.json").stdout
    run("plot", tmp_path / "h.json", "--out", tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000
    refused = run("curvature", folder / "c.safetensors", "--data", "digits", "--wrt", "x", code=1)
    assert "--wrt must be weights, inputs or both, got 'x'" in refused.stderr


@pytest.mark.parametrize("command", ["evaluate", "robustness", "curvature"])
def test_connections_are_loaded_where_the_command_computes(command, folder, monkeypatch):
    devices, load = [], Connection.load

    def loading(*arguments, **settings):
        devices.append(settings["device"])
        return load(*arguments, **settings)

    monkeypatch.setattr(Connection, "load", loading)
    settings = ("--data", "digits", "--points", 2, "--device", "cpu:0")
    run(command, folder / "c.safetensors", *settings, *(("--examples", 2) if command == "robustness" else ()))
    assert devices == ["cpu:0"]


def test_results_are_not_written_over_each_other(folder, tmp_path):
    other = tmp_path / "c.safetensors"
    other.write_bytes((folder / "c.safetensors").read_bytes())
    report = tmp_path / "report"
    for arguments in (
        ("robustness", folder / "c.safetensors", other, "--data", "digits", "--out", tmp_path),
        ("align", *ends(folder), "--out", report, "--permutation", report),
        ("compare", *ends(folder), "--data", "digits", "--out", report.with_suffix(".csv")),
        ("fit", *ends(folder), "--data", "digits", "--out", report, "--checkpoint", report),
        ("symmetry", "mlp", "--out", report, "--save-spec", report),
    ):
        assert "several results would be written to" in run(*arguments, code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
def test_robustness_recalibrates_batch_norm_on_what_it_is_told(statistics, tmp_path):
    write_idx_files(tmp_path)
    train, test = data.load("mnist", tmp_path)
    ends = (models.tinyten(in_channels=1, image_size=28, seed=seed).eval() for seed in (0, 1))
    Connection.straight_between(*ends).save(tmp_path / "c.safetensors")
    settings = ("--attack", "pgd1", "--eps", "0.1", "--points", 2, "--examples", 4, "--statistics", statistics)
    run("robustness", tmp_path / "c.safetensors", "--data", "mnist", "--root", tmp_path, *settings)
    found = RobustProfile.from_json((tmp_path / "c.robust.json").read_text())
    expected = {
        name: Connection.load(tmp_path / "c.safetensors").robustness(
            test, {"pgd1": PGD(0.1, 0.025, 1)}, num_points=2, num_examples=4, recalibrate=examples
        )
        for name, examples in (("clean", train), ("adversarial", AdversarialExamples(train, PGD(0.1, 0.025, 5))))
    }
    torch.testing.assert_close(found.losses, expected[statistics].losses)
    assert not torch.allclose(expected["clean"].losses["clean"], expected["adversarial"].losses["clean"])


def test_state_dicts_of_torch_save_are_ends_too(folder, tmp_path):
    a = models.load(folder / "a.safetensors")
    torch.save(a.state_dict(), tmp_path / "a.pt")
    run("align", tmp_path / "a.pt", folder / "b.safetensors", "--out", tmp_path / "b1", *MLP)
    run("align", *ends(folder), "--out", tmp_path / "b2", "--data", "digits")
    assert same_bits(models.load(tmp_path / "b1"), models.load(tmp_path / "b2"))


def test_a_model_can_come_from_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def make(num_inputs, num_classes, width=4):\n"
        "    return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    own = ("--data", "digits", "--model", "own_net:make", "--model-arg", "width=6")
    for name, seed in (("a", 0), ("b", 1)):
        run("train", name, *own, "--seed", seed, "--epochs", 1)
    run("fit", "a", "b", "--out", "c", *own, "--epochs", 1)
    result = run("evaluate", "c", *own, "--points", 3)
    assert "Profile(3 points, 500 examples" in result.stdout
    template = parse.make_model("own_net:make", {"width": 6}, data.load("digits")[0])
    assert not same_bits(models.load("a", template), models.load("b", template))


# -- what is measured and kept while a run goes on


def test_training_is_validated_on_examples_that_are_held_out(tmp_path):
    out, settings = tmp_path / "a.safetensors", ("--epochs", 3, "--validation", 100, "--data-seed", 4)
    result = run("train", out, *MLP, *settings, "--validate-every", 2)
    train, held_out = data.load("digits", validation=100, seed=4)
    network = models.mlp(64, (16,), 10, mean=train.mean(), std=train.std() + 0.1, seed=0)
    validation, expected = modeconn.callbacks.Validation(held_out, every=2), Recipe(epochs=3)
    trained = models.train(network, train, recipe=expected, callbacks=[validation])
    assert same_bits(models.load(out), trained)
    lines = result.stderr.splitlines()
    for one, line, epoch in zip(validation.values, lines, (2, 3), strict=True):  # the last is always measured
        says = f"validation loss: {one['validation loss']:.4f}; validation accuracy: {one['validation accuracy']:.2%}"
        assert re.fullmatch(rf"modeconn: epoch {epoch} of 3; loss: 0\.\d{{4}}; {says}", line)
    one = validation.values[0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.log.csv", "a.safetensors"]
    rows = (tmp_path / "a.log.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[2].endswith(f",{one['validation loss']},{one['validation accuracy']}")
    whole = modeconn.evaluate(trained, held_out)
    assert f"mlp on the test set: loss {whole.loss[0]:.4f}, accuracy {whole.accuracy[0]:.2%}\n" in result.stdout


def test_a_robust_network_is_validated_with_statistics_of_clean_data(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(modeconn.callbacks, "Validation", lambda *_, **settings: given.append(settings) or Quiet())
    for adversary in ((), ("--adversary", "pgd", "--eps", 0.1)):
        run("train", tmp_path / "a", *MLP, "--epochs", 1, "--validate-every", 1, "--overwrite", *adversary)
    assert "recalibrate" not in given[0] and isinstance(given[1]["recalibrate"], TensorLoader)


class Quiet(modeconn.callbacks.Callback):
    pass


def test_a_fit_is_validated_where_it_is_told_and_keeps_what_it_was(folder, tmp_path):
    out, log = tmp_path / "c.safetensors", tmp_path / "c.csv"
    watch = ("--validate-every", 2, "--validate-at", "0,1/2,1", "--log", log, "--keep-every", 2)
    result = run("fit", *ends(folder), "--data", "digits", "--out", out, "--epochs", 3, "--method", "none", *watch)
    found, test = Connection.load(out), data.load("digits")[1]
    kept = Connection.load(tmp_path / "c.epochs" / "epoch_2.safetensors")
    profile = kept.evaluate(test, t=[0, 0.5, 1])
    expected = {f"validation loss, t={t}": loss for t, loss in zip((0, 0.5, 1), profile.loss, strict=True)}
    assert [bool(values) for values in found.history.values] == [False, True, True]
    assert {name: found.history.values[1][name] for name in expected} == expected
    assert f"validation loss, t=0.5: {profile.loss[1]:.4f}" in result.stderr
    assert len(log.read_text().splitlines()) == 4 and [path.name for path in (tmp_path / "c.epochs").iterdir()] == [
        "epoch_2.safetensors"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--validate-at", "0.5"), "--validate-at is for --validate-every, which is missing"),
        (
            ("--validate-every", 1, "--validate-at", "0.5,0"),
            "--validate-at must be rising positions from 0 to 1, got 0.5",
        ),
        (("--validate-every", 1, "--validate-at", "x"), "--validate-at must be rising positions from 0 to 1, got x"),
        (("--curve", "line", "--keep-every", 1), "--keep-every are for curves that are learned, and a line is not"),
        (("--validation", 5000), "1 to 1296 can be held out for validation, or none, got --validation 5000"),
        (("--log", "nowhere/log.csv"), "cannot write 'nowhere/log.csv'"),
    ],
)
def test_what_cannot_be_watched_is_refused_with_its_option(folder, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("fit", *ends(folder), "--data", "digits", "--out", "c", *options, code=1)
    assert message in found.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--validate-every", "--keep-every", "--validation"])
def test_numbers_of_epochs_and_examples_are_positive(folder, tmp_path, option):
    assert option in run("train", tmp_path / "x", *MLP, option, 0, code=2).stderr


def test_held_out_examples_are_measured_by_every_command_and_not_for_data_of_ones_own(folder, tmp_path):
    run("evaluate", folder / "a.safetensors", "--data", "digits", "--validation", 50, "--out", tmp_path / "p")
    expected = modeconn.evaluate(models.load(folder / "a.safetensors"), data.load("digits", validation=50)[1])
    found = Profile.from_json((tmp_path / "p.json").read_text())
    assert torch.equal(found.loss, expected.loss) and found.num_examples == 50
    own = run("train", tmp_path / "x", "--data", "mine:make", "--model", "mlp", "--validation", 50, code=1)
    assert "--validation are for the data sets of modeconn; tell mine:make by --data-arg KEY=VALUE" in own.stderr


def test_robustness_on_training_data_has_a_name_of_its_own(folder, tmp_path):
    network = tmp_path / "a.safetensors"
    shutil.copy(folder / "a.safetensors", network)
    common = ("--data", "digits", "--attack", "pgd1", "--eps", "0.1", "--examples", 30)
    for on in ("test", "train"):
        run("robustness", network, *common, "--on", on)
    train, test = data.load("digits")
    for name, loader in (("a.robust.json", test), ("a.robust.train.json", train.in_order())):
        expected = modeconn.robustness(models.load(network), loader, {"pgd1": PGD(0.1, 0.025, 1)}, num_examples=30)
        found = RobustProfile.from_json((tmp_path / name).read_text())
        assert torch.equal(found.losses["clean"], expected.losses["clean"]) and found.data == expected.data
    assert "--on must be train or test, got 'x'" in run("robustness", network, *common, "--on", "x", code=1).stderr


# -- interruption


def test_a_fit_stopped_by_ctrl_c_says_how_to_go_on_and_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    command = ("fit", *ends(folder), "--data", "digits", "--epochs", 3, "--method", "none", *ADAM)
    run(*command, "--out", tmp_path / "whole")

    passes, read = [], TensorLoader.__iter__

    def interrupted(self):
        passes.append(self)
        for number, batch in enumerate(read(self)):
            if len(passes) == 5 and number == 7:  # before training, the data is looked at three times
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TensorLoader, "__iter__", interrupted)
        result = run(*command, "--out", tmp_path / "c", code=130)
    kept = tmp_path / "c.checkpoint"
    assert f"the run is kept in {kept}; give the same command again" in result.stderr.replace("\n", " ")
    assert "1 epochs and 7 batches" in run("info", kept).stdout and not (tmp_path / "c").exists()

    run(*command, "--out", tmp_path / "c")
    assert not kept.exists()
    whole, resumed = (Connection.load(tmp_path / name).control_points for name in ("whole", "c"))
    assert torch.equal(whole, resumed)


# -- options by another name


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("fit", "a", "b", "--align", "weight"), "--method"),
        (("train", "a", "--lr", 0.1), "--optimizer, such as adam:lr=0.01"),
        (("evaluate", "a", "--num-points", 3), "--points"),
        (("info", "--lr", 3), "--help"),  # which has no optimizer
    ],
)
def test_an_option_by_the_name_that_python_has_for_it_names_the_one_that_is_meant(arguments, option):
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", run(*arguments, code=2).output).split())
    assert f"No such option: {arguments[-2]} (Possible options: {option})" in said


# -- metrics


def test_metrics_are_measured_by_name_and_from_the_users_own_module(folder, tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(
        "import modeconn\n\n\n"
        "def wrong(outputs, targets):\n"
        "    return (outputs.argmax(1) != targets).sum(), len(targets)\n\n\n"
        "class Confidence(modeconn.metrics.Perplexity):\n"
        "    pass\n\n\n"
        "class Needy:\n"
        "    def __init__(self, k):\n"
        "        self.k = k\n"
    )
    (tmp_path / "other_metrics.py").write_text("from my_metrics import wrong\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    connection = folder / "c.safetensors"
    asked = (
        "--metric",
        "top_k:3",
        "--metric",
        "my_metrics:wrong",
        "--metric",
        "my_metrics:Confidence",
        "--metric",
        "modeconn.metrics:Perplexity",
    )
    how = ("--data", "digits", *asked)
    run("evaluate", connection, *how, "--points", 3, "--out", tmp_path / "found")
    found = modeconn.Profile.load(tmp_path / "found.json")
    assert [*found.values][-4:] == ["top_k:3", "wrong", "Confidence", "Perplexity"]
    torch.testing.assert_close(found.values["wrong"], 1 - found.accuracy)
    assert bool((found.values["top_k:3"] >= found.accuracy).all())
    run("plane", connection, *how, "--points", 2, "--quantity", "wrong", "--out", tmp_path / "plane")
    assert "wrong" in modeconn.Plane.load(tmp_path / "plane.json").values
    for spec, said in (
        ("top_5", "there is no metric 'top_5'; there are cka, disagreement, perplexity, tempered_loss, top_k"),
        ("top_k", "metric 'top_k': missing a required argument: 'k'; top_k takes k, axis"),
        ("my_metrics:nothing", "cannot import 'my_metrics:nothing'"),
        ("my_metrics:Needy", "my_metrics:Needy fails: TypeError"),
        ("other_metrics:wrong", "--metric is given twice for 'wrong': give one of them another name"),
    ):
        asked = ("--metric", "my_metrics:wrong", "--metric", spec)
        told = run("evaluate", connection, "--data", "digits", *asked, "--out", tmp_path / "x", code=1)
        assert said in told.output
    told = run(
        "plane", connection, "--data", "digits", "--points", 2, "--quantity", "wrong", "--out", tmp_path / "p", code=1
    )
    assert "--quantity must be one of loss, accuracy, error, got 'wrong'; --metric measures others" in told.output
    assert not list(tmp_path.glob("p.*")) and not list(tmp_path.glob("x.*"))


# -- the demo


def test_no_result_takes_the_place_of_another(folder, tmp_path):
    """A result of other settings or other data is another result, whose name has to be said."""
    curve = tmp_path / "curve.safetensors"
    shutil.copy(folder / "c.safetensors", curve)
    first = ("evaluate", curve, "--data", "digits", "--points", 2)
    run(*first)
    kept = curve.with_suffix(".json").read_bytes()
    run(*first, "--on", "train")
    assert curve.with_name("curve.train.json").exists() and curve.with_suffix(".json").read_bytes() == kept
    run(*first)  # the same again
    kept = curve.with_suffix(".json").read_bytes()
    more = run(*first, "--seed-of-nothing", code=2) and run(*first[:-1], 3, code=1)
    assert "holds another result, made by: modeconn evaluate" in more.stderr and "--overwrite" in more.stderr
    assert curve.with_suffix(".json").read_bytes() == kept
    run(*first[:-1], 3, "--overwrite")
    assert len(Profile.from_json(curve.with_suffix(".json").read_text()).t) == 3
    attacked = ("robustness", curve, "--data", "digits", "--points", 2, "--attack", "pgd1", "--eps", "0.1")
    run(*attacked)
    other = run(*attacked[:-1], "0.2", code=1)
    assert "--eps 0.1" in other.stderr and "--overwrite" in other.stderr


def test_info_tells_how_a_file_was_made(folder, tmp_path):
    for name in ("a", "c"):
        told = run("info", folder / f"{name}.safetensors").stdout
        assert (
            f"modeconn {'train' if name == 'a' else 'fit'}" in told and torch.__version__ in told and "CRC-32" in told
        )
    run("evaluate", folder / "c.safetensors", "--data", "digits", "--points", 2, "--out", tmp_path / "result")
    told = run("info", tmp_path / "result.json").stdout
    assert "made by" in told and "modeconn evaluate" in told and "its loader" in told
    run("plot", tmp_path / "result.json", "--out", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").text["Description"].startswith("modeconn plot")
    refused = ("--figure", "spectrum", "--out", tmp_path / "spectrum.png")
    assert "three evenly spaced positions" in run("plot", tmp_path / "result.json", *refused, code=1).stderr


def test_planes_are_those_of_python(folder, tmp_path):
    out = tmp_path / "plane"
    told = run("plane", folder / "c.safetensors", "--data", "digits", "--points", 3, "--refine", 1, "--out", out).stdout
    train, test = data.load("digits")
    connection = Connection.load(folder / "c.safetensors")
    expected = modeconn.plane(connection, test, num_points=3, refine=1, recalibrate=train)
    found = modeconn.Plane.load(f"{out}.json")
    assert torch.equal(found.values["loss"], expected.values["loss"]) and expected.caption in told
    assert not list(tmp_path.glob("*checkpoint*"))
    relabelled = tmp_path / "c.safetensors"
    models.save(modeconn.align(*map(models.load, ends(folder)), train).model_b, relabelled)
    three = run("plane", *ends(folder), relabelled, "--data", "digits", "--points", 2, "--out", "-").stdout
    assert list(modeconn.Plane.from_json(three).networks) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors"], "a plane goes through a connection or through three networks, got 1 files"),
        (["a.safetensors", "b.safetensors", "b.safetensors"], "the three networks need names of their own"),
        (["c.safetensors", "--export", "gif"], "--export knows html, npz, vti, csv, pdf, svg, got 'gif'"),
        (["c.safetensors", "--extent", "1,2,3"], "--extent must be four numbers, LEFT,RIGHT,BOTTOM,TOP, got '1,2,3'"),
        (
            ["c.safetensors", "--extent", "1,0,0,1"],
            "extent must be (left, right, bottom, top), finite, each pair rising",
        ),
        (["c.safetensors", "--times", "0.5"], "times must be more than 1, got --times 0.5"),
    ],
)
def test_planes_that_cannot_be_are_one_sentence(folder, arguments, message):
    words = [str(folder / one) if one.endswith(".safetensors") else one for one in arguments]
    result = CliRunner().invoke(app, ["plane", *words, "--data", "digits", "--out", str(folder / "none")])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split()), result.stderr
    assert not list(folder.glob("none*"))


def test_no_command_replaces_networks_of_another_one_or_what_it_reads(folder, tmp_path):
    a, b = (shutil.copy(path, tmp_path / path.name) for path in ends(folder))
    c = tmp_path / "c.safetensors"
    run("fit", a, b, "--data", "digits", "--epochs", 1, "--out", c)
    commands = {
        "train": ["train", c, *MLP, "--epochs", 1],
        "align": ["align", a, b, "--method", "weight", "--out", c],
        "permutation": ["align", a, b, "--method", "weight", "--out", tmp_path / "d", "--permutation", c],
        "fit": ["fit", a, b, "--data", "digits", "--epochs", 2, "--out", c],
        "chain": ["chain", a, b, "--out", c],
        "merge": ["merge", a, b, "--out", c],
    }
    before = {path: path.read_bytes() for path in map(Path, (a, b, c))}
    for name, words in commands.items():
        assert "c.safetensors' holds another result, made by: modeconn fit" in run(*words, code=1).stderr, name
        own = [b if word == c else word for word in words]
        if name != "train":
            refused = run(*own, "--overwrite", code=1).stderr
            assert "b.safetensors' is one of the files that are read" in " ".join(refused.split()), name
    assert all(path.read_bytes() == content for path, content in before.items())
    run("chain", a, b, "--out", c, "--overwrite")
    run("chain", a, b, "--out", c, "--overwrite")
    assert Connection.load(c).history is None


def test_cycles_go_on_from_a_network_and_write_one_each(folder, tmp_path, monkeypatch):
    a, _ = ends(folder)
    words = ["train", tmp_path / "s.safetensors", *MLP, "--start", a, "--cycles", 2, "--epochs", 1, *ADAM, "--seed", 3]
    save = models.save

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "save", interrupted)
    assert "s.safetensors.checkpoint.1, " in " ".join(run(*words, code=130).stderr.split())
    monkeypatch.setattr(models, "save", save)
    run(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"s-1.safetensors", "s-2.safetensors"}
    train, _ = data.load("digits")
    recipe = Recipe(1, parse.optimizer("adam:lr=0.003"), one_cycle, 0.0)
    expected = models.train_snapshots(models.load(a), train, cycles=2, recipe=recipe, seed=3)
    for number, network in enumerate(expected, 1):
        assert same_bits(models.load(tmp_path / f"s-{number}.safetensors"), network)


def test_a_chain_goes_through_the_networks_of_its_files(folder, tmp_path):
    a, b = ends(folder)
    run("chain", a, b, a, "--out", tmp_path / "chain")
    chain = Connection.load(tmp_path / "chain")
    assert all(same_bits(chain.model_at(t), models.load(path)) for t, path in ((0, a), (0.5, b), (1, a)))
    assert "goes through two networks or more, got 1" in run("chain", a, "--out", tmp_path / "x", code=1).stderr
    assert not (tmp_path / "x").exists()


def test_a_fit_starts_from_a_network_or_from_a_connection(folder, tmp_path):
    a, b, other = *ends(folder), folder / "c.safetensors"
    still = ["--data", "digits", "--epochs", 1, "--optimizer", "sgd:lr=0", "--weight-decay", 0, "--overwrite"]
    still += ["--out", tmp_path / "d"]
    connection = Connection.load(other)
    for start, point in ((b, connection.space.flatten(models.load(b))), (other, connection.control_points[1])):
        run("fit", a, b, *still, "--start", start)
        assert torch.equal(Connection.load(tmp_path / "d").control_points[1], point)
    refused = run("fit", a, b, *still, "--start", a, "--start", other, code=1).stderr
    assert "--start takes one connection, or a network for each inner control point" in " ".join(refused.split())


def test_networks_along_a_connection_are_written_and_predict(folder, tmp_path):
    run("sample", folder / "c.safetensors", "--data", "digits", "--points", 3, "--out", tmp_path)
    connection = Connection.load(folder / "c.safetensors")
    for number, t in enumerate((0.0, 0.5, 1.0)):
        assert same_bits(models.load(tmp_path / f"c-00{number}.safetensors"), connection.model_at(t))
    result = CliRunner().invoke(
        app, ["sample", str(folder / "c.safetensors"), "--data", "digits", "--points", "3", "--out", str(tmp_path)]
    )
    assert result.exit_code == 1 and "exists. Choose another folder, or --overwrite it" in " ".join(
        result.stderr.split()
    )
    out = tmp_path / "said.npz"
    run("predict", folder / "c.safetensors", "--data", "digits", "--points", 3, "--out", out)
    found = modeconn.Predictions.load(out)
    assert torch.equal(found.probabilities, connection.predict(data.load("digits")[1], num_points=3).probabilities)
    assert found.made_by["command"].startswith("modeconn predict")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, run("demo", "--out", out)


def test_the_demo_prints_one_table_and_names_its_folder(demo):
    out, result = demo
    rows = [line for line in result.stdout.splitlines() if line.startswith(("straight line", "curve"))]
    assert [row.split("  ")[0] for row in rows] == [
        "straight line",
        "straight line, aligned",
        "curve",
        "curve, aligned",
    ]
    assert str(out) in result.stdout
    assert {path.suffix for path in out.iterdir()} == {".png", ".safetensors", ".json", ".html"}
    page = (out / "report.html").read_text()
    assert all(name in page for name in ("straight-line-aligned", "curve-aligned", "barrier")) and len(page) < 5_000_000


def test_alignment_lowers_the_barriers_of_the_demo(demo):
    table = json.loads((demo[0] / "results.json").read_text())["table"]
    barrier = {name: row["barrier"] for name, row in table.items()}
    assert barrier["straight line, aligned"] <= 0.08 * barrier["straight line"]
    assert barrier["curve, aligned"] <= 0.04 * barrier["straight line"]
    assert barrier["curve, aligned"] <= 0.5 * barrier["curve"]
    assert min(row["acc t=0"] for row in table.values()) > 0.95


def test_the_files_of_the_demo_are_what_its_numbers_come_from(demo):
    out = demo[0]
    table = json.loads((out / "results.json").read_text())["table"]
    _, test = data.load("digits")
    for name, row in table.items():
        connection = Connection.load(out / f"{name.replace(',', '').replace(' ', '-')}.safetensors")
        assert connection.evaluate(test, num_points=61).barrier == pytest.approx(row["barrier"], abs=1e-6)
    b = models.load(out / "b.safetensors")
    relabelled = Permutation.load(out / "permutation.safetensors").apply(b)
    assert same_bits(Connection.load(out / "curve-aligned.safetensors").model_at(1), relabelled)


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with on_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_the_demo_runs_on_image_files(tmp_path):
    write_idx_files(tmp_path)
    result = run(
        *("demo", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "out", "--epochs", 1, "--curve-epochs", 1),
        *("--train-examples", 64, "--test-examples", 20, "--points", 3, "--batch-size", 32),
    )
    assert "tinyten on mnist, 20 test examples" in result.stdout
    assert Connection.load(tmp_path / "out" / "curve.safetensors").history.loss


def write_idx_files(folder):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 80), ("t10k", 40)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            header = bytes([0, 0, 8, array.dim()]) + sizes
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())


# -- plot and info


def test_plot_draws_what_files_hold(demo, folder, tmp_path):
    out = demo[0]
    run("align", *ends(folder), "--out", tmp_path / "b", "--report", tmp_path / "r.json", "--data", "digits")
    for number, files in enumerate(
        [
            ("straight-line.json", "curve.json"),
            ("curve.safetensors", "curve-aligned.safetensors"),
            (tmp_path / "r.json",),
        ]
    ):
        figure = tmp_path / f"{number}.png"
        run("plot", *(out / name for name in files), "--out", figure)
        assert figure.read_bytes().startswith(b"\x89PNG")
    run("plot", out / "curve.json", "--out", tmp_path / "f.pdf", "--quantity", "accuracy", "--labels", "mine")
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_info_tells_what_a_file_is(demo, folder, tmp_path):
    out = demo[0]
    assert "Bezier(degree=2, free_ends=False), 3 control points" in run("info", out / "curve.safetensors").stdout
    assert "mlp(num_inputs=64, hidden=[128, 128], num_classes=10" in run("info", out / "a.safetensors").stdout
    assert "of 256 units moved" in run("info", out / "permutation.safetensors").stdout
    assert "Profile(61 points, 500 examples" in run("info", out / "curve.json").stdout
    Connection.straight_between(CASE["mlp"].make(0), CASE["mlp"].make(1)).save(tmp_path / "c")
    assert "not of modeconn.models; give --model" in run("info", tmp_path / "c").stdout
    (tmp_path / "r.json").write_text('{"correlation": {"fc": [0.1, 0.75]}}')
    assert "fc                 0.100  0.750" in run("info", tmp_path / "r.json").stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"align": False}, "2 epochs and 0 batches"),
        ({"curve": Line(), "refine": PAM(iterations=2)}, "2 turns of PAM and 0 steps of descent"),
        ({"refine": PAM(iterations=2, exact=True, num_points=3)}, "2 turns of PAM and 2 steps of descent"),
    ],
)
def test_info_describes_every_kind_of_run(settings, said, tmp_path):
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    settings = {"recipe": Recipe(epochs=2), "checkpoint": tmp_path / "run", **settings}
    modeconn.fit_curve(a, b, batches(2), **settings).save(tmp_path / "c")
    assert said in run("info", tmp_path / "run").stdout
    assert "fit " in run("info", tmp_path / "c").stdout


def test_every_figure_of_a_file_can_be_chosen(folder, tmp_path):
    train = data.load("digits")[0]
    a, b = map(models.load, ends(folder))
    refinement = modeconn.PAM(iterations=1)
    modeconn.fit_curve(a, b, train, align=True, recipe=Recipe(1), refine=refinement).save(tmp_path / "c")
    for figure in ("history", "history-by-t", "turns", "cycles"):
        drawn = [tmp_path / f"{figure}{ending}.png" for ending in ("", "-dark")]
        run("plot", tmp_path / "c", "--figure", figure, "--out", drawn[0])
        run("plot", tmp_path / "c", "--figure", figure, "--out", drawn[1], "--dark")
        corners = [Image.open(path).convert("RGB").getpixel((0, 0)) for path in drawn]
        assert corners == [(255, 255, 255), (0, 0, 0)]
    said = run("plot", tmp_path / "c", "--figure", "eigen-angles", "--out", tmp_path / "x.png", code=1).stderr
    assert (
        "there is no figure of the kind eigen-angles: --figure can be history or history-by-t or turns or cyc" in said
    )
    said = run("plot", tmp_path / "c", "--figure", "pie", "--out", tmp_path / "x.png", code=1).stderr
    assert "--figure must be one of profile, robust-profile" in said
    cycles = ("--figure", "cycles", "--quantity", "loss")
    said = run("plot", tmp_path / "c", *cycles, "--out", tmp_path / "x.png", code=1).stderr
    assert "what is drawn of a profile, a plane, a comparison or a history; cycles has no choice" in said
    said = run("plot", tmp_path / "c", "--quantity", "accuracy", "--out", tmp_path / "x.png", code=1).stderr
    assert "fit 0 has no 'accuracy' by epoch: nothing was measured but the training loss" in said
    said = run("plot", *2 * [tmp_path / "c"], "--figure", "turns", "--out", tmp_path / "x.png", code=1).stderr
    assert "a figure of the kind turns shows one file, got 2." in said
    assert not (tmp_path / "x.png").exists()


def test_what_a_validation_measured_is_drawn_of_a_file(folder, tmp_path):
    train, test = data.load("digits")
    how = {"align": False, "recipe": Recipe(2), "callbacks": [modeconn.callbacks.Validation(test)]}
    modeconn.fit_curve(*map(models.load, ends(folder)), train, **how).save(tmp_path / "c")
    run("plot", *2 * [tmp_path / "c"], "--quantity", "accuracy", "--labels", "a,b", "--out", tmp_path / "x.svg")
    said = run("plot", tmp_path / "c", "--quantity", "speed", "--out", tmp_path / "y.svg", code=1).stderr
    assert "has no 'speed' by epoch, only 'loss', 'validation loss, t=0.5', 'validation accuracy, t=0.5'" in said


def test_planes_of_one_window_have_a_mean(folder, tmp_path):
    window = ("--data", "digits", "--points", 3, "--test-examples", 50, "--extent", "-4,20,-5,9")
    for number in (1, 2):
        run("plane", folder / "c.safetensors", *window, "--out", tmp_path / f"{number}.json")
    planes = [tmp_path / f"{number}.json" for number in (1, 2)]
    assert modeconn.Plane.load(planes[0]).y.tolist() == [-5, 2, 9]
    for figure in ("mean-plane", "std-plane"):
        run("plot", *planes, "--figure", figure, "--quantity", "accuracy", "--out", tmp_path / f"{figure}.png")
        assert (tmp_path / f"{figure}.png").exists()
    said = run("plot", *planes, "--figure", "mean-plane", "--labels", "a,b", "--out", tmp_path / "x.png", code=1).stderr
    assert "--labels are for figures that name several files, which mean-plane does not" in said


@pytest.mark.filterwarnings("ignore:.*attack")
def test_info_and_plot_know_every_file_that_commands_write(demo, folder, tmp_path):
    out, curve = tmp_path / "out", tmp_path / "out" / "c.safetensors"
    shutil.copytree(demo[0], out)
    shutil.copy(folder / "c.safetensors", curve)
    short = ["--data", "digits", "--points", 2]
    run(
        "align",
        *ends(folder),
        "--data",
        "digits",
        "--out",
        out / "al",
        "--permutation",
        out / "p",
        "--report",
        out / "r",
    )
    run("evaluate", curve, *short)
    run("robustness", curve, *short, "--attack", "pgd1", "--eps", 0.1, "--examples", 20, "--checkpoint", out / "kept")
    run("curvature", curve, *short)
    run("compare", *ends(folder), *short, "--out", out / "all.json", "--method", "weight", "--checkpoint", out / "seen")
    run("symmetry", out / "a.safetensors", "--out", out / "report", "--save-spec", out / "spec")
    run("deepalign", "fit", *ends(folder), "--data", "digits", "--settings", "num_steps=1", "--out", out / "aligner")
    run("merge", *ends(folder), "--out", out / "merged")
    run("plane", curve, "--data", "digits", "--points", 3, "--refine", 1, "--export", "npz,vti,csv,svg,html")
    run("predict", curve, *short)
    modeconn.fit_curve(
        *map(models.load, ends(folder)), data.load("digits")[0], recipe=Recipe(1), checkpoint=out / "run"
    )
    torch.save({"ema": {"w": torch.ones(2, 3)}}, out / "other.pt")
    (out / "spec.json").write_text(modeconn.discover(models.mlp(4, (3,), 2)).to_json())
    kinds = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        first = run("info", path).stdout.splitlines()[0]
        kinds[path.name] = first.removeprefix(f"{path}: ")
        result = CliRunner().invoke(app, ["plot", str(path), "--out", str(tmp_path / "x.png")])
        assert result.exit_code == 0 or "of which there is nothing to draw" in result.stderr, (path, result.stderr)
    expected = {
        "c.safetensors": "connection",
        "c.json": "profile",
        "c.csv": "table",
        "c.robust.json": "robust profile",
        "c.robust.png": "PNG figure",
        "c.curvature.json": "curvature",
        "kept": "finished measurements",
        "r": "correlations of an alignment",
        "p": "permutation",
        "all.json": "comparison",
        "seen": "finished measurements",
        "report": "report of symmetries",
        "spec": "spec",
        "spec.json": "spec",
        "aligner": "deep align",
        "merged": "model",
        "run": "checkpoint of fit_curve",
        "results.json": "demo",
        "c.plane.json": "plane",
        "c.plane.png": "PNG figure",
        "c.plane.svg": "SVG figure",
        "c.plane.npz": "arrays of numpy",
        "c.plane.vti": "VTK image data",
        "c.plane.csv": "table",
        "c.plane.html": "page",
        "report.html": "page",
        "c.predictions.npz": "predictions",
        "other.pt": "file of torch.save",
    }
    assert {name: kinds[name] for name in expected} == expected


def test_a_file_whose_header_is_as_long_as_a_brace_is_no_json(tmp_path):
    """The first byte of a safetensors file is that of a length, which may be any byte."""
    model = models.mlp(4, (3,), 2)
    for number in range(400):
        model.made_by = {"call": "x" * number}
        models.save(model, tmp_path / "m")
        if (tmp_path / "m").read_bytes()[:1] == b"{":
            break
    assert run("info", tmp_path / "m").stdout.startswith(f"{tmp_path / 'm'}: model")


OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(n: int = 60):
    x = torch.rand(n, 5, generator=torch.Generator().manual_seed(0))
    found = TensorDataset(x, (x.sum(1) * 1.2).long() % 3)
    return DataLoader(found, batch_size=16, shuffle=True), DataLoader(found, batch_size=16)


def net(width: int = 8, num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, num_classes))


def quiet(width: int = 8):
    return net(width)


def real():
    found = [(torch.rand(4, 5), torch.rand(4))]
    return found, found


def broken():
    import nothing_here


def one():
    return [1]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a module of the user's own, and two networks and a connection made with it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine_of_the_test.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    for seed in (1, 2):
        made = ("--model", "mine_of_the_test:net", "--model-arg", "width=6", "--seed", seed)
        run("train", folder / f"{seed}.st", *OWN_DATA, *made, "--epochs", 1)
    run("fit", folder / "1.st", folder / "2.st", *OWN_DATA, "--out", folder / "c.st", "--epochs", 1)
    yield folder
    sys.path.remove(str(folder))


OWN_DATA = ("--data", "mine_of_the_test:data", "--data-arg", "n=90")


def test_own_data_and_models_need_to_be_said_once(own):
    assert "mine_of_the_test:net(width=6" in run("info", own / "1.st").stdout
    assert "Profile(3 points, 90 examples" in run("evaluate", own / "c.st", *OWN_DATA, "--points", 3).stdout
    run("evaluate", own / "c.st", *OWN_DATA, "--points", 3, "--out", own / "named.json")
    assert (own / "named.json").is_file() and (own / "named.csv").is_file()
    shape = ("--input-shape", "2,5")
    run("align", own / "1.st", own / "2.st", "--method", "weight", "--out", own / "al.st", *shape)
    run("merge", own / "1.st", own / "2.st", "--method", "weight", "--out", own / "m.st", *OWN_DATA)
    assert "proved" in run("symmetry", own / "1.st", *shape).stdout
    with pytest.raises(ValueError, match=r"mine_of_the_test:never made it, which files do not call. Pass template="):
        models.build("mine_of_the_test:never")


def test_a_file_that_needs_its_model_is_not_called_damaged(own, tmp_path):
    network = models.load(own / "1.st")
    network.zoo_entry = ("mine_of_the_test:quiet", {"width": 6})
    models.save(network, tmp_path / "n.st")
    with pytest.raises(
        ValueError, match=r"n.st' does not say how to build its model: mine_of.*quiet made it, .* templ"
    ):
        models.load(tmp_path / "n.st")
    shape = ("--input-shape", "2,5")
    assert "Say it yourself, --model" in run("symmetry", tmp_path / "n.st", *shape, code=1).stderr
    given = ("--model", "mine_of_the_test:net", "--model-arg", "width=6")
    assert "proved" in run("symmetry", tmp_path / "n.st", *shape, *given).stdout
    missing = run("symmetry", tmp_path / "gone.safetensors", *shape, code=1)
    assert "there is no file" in missing.stderr and "gone.safetensors" in missing.stderr


def test_what_does_not_say_that_it_makes_models_is_not_called_by_a_file(own, tmp_path):
    for name in ("mine_of_the_test:quiet", "os:system", "subprocess:run"):
        network = models.load(own / "1.st")
        network.zoo_entry = (name, {"width": 6})
        models.save(network, tmp_path / "n.st")
        result = run("evaluate", tmp_path / "n.st", *OWN_DATA, code=1)
        assert "so it is not called. Say it yourself, --model" in result.stderr
    run("evaluate", tmp_path / "n.st", *OWN_DATA, "--model", "mine_of_the_test:net", "--model-arg", "width=6")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "mine_of_the_test:broken"), "mine_of_the_test:broken fails: ModuleNotFoundError: No module named"),
        (("--data", "mine_of_the_test:one"), "mine_of_the_test:one must return two loaders"),
        (("--data", "mine_of_the_test:none"), "cannot import 'mine_of_the_test:none'"),
        (("--data", "nowhere:data"), "cannot import 'nowhere:data': ModuleNotFoundError: No module named 'nowhere'"),
        (("--data", "mine_of_the_test:data", "--data-arg", "m=3"), "--data-arg KEY=VALUE sets n."),
        (("--data", "mine_of_the_test:real"), "or forward=. (loss_fn= and forward= are arguments in Python, which no"),
        ((*OWN_DATA, "--batch-size", 3), "--root, --batch-size and --validation are for the data sets of modeconn"),
        (("--data", "digits", "--data-arg", "m=3"), "--data-arg is for the factory of --data package.module:factory"),
        ((*OWN_DATA, "--test-examples", 3), "--test-examples is for a modeconn.data.TensorLoader"),
        ((*OWN_DATA, "--device", "nowhere"), "got --device 'nowhere'"),
        ((*OWN_DATA, "--model", "mine_of_the_test:broken"), "mine_of_the_test:broken fails: ModuleNotFoundError"),
        (
            (*OWN_DATA, "--model", "mine_of_the_test:one"),
            "mine_of_the_test:one must return a torch.nn.Module, got list",
        ),
    ],
)
def test_errors_of_own_data_and_models_are_one_sentence(own, words, message):
    result = run("evaluate", own / "c.st", *words, "--out", own / "x", code=1)
    (line,) = result.stderr.splitlines()
    assert message in line


def test_one_network_is_measured_with_its_own_statistics(own, tmp_path):
    network = models.load(own / "1.st", mine().net(6))
    _, test = mine().data(90)
    inputs, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    expected = float(torch.nn.functional.cross_entropy(network(inputs), targets).detach())
    profile = Profile.from_json(run("evaluate", own / "1.st", *OWN_DATA, "--out", "-").stdout)
    assert profile.loss.tolist() == pytest.approx([expected], rel=1e-5) and profile.num_examples == 90
    for _ in range(2):  # the second takes the place of the first, which the same command wrote
        run("evaluate", own / "1.st", *OWN_DATA)
    told = run("info", own / "1.json").stdout
    assert "modeconn evaluate" in told and "its loader" in told
    attack = ("--attack", "pgd1", "--eps", 0.1, "--out", "-")
    robust = RobustProfile.from_json(run("robustness", own / "1.st", *OWN_DATA, *attack).stdout)
    assert robust.loss["clean"].tolist() == pytest.approx([expected], rel=1e-5)


def mine():
    import importlib

    return importlib.import_module("mine_of_the_test")


def test_one_of_several_state_dicts_is_chosen_by_name(folder, tmp_path):
    a, b = (models.load(path) for path in ends(folder))
    torch.save({"model": a.state_dict(), "ema": b.state_dict(), "epoch": 3}, tmp_path / "kept.pt")
    command = ("evaluate", tmp_path / "kept.pt", *MLP, "--out", "-")
    assert "Say which with entry=" not in (refused := run(*command, code=1)).stderr and "--entry" in refused.stderr
    for name, path in zip(("model", "ema"), ends(folder), strict=True):
        found = Profile.from_json(run(*command, "--entry", name).stdout)
        expected = Profile.from_json(run("evaluate", path, "--data", "digits", "--out", "-").stdout)
        assert torch.equal(found.loss, expected.loss)


def test_a_dash_prints_json_and_writes_nothing(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = (*OWN_DATA, "--points", 2, "--out", "-")
    assert len(Profile.from_json(run("evaluate", own / "c.st", *short).stdout).t) == 2
    assert Curvature.from_json(run("curvature", own / "c.st", *short).stdout).wrt == "weights"
    robust = run("robustness", own / "c.st", *short, "--attack", "pgd1", "--eps", 0.1).stdout
    assert RobustProfile.from_json(robust).num_examples == 90
    both = run("compare", own / "1.st", own / "2.st", *short, "--method", "weight").stdout
    assert modeconn.Comparison.from_json(both).num_pairs == 1
    assert not list(tmp_path.iterdir())
    assert "prints one result" in run("robustness", own / "c.st", own / "c.st", *short, code=1).stderr


def test_errors_speak_of_options(own):
    line = run("robustness", own / "c.st", *OWN_DATA, "--examples", 0, "--out", own, code=1).stderr
    assert "--examples must be at least 1, got --examples 0" in line
    line = run("align", own / "1.st", own / "2.st", "--method", "weight", "--out", own / "x", code=1).stderr
    assert "pass --input-shape" in line and "=" not in line


def test_a_label_may_hold_a_comma(own, tmp_path):
    run("evaluate", own / "c.st", *OWN_DATA, "--points", 2, "--out", tmp_path / "r")
    both = [tmp_path / "r.json"] * 2
    run("plot", *both, "--out", tmp_path / "p.svg", "--labels", '"one, two",three')
    assert "one, two" in (tmp_path / "p.svg").read_text()
    assert "label" in run("plot", *both, "--out", tmp_path / "p.svg", "--labels", "one, two,three", code=1).stderr


def test_info_describes_a_spec(tmp_path):
    spec = modeconn.discover(models.mlp(4, (5,), 3))
    spec.save(tmp_path / "spec")
    assert repr(spec) in run("info", tmp_path / "spec").stdout


def test_symmetry_reports_proves_and_saves(folder, tmp_path):
    result = run(
        "symmetry", folder / "a.safetensors", "--out", tmp_path / "r.json", "--save-spec", tmp_path / "s.safetensors"
    )
    assert result.output.startswith("1 group, 10^13.3 relabellings")
    assert "proved: no tensor differs" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["groups"][0]["shape"] == [16]
    a = models.load(folder / "a.safetensors")
    assert modeconn.PermutationSpec.load(tmp_path / "s.safetensors") == modeconn.discover(a)


def test_symmetry_takes_any_factory_and_input():
    layer = ["torch.nn:LSTMCell", "--model-arg", "input_size=3", "--model-arg", "hidden_size=4"]
    assert "0 groups" in run("symmetry", *layer, "--input-shape", "2,3", "--no-verify").output  # its state is returned
    result = run("symmetry", "resnet20", "--freeze", "stem*", "--no-verify")
    assert "frozen by request" in result.output


def test_info_without_a_file_tells_versions():
    text = run("info").stdout
    assert f"modeconn {modeconn.__version__}" in text and f"torch {torch.__version__}" in text


@pytest.mark.parametrize(
    "command",
    ["demo", "train", "align", "merge", "fit", "evaluate", "robustness", "curvature", "plot", "info", "symmetry"],
)
def test_the_help_of_every_command_has_an_example(command):
    text = run(command, "--help").stdout
    assert f"\n  modeconn {command}" in text


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "{}/x", *MLP, "--model", "bert"), "there is no model 'bert'; there are "),
        (("train", "{}/x", "--data", "digits", "--model", "mlp"), "model 'mlp' cannot be made: missing .*'hidden'"),
        (("train", "{}/x", *MLP, "--model", "no.such:thing"), "cannot import 'no.such:thing'"),
        (("train", "{}/x", *MLP, "--model-arg", "hidden"), "is written KEY=VALUE, got 'hidden'"),
        (("train", "{}/x", *MLP, "--optimizer", "adamm"), "there is no optimizer 'adamm'"),
        (
            ("train", "{}/x", *MLP, "--optimizer", "adam:rate=1"),
            "optimizer 'adam' has no argument 'rate'; it has lr, betas",
        ),
        (("train", "{}/x", *MLP, "--schedule", "linear"), "there is no schedule 'linear'; there are constant, "),
        (("train", "{}/x", *MLP, "--autocast", "int8"), "there is no precision 'int8'"),
        (("train", "{}/x", *MLP, "--epochs", 0), "epochs must be at least 1"),
        (("train", "{}/x", *MLP, "--train-examples", 5000), r"--train-examples must lie in 1\.\.1297, got 5000"),
        (("train", "{}/no/such/folder/x", *MLP), "cannot write .*such/folder/x"),
        (("train", "{}/x", "--data", "digitz", "--model", "mlp"), "there is no data set 'digitz'"),
        (("train", "{}/x", "--data", "cifar10", "--model", "tinyten"), "cifar10 does not come with the package"),
        (
            ("fit", "{}/a.safetensors", "{}/c.safetensors", "--out", "{}/x", "--data", "digits"),
            "is a connection, not a",
        ),
        (
            ("fit", *2 * ["{}/a.safetensors"], "--out", "{}/x", "--data", "digits", "--curve", "bezier:0"),
            "degree must be",
        ),
        (
            ("fit", *2 * ["{}/a.safetensors"], "--out", "{}/x", "--data", "digits", "--curve", "spline"),
            "no curve 'spline'",
        ),
        (
            ("fit", *2 * ["{}/a.safetensors"], "--out", "{}/x", "--data", "digits", "--method", "weight:sweeps=3"),
            "alignment method 'weight:sweeps=3': got an unexpected keyword argument 'sweeps'; weight takes num_sweeps",
        ),
        (("align", *2 * ["{}/a.safetensors"], "--out", "{}/x", "--model-arg", "width=2"), "--model, which is missing"),
        (("curvature", "{}/a.safetensors", "--data", "digits"), "is a model, not a connection"),
        (
            ("evaluate", "{}/c.safetensors", "--data", "digits", "--on", "both"),
            "--on must be train or test, got 'both'",
        ),
        (("evaluate", "{}/notes.json", "--data", "digits"), "it is no result along a curve, no plane, no comparison"),
        (("plot", "{}/a.safetensors", "--out", "{}/x.png"), "is a model, of which there is nothing to draw"),
        (
            ("plot", "{}/notes.json", "--out", "{}/x.png"),
            "it is no result along a curve, no plane, no comparison, no correl",
        ),
        (("info", "{}/notes.txt"), "it is no file that modeconn wrote"),
        (("info", "/dev/null"), "'/dev/null' is a device or pipe, of which no file can be read"),
        (
            ("plot", "{}/broken.json", "--out", "{}/x.png"),
            "broken.json': this is no file .*: it cannot be read as JSON",
        ),
        (
            ("train", "{}/x", "--data", "digits", "--model", "mlp", "--model-arg", "hidden=8"),
            "hidden is a list, got hidden=8: write 'hidden=8,' with a comma for one value, 'hidden=8,8' for two",
        ),
        (
            ("fit", *2 * ["{}/a.safetensors"], "--out", "{}/x", "--data", "digits", "--refine", "pom"),
            "there is no refinement 'pom'; there is pam",
        ),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_writes_nothing(folder, arguments, message):
    (folder / "notes.json").write_text("{}")
    (folder / "broken.json").write_text('{"kind": "Profile",')
    (folder / "notes.txt").write_text("no tensors here")
    before = sorted(folder.iterdir())
    result = run(*(str(argument).format(folder) for argument in arguments), code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("modeconn: error: ") and re.search(message, line), line
    assert result.stdout == "" and sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "no-a", "no-b"),
        ("train", "x", "--data", "digits"),
        ("info", "nowhere"),
        ("connect",),
        ("demo", "--points", 1),
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(arguments):
    result = run(*arguments, code=2)
    assert result.stdout == "" and "Traceback" not in result.stderr and result.stderr


# -- strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("line", Line()),
        ("bezier", Bezier(2)),
        ("bezier:3", Bezier(3)),
        ("bezier:degree=3,free_ends=True", Bezier(3, free_ends=True)),
        ("polychain:4", PolyChain(4)),
    ],
)
def test_curves_are_read(text, expected):
    assert parse.curve(text) == expected


def test_methods_optimizers_and_schedules_are_read():
    assert parse.method("activation:num_examples=None,statistic=cosine") == modeconn.ActivationMatching(
        num_examples=None, statistic="cosine"
    )
    assert parse.alignment("weight:seed=3") == modeconn.WeightMatching(seed=3)
    assert parse.alignment("none") is False
    optimizer = parse.optimizer("sgd:lr=0.5,momentum=0.9,nesterov=True")([torch.zeros(1, requires_grad=True)])
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["nesterov"] and optimizer.defaults["lr"] == 0.5
    assert parse.schedule("one_cycle") is one_cycle
    assert parse.schedule("halving:every=2,decay=1")(4, 10) == halving(4, 10, every=2, decay=1) == 0.25
    assert parse.precision("bfloat16") is torch.bfloat16 and parse.precision("none") is None


def test_a_model_takes_from_the_data_what_its_factory_asks_for():
    train = TensorLoader(torch.rand(8, 1, 16, 16), torch.arange(8) % 4)
    name, arguments = models.describe(parse.make_model("tinyten", {"num_classes": 7}, train))
    assert (name, arguments["num_classes"], arguments["in_channels"], arguments["image_size"]) == ("tinyten", 7, 1, 16)
    assert arguments["mean"] == train.mean().tolist() and arguments["std"] == train.std().tolist()


# -- the program itself


def test_the_program_turns_warnings_into_lines(tmp_path):
    (tmp_path / "own_net.py").write_text(
        "import torch\n"
        "class Scaled(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(64, 10)\n"
        "        self.register_buffer('scale', torch.ones(1))\n"
    )
    for name in "ab":
        state = {"weight": torch.zeros(10, 64), "bias": torch.zeros(10), "scale": torch.full((1,), float(name == "a"))}
        torch.save(state, tmp_path / name)
    result = subprocess.run(
        [*PROGRAM, *"fit a b --out c --data digits --model own_net:Scaled --method none --epochs 1".split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr.startswith("modeconn: warning: buffers differ between the networks that nothing")
    assert len(result.stderr.splitlines()) == 1 and "Wrote c" in result.stdout


PROGRAM = [sys.executable, "-m", "modeconn"]


def test_the_module_runs_as_the_command():
    result = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == modeconn.__version__


# -- comparing methods


def test_compare_does_what_the_function_does(folder, tmp_path):
    a, b, _ = the_same_in_python()
    out, methods = tmp_path / "c.json", ("activation", "weight:seed=1", "weight:start=activation")
    given = [word for name in methods for word in ("--method", name)]
    result = run(
        *("compare", *ends(folder), *reversed(ends(folder)), "--data", "digits", "--out", out, *given),
        *("--points", 3, "--epochs", 1, *ADAM, "--no-repair"),
    )
    found = modeconn.Comparison.from_json(out.read_text())
    expected = modeconn.compare(
        [(a, b), (b, a)],
        {name: parse.method(name) for name in methods},
        *data.load("digits"),
        num_points=3,
        repair=False,
        recipe=Recipe(1, parse.optimizer("adam:lr=0.003"), one_cycle, 0.0),
    )
    for row in ("identity", "random", *methods):
        for column in ("line", "line accuracy lost", "curve"):
            assert found.values[row][column] == expected.values[row][column]
    assert repr(found) in result.stdout
    assert (tmp_path / "c.csv").read_text() == found.to_csv()
    assert not (tmp_path / "c.json.checkpoint").exists()

    assert repr(found) in run("info", out).stdout
    run("plot", out, "--out", tmp_path / "c.png", "--quantity", "curve accuracy lost")
    assert (tmp_path / "c.png").stat().st_size > 5_000
    assert (
        "of the kind comparison shows one file, got 2"
        in run("plot", out, out, "--out", tmp_path / "c.png", code=1).stderr
    )


def test_compare_keeps_the_checkpoint_that_was_asked_for(folder, tmp_path):
    common = ("compare", *ends(folder), "--data", "digits", "--points", 2, "--checkpoint", tmp_path / "kept")
    for name in ("one", "two"):
        run(*common, "--out", tmp_path / f"{name}.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for record in (one, two):
        del record["made_by"], record["sha256"]
    assert one == two  # to the last second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--points", 3], "networks are compared in pairs, but there are 3"),
        (["--schedule", "one_cycle"], "say with --epochs how long"),
    ],
)
def test_compare_says_what_is_missing(folder, tmp_path, words, message):
    networks = [*ends(folder), *ends(folder)][: 3 if "--points" in words else 4]
    result = run("compare", *networks, "--data", "digits", "--out", tmp_path / "c.json", *words, code=1)
    assert message in result.stderr


def test_compare_does_not_write_its_table_over_its_json(folder, tmp_path):
    result = run("compare", *ends(folder), "--data", "digits", "--out", tmp_path / "c.csv", code=1)
    assert "several results would be written to" in result.stderr and "c.csv" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_method_may_start_from_another_one():
    expected = modeconn.WeightMatching(seed=2, start=modeconn.ActivationMatching())
    assert parse.method("weight:seed=2,start=activation") == expected
    expected = modeconn.Sinkhorn(num_steps=9, start=modeconn.WeightMatching())
    assert parse.method("sinkhorn:num_steps=9,start=weight") == expected
