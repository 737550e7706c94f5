"""Models in files, tensor by tensor."""

import json
import math
import os
import shutil
import sys
import weakref

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from modeconn import tensor_files
from modeconn.cli.app import app
from modeconn.tensor_files import TensorFiles, difference, interpolate, reading
from modeconn.tools.memory import peak_memory

TYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
)


def tensors(seed, dtype=torch.float32, count=7, size=(20, 30)):
    torch.manual_seed(seed)
    found = {f"layers.{number}.weight": torch.randn(size).to(dtype) for number in range(count)}
    return found | {"scalar": torch.randn(()).to(dtype), "empty": torch.zeros(0, 3), "count": torch.tensor([3])}


def folder_of(path, state, *, shards=3):
    """Write a folder as Hugging Face has it, by hand."""
    path.mkdir()
    names, places = list(state), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[number::shards]}
        safetensors.torch.save_file(part, path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "toy"}')
    (path / "tokenizer.model").write_bytes(b"\x00\x01")
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return path


@pytest.fixture
def pair(tmp_path):
    a, b = (folder_of(tmp_path / name, tensors(seed)) for name, seed in (("a", 1), ("b", 2)))
    return a, b


def in_memory(path):
    return {name: TensorFiles(path).read(name) for name in TensorFiles(path).entries}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


def test_every_kind_of_file_holds_the_same(tmp_path, pair):
    state = tensors(1)
    safetensors.torch.save_file(state, tmp_path / "one.safetensors")
    torch.save(state, tmp_path / "one.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    index = pair[0] / "model.safetensors.index.json"
    for path in (pair[0], index, tmp_path / "one.safetensors", tmp_path / "one.pt", tmp_path / "old.pt"):
        assert same(in_memory(path), state)
        assert TensorFiles(path).num_bytes == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -0.5])
