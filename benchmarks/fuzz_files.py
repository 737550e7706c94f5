"""One good file of every kind that modeconn reads, how to read it, and what of it to compare."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from typer.testing import CliRunner

import modeconn
from benchmarks.fuzz_damage import fingerprint
from modeconn import (
    PAM,
    AdversarialTraining,
    Comparison,
    Connection,
    DeepAlign,
    PermutationSpec,
    Recipe,
    Relabelling,
    WeightMatching,
    data,
    models,
)
from modeconn.cli.app import app
from modeconn.data import TensorLoader
from modeconn.measure.along import AlongCurve

ONE = Recipe(epochs=1)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
        name: What it is.
        file: Its path in a folder.
        make: Writes a good one, and all that it needs beside it, into a folder.
        read: Reads, shows and uses it, and returns a digest of what it held.
        is_ours: Whether modeconn wrote it, so that mere damage must be noticed.
        may_differ: Whether damage may leave out some of it: lines of a file that only grows.
    """

    name: str
    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], str]
    is_ours: bool = True
    may_differ: bool = False


@cache
def networks() -> tuple[nn.Module, nn.Module]:
    """Return two small networks."""
    return tuple(models.train(models.mlp(4, (6,), 3, seed=seed), loader(), recipe=ONE, seed=seed) for seed in (1, 2))


@cache
def loader() -> TensorLoader:
    """Return a little data."""
    generator = torch.Generator().manual_seed(0)
    return TensorLoader(torch.rand(24, 4, generator=generator), torch.arange(24) % 3, 8)


@cache
def connection() -> Connection:
    """Return a curve with a history and a relabelling."""
    return modeconn.fit_curve(*networks(), loader(), recipe=ONE, align=WeightMatching())


@cache
def results() -> dict[str, Any]:
    """Return results of every kind."""
    attack, found = modeconn.PGD(0.1, 0.05, 2), connection()
    return {
        "profile": found.evaluate(loader(), num_points=3),
        "robust profile": found.robustness(loader(), attack, t=[0, 0.5, 1], transfer=True),
        "curvature": found.curvature(loader(), t=[0, 1], num_steps=9, tolerance=1.0),
        "comparison": compare(),
        "report of symmetries": modeconn.discover(networks()[0]).report(),
    }


def compare(checkpoint: Path | None = None) -> Comparison:
    """Compare two ways to match."""
    how = {"loader": loader(), "test": loader(), "num_points": 3, "checkpoint": checkpoint}
    return modeconn.compare([networks()], {"weights": WeightMatching()}, **how)


def used_model(path: Path) -> str:
    """Load a network and show it."""
    model = models.load(path)
    repr(model)
    return fingerprint(model.state_dict(), model)


def used_template(path: Path) -> str:
    """Load a state dict into a network."""
    return fingerprint(models.load(path, models.mlp(4, (6,), 3)).state_dict())


def used_connection(path: Path) -> str:
    """Load a curve and look at it from all sides."""
    found = Connection.load(path)
    repr(found)
    found.model_at(0.5)
    return fingerprint(found.control_points, found.curve, found.history, found.model_at(1).state_dict())


def used_relabelling(path: Path) -> str:
    """Load a relabelling, invert it and apply it."""
    found = Relabelling.load(path)
    repr(found)
    found.inverse()
    if found.spec.shapes.keys() == networks()[0].state_dict().keys():
        fit = [tuple(found.spec.shapes[n]) == tuple(t.shape) for n, t in networks()[0].state_dict().items()]
        if all(fit):
            found.apply(networks()[0])
    return fingerprint(dict(found.tensors()), found.spec.to_json())


def used_spec(path: Path) -> str:
    """Load a spec, tell of it, and draw a relabelling."""
    found = PermutationSpec.load(path)
    repr(found.report())
    repr(found.identity())
    return fingerprint(found.to_json())


def used_aligner(path: Path) -> str:
    """Load an aligner and align with it."""
    found = DeepAlign.load(path)
    repr(found)
    aligned = named(lambda _: modeconn.align(*networks(), method=found))(path)
    return fingerprint(dict(aligned.permutation.tensors()))


