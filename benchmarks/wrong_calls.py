"""Call every verb wrongly, hundreds of times, and count what ends in anything but one clear sentence.

    python benchmarks/wrong_calls.py [--only NAME] [--show]

Each verb is called with one argument replaced by something that it cannot mean: another kind, a number out of range,
data that does not fit. Good endings are a ValueError, OSError or FloatingPointError that the package itself raises, or
that the call was accepted (some of these values make sense). Bad ones ("raw") are all else that is raised; so is a call
that does not end within the time. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import math
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import modeconn
from modeconn import PAM, PGD, Bezier, Connection, PolyChain, Recipe, WeightMatching, models
from modeconn.data import TensorLoader

GOOD = (ValueError, OSError, FloatingPointError)
SECONDS = 20
PACKAGE = str(Path(modeconn.__file__).parent)
RECIPE = Recipe(epochs=1)


def network(seed: int = 0, *, width: int = 6, out: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, out))


def data(count: int = 3, *, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 4, generator=generator), torch.arange(size) % 3) for _ in range(count)]


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


A, B, DATA = network(1), network(2), data()
NORM_A, NORM_B = normed(1), normed(2)
X = DATA[0][0]
SPEC = modeconn.discover(A, X)
LINE = Connection.straight_between(A, B)
NORM_LINE = Connection.straight_between(NORM_A, NORM_B)
PROFILE = LINE.evaluate(DATA, num_points=2)
AX = Figure().subplots()
SETTINGS = {"recipe": RECIPE, "align": WeightMatching(), "spec": SPEC}
THINGS: list[Any] = [None, 3, -1, 2.5, math.nan, "abc", [], {}, object(), len, nn.Linear, torch.zeros(2), b"x"]
MODELS: list[Any] = [
    *THINGS,
    network(width=7),
    network(out=4),
    nn.Linear(4, 3),
    network().double(),
    nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3)),
    broken := network(),
]
with torch.no_grad():
    broken[0].weight[0] = math.nan
x, y = DATA[0]
LOADERS: list[Any] = [
    *THINGS,
    x,
    (x, y),
    iter(DATA),
    [x],
    [(x, y, x)],
    [{"x": x}],
    [("a", "b")],
    [(x, None)],
    [(None, y)],
    [(x.double(), y)],
    [(x.long(), y)],
    [(x[:, :3], y)],
    [(x, y + 7)],
    [(x, y - 4)],
    [(x, y.float())],
    [(x, y[:-1])],
    [(x[:0], y[:0])],
    [*DATA, (x[:0], y[:0])],
    [*DATA, (x.double(), y)],
    [*DATA, (x[:, :2], y)],
    [*DATA, (x, y + 9)],
    [*DATA, "abc"],
    [*DATA, x],
    [*DATA, None],
    [*DATA, (x, y, y)],
    [(x.to_sparse(), y)],
    [(x, y.to_sparse())],
    [(torch.complex(x, x).conj(), y)],
    [(x.to("meta"), y)],
    [(x, y.to(torch.uint8))],
    [*DATA, (x, y[:3])],
    [(x * math.nan, y)],
    [(x.tolist(), y)],
    [(x.numpy(), y)],
    [(x[0], y[0])],
    [(x, x)],
]
NUMBERS: list[Any] = [None, -1, 0, 1.5, math.nan, math.inf, "3", [3], torch.tensor([1, 2]), True, torch.zeros(0)]
KINDS: dict[str, list[Any]] = {
    "model": MODELS,
    "loader": LOADERS,
    "integer": NUMBERS,
    "number": [None, -1.0, math.nan, "0.1", [0.1], torch.ones(2), 2**70, -(10**400)],
    "flag": [None, 2, "yes", [], math.nan],
    "function": [
        3,
        "abc",
        nn.MSELoss,
        [],
        lambda: None,
        lambda *given: None,
        lambda *given: torch.ones(3),
        lambda o, t: "x",
    ],
    "spec": [3, "abc", A, modeconn.discover(network(width=7), X), modeconn.discover(nn.Linear(4, 3), X), []],
    "path": [3, 2.5, [], "/nonexistent/folder/file", "/", object()],
    "positions": [
        torch.tensor(0.5),
        np.array(0.5),
        torch.zeros(2),
        3,
        "ab",
        [],
        [2.0],
        [-0.1, 0.5],
        [0.5, 0.2],
        [math.nan],
        [[0.1]],
        {0.1: 1},
        [None],
    ],
    "mapping": [
        3,
        "abc",
        [1],
        {"a": 3},
        {"a": len},
        {"loss": modeconn.metrics.top_k(1)},
        {"a": modeconn.metrics.top_k},
    ],
    "callbacks": [3, "abc", [3], [len], [modeconn.callbacks.CSVLog], modeconn.callbacks.EarlyStopping()],
    "attack": [
        3,
        "pgd",
        PGD,
        [3],
        {"a": 3},
        A,
        [A],
        torch.tensor(0.5),
        [],
        {},
        lambda model, x, y: x + 9,
        lambda model, x, y: x[:1],
        lambda *g: None,
    ],
    "method": [3, "weights", WeightMatching, object(), len, torch.zeros(2)],
    "align": [3, "yes", None, WeightMatching, [], object()],
    "curve": [3, "bezier", Bezier, None, object()],
    "recipe": [3, "abc", Recipe, {"epochs": 3}, object()],
    "refine": [3, "pam", PAM, modeconn.ProximalLinear()],
    "adversary": [3, "pgd", PGD, object(), A],
    "device": [3, "x", "cuda:99", [], b"cpu"],
    "drawn": [None, 3, "abc", [], LINE, nn.Linear],
    "text": [3, None, [], b"x"],
    "example": [3, "abc", torch.zeros(2, 7), torch.zeros(2, 4).double(), (X, X), {"y": X}, object()],
    "choice": [3, "abc", None, []],
}

COMMON = {"loss_fn": "function", "forward": "function", "seed": "integer"}
VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
    "discover": (
        modeconn.discover,
        {"model": A, "example_input": X},
        {"model": "model", "example_input": "example", "rules": "mapping", "freeze": "choice", "progress": "flag"},
    ),
    "verify": (
        SPEC.verify,
        {"model": A, "example_input": X},
        {"model": "model", "example_input": "example", "tolerance": "number", "seed": "integer"},
    ),
    "align": (
        modeconn.align,
        {"model_a": A, "model_b": B, "loader": DATA, "spec": SPEC},
        {
            "model_a": "model",
            "model_b": "model",
            "loader": "loader",
            "method": "method",
            "spec": "spec",
            "verify": "flag",
        },
    ),
    "fit_curve": (
        modeconn.fit_curve,
        {"model_a": A, "model_b": B, "loader": DATA, **SETTINGS},
        {
            "model_a": "model",
            "model_b": "model",
            "loader": "loader",
            "align": "align",
            "curve": "curve",
            "recipe": "recipe",
            "refine": "refine",
            "adversary": "adversary",
            "spec": "spec",
            "checkpoint": "path",
            "callbacks": "callbacks",
            "progress": "flag",
            **COMMON,
        },
    ),
    "train": (
        models.train,
        {"model": A, "loader": DATA, "recipe": RECIPE},
        {
            "model": "model",
            "loader": "loader",
            "recipe": "recipe",
            "adversary": "adversary",
            "recalibrate": "loader",
            "checkpoint": "path",
            "callbacks": "callbacks",
            "progress": "flag",
            **COMMON,
        },
    ),
    "train_population": (
        models.train_population,
        {"models": [A, B], "loader": DATA, "recipe": RECIPE},
        {"models": "positions", "loader": "loader", "recipe": "recipe", "loss_fn": "function", "seeds": "positions"},
    ),
    "evaluate": (
        LINE.evaluate,
        {"loader": DATA, "num_points": 3},
        {
            "loader": "loader",
            "t": "positions",
            "num_points": "integer",
            "recalibration_examples": "integer",
            "repair": "flag",
            "metrics": "mapping",
            "callbacks": "callbacks",
            "loss_fn": "function",
            "forward": "function",
        },
    ),
    "evaluate()": (
        modeconn.evaluate,
        {"model": A, "loader": DATA},
        {
            "model": "model",
            "loader": "loader",
            "recalibrate": "loader",
            "recalibration_examples": "integer",
            "metrics": "mapping",
            "loss_fn": "function",
            "forward": "function",
        },
    ),
    "robustness": (
        LINE.robustness,
        {"loader": DATA, "attacks": [PGD(0.1, 0.1, 1)], "num_points": 2},
        {
            "loader": "loader",
            "attacks": "attack",
            "t": "positions",
            "num_points": "integer",
            "num_examples": "integer",
            "transfer": "flag",
            "loss_fn": "function",
            "checkpoint": "path",
            "seed": "integer",
        },
    ),
    "curvature": (
        LINE.curvature,
        {"loader": DATA, "num_points": 2, "num_steps": 2, "tolerance": 10.0},
        {
            "loader": "loader",
            "wrt": "choice",
            "t": "positions",
            "num_points": "integer",
            "num_steps": "integer",
            "tolerance": "number",
            **COMMON,
        },
    ),
    "model_at": (
        LINE.model_at,
        {"t": 0.5},
        {"t": "number", "recalibrate": "loader", "recalibration_examples": "integer", "repair": "flag"},
    ),
    "interpolate": (
        modeconn.interpolate,
        {"model_a": A, "model_b": B},
        {"model_a": "model", "model_b": "model", "t": "number", "recalibrate": "loader", "repair": "flag"},
    ),
    "merge_many": (
        modeconn.merge_many,
        {"models": [A, B], "spec": SPEC},
        {
            "models": "positions",
            "loader": "loader",
            "method": "method",
            "start": "method",
            "num_rounds": "integer",
            "repair": "flag",
            "spec": "spec",
            "seed": "integer",
        },
    ),
    "repair": (
        modeconn.repair,
        {"model": A, "endpoints": [A, B], "loader": DATA},
        {
            "model": "model",
            "endpoints": "positions",
            "loader": "loader",
            "weights": "positions",
            "num_examples": "integer",
        },
    ),
    "compare": (
        modeconn.compare,
        {
            "pairs": [(A, B)],
            "methods": [WeightMatching()],
            "loader": DATA,
            "test": DATA,
            "num_points": 2,
            "spec": SPEC,
            "repair": False,
        },
        {
            "pairs": "positions",
            "methods": "mapping",
            "loader": "loader",
            "test": "loader",
            "num_points": "integer",
            "recipe": "recipe",
            "curve": "curve",
            "spec": "spec",
            "checkpoint": "path",
            **COMMON,
        },
    ),
    "straight_between": (
        Connection.straight_between,
        {"model_a": A, "model_b": B},
        {"model_a": "model", "model_b": "model"},
    ),
    "load": (Connection.load, {"path": "/nonexistent"}, {"path": "path", "template": "model", "device": "choice"}),
    "DeepAlign.fit": (
        modeconn.DeepAlign(features=4, edge_features=4, depth=1, num_steps=1, num_validation_pairs=2).fit,
        {"population": [A, B], "loader": DATA, "spec": SPEC},
        {
            "population": "positions",
            "loader": "loader",
            "validation": "positions",
            "spec": "spec",
            "loss_fn": "function",
            "checkpoint": "path",
        },
    ),
    "PGD()": (
        lambda **s: PGD(**s)(A, X, y),
        {"eps": 0.1, "step_size": 0.1, "num_steps": 1},
        {
            "eps": "number",
            "step_size": "number",
            "num_steps": "integer",
            "num_restarts": "integer",
            "seed": "integer",
            "random_start": "flag",
        },
    ),
    "Recipe": (
        Recipe,
        {},
        {
            "epochs": "integer",
            "optimizer": "function",
            "schedule": "function",
            "weight_decay": "number",
            "autocast": "choice",
            "compile": "flag",
        },
    ),
    "Bezier": (Bezier, {}, {"degree": "integer", "free_ends": "flag"}),
    "PolyChain": (PolyChain, {}, {"num_segments": "integer", "free_ends": "flag"}),
    "PAM": (
        PAM,
        {},
        {
            "iterations": "integer",
            "num_batches": "integer",
            "step": "refine",
            "nu_curve": "number",
            "tolerance": "number",
            "exact": "flag",
            "num_points": "integer",
        },
    ),
    "Sinkhorn": (
        modeconn.Sinkhorn,
        {},
        {
            "num_steps": "integer",
            "learning_rate": "number",
            "start": "method",
            "objective": "choice",
            "loss_fn": "function",
            "num_examples": "integer",
        },
    ),
    "WeightMatching": (
        WeightMatching,
        {},
        {"num_sweeps": "integer", "num_starts": "integer", "start": "method", "seed": "integer"},
    ),
    "ActivationMatching": (
        modeconn.ActivationMatching,
        {},
        {"num_examples": "integer", "statistic": "choice", "pre_activation": "flag", "adversary": "adversary"},
    ),
    "TensorLoader": (
        TensorLoader,
        {"inputs": x, "targets": y, "batch_size": 4},
        {"inputs": "model", "targets": "model", "batch_size": "integer", "shuffle": "flag", "num_classes": "integer"},
    ),
    "verify()": (
        modeconn.verify,
        {"spec": SPEC, "model": A, "example_input": X},
        {"spec": "spec", "model": "model", "example_input": "example", "tolerance": "number", "seed": "integer"},
    ),
    "WeightSpace": (modeconn.WeightSpace, {"model": A}, {"model": "model"}),
    "WeightSpace.load": (
        modeconn.WeightSpace(A).load,
        {"theta": modeconn.WeightSpace(A).flatten(A), "model": network()},
        {"theta": "positions", "model": "model"},
    ),
    "top_k": (modeconn.metrics.top_k, {"k": 1}, {"k": "integer", "axis": "integer"}),
    "disagreement": (modeconn.metrics.disagreement, {"end": "a"}, {"end": "choice"}),
    "cka": (modeconn.metrics.cka, {"end": "a"}, {"end": "choice", "layer": "positions"}),
    "Perplexity": (modeconn.metrics.Perplexity, {}, {"ignore_index": "integer", "axis": "integer"}),
    "Validation": (
        modeconn.callbacks.Validation,
        {"loader": DATA},
        {
            "loader": "path",
            "t": "positions",
            "every": "integer",
            "repair": "flag",
            "metrics": "mapping",
            "other": "flag",
        },
    ),
    "EarlyStopping": (
        modeconn.callbacks.EarlyStopping,
        {},
        {"monitor": "text", "patience": "integer", "higher_is_better": "flag", "margin": "number"},
    ),
    "CSVLog": (modeconn.callbacks.CSVLog, {}, {"path": "path"}),
    "AlongCurve": (
        modeconn.AlongCurve,
        {"t": torch.tensor([0.0, 1.0]), "values": {"a": torch.zeros(2)}},
        {"t": "positions", "values": "mapping", "own": "mapping", "num_examples": "integer"},
    ),
    "plot.profile": (
        lambda one=PROFILE, **more: modeconn.plot.profile(one, **{"ax": AX, **more}),
        {},
        {"one": "drawn", "labels": "positions", "quantity": "text", "ax": "drawn"},
    ),
    "plot.correlation": (
        lambda one, **more: modeconn.plot.correlation(one, **{"ax": AX, **more}),
        {"one": {"a": (0.1, 0.2)}},
        {"one": "drawn", "labels": "positions", "ax": "drawn"},
    ),
    "plot.comparison": (
        lambda one, **more: modeconn.plot.comparison(one, **{"ax": AX, **more}),
        {"one": PROFILE},
        {"one": "drawn", "column": "text"},
    ),
    "data.load": (
        modeconn.data.load,
        {"name": "digits"},
        {"name": "choice", "batch_size": "integer", "validation": "integer", "seed": "integer", "device": "device"},
    ),
    "Permutation": (modeconn.Permutation, {"spec": SPEC, "perms": {}}, {"spec": "spec", "perms": "mapping"}),
    "Ensemble": (lambda models: modeconn.Ensemble(models)(x), {"models": [A, B]}, {"models": "positions"}),
    "best_swap": (
        modeconn.best_swap,
        {"connection": modeconn.fit_curve(A, B, DATA, **SETTINGS), "num_tries": 2},
        {"connection": "choice", "loader": "loader", "num_tries": "integer", "num_batches": "integer", **COMMON},
    ),
    "Permutation.apply": (SPEC.identity().apply, {"model": A}, {"model": "model"}),
    "models.build": (
        models.build,
        {"name": "mlp", "num_inputs": 4, "hidden": (3,), "num_classes": 2},
        {"name": "choice", "num_inputs": "integer", "hidden": "positions", "num_classes": "integer", "seed": "integer"},
    ),
}


for verb, good in {
    "evaluate": {"recalibrate": DATA},
    "robustness": {"recalibrate": DATA},
    "curvature": {"recalibrate": DATA},
    "model_at": {"recalibrate": DATA},
    "interpolate": {"model_a": NORM_A, "model_b": NORM_B, "recalibrate": DATA},
    "merge_many": {"models": [NORM_A, NORM_B], "spec": None, "loader": DATA},
    "repair": {"model": NORM_A, "endpoints": [NORM_A, NORM_B]},
    "compare": {"pairs": [(NORM_A, NORM_B)], "spec": None, "repair": True},
    "straight_between": {"model_a": NORM_A, "model_b": NORM_B},
}.items():
    function, usual, wrong = VERBS[verb]
    function = getattr(NORM_LINE, verb) if "recalibrate" in good and verb != "interpolate" else function
    VERBS[f"{verb} with batch norm"] = function, usual | good, {"recalibrate": "loader"} | wrong
del VERBS["merge_many with batch norm"][2]["recalibrate"]
for verb in ("repair", "compare", "straight_between"):
    VERBS[f"{verb} with batch norm"][2].pop("recalibrate", None)


class TooLong(BaseException):
    pass


def calls(verb: str) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """Yield the argument that is wrong, its value, and the call."""
    function, good, wrong = VERBS[verb]
    for name, kind in wrong.items():
        for value in KINDS[kind]:
            yield name, value, lambda n=name, v=value: function(**{**good, n: v})


def ending(call: Callable[[], Any]) -> str:
    """Return "accepted", "refused", or what was raised raw, with its place."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        return "accepted"
    except GOOD as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = frames[-1].filename.startswith(PACKAGE) or "dataclass" in frames[-1].name
        ours = ours and "values to unpack" not in str(error)  # Python's own sentence, raised in the package's lines
        return "refused" if ours or isinstance(error, OSError) else f"raw: {type(error).__name__}: {error}"
    except TooLong:
        return f"raw: it did not end within {SECONDS} s"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).splitlines()[0] if str(error) else ""
        return f"raw: {type(error).__name__}: {text[:120]} ({Path(place.filename).name}:{place.lineno})"
    finally:
        signal.alarm(0)


def _stop(*_: Any) -> None:
    raise TooLong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only verbs whose names hold this text")
    parser.add_argument("--show", action="store_true", help="print accepted calls, too")
    options = parser.parse_args()
    found: collections.Counter[str] = collections.Counter()
    for verb in (verb for verb in VERBS if options.only in verb):
        for name, value, call in calls(verb):
            end = ending(call)
            found[end.partition(":")[0]] += 1
            if end.startswith("raw") or (options.show and end == "accepted"):
                shown = type(value).__name__ if isinstance(value, (nn.Module, np.ndarray)) else repr(value)
                print(f"{verb}({name}={shown[:70]!s}): {end}".replace("\n", " "), flush=True)
    print(f"{sum(found.values())} calls: {', '.join(f'{count} {end}' for end, count in found.items())}")
    return 1 if found["raw"] else 0


if __name__ == "__main__":
    sys.exit(main())
