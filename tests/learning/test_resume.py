from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import modeconn
from modeconn.curves import Bezier, PolyChain
from modeconn.learning.checkpoint import Checkpoint
from modeconn.network.loss import cross_entropy
from modeconn.network.recipe import Recipe, constant
from modeconn.symmetry import discover
from modeconn.tools import files
from tests.cases import CASE, DEVICE, batches
from tests.learning.resume_worker import RECIPE, after, fit, loader

ROOT = Path(__file__).parents[2]


class Breaking:
    """A loader that is interrupted when it is asked for the n-th time: once to look at, then nine times an epoch."""

    def __init__(self, data, count: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.data, self.left, self.error = data, count, error

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        iterator = iter(self.data)
        while True:
            self.left -= 1
            if self.left == 0:
                raise self.error
            try:
                yield next(iterator)
            except StopIteration:
                return


def same(left, right) -> bool:
    return (
        torch.equal(left.control_points, right.control_points)
        and left.history.loss == right.history.loss
        and left.history.loss_by_t == right.history.loss_by_t
    )


def killed(path: Path, where: str, count: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tests.learning.resume_worker", str(path), where, str(count)]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert result.returncode == -signal.SIGKILL


def test_a_run_killed_in_epochs_and_in_writes_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    path = tmp_path / "c.safetensors"
    killed(path, "batch", 6)  # inside the first epoch, two batches after its checkpoint
    stood = files.read(path, "checkpoint of fit_curve")[1]["progress"]
    assert (stood["epoch"], stood["batch"]) == (0, 3)
    killed(path, "write", 3)  # each write syncs file and folder: inside its second write
    killed(path, "rename", 3)  # with a finished file that has not got its name
    stood = files.read(path, "checkpoint of fit_curve")[1]["progress"]
    assert (stood["epoch"], stood["batch"]) == (1, 3)
    assert same(fit(path), fit())
    assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize("count", [2, 3, 10, 11, 27])
def test_a_run_interrupted_at_any_batch_ends_with_the_same_bits(tmp_path, count):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(loader(), count))
    assert same(fit(tmp_path / "c"), fit())


@pytest.mark.parametrize("count", [11, 15])
def test_a_run_that_fails_goes_on_from_the_end_of_the_epoch_before(tmp_path, count):
    with pytest.raises(MemoryError):
        fit(tmp_path / "c", Breaking(loader(), count, MemoryError))
    assert same(fit(tmp_path / "c"), fit())


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt, also where a shell started the tests in the background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_step_and_saves(tmp_path):
    def forward(model, batch):
        steps.append(None)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model(batch[0]), batch[1])

    steps = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", forward=forward)
    assert signal.getsignal(signal.SIGINT) is handler
    assert files.read(tmp_path / "c", "checkpoint of fit_curve")[1]["progress"]["batch"] == 5
    assert same(fit(tmp_path / "c", forward=forward), fit(forward=forward))


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_acts_at_once_and_leaves_the_last_checkpoint(tmp_path):
    def forward(model, batch):
        steps.append(None)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model(batch[0]), batch[1])

    steps = []
    with pytest.raises(KeyboardInterrupt):
        fit(Checkpoint(tmp_path / "c", every_batches=4), forward=forward)
    assert files.read(tmp_path / "c", "checkpoint of fit_curve")[1]["progress"]["batch"] == 4
    assert same(fit(tmp_path / "c", forward=forward), fit(forward=forward))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_the_last_write_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", after(3, lambda: signal.raise_signal(signal.SIGINT), os.replace))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c")