def used_result(path: Path) -> str:
    """Read a result along a curve and show it in every way."""
    found = AlongCurve.from_json(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    repr(found)
    found._repr_html_()
    found.to_csv()
    return fingerprint(found.to_json())


def named(read: Callable[[Path], str]) -> Callable[[Path], str]:
    """Name the file in the sentences of readers that are given its text alone."""

    def reading(path: Path) -> str:
        try:
            return read(path)
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text.") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return reading


def used_comparison(path: Path) -> str:
    """Read a comparison and show it in every way."""
    found = Comparison.from_json(path.read_text(encoding="utf-8"))
    repr(found)
    found._repr_html_()
    found.to_csv()
    return fingerprint(found.to_json())


def command(*arguments: Any) -> str:
    """Run a command, which must end well or in one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise RuntimeError(f"traceback: {result.exception!r}") from result.exception
    if result.exit_code == 1 and result.stderr.startswith("modeconn: error: "):
        raise ValueError(result.stderr)
    if result.exit_code:
        raise RuntimeError(f"exit code {result.exit_code}: {result.output}")
    return fingerprint(result.output)


def info(path: Path) -> str:
    """Run modeconn info."""
    return command("info", path)


def drawn(path: Path) -> str:
    """Run modeconn plot."""
    command("plot", path, "--out", path.with_name("figure.png"))
    return info(path)


def fit_from(path: Path) -> str:
    """Go on with a fit."""
    found = modeconn.fit_curve(*networks(), loader(), recipe=ONE, align=WeightMatching(), checkpoint=path)
    return fingerprint(found.control_points, found.history.loss)


def refine_from(path: Path) -> str:
    """Go on with PAM in its exact mode."""
    pam = PAM(iterations=1, exact=True, num_points=3)
    found = modeconn.fit_curve(*networks(), loader(), recipe=ONE, align=WeightMatching(), refine=pam, checkpoint=path)
    return fingerprint(found.control_points, found.history.loss)


def train_from(path: Path) -> str:
    """Go on with the training of a network against an attack."""
    attack = AdversarialTraining(modeconn.PGD(0.1, 0.1, 1))
    how = {"recipe": ONE, "adversary": attack, "recalibrate": False, "checkpoint": path}
    return fingerprint(models.train(models.mlp(4, (6,), 3), loader(), **how).state_dict())


ALIGNER = DeepAlign(num_steps=2, features=8, depth=1, batch_size=2, num_validation_pairs=2, validate_every=1)


def aligner_from(path: Path) -> str:
    """Go on with the fit of an aligner."""
    found = ALIGNER.fit([*networks(), *networks()], loader(), checkpoint=path)
    return fingerprint(dict(modeconn.align(*networks(), method=found).permutation.tensors()))


def robustness_from(path: Path) -> str:
    """Go on with a measurement under attack."""
    found = connection().robustness(loader(), modeconn.PGD(0.1, 0.05, 2), t=[0, 1], checkpoint=path)
    return fingerprint({name: value for name, value in found.values.items()})


def comparison_from(path: Path) -> str:
    """Go on with a comparison; times are no part of it."""
    found = compare(path)
    return fingerprint(
        {row: {name: columns[name] for name in ("line", "repaired")} for row, columns in found.values.items()}
    )


def pixels(num: int) -> np.ndarray:
    """Return CIFAR images as rows."""
    return np.random.default_rng(0).integers(0, 256, (num, 3072), dtype=np.uint8)


def make_cifar(folder: Path) -> None:
    """Write CIFAR-10 of two images a file."""
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": pixels(2), b"labels": [1, 2]}, protocol=2))


def idx(values: np.ndarray) -> bytes:
    """Return an array in the IDX format."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def make_mnist(folder: Path, ending: str = "") -> None:
    """Write MNIST of three images a file."""
    for prefix in ("train", "t10k"):
        for kind, values in (("images", pixels(3)[:, :48].reshape(3, 6, 8)), ("labels", np.arange(3))):
            content = idx(values)
            name = f"{prefix}-{kind}-idx{values.ndim}-ubyte{ending}"
            (folder / name).write_bytes(gzip.compress(content) if ending else content)


def make_tiny_imagenet(folder: Path) -> None:
    """Write Tiny ImageNet of two images."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels(4).reshape(64, 64, 3)).save(buffer, "JPEG")
    for place in ("train/n01/images/n01_0.JPEG", "val/images/val_0.JPEG"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(buffer.getvalue())
    (folder / "wnids.txt").write_text("n01\n")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")


def loaded(name: str, levels: int = 0) -> Callable[[Path], str]:
    """Return what loads a data set from the folder of a file, or one so many levels above it."""

    def load(path: Path) -> str:
        root = path.parents[levels]
        train, test = data.load(name, root, augment=False)
        next(iter(train))
        return fingerprint(train.inputs, train.targets, test.inputs, test.targets)

    return load


def made(name: str, write: Callable[[Any, Path], Any], thing: Callable[[], Any]) -> Callable[[Path], None]:
    """Return what writes a thing into a folder."""
    return lambda folder: write(thing(), folder / name)


def json_of(kind: str) -> Callable[[Path], None]:
    """Return what writes a result."""
    return lambda folder: results()[kind].to_json(folder / f"{kind.replace(' ', '_')}.json")


def _grows(target: Target) -> bool:
    return target.name in ("checkpoint of robustness", "checkpoint of compare")


def _targets() -> list[Target]:
    model = made("model", models.save, lambda: networks()[0])
    state = made("state.pt", torch.save, lambda: {"model": networks()[0].state_dict(), "epoch": 3})
    curve = made("curve", Connection.save, connection)
    moved = made("moved", Relabelling.save, lambda: connection().permutation)
    spec = made("spec", PermutationSpec.save, lambda: modeconn.discover(networks()[0]))
    aligner = made("aligner", DeepAlign.save, lambda: ALIGNER.fit([*networks(), *networks()], loader()))
    ours = [
        Target("network", "model", model, used_model),
        Target("connection", "curve", curve, used_connection),
        Target("relabelling", "moved", moved, used_relabelling),
        Target("spec", "spec", spec, used_spec),
        Target("aligner", "aligner", aligner, used_aligner),
        *(
            Target(f"checkpoint of {name}", "run", lambda folder, go=go: go(folder / "run"), go)
            for name, go in {
                "fit": fit_from,
                "refine": refine_from,
                "train": train_from,
                "deepalign": aligner_from,
                "robustness": robustness_from,
                "compare": comparison_from,
            }.items()
        ),
    ]
    jsons = {"profile": used_result, "robust profile": used_result, "curvature": used_result}
    for kind, read in {**jsons, "comparison": used_comparison}.items():
        ours.append(Target(kind, f"{kind.replace(' ', '_')}.json", json_of(kind), named(read)))
    told = [
        *(Target(f"info of {one.name}", one.file, one.make, info, may_differ=_grows(one)) for one in ours),
        *(Target(f"plot of {one.name}", one.file, one.make, drawn) for one in ours if one.file.endswith(".json")),
        Target("info of report of symmetries", "report_of_symmetries.json", json_of("report of symmetries"), info),
    ]
    theirs = [
        Target("state dict", "state.pt", state, used_template, is_ours=False),
        Target("cifar10", "data_batch_2", make_cifar, loaded("cifar10"), is_ours=False),
        Target("mnist images", "train-images-idx3-ubyte", make_mnist, loaded("mnist"), is_ours=False),
        Target("mnist labels", "t10k-labels-idx1-ubyte", make_mnist, loaded("mnist"), is_ours=False),
        Target(
            "mnist packed", "train-images-idx3-ubyte.gz", lambda f: make_mnist(f, ".gz"), loaded("mnist"), is_ours=False
        ),
        *(
            Target(f"tiny imagenet {file}", file, make_tiny_imagenet, loaded("tiny_imagenet", levels), is_ours=False)
            for file, levels in (("wnids.txt", 0), ("val/val_annotations.txt", 1), ("val/images/val_0.JPEG", 2))
        ),
    ]
    return [*ours, *told, *theirs]


TARGETS = _targets()
