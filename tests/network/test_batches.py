"""What a batch is, in whatever containers; and looking at data without reading it twice."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn
from modeconn.data import Flip, TensorLoader
from modeconn.measure.meter import Meter
from modeconn.network.batches import (
    Opened,
    batches,
    check_loader,
    checksum,
    first_batch,
    first_examples,
    in_order,
    inputs_and_targets,
    inputs_of,
    num_bytes,
    num_examples,
    run,
    shuffled,
    tensors_of,
    to_device,
    without_singles,
)
from modeconn.tools.fingerprint import digest
from modeconn.tools.rng import seeded

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Sample:
    pixels: Tensor
    label: Tensor
    name: str = "sample"


class Movable:
    """An object of a kind that nobody knows, which moves by itself, as graphs and packed sequences do."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes, self.moves = nodes, 0

    def to(self, device: Any) -> Movable:
        moved = Movable(self.nodes.to(device))
        moved.moves = self.moves + 1
        return moved


def x(size: int = 4) -> Tensor:
    return torch.arange(3.0 * size).view(size, 3)


CONTAINERS = {
    "tensor": lambda size: x(size),
    "pair": lambda size: (x(size), torch.arange(size)),
    "list": lambda size: [x(size), torch.arange(size)],
    "dict": lambda size: {"x": x(size), "y": torch.arange(size), "text": "no tensor"},
    "ordered": lambda size: OrderedDict(x=x(size), y=torch.arange(size)),
    "user dict": lambda size: UserDict(x=x(size), y=torch.arange(size)),
    "named": lambda size: Pair(x(size), {"y": torch.arange(size)}),
    "data class": lambda size: Sample(x(size), torch.arange(size)),
    "nested": lambda size: ({"a": [x(size), None]}, UserDict(b=Sample(x(size), torch.arange(size)))),
    "a number first": lambda size: {"scale": torch.tensor(2.0), "x": x(size), "y": torch.arange(size)},
}


def flat(batch: Any) -> list:
    return [tensor.tolist() for tensor in tensors_of(batch)]


@pytest.fixture(params=CONTAINERS, ids=str)
def make(request):
    return CONTAINERS[request.param]


def test_a_batch_knows_its_size_and_bytes_whatever_holds_it(make):
    assert num_examples(make(4)) == 4 and num_examples(make(1)) == 1
    assert num_bytes(make(4)) == sum(tensor.nbytes for tensor in tensors_of(make(4)))


def test_moving_keeps_every_container_and_leaves_the_callers_alone(make):
    batch = make(4)
    before = flat(batch)
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch) and flat(batch) == before
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(batch)} == {"cpu"}


def test_cutting_and_joining_are_those_of_every_tensor_with_examples(make):
    (cut,) = first_examples([make(4)], 3)
    assert type(cut) is type(make(4)) and num_examples(cut) == 3
    together = list(without_singles([make(1), make(3)]))
    if "scale" in (make(1) if isinstance(make(1), dict) else ()):
        assert len(together) == 2  # numbers cannot be joined, so these stay two batches
        return
    assert len(together) == 1 and num_examples(together[0]) == 4 and type(together[0]) is type(make(4))


def test_a_checksum_tells_batches_apart(make):
    assert checksum(make(4)) == checksum(make(4)) != checksum(make(3))
    first = next(tensors_of(changed := make(4)))
    first += 1
    assert checksum(changed) != checksum(make(4))


def test_an_object_that_moves_by_itself_does_and_is_counted_by_its_tensors():
    batch = (Movable(x(5)), torch.arange(5))
    moved = to_device(batch, "meta")
    assert moved[0].moves == 1 and moved[0].nodes.device.type == "meta" and batch[0].moves == 0
    assert num_examples(batch[0]) == 5 and list(without_singles([(Movable(x(1)), torch.arange(1)), batch]))[1] is batch


@pytest.mark.parametrize("batch", [(), {"text": "abc"}, [["ab", "c"]], torch.tensor(1.0), None])
def test_a_batch_without_examples_is_an_error_that_says_what_it_is(batch):
    with pytest.raises(ValueError, match="a batch must hold a tensor whose first dimension counts its examples, got"):
        num_examples(batch)


def complex_pair(size: int = 4) -> Tensor:
    return torch.complex(x(size), x(size) + 1)


LAYOUTS = {
    "sparse": lambda size: x(size).to_sparse(),
    "rows": lambda size: x(size).to_sparse_csr(),
    "columns": lambda size: x(size).to_sparse_csc(),
    "conjugate": lambda size: complex_pair(size).conj(),
    "negative": lambda size: complex_pair(size).conj().imag,
    "nested": lambda size: torch.nested.nested_tensor(list(x(size)), layout=torch.jagged),
    "one number": lambda size: torch.tensor([size]).expand(1),
}


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_batch_may_be_of_any_layout(kind):
    make = LAYOUTS[kind]
    assert checksum(make(4)) == checksum(make(4)) != checksum(make(3))
    assert digest([make(4)]) != digest([make(3)])
    assert num_bytes(make(4)) > 0
    assert next(tensors_of(to_device(make(4), CPU))).layout == make(4).layout


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("kind", ["sparse", "rows", "columns"])
def test_sparse_batches_are_cut_and_used_as_dense_ones_are(kind):
    (cut,) = first_examples([LAYOUTS[kind](4)], 3)
    assert cut.layout == LAYOUTS[kind](4).layout and torch.equal(cut.to_dense(), x(4)[:3])


