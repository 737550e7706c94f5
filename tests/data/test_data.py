from __future__ import annotations

import gzip
import math
import pathlib
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from modeconn import data
from modeconn.data import Crop, Flip, Rotate, TensorLoader
from modeconn.data.augment import crop, rotate
from modeconn.data.cifar import read_pickle
from modeconn.data.idx import read_idx
from modeconn.network.batches import check_loader

MODES = {"plain": {}, "shuffled": {"shuffle": True}, "augmented": {"shuffle": True, "augment": (Flip(), Crop(2))}}


def images(num: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))


def numbered(num: int, **settings) -> TensorLoader:
    """A loader whose inputs tell which example they are."""
    return TensorLoader(torch.arange(num).float().unsqueeze(1), torch.zeros(num, dtype=torch.long), **settings)


# --- TensorLoader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("num", "batch_size"), [(1, 4), (4, 4), (5, 4), (6, 4), (9, 4), (3, 1), (10, 3)])
def test_each_example_comes_once_in_as_many_batches_as_len_says(num, batch_size, shuffle):
    loader = numbered(num, batch_size=batch_size, shuffle=shuffle)
    for _ in range(2):
        batches = [inputs for inputs, _ in loader]
        assert len(batches) == len(loader)
        assert torch.cat(batches).flatten().sort().values.tolist() == list(range(num))


@pytest.mark.parametrize(
    ("num", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (1, [1]), (3, [3]), (13, [4, 4, 5])]
)
def test_a_last_batch_of_one_joins_the_one_before(num, sizes):
    assert [len(inputs) for inputs, _ in numbered(num, batch_size=4)] == sizes


