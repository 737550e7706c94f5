from __future__ import annotations

import os
import pickle

import pytest
import safetensors.torch
import torch

import modeconn
from modeconn.tools import files
from modeconn.tools.json_files import from_json, to_json
from modeconn.tools.writing import check_writable

TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0), "n": torch.tensor(3)}


def test_a_file_brings_tensors_and_description_back(tmp_path):
    files.write(tmp_path / "a.safetensors", "thing", {**TENSORS, "t": TENSORS["x"].t()}, {"seed": 3, "loss": [0.1]})
    tensors, about = files.read(tmp_path / "a.safetensors", "thing")
    assert about == {"kind": "thing", "seed": 3, "loss": [0.1]}
    assert tensors.keys() == {*TENSORS, "t"} and torch.equal(tensors["t"], TENSORS["x"].t())
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.safetensors"
    files.write(path, "thing", TENSORS, {"version": "old"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"cannot write '.*a\.safetensors' \(No space left on device\)"):
        files.write(path, "thing", TENSORS, {"version": "new"})
    assert files.read(path, "thing")[1]["version"] == "old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_folder_that_does_not_exist_is_named_and_not_made(tmp_path):
    path = tmp_path / "missing" / "a.safetensors"
    for attempt in (lambda: check_writable(path), lambda: files.write(path, "thing", TENSORS, {})):
        with pytest.raises(FileNotFoundError, match=r"cannot write '.*missing/a\.safetensors' \(No such file"):
            attempt()
    assert os.listdir(tmp_path) == []


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)


def test_checking_that_a_file_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["nothing", "part of the header", "no data", "all but a byte"])
def test_a_truncated_file_is_an_error_that_says_so(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    files.write(path, "thing", {"x": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors' is truncated or no safetensors file"):
        files.read(path, "thing")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["MODECONN_BOMB"],)


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, dump):
    monkeypatch.setenv("MODECONN_BOMB", str(tmp_path / "boom"))
    path = tmp_path / "a.safetensors"
    dump(Bomb(), path)
    with pytest.raises(ValueError, match=r"is a pickle .* which could run code"):
        files.read(path, "thing")
    assert not (tmp_path / "boom").exists()


def test_no_header_length_is_taken_for_a_pickle(tmp_path):
    for length in range(0, 256, 8):  # headers are padded to multiples of 8 bytes
        files.write(tmp_path / "a", "thing", {}, {"text": "x" * length})
        assert files.read(tmp_path / "a", "thing")[1]["text"] == "x" * length


def test_a_file_of_another_kind_or_program_is_refused(tmp_path):
    files.write(tmp_path / "ours", "connection", TENSORS, {})
    with pytest.raises(ValueError, match="ours' is a connection, not a thing"):
        files.read(tmp_path / "ours", "thing")
    (tmp_path / "theirs").write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match="theirs' was not written by modeconn; it should be a thing"):
        files.read(tmp_path / "theirs", "thing")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.read(tmp_path / "nowhere", "thing")


def test_a_device_is_no_file():
    for read in (modeconn.Connection.load, modeconn.models.load, modeconn.PermutationSpec.load):
        with pytest.raises(ValueError, match="'/dev/null' is a device or pipe, of which no file can be read"):
            read("/dev/null")


def test_a_damaged_name_of_the_digest_is_no_older_file(tmp_path):
    """Two flipped bits, one of them in the name of the digest, must not pass for a file that never had one."""
    path = tmp_path / "file"
    files.write(path, "kind", {"x": torch.ones(3)}, {"number": 12345})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"modeconn.sha256", b"modeconn.sha25v").replace(b"12345", b"12346"))
    with pytest.raises(ValueError, match="is damaged: its content is not what was written"):
        files.read(path)
    text = to_json({"number": 12345}).replace('"sha256"', '"sha25v"').replace("12345", "12346")
    with pytest.raises(ValueError, match="is damaged: it is not what was written"):
        from_json(text, "record")