def test_networks_are_measured_and_trained_on_sparse_inputs():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    dense, sparse = ([(make(4), torch.arange(4) % 2)] * 2 for make in (x, LAYOUTS["sparse"]))
    for loader in (dense, sparse):
        line = modeconn.Connection.straight_between(a, b).evaluate(loader, num_points=2)
        recipe = modeconn.Recipe(epochs=1)
        modeconn.fit_curve(a, b, loader, align=False, recipe=recipe)
        modeconn.models.train(a, loader, recipe=recipe)
        assert float(line.loss[0]) == pytest.approx(F.cross_entropy(a(x(4)), torch.arange(4) % 2).item(), rel=1e-5)


def test_a_batch_without_values_is_an_error_that_says_so():
    for use in (lambda batch: first_batch([batch]), lambda batch: Opened([batch], CPU), lambda b: to_device(b, CPU)):
        with pytest.raises(ValueError, match=r"tensor of shape \(4, 3\) on the device 'meta', without values"):
            use((x(4), x(4).to("meta")))


def test_inputs_are_those_of_a_pair_or_what_is_alone():
    both = (x(), torch.arange(4))
    assert inputs_of(both) is both[0] and inputs_of([both[0]]) is both[0]
    assert inputs_of({"x": 1}) == {"x": 1} and inputs_of((1, 2, 3)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("batch", "what"),
    [(x(2), "one Tensor"), ((1, 2, 3), "3 things"), (None, "one NoneType"), ({"x": x(), "y": x()}, "one dict")],
)
def test_what_is_no_pair_is_an_error_that_says_what_it_is(batch, what):
    with pytest.raises(ValueError, match=rf"must yield \(inputs, targets\) pairs, but one of its batches is {what}\."):
        inputs_and_targets(batch)


# ---------------------------------------------------------------- passes