def test_batches_of_one_stay_when_asked_for():
    assert [len(inputs) for inputs, _ in numbered(3, batch_size=1)] == [1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_the_global_generator_decides_what_a_pass_yields(mode):
    loader = TensorLoader(images(50, 3, 8, 8), torch.arange(50), batch_size=16, **MODES[mode])

    def one_pass() -> list[Tensor]:
        return [tensor for batch in loader for tensor in batch]

    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = one_pass(), one_pass()
        torch.manual_seed(3)
        again = one_pass()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == (mode == "plain")


def test_nothing_is_drawn_without_shuffle_and_augmentation():
    before = torch.get_rng_state()
    list(TensorLoader(images(10, 3, 8, 8), torch.zeros(10, dtype=torch.long), batch_size=4))
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_and_targets_stay_together():
    loader = TensorLoader(torch.arange(30.0).unsqueeze(1), torch.arange(30), batch_size=7, shuffle=True)
    for inputs, targets in loader:
        assert torch.equal(inputs.flatten().long(), targets)


def test_bytes_become_floats_from_0_to_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    ((inputs, _),) = TensorLoader(pixels, torch.tensor([0]))
    torch.testing.assert_close(inputs, torch.tensor([0.0, 0.2, 1.0]).reshape(1, 1, 1, 3), rtol=0, atol=0)


def test_changing_a_batch_in_place_leaves_the_data_set_alone():
    loader = numbered(6, batch_size=3)
    for inputs, targets in loader:
        inputs.zero_()
        targets.fill_(7)
    assert loader.inputs.flatten().tolist() == list(range(6)) and loader.targets.sum() == 0


def test_a_loader_passes_the_check_at_the_door():
    inputs, targets = check_loader(numbered(6, batch_size=4))
    assert inputs.shape == (4, 1) and targets.shape == (4,)


def test_with_changes_settings_on_a_copy():
    loader = TensorLoader(images(6, 3, 8, 8), torch.arange(6), shuffle=True, augment=(Flip(),))
    plain = loader.with_(shuffle=False, augment=(), batch_size=2)
    assert (loader.shuffle, loader.augment, loader.batch_size) == (True, (Flip(),), 128)
    assert [targets.tolist() for _, targets in plain] == [[0, 1], [2, 3], [4, 5]]
    assert plain.inputs is loader.inputs


def test_a_split_is_a_partition_fixed_by_its_seed():
    loader = numbered(20, shuffle=True, augment=(Flip(),))
    rest, held_out = loader.split(6, seed=1)
    both = torch.cat([rest.inputs, held_out.inputs]).flatten()
    assert both.sort().values.tolist() == list(range(20)) and held_out.num_examples == 6
    assert rest.shuffle and not held_out.shuffle and held_out.augment == ()
    assert torch.equal(loader.split(6, seed=1)[1].inputs, held_out.inputs)
    assert not torch.equal(loader.split(6, seed=2)[1].inputs, held_out.inputs)


@pytest.mark.parametrize("num_held_out", [-1, 0, 5])
def test_a_split_leaves_no_part_empty(num_held_out):
    with pytest.raises(ValueError, match=f"between 1 and 4 of 5 examples can be held out, got {num_held_out}"):
        numbered(5).split(num_held_out)


def test_a_subset_keeps_all_classes():
    loader = TensorLoader(torch.zeros(4, 1), torch.tensor([0, 1, 2, 3]))
    assert loader.subset(torch.tensor([1, 0])).targets.tolist() == [1, 0]
    assert loader.subset(torch.tensor([1, 0])).num_classes == 4


@pytest.mark.parametrize("num", [10, 5000])  # one chunk, several
def test_mean_and_std_are_those_of_each_channel(num):
    loader = TensorLoader(images(num, 3, 4, 4), torch.zeros(num, dtype=torch.long))
    values = loader.inputs.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(loader.mean().double(), values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(loader.std().double(), values.std(1, correction=0), rtol=1e-6, atol=0)


def test_mean_and_std_of_vectors_are_those_of_each_feature():
    loader = TensorLoader(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    assert loader.mean().tolist() == [0.5, 1.0] and loader.std().tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("inputs", "targets", "settings", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2).long(), {}, r"equally many examples.*shapes \(3, 2\) and \(2,\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), {}, r"at least one; got shapes \(0, 2\) and \(0,\)"),
        (torch.zeros(2, 2), torch.tensor([0, 5]), {"num_classes": 3}, r"targets must lie in 0\.\.2, got a target of 5"),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), {}, r"targets must lie in 0\.\.1, got a target of -1"),
        (
            torch.zeros(2, 2),
            torch.tensor([0, 1]),
            {"batch_size": 0},
            r"batch_size must be at least 1, got batch_size=0",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(inputs, targets, settings, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(inputs, targets, **settings)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [Flip(), Crop(3), Rotate(15), Rotate(180)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_augmentation_keeps_shape_dtype_and_range(augmentation, dtype):
    batch = torch.rand(16, 3, 9, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = augmentation(batch)
    assert changed.shape == batch.shape and changed.dtype == dtype
    assert changed.min() >= 0 and changed.max() <= 1
    assert not torch.equal(changed, batch)


def test_a_flip_undoes_itself():
    batch = torch.rand(4, 3, 5, 6)
    assert torch.equal(Flip(1.0)(batch), batch.flip(3))
    assert torch.equal(Flip(1.0)(Flip(1.0)(batch)), batch)
    assert torch.equal(Flip(0.0)(batch), batch)


def test_flips_are_drawn_for_each_image():
    batch = torch.rand(400, 1, 1, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flipped = (Flip()(batch) != batch).flatten(1).any(1)
    assert 150 < flipped.sum() < 250  # five standard deviations


def test_a_crop_is_a_window_of_the_padded_image():
    batch = torch.rand(4, 2, 5, 6)
    offsets = torch.tensor([[0, 2, 4, 1], [4, 2, 0, 3]])
    cropped = crop(batch, offsets, padding=2)
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2))
    for index, (row, column) in enumerate(offsets.T.tolist()):
        assert torch.equal(cropped[index], padded[index, :, row : row + 5, column : column + 6])
    assert torch.equal(cropped[1], batch[1])


def test_crops_reach_every_shift():
    batch = torch.zeros(2000, 1, 5, 5)
    batch[:, 0, 2, 2] = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places = Crop(2)(batch).flatten(1).argmax(1)
    assert places.unique().numel() == 25


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_quarter_turn_moves_pixels_counter_clockwise(quarters):
    batch = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    angles = torch.full((2,), quarters * torch.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(rotate(batch, angles), batch.rot90(quarters, (2, 3)))


@pytest.mark.parametrize(("start", "end"), [((10, 40), (0, 30)), ((0, 30), (10, 20)), ((10, 20), (20, 30))])
def test_a_quarter_turn_keeps_distances_in_wide_images(start, end):
    batch = torch.zeros(1, 1, 21, 61, dtype=torch.float64)  # its centre is (10, 30)
    batch[0, 0, *start] = 1
    turned = rotate(batch, torch.tensor([torch.pi / 2], dtype=torch.float64))
    torch.testing.assert_close(turned[0, 0, *end], torch.ones((), dtype=torch.float64))


def test_rotated_white_stays_within_the_range_of_pixels():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        turned = Rotate(180)(torch.ones(500, 3, 9, 9))
    assert turned.max() == 1 and turned.min() == 0  # interpolation alone overshoots by a rounding error


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_come_with_the_package():
    train, test = data.load("digits")
    assert (train.num_examples, test.num_examples, train.num_classes, train.input_shape) == (1297, 500, 10, (64,))
    assert train.shuffle and not test.shuffle
    inputs = torch.cat([train.inputs, test.inputs])
    assert inputs.dtype == torch.float32 and inputs.min() == 0 and inputs.max() == 1
    assert torch.equal(inputs * 16, (inputs * 16).round())
    counts = torch.cat([train.targets, test.targets]).bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published


def test_the_seed_divides_the_digits():
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(2))
    parts = [torch.cat([part.inputs for part in data.load("digits", seed=seed)]) for seed in (0, 2)]
    assert not torch.equal(*parts)
    everything = [torch.empty_like(parts[0]), torch.empty_like(parts[0])]
    everything[0][torch.randperm(1797, generator=torch.Generator().manual_seed(0))] = parts[0]
    everything[1][order] = parts[1]
    assert torch.equal(*everything)


def test_validation_examples_are_held_out_of_the_training_set():
    train, _ = data.load("digits")
    rest, validation = data.load("digits", validation=200)
    assert (rest.num_examples, validation.num_examples) == (1097, 200)
    assert rest.shuffle and not validation.shuffle
    rows = torch.cat([rest.inputs, validation.inputs]).sort(0).values
    assert torch.equal(rows, train.inputs.sort(0).values)


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    data.load("digits", validation=100)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_data_set_is_answered_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"there is no data set 'cifar'; there are cifar10, cifar100, digits, "):
        data.load("cifar")


def test_a_batch_size_of_zero_is_not_taken_for_the_default():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got batch_size=0"):
        data.load("digits", batch_size=0)


@pytest.mark.parametrize("name", [name for name in data.names() if name != "digits"])
def test_files_need_a_root(name):
    with pytest.raises(ValueError, match=rf"{name} does not come with the package: pass root="):
        data.load(name)


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def python2_pickle(pixels: np.ndarray, labels: list[int], labels_key: bytes = b"labels", dtype: bytes = b"u1") -> bytes:
    """A batch as Python 2 wrote it: protocol 2, byte strings, the names NumPy 1 had."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    array_type = b"cnumpy\ndtype\n" + string(dtype) + number(0) + number(1) + b"\x87R"
    array_type += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + number(1) + shape + array_type + b"\x89" + string(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(labels_key) + numbers + b"u."


def python3_pickle(pixels: np.ndarray, labels: list[int], labels_key: bytes = b"labels") -> bytes:
    return pickle.dumps({b"data": pixels, labels_key: labels}, protocol=2)


def cifar_pixels(seed: int, num: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3072), dtype=np.uint8)


def write_cifar10(folder: pathlib.Path, write=python2_pickle) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(write(cifar_pixels(index), [index, 9, 0]))


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_cifar10_is_read_in_order(tmp_path, folder, write):
    write_cifar10(tmp_path / "root" / folder, write)
    train, test = data.load("cifar10", tmp_path / "root")
    assert (train.input_shape, train.num_examples, test.num_examples, test.num_classes) == ((3, 32, 32), 15, 3, 10)
    assert train.targets.tolist() == [0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0]
    assert np.array_equal(train.inputs[12].numpy().reshape(-1), cifar_pixels(4)[0])
    assert np.array_equal(test.inputs.numpy().reshape(3, -1), cifar_pixels(5))
    assert len(train.augment) == 3 and test.augment == ()


def test_augmentation_can_be_chosen(tmp_path):
    write_cifar10(tmp_path / "root")
    assert data.load("cifar10", tmp_path / "root", augment=False)[0].augment == ()
    assert data.load("cifar10", tmp_path / "root", augment=[Flip(0.1)])[0].augment == (Flip(0.1),)


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_cifar100_has_its_fine_labels(tmp_path, write):
    for seed, name in enumerate(["train", "test"]):
        (tmp_path / name).write_bytes(write(cifar_pixels(seed), [99, 5, seed], b"fine_labels"))
    train, test = data.load("cifar100", str(tmp_path))
    assert train.targets.tolist() == [99, 5, 0] and test.targets.tolist() == [99, 5, 1]
    assert test.num_classes == 100


def test_a_missing_file_is_named_with_the_places_searched(tmp_path):
    write_cifar10(tmp_path / "root")
    (tmp_path / "root" / "data_batch_3").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"cifar10 needs the file data_batch_3, which is not in .*root, .*cifar-10-batches-py"
    ):
        data.load("cifar10", tmp_path / "root")


class Attack:
    """Pickles to a call of ``Path.touch``."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, protocol):
    marker, file = tmp_path / "marker", tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"labels": [1], b"data": Attack(marker)}, protocol=protocol))
    pickle.loads(file.read_bytes())
    assert marker.exists()  # the attack works where nothing guards against it
    marker.unlink()

    with pytest.raises(ValueError, match=r"data_batch_1 asks for .*, which no CIFAR file holds"):
        read_pickle(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", [("os", "system"), ("builtins", "eval"), ("numpy", "load"), ("numpy", "ndarray.tofile")]
)
def test_every_other_name_is_refused(tmp_path, name):
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"\x80\x02c" + "\n".join(name).encode() + b"\n.")
    with pytest.raises(ValueError, match=rf"asks for {name[0]}\.{name[1]}, which no CIFAR file holds"):
        read_pickle(file)