def test_interpolation_is_that_in_memory(tmp_path, dtype, t):
    first, second = tensors(1, dtype), tensors(2, dtype)
    a, b = folder_of(tmp_path / "a", first), folder_of(tmp_path / "b", second, shards=2)
    interpolate(a, b, tmp_path / "out", t=t, shard_bytes=5_000)
    wide = torch.promote_types(dtype, torch.float32)
    expected = {name: torch.lerp(x.to(wide), second[name].to(wide), t).to(dtype) for name, x in first.items()
                if x.dtype is dtype}  # fmt: skip
    found = in_memory(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == first.keys() and found["count"].item() == 3
    if t == 0:
        assert same(found, in_memory(a))


def test_statistics_of_batch_norm_that_belong_to_no_network_are_told(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for path in paths:
        safetensors.torch.save_file(torch.nn.BatchNorm1d(3).state_dict(), path)
    with pytest.warns(UserWarning, match=r"statistics of batch norm are interpolated like weights.*recalibrate it"):
        interpolate(*paths, tmp_path / "out.safetensors")
    with pytest.warns(UserWarning, match=r"statistics of batch norm are averaged like weights.*recalibrate it"):
        tensor_files.average(paths, tmp_path / "mean.safetensors")
    interpolate(*paths, tmp_path / "end.safetensors", t=1.0)


def test_a_folder_is_one_as_others_write_it(tmp_path, pair):
    out = interpolate(*pair, tmp_path / "out", shard_bytes=5_000)
    held = {path.name for path in out.iterdir()}
    shards = {name for name in held if name.endswith(".safetensors")}
    assert held == shards | {"config.json", "tokenizer.model", "model.safetensors.index.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == TensorFiles(out).num_bytes
    assert set(index["weight_map"].values()) == shards
    for shard in shards:
        assert sum(tensor.nbytes for tensor in safetensors.torch.load_file(out / shard).values()) <= 5_000
    small = interpolate(*pair, tmp_path / "small")
    assert {path.name for path in small.iterdir()} == {"config.json", "tokenizer.model", "model.safetensors"}
    alone = interpolate(*pair, tmp_path / "alone.safetensors")
    assert same(in_memory(alone), in_memory(small)) and same(in_memory(out), in_memory(small))


@pytest.mark.parametrize("name", TYPES.split())
def test_files_of_every_type_are_those_of_the_library(tmp_path, name):
    dtype = getattr(torch, name)
    state = {"x": (torch.arange(12).reshape(3, 4) % 2).to(dtype), "none": torch.zeros(0, 2).to(dtype)}
    entries = {name: tensor_files.Entry(tuple(x.shape), dtype, tmp_path) for name, x in state.items()}
    out = tensor_files.write(tmp_path / "x.safetensors", entries, state.__getitem__)
    read = safetensors.torch.load_file(out)
    assert same(read, state) and same(in_memory(out), state)


def test_what_is_made_must_be_what_was_said(tmp_path):
    entries = {"x": tensor_files.Entry((2,), torch.float32, tmp_path)}
    with pytest.raises(ValueError, match=r"'x' became torch.float32 of \(3,\), not torch.float32 of \(2,\)"):
        tensor_files.write(tmp_path / "x.safetensors", entries, lambda name: torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path, pair):
    out = interpolate(*pair, tmp_path / "out", shard_bytes=1)
    assert len(list(out.glob("*.safetensors"))) == len(TensorFiles(out).entries)


class Alive:
    """Stands for the reading of tensors, and notes how many bytes of what it read are alive together."""

    def __init__(self, read):
        self.read, self.now, self.most = read, 0, 0

    def __call__(self, entry, begin):
        found = self.read(entry, begin)
        self.now += entry.num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(found, self.gone, entry.num_bytes)
        return found

    def gone(self, num_bytes):
        self.now -= num_bytes


def test_one_tensor_of_each_model_is_in_memory(pair, tmp_path, monkeypatch):
    alive = Alive(reading._values)
    monkeypatch.setattr(reading, "_values", alive)
    interpolate(*pair, tmp_path / "out", shard_bytes=50_000)
    difference(*pair)
    largest = max(entry.num_bytes for entry in TensorFiles(pair[0]).entries.values())
    assert alive.most == 2 * largest and alive.now == 0


def test_no_more_than_three_tensors_are_in_memory(tmp_path):
    size, count = (2048, 2048), 24  # 16 MB each
    state = {f"{number}": torch.zeros(size) for number in range(count)}
    a = folder_of(tmp_path / "a", state, shards=count)
    b = shutil.copytree(a, tmp_path / "b")
    del state
    interpolate(a, b, tmp_path / "first", shard_bytes=64 << 20)  # imports and first uses
    with peak_memory(torch.device("cpu")) as peak:
        interpolate(a, b, tmp_path / "out", shard_bytes=64 << 20)
    # Three of 16 MB, a few chunks, and up to 64 MB that the C library keeps when they are freed; a model takes 384 MB.
    assert (peak.num_bytes or 0) < 128 << 20


def test_whole_numbers_that_differ_are_told(tmp_path):
    first, second = tensors(1), tensors(2) | {"count": torch.tensor([4])}
    a, b = folder_of(tmp_path / "a", first), folder_of(tmp_path / "b", second)
    with pytest.warns(UserWarning, match="1 tensors of whole numbers differ, such as 'count': those of a were"):
        interpolate(a, b, tmp_path / "out")


# -- differences


def test_differences_are_those_of_the_tensors(tmp_path):
    first = tensors(1)
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["layers.2.weight"][3, 4] += 0.5
    a, b = folder_of(tmp_path / "a", first), folder_of(tmp_path / "b", second)
    found = difference(a, b)
    gap = float((first["layers.2.weight"].double() - second["layers.2.weight"].double()).abs().max())
    assert {name: value for name, value in found.largest.items() if value} == {"layers.2.weight": gap}
    assert found.relative["layers.2.weight"] == pytest.approx(gap / float(first["layers.2.weight"].double().norm()))
    assert not found.is_none and difference(a, a).is_none
    assert "layers.2.weight" in repr(found) and "1 of them differ" in repr(found)


def test_other_names_and_shapes_are_differences(tmp_path):
    first, second = tensors(1), tensors(1)
    second["more"] = second.pop("scalar")
    second["layers.0.weight"] = second["layers.0.weight"][:5].clone()
    a, b = folder_of(tmp_path / "a", first), folder_of(tmp_path / "b", second)
    found = difference(a, b)
    assert (found.missing, found.unexpected) == (("scalar",), ("more",))
    assert found.mismatching == {"layers.0.weight": ((20, 30), (5, 30))}
    with pytest.raises(ValueError, match=r"1 missing: scalar; 1 unexpected: more; 1 of other shapes: layers.0.weight"):
        interpolate(a, b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("x", "y", "largest"),
    [
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([math.nan], [math.nan], 0.0),
        ([math.nan], [1.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1 + 2j], [1 - 2j], 4.0),
        ([True], [False], 1.0),
        ([2**60], [2**60 + 2**20], 2.0**20),
        ([2**53], [2**53 + 1], sys.float_info.min),
        ([1.0, 2.0], [1 + 5j, 2], 5.0),
    ],
)
def test_numbers_of_every_kind_differ_by_what_they_do(tmp_path, x, y, largest):
    for name, value in (("a", x), ("b", y)):
        safetensors.torch.save_file({"x": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
    assert difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors").largest == {"x": largest}


# -- what is wrong with files


def lose_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def lie(folder):
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["scalar"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(told))


def forget(folder):
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"]["scalar"]
    index.write_text(json.dumps(told))


def truncate(folder):
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def scramble(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lose_a_shard, FileNotFoundError, "names shards that are missing: model-00002-of-00003.safetensors"),
        (lie, ValueError, "is not right about 'model-00001-of-00003.safetensors': it differs in scalar"),
        (forget, ValueError, "it differs in scalar"),
        (truncate, ValueError, "is truncated or no safetensors file"),
        (empty, ValueError, "holds no safetensors files. Name the file of weights itself"),
        (scramble, ValueError, "is no index of shards: it has no 'weight_map'"),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_written(tmp_path, pair, damage, kind, said):
    damage(pair[1])
    with pytest.raises(kind, match=said):
        interpolate(*pair, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(tmp_path, pair, monkeypatch, error):
    written, sync = [], os.fsync

    def full(file):
        written.append(file)
        if len(written) == 3:
            raise error
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(type(error)) as caught:
        interpolate(*pair, tmp_path / "out", shard_bytes=5_000)
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"cannot write '{tmp_path / 'out'}' (No space left on device). Choose a place that can be written to."
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_exists_is_kept_unless_it_is_to_be_overwritten(tmp_path, pair):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists\. Choose another name, or pass overwrite=True"):
        interpolate(*pair, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(ValueError, match=r"out' holds more than a model, or none, and would be replaced"):
        interpolate(*pair, tmp_path / "out", overwrite=True)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "out" / "old.safetensors")
    interpolate(*pair, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").exists() and TensorFiles(tmp_path / "out").entries.keys() == tensors(
        1
    ).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    with pytest.raises(ValueError, match=r"/a', which is read, and would be replaced"):
        interpolate(*pair, tmp_path, overwrite=True)
    inner = tmp_path / "out" / "model.safetensors"
    with pytest.raises(ValueError, match=r"model.safetensors', which is read, and would be replaced"):
        interpolate(inner, inner, tmp_path / "out", overwrite=True)
    assert all(path.exists() for path in (*pair, inner))


def test_a_file_that_is_replaced_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3)}, path)
    files = TensorFiles(path)
    safetensors.torch.save_file({"x": torch.ones(3)}, path, {"more": "metadata"})
    with pytest.raises(ValueError, match=r"was replaced while it was read"):
        files.read("x")


def test_types_that_cannot_hold_the_numbers_are_told(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.tensor([1e6, 2.0])}, path)
    with pytest.raises(ValueError, match=r"'x' holds numbers up to 1.0e\+06, too large for float16"):
        tensor_files.average([path], tmp_path / "out", dtype=torch.float16)
    for dtype in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"dtype= must be one of float64, float32, float16, bfloat16, got torch"):
            tensor_files.average([path], tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_types_are_averaged(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.tensor([1.0, 2.0]).to(dtype)}, path)
    for out in (tensor_files.average([path, path], tmp_path / "a"), interpolate(path, path, tmp_path / "b")):
        assert torch.equal(TensorFiles(out).read("x").float(), torch.tensor([1.0, 2.0]))


def test_two_models_in_one_folder_are_not_guessed_at(tmp_path):
    for name in ("a", "b"):
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files and 0 indices, so it is not known"):
        TensorFiles(tmp_path)


def test_pickles_that_hold_more_are_refused(tmp_path):
    torch.save({"state": tensors(1), "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds more than one state dict of tensors. Write it with"):
        TensorFiles(tmp_path / "a.pt")


# -- on the command line


def told(*command):
    return CliRunner().invoke(app, list(map(str, command)))


def test_commands_say_what_they_did(tmp_path, pair, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = told("interpolate", *pair, "--out", "out", "--t", 0.25, "--out-shard-size", "5KB")
    assert done.exit_code == 0 and "Wrote out" in done.stdout, done.output
    assert same(in_memory("out"), in_memory(interpolate(*pair, "again", t=0.25)))
    shard = next((tmp_path / "out").glob("*.safetensors"))
    described = told("info", shard).stdout
    assert "modeconn interpolate" in described and "--t 0.25" in described
    done = told("diff", pair[0], "out", "--out", "diff.json")
    assert done.exit_code == 0 and "8 of them differ" in done.stdout
    record = json.loads((tmp_path / "diff.json").read_text())
    assert record["largest"] == dict(difference(pair[0], "out").largest)
    assert "hold the same numbers" in told("diff", "out", "again").stdout


@pytest.mark.parametrize("size", ["5XB", "0", "much", "-1GB", "0.1B"])
def test_sizes_that_are_none_are_refused(pair, tmp_path, size):
    done = told("interpolate", *pair, "--out", tmp_path / "out", f"--out-shard-size={size}")
    assert done.exit_code == 1 and "--out-shard-size must be a size such as 5GB" in done.stderr


def test_sizes_are_read():
    from modeconn.cli.commands.tensor_files import bytes_of

    assert [bytes_of(text) for text in ("5GB", "1.5 mb", "2KiB", "7")] == [5 * 10**9, 1_500_000, 2048, 7]


def test_an_output_that_exists_is_named_by_its_option(pair, tmp_path):
    (tmp_path / "out").mkdir()
    done = told("interpolate", *pair, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "--overwrite" in done.stderr


def test_the_stage_is_public():
    assert tensor_files.TensorFiles is TensorFiles


def test_complex_tensors_lie_between_and_only_between_complex_ones(tmp_path):
    a, b = ({"w": torch.tensor(value)} for value in ([1 + 2j, 0j], [3 - 2j, 2j]))
    for name, state in (("a", a), ("b", b), ("real", {"w": torch.ones(2)})):
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "real")]
    out = interpolate(*paths[:2], tmp_path / "out.safetensors", t=0.25)
    assert torch.equal(in_memory(out)["w"], torch.tensor([1.5 + 1j, 0.5j]))
    with pytest.raises(ValueError, match="'w' is complex in one of the models alone"):
        interpolate(*paths[1:], tmp_path / "mixed.safetensors")


@pytest.mark.parametrize("out", [".", "..", "a/.."])
def test_a_place_without_a_name_is_refused(pair, out):
    with pytest.raises(ValueError, match="out must name a file or folder of its own"):
        interpolate(*pair, out, overwrite=True)