class Counting:
    """Counts its passes."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.passes = loader, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.loader)


def images(size: int = 10) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(size)


class Drawing:
    """Draws every batch anew from the global generator, as augmentation in a data set does."""

    def __iter__(self):
        return ((torch.rand(2, 3), torch.arange(2)) for _ in range(3))


LOADERS = {
    "drawing": Drawing,
    "list": lambda: [(x(4), torch.arange(4)), (x(2), torch.arange(2))],
    "built in": lambda: TensorLoader(*images(), batch_size=3, shuffle=True, augment=(Flip(),)),
    "shuffling": lambda: DataLoader(TensorDataset(*images()), batch_size=3, shuffle=True),
    "workers": lambda: DataLoader(TensorDataset(*images()), batch_size=3, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_opened_loader_goes_on_with_what_a_fresh_pass_would_give(kind):
    loader = LOADERS[kind]()
    with seeded(0):
        expected = [flat(batch) for batch in in_order(loader)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    opened = Opened(loader, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert flat(opened.first) == expected[0] == flat(first_batch(opened)) == flat(check_loader(opened))
    torch.rand(7)  # whatever is drawn meanwhile
    for _ in range(2):  # the pass that has begun, then a new one
        with seeded(0):
            assert [flat(batch) for batch in batches(in_order(opened), CPU)] == expected


@pytest.mark.parametrize("kind", LOADERS)
def test_another_pass_meanwhile_spoils_nothing(kind):
    loader = LOADERS[kind]()
    with seeded(0):
        expected = [flat(batch) for batch in in_order(loader)]
    opened = Opened(loader, CPU)
    assert len(list(opened)) == len(expected)
    with seeded(0):
        assert [flat(batch) for batch in in_order(opened)] == expected


def test_every_pass_of_workers_that_stay_is_whole():
    """Their passes share one iterator, so that the next one ends the one before; orders differ between them."""
    loader = DataLoader(TensorDataset(*images()), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True)
    opened = Opened(loader, CPU)
    list(opened)
    for _ in range(2):
        with seeded(0):
            assert sorted(i for _, targets in in_order(opened) for i in targets.tolist()) == list(range(10))


def test_an_opened_loader_is_read_once_by_who_looks_and_who_reads():
    counting = Counting(LOADERS["list"]())
    opened = Opened(counting, CPU)
    check_loader(opened)
    with seeded(0):
        assert len(list(in_order(opened))) == 2
    assert counting.passes == 1
    list(opened)
    list(shuffled(opened))
    assert counting.passes == 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 6))
def test_an_opened_pass_may_be_left_at_any_place(sizes, stop):
    loader = [(x(size), torch.arange(size)) for size in sizes]
    opened = Opened(loader, CPU)
    with seeded(0):
        begun = iter(in_order(opened))
        taken = [flat(next(begun)) for _ in range(min(stop, len(sizes)))]
        assert taken == [flat(batch) for batch in loader[:stop]]
        assert [flat(batch) for batch in in_order(opened)] == [flat(batch) for batch in loader]


def test_an_opened_loader_is_the_loader_in_all_else():
    loader = LOADERS["built in"]()
    opened = Opened(loader, CPU)
    assert len(opened) == len(loader) and opened.num_classes == loader.num_classes
    with pytest.raises(AttributeError):
        _ = opened.nothing_of_this_name
    with pytest.raises(ValueError, match="loader is empty"):
        Opened([], CPU)
    with pytest.raises(ValueError, match="can be read only once"):
        Opened(iter(LOADERS["list"]()), CPU)


class Growing:
    """A loader that is one batch longer each time it is read."""

    def __init__(self, count: int = 2) -> None:
        self.count = count

    def __iter__(self):
        self.count += 1
        return iter([(torch.rand(4, 3), torch.arange(4) % 2)] * self.count)


def test_passes_of_different_length_are_told_of_in_training_and_refused_in_measuring():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    recipe = modeconn.Recipe(epochs=2)
    message = "loader yielded . batches in this epoch, but its length or an earlier pass promised ."
    with pytest.warns(UserWarning, match=message):
        modeconn.fit_curve(a, b, Growing(), align=False, recipe=recipe)
    with pytest.warns(UserWarning, match=message):
        modeconn.models.train(a, Growing(), recipe=recipe)
    with pytest.raises(ValueError, match="passes of loader are of different lengths"):
        modeconn.models.train_population([a, b], Growing(), recipe=recipe)
    meter = Meter(Growing(), F.mse_loss, forward=lambda model, batch: model(batch[0]).square().mean())
    meter.measure(a)
    with pytest.raises(ValueError, match="loader yielded 16 examples on this pass and 12 on the one before"):
        meter.measure(b)


def test_the_learning_rate_never_leaves_its_schedule(monkeypatch):
    seen = []
    set_rate = modeconn.Recipe.set_learning_rate
    monkeypatch.setattr(
        modeconn.Recipe,
        "set_learning_rate",
        lambda self, optimizer, epoch: (seen.append(epoch), set_rate(self, optimizer, epoch))[1],
    )
    with pytest.warns(UserWarning, match="batches in this epoch"):
        modeconn.models.train(nn.Linear(3, 2), Growing(), recipe=modeconn.Recipe(epochs=2))
    assert seen == sorted(seen) and max(seen) == 2.0


def test_a_data_set_of_single_examples_is_no_loader():
    examples = TensorDataset(torch.rand(8, 4), torch.randint(3, (8,)))
    with pytest.raises(ValueError, match=r"got a TensorDataset, .* Pass DataLoader\(loader, batch_size=128\)"):
        modeconn.models.train(nn.Linear(4, 3), examples)
    pairs = TensorDataset(torch.rand(2, 8, 4), torch.randint(3, (2, 8)))  # of which each item is a batch
    modeconn.models.train(nn.Linear(4, 3), DataLoader(pairs, batch_size=None), recipe=modeconn.Recipe(epochs=1))


@pytest.mark.parametrize("kind", [tuple, list])
def test_one_batch_and_arrays_are_no_loaders(kind):
    x, y = torch.rand(8, 4), torch.randint(3, (8,))
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"got one batch, inputs and targets\. Pass a list of it, \[\(x, y\)\]"):
        modeconn.align(net, net, kind((x, y)))
    with pytest.raises(ValueError, match=r"got one array\. Pass a DataLoader") as told:
        modeconn.align(net, net, np.zeros((500, 4)))
    assert len(str(told.value)) < 200
    assert modeconn.align(net, net, [x, x]).permutation.is_identity  # two batches of inputs


def test_inputs_that_have_to_be_integers_are_told_so():
    with pytest.raises(ValueError, match="let the loader yield int64"):
        run(nn.Embedding(5, 3), torch.rand(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], lr=1.0)},
            r"optimizer must be a function, such as partial\(torch",
        ),
        (
            {"schedule": "one_cycle"},
            r"schedule must be a function, such as modeconn\.one_cycle, got schedule='one_cycle'",
        ),
    ],
)
def test_recipes_say_what_their_functions_look_like(settings, message):
    with pytest.raises(ValueError, match=message):
        modeconn.Recipe(**settings)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 3, 1), nn.GRU(4, 3)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_inputs_of_another_dtype_are_told_from_batches_of_another_kind(layer, dtype):
    x = torch.ones(4, 4, 4).to(dtype)
    with pytest.raises(ValueError, match=r"Let the loader yield inputs of the dtype of the network's weights"):
        run(layer, x)
    with pytest.raises(ValueError, match=r"have to be of one dtype: convert the inputs, or the network\.$"):
        modeconn.discover(layer, x)
    with pytest.raises(ValueError, match=r"one dtype: .*\. That is the loader's first batch\.$"):
        modeconn.align(layer, layer, [(x, x)])
