"""Connect robust networks: clean and robust barriers, aligned and not; a table in benchmarks/results.

    python benchmarks/robust.py fashion_mnist --root DIR --work DIR    # small ConvFC networks, 10,000 images
    python benchmarks/robust.py cifar10 --root DIR --work DIR          # TinyTen, 10,000

Networks are trained against PGD-5 on the first training images, curves with the same adversary, and both are attacked
with PGD-20 on the first 1,000 test images at 11 points, then with AutoAttack, the reference standard version, on the
first 200 at t = 0, 1/2 and 1; eps is in the norm linf, pixels in [0, 1]. The ends of a pair are attacked once and
belong to all its rows: relabelled, b is the same function. AutoAttack leaves an example as soon as it is broken, so its
loss is a lower bound, and its table holds accuracies alone.

Endpoints, curves and measurements are kept in the work folder as soon as they are there, attacks batch by batch; a run
that is started again goes on where it stopped. The tables hold the pairs that are whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from spread import Spread, shown, spread
from timing import environment
from torch import Tensor, nn

import modeconn
from modeconn import PGD, ActivationMatching, Recipe, attacks, data, models
from modeconn.measure.robust_profile import CLEAN, RobustProfile
from modeconn.network.recipe import one_cycle


@dataclass(frozen=True)
class Setting:
    """Networks, the first ``train_examples`` of a data set, and how endpoints and curves are trained on them."""

    build: Callable[..., nn.Module]
    model: str
    train_examples: int
    eps: float
    recipe: Recipe

    @property
    def adversary(self) -> PGD:
        return PGD(self.eps, self.eps / 4, 5)


CONV_FC = partial(models.conv_fc, in_channels=1, image_size=28, width=0.25)
ADAM, SGD = partial(torch.optim.Adam, lr=3e-3), partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
SETTINGS = {
    "fashion_mnist": Setting(
        CONV_FC, "conv_fc(width=0.25)", 10_000, 0.1, Recipe(6, optimizer=ADAM, schedule=one_cycle, weight_decay=0.0)
    ),
    "cifar10": Setting(
        models.tinyten, "tinyten", 10_000, 8 / 255, Recipe(8, optimizer=SGD, schedule=one_cycle, weight_decay=5e-4)
    ),
}
ALIGNMENTS = ("", " aligned", " aligned by attacks")
ROWS = tuple(f"{shape}{alignment}" for shape in ("straight", "curve") for alignment in ALIGNMENTS)
PGD20, AUTOATTACK = "pgd20", "autoattack"


class Pair:
    """Two endpoints, and the connections between them."""

    def __init__(
        self, number: int, setting: Setting, train: data.TensorLoader, test: data.TensorLoader, work: Path
    ) -> None:
        self.number, self.setting, self.train, self.test, self.work = number, setting, train, test, work
        self.seeds = (2 * number + 1, 2 * number + 2)

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was measured before under this name, or measure and keep it, with its seconds."""
        path = self.work / f"pair-{self.number}-{name.replace(' ', '-')}.json"
        if not path.exists():
            begin, cpu = time.perf_counter(), time.process_time()
            found = measure()
            seconds = {"seconds": time.perf_counter() - begin, "CPU seconds": time.process_time() - cpu}
            path.write_text(json.dumps({**found, **seconds}, indent=1) + "\n")
            print(self.number, name, json.dumps({**found, **seconds})[:300], flush=True)
        return json.loads(path.read_text())

    @cached_property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return tuple(self._endpoint(seed) for seed in self.seeds)

    def _endpoint(self, seed: int) -> nn.Module:
        path, setting = self.work / f"endpoint-{seed}.safetensors", self.setting

        def measure() -> dict[str, Any]:
            model = setting.build(mean=self.train.mean().tolist(), std=self.train.std().tolist(), seed=seed)
            trained = models.train(model, self.train, recipe=setting.recipe, adversary=setting.adversary, seed=seed)
            models.save(trained, path)
            return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

        self.kept(f"endpoint {seed}", measure)
        return models.load(path)

    def connection(self, row: str) -> modeconn.Connection:
        ends = self.ends  # made here, so that their seconds are none of the fit's
        path, adversary = self.work / f"pair-{self.number}-{row.replace(' ', '-')}.safetensors", self.setting.adversary

        def measure() -> dict[str, Any]:
            shape, _, alignment = row.partition(" ")
            align: Any = False
            if alignment:
                method = ActivationMatching(adversary=adversary if "attacks" in alignment else None)
                align = modeconn.align(*ends, self.train, method=method)
            is_curve = shape == "curve"
            modeconn.fit_curve(
                *ends,
                self.train,
                align=align,
                curve=modeconn.Bezier(2) if is_curve else modeconn.Line(),
                recipe=self.setting.recipe,
                adversary=adversary if is_curve else None,
                seed=self.number,
                checkpoint=path.with_suffix(".checkpoint") if is_curve else None,
            ).save(path)
            return {"correlation": align.correlation} if alignment else {}

        self.kept(f"fit {row}", measure)
        return modeconn.Connection.load(path)

    def attacked(self, row: str, name: str, points: int) -> dict[str, Any]:
        """Return loss and accuracy, clean and under one attack, at evenly spaced points of one connection."""
        settings = {
            "attacks": {name: attacks.build(name, eps=self.setting.eps)},
            "num_examples": {PGD20: 1000, AUTOATTACK: 200}[name],
        }
        ends, connection = self.ends, self.connection(row)
        test = self.test.with_(batch_size=250 if name == PGD20 else 100)

        def end(place: int) -> RobustProfile:
            path = self.work / f"end-{self.seeds[place]}-{name}.records"
            return modeconn.robustness(ends[place], test, checkpoint=path, **settings)

        def measure() -> dict[str, Any]:
            inner = torch.linspace(0, 1, points, dtype=torch.float64)[1:-1].tolist()
            path = self.work / f"pair-{self.number}-{row.replace(' ', '-')}-{name}.records"
            between = connection.robustness(test, t=inner, recalibrate=self.train, checkpoint=path, **settings)
            return summary_of(with_ends(end(0), between, end(1)), name)

        return self.kept(f"{name} {row}", measure)


