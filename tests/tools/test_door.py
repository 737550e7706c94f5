"""What is no argument of its kind is refused in one sentence, at the door; what is one passes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn import Bezier, Recipe, WeightMatching
from modeconn.tools.door import check_settings, checked, kind_of, looked_at
from modeconn.tools.fingerprint import identify
from modeconn.tools.warn import warn
from tests.cases import CASE, batches


@checked
def verb(
    count: int,
    rate: float = 0.5,
    *,
    flag: bool = False,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    places: Sequence[float] = (),
    named: Mapping[str, Any] | None = None,
    how: Literal["a", "b"] = "a",
    loss: Callable[..., Any] = min,
    pairs: Iterable[tuple[int, str]] = (),
    sizes: tuple[int, ...] = (),
    anything: Any = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **more: int,
) -> str:
    """Say so."""
    return "done"


GOOD = [
    {"count": np.int64(3), "rate": 1, "flag": np.bool_(True)},
    {"count": 1, "model": nn.Linear(2, 1), "data": [], "places": torch.linspace(0, 1, 3), "named": {}},
    {"count": 1, "data": torch.utils.data.DataLoader([1]), "how": "b", "loss": nn.MSELoss(), "anything": object()},
    {"count": 1, "pairs": [(1, "a"), [2, "b"]], "sizes": [1, 2], "seed": 3},
    {"count": 1, "pairs": iter("only reading it could tell"), "sizes": torch.tensor([1, 2]).tolist()},
    {"count": 1, "rate": float("inf"), "places": np.zeros(2), "loss": functools.partial(min), "other": "x"},
]
BAD = [
    ({"count": 1.0}, "count must be an integer, got count=1.0"),
    ({"count": True}, "count must be an integer, got count=True"),
    ({"count": 1, "rate": float("nan")}, "rate must be a number, got rate=nan"),
    ({"count": 1, "flag": 1}, "flag must be True or False, got flag=1"),
    ({"count": 1, "model": nn.Linear}, "model must be a torch.nn.Module or None, got model=<class"),
    ({"count": 1, "data": "abc"}, "data must be an iterable, such as a list or a DataLoader, or None, got data='abc'"),
    ({"count": 1, "places": 3}, "places must be a list or tuple, each a number, got places=3"),
    ({"count": 1, "named": [1]}, r"named must be a mapping or None, got named=\[1\]"),
    ({"count": 1, "how": "c"}, "how must be 'a' or 'b', got how='c'"),
    ({"count": 1, "loss": nn.MSELoss}, "loss must be a function, got loss=<class"),
    ({"count": 1, "loss": 3}, "loss must be a function, got loss=3"),
    ({"count": 1, "pairs": [(1, "a", 2)]}, r"pairs\[0\] must be a list or tuple of 2, an integer, a str"),
    ({"count": 1, "pairs": {1: "a"}}, "pairs must be an iterable, such as a list, each a list or tuple of 2, an int"),
    ({"count": 1, "sizes": (1, 2.0)}, r"sizes\[1\] must be an integer, got sizes\[1\]=2.0"),
    ({"count": 1, "seed": -1}, "seed must be an integer of 0 or more, got seed=-1"),
    ({"count": torch.zeros(3)}, r"count must be an integer, got a tensor of shape \(3,\)"),
    (
        {"count": 1, "places": torch.tensor(0.5)},
        r"places must be a list or tuple, each a number, got places=tensor\(0.5",
    ),
    ({"count": 1, "data": np.array(0.5)}, r"data must be an iterable, such as a list or a DataLoader, or None, got"),
    ({"count": 1, "pairs": torch.zeros(2)}, r"pairs\[0\] must be a list or tuple of 2"),
    ({"count": 1, "pairs": [(1, 2)]}, r"pairs\[0\]\[1\] must be a string, got pairs\[0\]\[1\]=2"),
    ({"count": 1, "rate": 2**70}, "rate must be a number, got an integer of 71 bits, where 64 are the most"),
    ({"count": 1, "rate": 10**400}, "rate must be a number, got an integer of 1329 bits"),
    ({"count": 1, "model": nn.Sequential(nn.LazyLinear(3))}, "model has lazy layers, .*: run it on one batch first"),
    ({"count": 1, "model": nn.LazyBatchNorm1d()}, "model has lazy layers, whose weights have no shape yet"),
    ({"count": 1, "device": "x"}, "device must be one that is here, such as 'cpu', got device='x': torch knows none"),
    ({"count": 1, "device": "cuda:99"}, "device must be one that is here, such as 'cpu', got device='cuda:99': "),
]


@pytest.mark.parametrize("given", GOOD)
def test_what_fits_passes(given):
    assert verb(**given) == "done"


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        verb(**given)


def test_networks_of_which_no_shape_is_known_are_refused_in_lists_too():
    lazy = nn.Sequential(nn.LazyLinear(3))
    for use, name in (
        (lambda: modeconn.Ensemble([lazy]), r"models\[0\]"),
        (lambda: modeconn.compare([(lazy, lazy)], [WeightMatching()], [], []), r"pairs\[0\]\[0\]"),
        (lambda: modeconn.models.train_population(iter([lazy]), batches()), "model"),
    ):
        with pytest.raises(ValueError, match=f"{name} has lazy layers"):
            use()


def test_data_and_relabellings_are_what_they_are_on_any_default_device():
    a = CASE["mlp"].make(0)
    spec = modeconn.discover(a, batches()[0][0])
    train = modeconn.data.load("digits")[0].with_(shuffle=False)
    expected, moved = list(train), spec.random(torch.Generator().manual_seed(0)).apply(a)
    with torch.device("meta"):
        found = list(modeconn.data.load("digits")[0].with_(shuffle=False))
        number = len(list(train.split(9)[0].shuffled()))
        again = spec.random(torch.Generator().manual_seed(0)).apply(a)
        back = spec.random(torch.Generator().manual_seed(0)).inverse().apply(again)
    assert all(torch.equal(x, y) for pair in zip(expected, found, strict=True) for x, y in zip(*pair, strict=True))
    assert number == len(train.split(9)[0])
    assert all(torch.equal(x, y) for x, y in zip(moved.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), back.parameters(), strict=True))


def test_the_function_is_itself_for_help():
    assert verb.__doc__ == "Say so." and list(inspect.signature(verb).parameters)[:2] == ["count", "rate"]


@looked_at
def given(
    count: int = 0, rate: float = 0.0, flag: bool = False, how: Literal["a", "b"] | bool = "a",
    align: bool | SupportsIndexing = False, sizes: Sequence[int] = (), places: Sequence[float] | Tensor = (),
    shape: tuple[int, int] | None = None, start: float | Tensor = 0.0, anything: Any = None,
    data: Iterable[Any] = (),
) -> tuple[Any, ...]:  # fmt: skip
    return count, rate, flag, how, align, sizes, places, shape, start, anything, data


class SupportsIndexing(Protocol):
    def index(self) -> int: ...


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("count", np.int64(3), 3),
        ("count", np.uint8(3), 3),
        ("rate", np.float32(0.5), 0.5),
        ("rate", torch.tensor(0.5), 0.5),
        ("rate", np.int64(2), 2),
        ("flag", np.True_, True),
        ("how", np.str_("b"), "b"),
        ("how", np.True_, True),
        ("align", np.True_, True),
        ("sizes", (np.int64(1), 2), (1, 2)),
        ("sizes", [1, np.int64(2)], [1, 2]),
        ("sizes", np.array([1, 2]), [1, 2]),
        ("places", np.linspace(0, 1, 3), [0.0, 0.5, 1.0]),
        ("shape", (np.int64(1), np.int64(2)), (1, 2)),
        ("shape", np.array([1, 2]), (1, 2)),
    ],
)
def test_numbers_of_numpy_and_torch_become_numbers_of_python(name, value, own):
    found = dict(zip(inspect.signature(given).parameters, given(**{name: value}), strict=True))[name]
    assert found == own and type(found) is type(own) and json.loads(json.dumps(found)) == json.loads(json.dumps(own))
    if isinstance(own, (list, tuple)):
        assert [type(one) for one in found] == [type(one) for one in own]


@pytest.mark.parametrize(
    "settings",
    [
        {"start": torch.tensor(1.0)},
        {"places": torch.zeros(2)},
        {"anything": np.int64(1)},
        {"sizes": range(2)},
        {"data": np.zeros((2, 2))},
        {"data": [np.int64(1)]},
    ],
)
def test_what_an_annotation_takes_as_it_is_stays(settings):
    assert any(value is next(iter(settings.values())) for value in given(**settings))


def test_fields_of_a_users_own_class_stay_what_it_computes_with():
    @dataclass(frozen=True)
    class Weighted(WeightMatching):
        shares: Sequence[float] = (1.0,)
        tilt: float = 0.0

    tilt, shares = torch.tensor(0.25, requires_grad=True), np.array([1.0, 2.0])
    made = Weighted(shares=shares, tilt=tilt)
    assert made.shares is shares and made.tilt is tilt
    clipped = modeconn.PGD(0.5, 0.25, 3, clip=np.array([0.0, 1.0]))
    assert clipped == modeconn.PGD(0.5, 0.25, 3, clip=(0.0, 1.0)) and hash(clipped)


def test_settings_with_numbers_of_numpy_are_those_with_numbers_of_python():
    numpys = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    tried = 0
    for kind in (getattr(modeconn, name) for name in modeconn.__all__):
        if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
            continue
        attacked = dict.fromkeys(("AdversarialTraining", "TRADES"), (modeconn.PGD(0.5, 0.25, 3),))
        needed = attacked | {"PGD": (0.5, 0.25, 3), "FreeAdversarialTraining": (0.5,), "Checkpoint": ("x",)}
        try:
            ours = kind(*needed.get(kind.__name__, ()))
        except TypeError:  # results, which nobody makes by hand
            continue
        values = {field.name: getattr(ours, field.name) for field in dataclasses.fields(ours) if field.init}
        other = {name: numpys[type(value)](value) for name, value in values.items() if type(value) in numpys}
        tried += len(other)
        again = kind(**values | other)
        assert repr(again) == repr(ours) and identify(again) == identify(ours), kind
    assert tried > 80


def test_seeds_and_sizes_may_come_from_arrays(tmp_path):
    (a, b), loader = (modeconn.models.mlp(4, (3,), 2, seed=seed).eval() for seed in np.arange(2)), batches()
    modeconn.models.save(modeconn.models.mlp(np.int64(4), np.array([3, 3]), 2, seed=np.int64(1)), tmp_path / "m")
    assert modeconn.models.describe(modeconn.models.load(tmp_path / "m"))[1]["hidden"] == [3, 3]
    loader = [(x.flatten(1)[:, :4], y % 2) for x, y in loader]
    how = {"recipe": Recipe(1), "loader": loader}
    fits = [modeconn.fit_curve(a, b, seed=kind(3), curve=Bezier(free_ends=np.True_), **how) for kind in (int, np.int64)]
    assert torch.equal(*(fit.control_points for fit in fits))
    fits[1].save(tmp_path / "c")
    assert modeconn.Connection.load(tmp_path / "c").curve == Bezier(free_ends=True)
    c = modeconn.models.mlp(4, (3,), 2, seed=7).eval()
    modeconn.plane({"a": a, "b": b, "c": c}, loader, num_points=np.int64(2))


def test_settings_are_checked_by_their_annotations():
    @dataclass(frozen=True)
    class Settings:
        count: int = 3
        curve: Bezier | None = None

        def __post_init__(self) -> None:
            check_settings(self)

    Settings(4, Bezier(2))
    with pytest.raises(ValueError, match="count must be an integer, got count='4'"):
        Settings("4")
    with pytest.raises(ValueError, match="curve must be a Bezier or None, got curve='bezier'"):
        Settings(curve="bezier")


def test_annotations_that_say_more_are_left_alone():
    assert kind_of(Any) is None and kind_of(modeconn.matching.Method | None) is None
    assert kind_of(Tensor)[1] == "a tensor"


def takes_a_network(name: str) -> bool:
    function = getattr(modeconn, name)
    return inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") in (
        "model",
        "model_a",
    )


VERBS = [name for name in modeconn.__all__ if takes_a_network(name)]


@pytest.mark.parametrize("name", VERBS)
def test_every_public_function_of_a_network_checks_it(name):
    function = getattr(modeconn, name)
    first = next(iter(inspect.signature(function).parameters))
    required = [p for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    with pytest.raises(ValueError, match=f"{first} must be a torch.nn.Module, got {first}='network'"):
        function("network", *[None for _ in required[1:]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_verbs_that_learn_do_so_wherever_they_are_called(mode):
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    expected = modeconn.fit_curve(a, b, batches(), align=WeightMatching(), recipe=Recipe(epochs=1))
    with mode():
        found = modeconn.fit_curve(a, b, batches(), align=WeightMatching(), recipe=Recipe(epochs=1))
        trained = modeconn.models.train(a, batches(), recipe=Recipe(epochs=1))
        sinkhorn = modeconn.align(a, b, batches(), method=modeconn.Sinkhorn(num_steps=2))
        bend = found.curvature(batches(), t=[0.5], num_steps=3, tolerance=1.0)
    assert torch.equal(found.control_points, expected.control_points) and not found.control_points.is_inference()
    assert not any(parameter.is_inference() for parameter in trained.parameters())
    assert len(sinkhorn.history) > 1 and float(bend.eigenvalue) != 0


def pixels():
    return [(inputs.sigmoid(), targets) for inputs, targets in batches()]


AUTOCAST = {
    "fit_curve": lambda a, b, line: modeconn.fit_curve(a, b, batches(), recipe=Recipe(epochs=2)).control_points,
    "train": lambda a, b, line: torch.cat([p.flatten() for p in modeconn.models.train(a, batches()).parameters()]),
    "evaluate": lambda a, b, line: line.evaluate(batches(), t=[0, 0.5, 1]).loss,
    "robustness": lambda a, b, line: line.robustness(pixels(), modeconn.PGD(0.1, 0.05, 2), t=[0, 1]).values[
        "clean loss"
    ],
    "sinkhorn": lambda a, b, line: torch.tensor(modeconn.align(a, b, batches(), method=modeconn.Sinkhorn()).history),
    "through": lambda a, b, line: torch.tensor(
        modeconn.align(a, b, batches(), method=modeconn.StraightThrough(num_steps=3)).history
    ),
    "weights": lambda a, b, line: modeconn.align(a, b, batches(), method=WeightMatching()).model_b[1].weight,
    "repair": lambda a, b, line: modeconn.repair(line.model_at(0.5), (a, b), batches())[1].weight,
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.filterwarnings("ignore:.*left unrepaired", "ignore:.*attack")
def test_verbs_compute_alike_under_autocast_and_say_so(name):
    """Autocast goes on with the weights that it has cast where weights change in place: one network for all t."""
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    line = modeconn.Connection.straight_between(a, b)
    expected = AUTOCAST[name](a, b, line)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is switched off") as caught:
        found = AUTOCAST[name](a, b, line)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected) and Path(caught[0].filename) == Path(__file__)


def test_warnings_point_at_the_caller():
    a, b = (CASE["mlp"].make(seed) for seed in (0, 1))
    with pytest.warns(UserWarning, match="no curve was learned") as caught:
        modeconn.fit_curve(a, b, example_input=batches()[0][0])
    assert Path(caught[0].filename) == Path(__file__)
    with pytest.warns(UserWarning, match="here") as caught:
        warn("here")
    assert Path(caught[0].filename) == Path(__file__)


X, Y = torch.rand(6, 4), torch.arange(6) % 3
NORMED = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval() for _ in range(2)]
LINE, SPEC = modeconn.Connection.straight_between(*NORMED), modeconn.discover(NORMED[0], X)
REFUSED = {
    "targets must be classes, integers": lambda: modeconn.data.TensorLoader(X, Y.float()),
    "batch_size must be an integer, got batch_size='3'": lambda: modeconn.data.TensorLoader(X, Y, "3"),
    "num_classes must be at least 1": lambda: modeconn.models.mlp(4, (3,), -1),
    "hidden must be at least 1 each": lambda: modeconn.models.mlp(4, (3, 0), 2),
    "image_size must be an integer": lambda: modeconn.models.tinyten(image_size=32.0),
    "seed must be an integer, got seed=True": lambda: modeconn.models.mlp(4, (3,), 2, seed=True),
    r"models\[0\] must be a torch.nn.Module, got models\[0\]=None": lambda: modeconn.Ensemble(iter([None])),
    "attacks must be an attack, or a list or dict": lambda: modeconn.robustness(NORMED[0], [(X, Y)], 3),
    "rules must be by operator": lambda: modeconn.discover(NORMED[0], X, rules={"linear": min}),
    "the rule for aten::linear must be a function, got 3": lambda: modeconn.discover(
        NORMED[0], X, rules={"aten::linear": 3}
    ),
    "connection must be a modeconn.Connection": lambda: modeconn.best_swap(None, [(X, Y)]),
    "recalibration_examples must be at least 1": lambda: modeconn.interpolate(
        *NORMED, recalibrate=[(X, Y)], recalibration_examples=-1
    ),
    "a batch of the loader holds no example": lambda: modeconn.models.train_population(NORMED, [(X[:0], Y[:0])]),
    r"does not run on the inputs of a batch, Tensor of float64 \(6, 4\)": lambda: modeconn.models.train_population(
        NORMED, [(X.double(), Y)]
    ),
    "loss_fn= must return the mean loss of a batch": lambda: modeconn.models.train_population(
        NORMED, [(X, Y)], loss_fn=lambda outputs, targets: outputs.mean(1)
    ),
    "attack must be one such as PGD": lambda: modeconn.AdversarialTraining(nn.Linear(4, 3)),
    "attack must be called as attack.model, x, y.": lambda: modeconn.AdversarialExamples([(X, Y)], nn.Linear(4, 3)),
    "loader must be an iterable": lambda: modeconn.AdversarialExamples(3, modeconn.PGD(0.1, 0.1, 1)),
    "adversary must be an attack, Adv.* got a Sequential": lambda: modeconn.models.train(
        NORMED[0], [(X, Y)], adversary=NORMED[1]
    ),
    "adversary must be an attack, such as PGD": lambda: modeconn.ActivationMatching(adversary=nn.Linear(4, 3)),
    "attack Linear.* cannot be called as attack": lambda: modeconn.robustness(NORMED[0], [(X, Y)], nn.Linear(4, 3)),
    "attack a cannot be called as attack": lambda: modeconn.robustness(NORMED[0], [(X, Y)], {"a": NORMED[1]}),
    "attacks must be an attack, or a list": lambda: modeconn.robustness(NORMED[0], [(X, Y)], torch.tensor(0.5)),
    "method must be an object with a match": lambda: modeconn.merge_many(NORMED, [(X, Y)], method=torch.zeros(2)),
    "loader must be an iterable, such as a list or a DataLoader, got loader=array": lambda: LINE.evaluate(
        np.array(0.5), recalibrate=[(X, Y)]
    ),
    "num_points must be at least 2": lambda: LINE.evaluate([(X, Y)], t=[0.0, 1.0], num_points=-1),
    "holds no example: tuple of float32 .0, 4.": lambda: modeconn.models.train(NORMED[0], [(X, Y), (X[:0], Y[:0])]),
    "divide pixels by 255. Attacks move inputs": lambda: modeconn.robustness(
        NORMED[0], [(X.long(), Y)], modeconn.PGD(0.1, 0.1, 1)
    ),
    "spec must be a modeconn.PermutationSpec": lambda: modeconn.verify(None, NORMED[0], X),
    "model must be a torch.nn.Module, got model=3": lambda: modeconn.verify(SPEC, 3),
    "tolerance must be a number": lambda: modeconn.verify(SPEC, NORMED[0], X, tolerance="x"),
    "tolerance must be at least 0": lambda: modeconn.verify(SPEC, NORMED[0], X, tolerance=-1.0),
    "seed must be an integer, got seed=None": lambda: modeconn.verify(SPEC, NORMED[0], X, seed=None),
    "generator must be a torch.Generator or None": lambda: SPEC.random(3),
    "perms must be a mapping": lambda: modeconn.Permutation(SPEC, 3),
    "spec must be a PermutationSpec": lambda: modeconn.Permutation(3, {}),
    r"perms\['0'\] must be a tensor": lambda: modeconn.Permutation(SPEC, {"0": [0]}),
    "matrices must be a mapping": lambda: modeconn.SoftPermutation(SPEC, 3),
    r"matrices\['0'\] must be a tensor": lambda: modeconn.SoftPermutation(SPEC, {"0": 3}),
    "i must lie in 0..1, got i=5": lambda: modeconn.Merge(NORMED[0], (SPEC.identity(),) * 2, (0.0,)).pairwise(5, 0),
    "path must be a Path": lambda: modeconn.Connection(3),
    "model must be a torch.nn.Module, got model=None": lambda: modeconn.WeightSpace(None),
    "model must be a torch.nn.Module, got model=2": lambda: modeconn.WeightSpace(NORMED[0]).flatten(2),
    "b must be a torch.nn.Module, got b=3": lambda: modeconn.WeightSpace(NORMED[0]).check(3),
    "theta must be a tensor, got theta='x'": lambda: modeconn.WeightSpace(NORMED[0]).unflatten("x"),
    "vector must be a tensor": lambda: modeconn.WeightSpace(NORMED[0]).from_canonical(None),
    "t must be a tensor, got t=3": lambda: modeconn.AlongCurve(3, {}),
    r"values\['a'\] must be a tensor": lambda: modeconn.AlongCurve(torch.tensor([0.0, 1.0]), {"a": 3}),
    "path must be a string or a path, got path=3": lambda: modeconn.AlongCurve(
        torch.tensor([0.0]), {"a": torch.tensor([1.0])}
    ).to_json(3),
    "inputs and targets must have values": lambda: modeconn.data.load("digits", device="meta"),
    "metric 'a' cannot compare the model's outputs": lambda: modeconn.Connection.straight_between(*NORMED).evaluate(
        [(X, Y)], recalibrate=[(X, Y)], metrics={"a": len}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_the_sentence_says_which_argument_and_what_it_takes(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


PAIR = (
    nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
    nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
)
ONCE = Recipe(epochs=1)
FITTED = modeconn.fit_curve(*PAIR, [(X, Y)], align=WeightMatching(), recipe=ONCE)
READERS = {
    "evaluate": lambda loader: FITTED.evaluate(loader, num_points=2),
    "robustness": lambda loader: FITTED.robustness(loader, [modeconn.PGD(0.1, 0.1, 1)], num_points=2),
    "curvature": lambda loader: FITTED.curvature(loader, num_points=2, num_steps=2, tolerance=10.0),
    "fit_curve": lambda loader: modeconn.fit_curve(*PAIR, loader, align=False, recipe=ONCE),
    "Sinkhorn": lambda loader: modeconn.align(*PAIR, loader, method=modeconn.Sinkhorn(num_steps=3)),
    "compare": lambda loader: modeconn.compare([PAIR], [WeightMatching()], loader, loader, num_points=2, repair=False),
    "best_swap": lambda loader: modeconn.best_swap(FITTED, loader, num_tries=2),
    "train": lambda loader: modeconn.models.train(PAIR[0], loader, recipe=ONCE),
    "train_population": lambda loader: modeconn.models.train_population(PAIR, loader, recipe=ONCE),
    "DeepAlign": lambda loader: modeconn.DeepAlign(
        features=4, edge_features=4, depth=1, num_steps=3, num_validation_pairs=2
    ).fit(PAIR, loader),
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("later", [X, (X, Y, Y), None], ids=["inputs", "three", "None"])
def test_a_later_batch_that_is_no_pair_is_named(verb, later):
    with pytest.raises(ValueError, match=r"but one of (its batches|them) is (one Tensor|3 things|one NoneType|None)"):
        READERS[verb]([(X, Y), later])


@pytest.mark.parametrize("verb", READERS)
def test_classes_may_be_bytes(verb):
    READERS[verb]([(X, Y.to(torch.uint8))])


def test_an_unknown_argument_is_named_with_the_function_and_the_one_it_may_be():
    with pytest.raises(TypeError, match=r"^align\(\) got .* argument 'methods'; do you mean method="):
        modeconn.align(nn.Linear(2, 2), nn.Linear(2, 2), methods=None)
    with pytest.raises(TypeError, match=r"^align\(\) missing a required argument: 'model_b'$"):
        modeconn.align(nn.Linear(2, 2))