def test_arrays_of_objects_are_refused(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(python2_pickle(cifar_pixels(0), [0, 1, 2], dtype=b"O8"))
    with pytest.raises(
        ValueError, match=r"data_batch_1 is damaged or no CIFAR file .*arrays must be of uint8, got 'O8'"
    ):
        read_pickle(file)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_cifar_file_is_named(tmp_path, keep):
    write_cifar10(tmp_path / "root")
    file = tmp_path / "root" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="data_batch_2 is damaged or no CIFAR file"):
        data.load("cifar10", tmp_path / "root")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [1]}, "is no CIFAR file: it lacks images of 3x32x32 pixels or 'labels'"),
        ({b"data": cifar_pixels(0)[:, :99], b"labels": [1, 2, 3]}, "is no CIFAR file: it lacks images of 3x32x32"),
        ({b"data": cifar_pixels(0), b"labels": [1, 2]}, r"holds labels of shape \(2,\) for 3 images"),
        ({b"data": cifar_pixels(0), b"labels": [1, 2, 10]}, r"holds a label of 10; labels lie in 0..9"),
        ({b"data": cifar_pixels(0), b"labels": [1, 2, -1]}, r"holds a label of -1; labels lie in 0..9"),
        ({b"data": cifar_pixels(0), b"labels": [1, 2, 2.5]}, "is no CIFAR file: it lacks images"),
        ({b"data": cifar_pixels(0), b"labels": [1, 2, 2**70]}, "is no CIFAR file: it lacks images"),
        ({b"data": "text", b"labels": "text"}, "is no CIFAR file: it lacks images"),
        ([1, 2], "is damaged or no CIFAR file"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    write_cifar10(tmp_path / "root")
    (tmp_path / "root" / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=f"test_batch {message}"):
        data.load("cifar10", tmp_path / "root")


def test_a_pickle_that_numbers_its_objects_without_end_takes_no_memory(tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")  # 32 GiB for the objects numbered below
    with pytest.raises(ValueError, match=r"file is damaged or no CIFAR file .*numbers an object 2147483647"):
        read_pickle(tmp_path / "file")


# --- IDX --------------------------------------------------------------------------------------------------------------


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_mnist(folder: pathlib.Path, *, ending: str = "", mark: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, num in (("train", 5), ("t10k", 3)):
        pixels, labels = images(num, 4, 6).numpy(), np.arange(num)
        for kind, values in (("images", pixels), ("labels", labels)):
            content = idx_bytes(values)
            name = f"{prefix}-{kind}{mark}idx{values.ndim}-ubyte{ending}"
            (folder / name).write_bytes(gzip.compress(content) if ending else content)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion_mnist", "fashion-mnist"), ("fashion_mnist", "")],
)
def test_idx_files_are_found_and_read(tmp_path, name, folder, ending, mark):
    write_mnist(tmp_path / folder, ending=ending, mark=mark)
    train, test = data.load(name, tmp_path)
    assert train.input_shape == (1, 4, 6) and (train.num_classes, test.num_examples) == (10, 3)
    assert torch.equal(train.inputs, images(5, 4, 6).unsqueeze(1)) and train.targets.tolist() == [0, 1, 2, 3, 4]


def test_a_missing_idx_file_is_named_with_its_other_spellings(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"mnist needs the file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz or .*not in",
    ):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or no IDX file"),
        (idx_bytes(np.zeros((2, 3)))[:-1], r"is damaged: an array of shape \(2, 3\) takes 6 bytes, it holds 5 bytes"),
        (idx_bytes(np.zeros((2, 3))) + b"0", r"is damaged: an array of shape \(2, 3\) takes 6 bytes, it holds more"),
        (
            b"\0\0\x0d\2" + idx_bytes(np.zeros((2, 3)))[4:],
            "is no IDX file of unsigned bytes in 2 dimensions: it begins with 00000d02",
        ),
        (
            idx_bytes(np.zeros(2)) + b"0" * 9,
            "is no IDX file of unsigned bytes in 2 dimensions: it begins with 00000801",
        ),
        (idx_bytes(np.zeros((2, 3)))[:4] + b"\xff" * 8, "is damaged: an array of shape .* would take"),
        (gzip.compress(idx_bytes(np.zeros((2, 3))) + bytes(10**8), mtime=0), ".* takes 6 bytes, it holds more"),
        (gzip.compress(idx_bytes(np.zeros((3, 3))), mtime=0)[:-9], "is damaged or no IDX file"),
        (b"\x1f\x8b" + b"junk" * 9, "is damaged or no IDX file"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file {message}"):
        read_idx(tmp_path / "file", 2)


# --- Tiny ImageNet ----------------------------------------------------------------------------------------------------


def write_tiny_imagenet(base: pathlib.Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    classes = ["n02", "n01"]
    for label, name in enumerate(classes):
        folder = base / "train" / name / "images"
        folder.mkdir(parents=True)
        for index in range(2):
            mode, colour = ("L", 200) if index else ("RGB", (250, 100 * label, 0))
            pillow.new(mode, (64, 64), colour).save(folder / f"{name}_{index}.JPEG")
    (base / "wnids.txt").write_text("\n".join(classes) + "\n")
    (base / "val" / "images").mkdir(parents=True)
    pillow.new("RGB", (64, 64), (0, 0, 250)).save(base / "val" / "images" / "val_0.JPEG")
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")


@pytest.mark.parametrize("folder", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_from_its_folders(tmp_path, folder):
    write_tiny_imagenet(tmp_path / folder)
    train, test = data.load("tiny_imagenet", tmp_path)
    assert train.input_shape == (3, 64, 64) and train.num_classes == 200
    assert train.targets.tolist() == [0, 0, 1, 1] and test.targets.tolist() == [1]
    centre = train.inputs[:, :, 32, 32].int()
    expected = torch.tensor([[250, 0, 0], [200, 200, 200], [250, 100, 0], [200, 200, 200]])
    assert (centre - expected).abs().max() <= 3  # JPEG is lossy
    assert (test.inputs[0, :, 0, 0].int() - torch.tensor([0, 0, 250])).abs().max() <= 3


def test_missing_tiny_imagenet_files_are_named(tmp_path):
    write_tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny_imagenet needs the file val/val_annotations\.txt"):
        data.load("tiny_imagenet", tmp_path)
    for path in (tmp_path / "train" / "n01" / "images").iterdir():
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"the images of class n01, which wnids.txt names, but .*images holds none"
    ):
        data.load("tiny_imagenet", tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    write_tiny_imagenet(tmp_path)
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (32, 64)).save(tmp_path / "train" / "n01" / "images" / "n01_0.JPEG")
    with pytest.raises(ValueError, match=r"n01_0\.JPEG must have 64x64 pixels, it has 32x64"):
        data.load("tiny_imagenet", tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wnids.txt", b"n02\n../n01\n", "must name up to 200 folders, each once, got 2, among them '../n01'"),
        ("wnids.txt", b"n02\nn02\n", "each once, got 2, among them 'n02'"),
        ("wnids.txt", b"\xff\xfe", "wnids.txt is no text"),
        ("wnids.txt", b"\n", "wnids.txt is empty"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn03\n", "line 1 of .* one of the 2 classes, got 'val_0.JPEG"),
        ("val/val_annotations.txt", b"../x.JPEG\tn01\n", "line 1 of .* the name of an image"),
        ("val/val_annotations.txt", b"val_0.JPEG\n", "line 1 of .* one of the 2 classes"),
        ("val/images/val_0.JPEG", b"GIF89a@\0@\0\0\0\0;", "val_0.JPEG is damaged or no JPEG image"),
        ("val/images/val_0.JPEG", None, "val_0.JPEG is damaged or no JPEG image"),
        ("val/images/val_0.JPEG", b"", "val_0.JPEG is damaged or no JPEG image"),
    ],
)
def test_damaged_tiny_imagenet_files_are_named(tmp_path, file, content, message):
    write_tiny_imagenet(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=message):
        data.load("tiny_imagenet", tmp_path)


def test_an_image_of_another_size_is_refused_before_it_is_decoded(tmp_path):
    write_tiny_imagenet(tmp_path)
    path = tmp_path / "val" / "images" / "val_0.JPEG"
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65000, 65000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"val_0\.JPEG (must have 64x64 pixels, it has 65000x65000|is damaged)"):
        data.load("tiny_imagenet", tmp_path)


def test_labels_that_are_no_classes_name_their_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 77])))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte holds a label of 77; labels lie in 0..9"):
        data.load("mnist", tmp_path)


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="tiny_imagenet holds JPEG images, which need Pillow: pip install pillow"):
        data.load("tiny_imagenet", tmp_path)