def with_ends(first: RobustProfile, between: RobustProfile, last: RobustProfile) -> RobustProfile:
    """Return the profile of a whole curve from its inside and its ends, each measured as a network by itself."""

    def joined(name: str) -> dict[str, Tensor]:
        parts = [getattr(profile, name) for profile in (first, between, last)]
        return {row: torch.cat([part[row] for part in parts]) for row in parts[0]}

    t = torch.cat([first.t, between.t, last.t + 1])
    return RobustProfile(t, joined("correct"), joined("losses"), between.attacks, between.data)


def summary_of(profile: RobustProfile, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"t": profile.t.tolist(), "examples": profile.num_examples, "warnings": profile.warnings}
    for label, row in (("clean", CLEAN), ("robust", name)):
        accuracy, loss = profile.accuracy[row], profile.loss[row]
        values |= {
            f"{label} accuracy at the ends": float(accuracy[[0, -1]].mean()),
            f"{label} loss at the ends": float(loss[[0, -1]].mean()),
            f"lowest {label} accuracy": float(accuracy.min()),
            f"{label} accuracy in the middle": float(accuracy[len(accuracy) // 2]),
            f"{label} accuracy drop": profile.accuracy_drop[row],
            f"{label} barrier": profile.barrier[row],
            f"{label} accuracies": accuracy.tolist(),
            f"{label} losses": loss.tolist(),
        }
    return values


Rows = Mapping[str, Mapping[str, Spread]]


def summary(pairs: list[dict[str, dict[str, Any]]]) -> Rows:
    """Mean and standard deviation over pairs of every number of every row."""
    numbers = [key for key, value in pairs[0][ROWS[0]].items() if isinstance(value, float)]
    return {row: {key: spread([pair[row][key] for pair in pairs]) for key in numbers} for row in ROWS}


def table(rows: Rows, columns: tuple[str, ...]) -> str:
    """Accuracies in percent, losses and barriers as they are."""
    lines = ["| | " + " | ".join(f"{c}, %" if "accuracy" in c else c for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [
            shown(row[column], ".1f", 100) if "accuracy" in column else shown(row[column], ".3f") for column in columns
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


PGD_COLUMNS = tuple(
    f.format(label)
    for label in ("clean", "robust")
    for f in ("{} accuracy at the ends", "lowest {} accuracy", "{} loss at the ends", "{} barrier")
)
AUTOATTACK_COLUMNS = ("robust accuracy at the ends", "robust accuracy in the middle", "robust accuracy drop")


def write(
    name: str,
    setting: Setting,
    found: dict[str, list[dict[str, dict[str, Any]]]],
    fits: list[dict[str, float]],
    out: Path,
) -> None:
    """Write the tables of all pairs that are whole."""
    record: dict[str, Any] = {
        "data": f"{name}, the first {setting.train_examples:,} training images",
        "model": setting.model,
        "eps": setting.eps,
        "norm": "linf, pixels in [0, 1]",
        "trained against": repr(setting.adversary),
        "epochs": setting.recipe.epochs,
        "environment": environment(torch.device("cpu")),
        "CPU seconds": fits,
    }
    text = [
        f"{setting.model} on {record['data']}; eps {setting.eps:.4g} in linf, pixels in [0, 1]; endpoints and curves "
        f"{setting.recipe.epochs} epochs against {setting.adversary}; mean over pairs, and standard deviation "
        f"where there are several. "
        f"{record['environment']}.\n"
    ]
    titles = {
        PGD20: ("PGD-20, the first 1,000 test images, 11 points", PGD_COLUMNS),
        AUTOATTACK: ("AutoAttack (standard), the first 200 test images, t = 0, 1/2, 1", AUTOATTACK_COLUMNS),
    }
    for attack, pairs in found.items():
        if pairs:
            title, columns = titles[attack]
            seeds = ", ".join(f"{2 * number + 1}-{2 * number + 2}" for number in range(len(pairs)))
            rows = summary(pairs)
            record[attack] = {"attack": title, "seeds": seeds, "rows": rows, "each pair": pairs}
            text.append(f"{title}; seeds {seeds}\n\n{table(rows, columns)}\n")
    minutes = statistics.mean(fit["endpoint"] for fit in fits) / 60, statistics.mean(fit["curve"] for fit in fits) / 60
    text.append("{:.1f} minutes of processor time for an endpoint, {:.1f} for a curve.\n".format(*minutes))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"robust_{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"robust_{name}.md").write_text("\n".join(text))


def seconds_of(pair: Pair) -> dict[str, float]:
    """Mean seconds of processor time of training an endpoint and of fitting a curve; a machine may be shared."""
    names = {
        "endpoint": [f"endpoint-{seed}" for seed in pair.seeds],
        "curve": [f"fit-{row.replace(' ', '-')}" for row in ROWS if row.startswith("curve")],
    }
    files = {kind: [pair.work / f"pair-{pair.number}-{name}.json" for name in some] for kind, some in names.items()}
    return {
        kind: statistics.mean(json.loads(path.read_text())["CPU seconds"] for path in paths)
        for kind, paths in files.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for endpoints, curves and numbers")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    setting = SETTINGS[args.data]
    train, test = data.load(args.data, args.root)
    train = train.subset(torch.arange(setting.train_examples))
    pairs = [Pair(number, setting, train, test, args.work) for number in range(args.pairs)]
    found: dict[str, list[dict[str, dict[str, Any]]]] = {PGD20: [], AUTOATTACK: []}
    for attack, points in ((PGD20, 11), (AUTOATTACK, 3)):  # the costly attack after all of the cheap one
        for pair in pairs:
            found[attack].append({row: pair.attacked(row, attack, points) for row in ROWS})
            fits = [seconds_of(one) for one in pairs[: len(found[PGD20])]]
            write(args.data, setting, found, fits, args.out)
    print((args.out / f"robust_{args.data}.md").read_text())


if __name__ == "__main__":
    main()
