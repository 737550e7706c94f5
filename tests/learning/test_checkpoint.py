"""The one file of a run: read when it begins, written as it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modeconn import Checkpoint, discover, models
from modeconn.learning.checkpoint import RunFile
from modeconn.tools import files

CPU = torch.device("cpu")


class Part:
    """A part of a run that holds one tensor and one number."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def state(self):
        return {f"{self.name}.tensor": torch.tensor([self.value])}, {self.name: self.value}

    def load_state(self, tensors, about):
        assert float(tensors[f"{self.name}.tensor"]) == about[self.name]
        self.value = about[self.name]


def settings(**changes):
    return lambda: {"seed": "0", "curve": "Line()", **changes}


def test_all_parts_are_taken_to_where_they_were_saved(tmp_path):
    path = tmp_path / "run"
    one, two = Part("one", 1.0), Part("two", 2.0)
    with RunFile(Checkpoint(path), settings(), CPU) as file:
        assert file.saved is None and file.relabelling(models.mlp(4, (5,), 3)) is None and file.is_kept
        file.save(one, two)
        one.value = 5.0
        file.save(one, two)
        with pytest.raises(OSError, match="run' is in use by another run"):
            RunFile(Checkpoint(path), settings(), CPU)
    again = RunFile(Checkpoint(path), settings(), CPU)
    one, two = Part("one", 0.0), Part("two", 0.0)
    again.resume(one, two)
    assert (one.value, two.value) == (5.0, 2.0)


def test_a_run_that_is_not_kept_asks_for_no_settings_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def never():
        raise AssertionError("digests of networks take time")

    file, part = RunFile(None, never, CPU), Part("one", 1.0)
    file.save(part)
    file.resume(part)
    assert not file.is_due(1) and not file.is_kept and str(file) == "" and not list(Path().iterdir())


def test_the_relabelling_at_the_start_is_in_every_checkpoint(tmp_path):
    model = models.mlp(4, (5,), 3)
    spec = discover(model)
    permutation = spec.random(torch.Generator().manual_seed(0))
    with RunFile(Checkpoint(tmp_path / "run"), settings(), CPU) as file:
        file.keep(permutation)
        file.save(Part("one", 1.0))
    assert RunFile(Checkpoint(tmp_path / "run"), settings(), CPU).relabelling(model) == permutation
    with pytest.raises(ValueError, match="run' is damaged"):
        RunFile(Checkpoint(tmp_path / "run"), settings(), CPU).relabelling(models.mlp(4, (6,), 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "1"}, "seed is 0 in it and 1 here. Pass another path, or delete the file"),
        ({"more": "x"}, "more is None in it and x here"),
    ],
)
def test_a_file_of_another_run_is_refused_by_the_first_setting_that_differs(tmp_path, changes, message):
    path = tmp_path / "run"
    with RunFile(Checkpoint(path), settings(), CPU) as file:
        file.save(Part("one", 1.0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        RunFile(Checkpoint(path), settings(**changes), CPU)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = tmp_path / "run"
    with RunFile(Checkpoint(path), settings(), CPU) as file:
        file.save(Part("one", 1.0))
    tensors, about = files.read(path)
    files.write(path, about.pop("kind"), tensors, {**about, "format": 1})
    with pytest.raises(ValueError, match="format is 1 in it and 2 here"):
        RunFile(Checkpoint(path), settings(), CPU)


class Mapped:
    """A part of a run that holds a mapping, of which older versions may not have known all."""

    def state(self):
        return {}, {"mapping": {"known": 1.0, "newer": 2.0}}

    def load_state(self, tensors, about):
        self.loaded = about["mapping"]


@pytest.mark.parametrize(("saved", "is_right"), [({"known": 3.0}, True), ({"known": "x"}, False), ("x", False)])
def test_what_is_there_of_a_mapping_is_of_the_right_kind_also_where_something_is_missing(tmp_path, saved, is_right):
    path, part = tmp_path / "run", Mapped()
    with RunFile(Checkpoint(path), settings(), CPU) as file:
        file.save(part)
    tensors, about = files.read(path)
    files.write(path, about.pop("kind"), tensors, {**about, "mapping": saved})
    again = RunFile(Checkpoint(path), settings(), CPU)
    if is_right:
        assert again.resume(part) and part.loaded == saved
    else:
        with pytest.raises(ValueError, match="run' is damaged"):
            again.resume(part)


def test_other_conditions_are_told_and_the_run_goes_on(tmp_path):
    path = tmp_path / "run"
    with RunFile(Checkpoint(path), settings(), CPU) as file:
        file.save(Part("one", 1.0))
    tensors, about = files.read(path)
    about["environment"]["threads"] = 77
    files.write(path, about.pop("kind"), tensors, about)
    with pytest.warns(UserWarning, match="threads was 77 and is"):
        assert RunFile(Checkpoint(path), settings(), CPU).saved is not None


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_run(tmp_path):
    with pytest.raises(OSError, match="Choose a place that can be written to"):
        RunFile(Checkpoint(tmp_path / "nowhere" / "run"), settings(), CPU)


@pytest.mark.parametrize(
    ("checkpoint", "due"),
    [({}, []), ({"every_batches": 2}, [2, 4]), ({"every_seconds": 1e-9}, [1, 2, 3, 4])],
    ids=str,
)
def test_a_run_saves_itself_as_often_as_it_was_told(tmp_path, checkpoint, due):
    file = RunFile(Checkpoint(tmp_path / "run", **checkpoint), settings(), CPU)
    assert [batch for batch in range(1, 5) if file.is_due(batch)] == due


def test_what_is_saved_goes_through_json(tmp_path):
    with RunFile(Checkpoint(tmp_path / "run"), settings(), CPU) as file:
        file.save(Part("one", 1.0))
    assert json.dumps(files.read(tmp_path / "run")[1])