class Noisy(Dataset):
    """Examples with noise from each of the global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.full((1, 2, 4), float(index)) / 40 + 0.1 * noise, index % 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_that_follows_the_global_generators_resumes_inside_an_epoch(tmp_path, num_workers):
    data = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=num_workers)
    recipe = Recipe(epochs=2, optimizer=RECIPE.optimizer)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(data, 9), recipe=recipe)
    assert same(fit(tmp_path / "c", data, recipe=recipe), fit(data=data, recipe=recipe))


def test_a_loader_with_a_will_of_its_own_starts_its_epoch_anew_and_says_so(tmp_path):
    inputs = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(8), strict=True)))
    data = DataLoader(inputs, batch_size=12, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(data, 7))
    with pytest.warns(UserWarning, match=r"interrupted after batch 3 of epoch 0.* The epoch starts anew"):
        connection = fit(tmp_path / "c", data)
    assert len(connection.history.loss) == 3


def test_a_loader_with_its_own_generator_is_warned_of_between_epochs_too(tmp_path):
    examples = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(8), strict=True)))
    data = DataLoader(examples, batch_size=12, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(data, 13))
    with pytest.warns(UserWarning, match=r"the loader draws from a generator of its own"):
        fit(tmp_path / "c", data)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = fit(tmp_path / "c")
    again = fit(tmp_path / "c", loss_fn=cross_entropy)
    assert same(first, again) and again.history.seconds == first.history.seconds


def test_a_resumed_run_keeps_the_permutation_and_does_not_align_again(tmp_path):
    a, data = CASE["batch_norm"].make(0), loader()
    permutation = discover(a, next(iter(data))[0]).random(torch.Generator().manual_seed(0))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(data, 5), align=permutation)
    resumed = fit(tmp_path / "c", data, align=permutation)
    assert same(resumed, fit(align=permutation)) and resumed.permutation == permutation


def test_modules_that_learn_in_their_buffers_resume_too(tmp_path):
    def forward(model, batch):
        model.mean.lerp_(batch[0].mean(), 0.1)
        return cross_entropy(model[0](batch[0] - model.mean), batch[1])

    def centred(seed: int):
        model = torch.nn.Sequential(CASE["mlp"].make(seed))
        model.register_buffer("mean", torch.zeros((), device=DEVICE))
        return model

    from modeconn.fit import fit_curve

    def run(path, data):
        return fit_curve(centred(0), centred(1), data, align=False, recipe=RECIPE, forward=forward, checkpoint=path)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c", Breaking(loader(), 12))
    assert same(run(tmp_path / "c", loader()), run(None, loader()))


def test_float16_runs_resume_with_their_loss_scale(tmp_path):
    recipe = Recipe(epochs=2, autocast=torch.float16, schedule=constant)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(loader(), 7), recipe=recipe)
    assert same(fit(tmp_path / "c", recipe=recipe), fit(recipe=recipe))


@pytest.mark.parametrize(
    ("every", "expected"),
    [({}, ["0.8", "1.8", "2.8"]), ({"every_batches": 5}, ["0.5", "0.8", "1.5", "1.8", "2.5", "2.8"])],
)
def test_a_run_saves_after_epochs_and_as_often_as_asked(tmp_path, monkeypatch, every, expected):
    saved, write = [], files.write

    def spy(path, kind, tensors, about):
        progress = about["progress"]
        saved.append(f"{progress['epoch'] - (not progress['batch'])}.{progress['batch'] or 8}")
        write(path, kind, tensors, about)

    monkeypatch.setattr(files, "write", spy)
    fit(Checkpoint(tmp_path / "c", **every))
    assert saved == expected


def test_a_run_saves_by_the_clock(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c", every_seconds=60)
    assert checkpoint.is_due(1, last_saved=-1e9) and not checkpoint.is_due(1, last_saved=1e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curve": Bezier(2)}, r"curve is Bezier\(degree=3, free_ends=False\) in it and Bezier\(degree=2"),
        ({"curve": PolyChain(3)}, r"curve is Bezier\(degree=3, .* and PolyChain\(num_segments=3"),
        ({"seed": 12}, "seed is 11 in it and 12 here"),
        ({"recipe": Recipe(epochs=9, optimizer=RECIPE.optimizer)}, r"recipe\.epochs is 3 in it and 9 here"),
        ({"recipe": Recipe(epochs=3, schedule=RECIPE.schedule)}, r"recipe\.optimizer is .*Adam\(lr=0\.01\) in it"),
        ({"loss_fn": torch.nn.functional.cross_entropy}, r"loss is cross_entropy in it and torch"),
        ({"align": True}, "align is False in it and True here"),
    ],
)
def test_a_checkpoint_of_another_run_is_an_error_and_stays_as_it_is(tmp_path, changes, message):
    path = tmp_path / "c.safetensors"
    fit(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"c\.safetensors' is of another run: {message}"):
        fit(path, **changes)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "seeds", "what"), [("mlp", (0, 1), r"parameter '1\.weight'"), ("batch_norm", (0, 2), "network b")]
)
def test_a_checkpoint_of_other_networks_is_an_error(tmp_path, name, seeds, what):
    from modeconn.fit import fit_curve

    fit(tmp_path / "c")
    a, b = (CASE[name].make(seed) for seed in seeds)
    with pytest.raises(ValueError, match=rf"is of another run: .*{what}"):
        fit_curve(a, b, loader(), align=False, curve=Bezier(3), recipe=RECIPE, seed=11, checkpoint=tmp_path / "c")


@pytest.mark.parametrize("spoil", [lambda content: content[:-7], lambda content: b"PK" + content])
def test_a_spoiled_checkpoint_is_an_error_and_stays_as_it_is(tmp_path, spoil):
    fit(tmp_path / "c")
    content = spoil((tmp_path / "c").read_bytes())
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match=r"is truncated|is a pickle"):
        fit(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content


def test_going_on_under_other_conditions_is_warned_of(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", Breaking(loader(), 5))
    tensors, about = files.read(tmp_path / "c", "checkpoint of fit_curve")
    about["environment"]["threads"] = 77
    files.write(tmp_path / "c", about.pop("kind"), tensors, about)
    with pytest.warns(UserWarning, match=rf"threads was 77 and is {torch.get_num_threads()}"):
        fit(tmp_path / "c")


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write '.*missing/c'"):
        fit(tmp_path / "missing" / "c", loss_fn=lambda *_: pytest.fail("work was done"))


def test_intervals_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="every_batches must be positive, got every_batches=0"):
        Checkpoint(tmp_path / "c", every_batches=0)


def test_a_checkpoint_describes_itself_in_json(tmp_path):
    fit(tmp_path / "c")
    about = files.read(tmp_path / "c", "checkpoint of fit_curve")[1]
    assert about["settings"]["curve"] == "Bezier(degree=3, free_ends=False)" and json.dumps(about)
    assert about["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("verb", ["fit_curve", "train", "train_population"])
def test_a_checkpoint_knows_its_data(verb, tmp_path):
    """A finished run must not be handed out as that on other data."""
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    recipe = Recipe(epochs=1)
    run = {
        "fit_curve": lambda data: modeconn.fit_curve(a, b, data, align=False, recipe=recipe, checkpoint=tmp_path / "c"),
        "train": lambda data: modeconn.models.train(a, data, recipe=recipe, checkpoint=tmp_path / "c"),
        "train_population": lambda data: modeconn.models.train_population(
            [a, b], data, recipe=recipe, checkpoint=tmp_path / "c"
        ),
    }[verb]
    run(batches())
    run(batches())
    with pytest.warns(UserWarning, match="the first batch of loader is another one than when the run of .* began"):
        run(batches(seed=5))
    with pytest.raises(ValueError, match="is of another run: the number of batches of loader is 5 in it and 3 here"):
        run(batches(3))
    with pytest.raises(ValueError, match="is of another run: the first batch of loader is"):
        run(batches(batch_size=6))