LOADER = TensorLoader(torch.rand(4, 1, 2, 2), torch.arange(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.Flip("x"), "probability must be a number, got probability='x'"),
        (lambda: data.Flip(1.5), r"probability must lie in \[0, 1\], got probability=1.5"),
        (lambda: data.Crop(1.5), "padding must be an integer, got padding=1.5"),
        (lambda: data.Crop(-1), "padding must be at least 0, got padding=-1"),
        (lambda: data.Rotate(None), "degrees must be a number, got degrees=None"),
        (lambda: data.Rotate(math.inf), "degrees must be finite, got degrees=inf"),
        (lambda: LOADER.split("x"), "num_held_out must be an integer, got num_held_out='x'"),
        (lambda: LOADER.subset(3), "indices must be a tensor, got indices=3"),
        (lambda: LOADER.subset(torch.ones(2)), r"indices must be int64 of one axis, got torch.float32 of shape \(2,\)"),
        (lambda: LOADER.subset(torch.tensor([0, 4])), r"indices must lie in 0\.\.3, got 4 among them"),
        (lambda: LOADER.to("x"), "device must be one that is here, such as 'cpu', got device='x'"),
        (lambda: data.load("digits", device="x"), "device must be one that is here, such as 'cpu', got device='x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_where_they_are_written(call, message):
    with pytest.raises(ValueError, match=message):
        call()
