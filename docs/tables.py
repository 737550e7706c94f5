"""Tables and figures for the page of results, read from the files in ``benchmarks/results``.

Each function returns something that a notebook shows: a `Table` or a `Picture`. Nothing is computed here but means,
spreads, ratios and their intervals; no number is written in this file.
"""

from __future__ import annotations

import html
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import modeconn
from modeconn import plot
from modeconn.plot import style

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

CONNECTIONS = {
    "straight": "straight line",
    "straight aligned": "straight line, aligned",
    "straight aligned by attacks": "straight line, aligned under attack",
    "curve": "curve",
    "PAM curve": "curve, PAM",
    "PAM on curve": "curve, PAM",
    "curve aligned": "curve, aligned",
    "curve aligned by attacks": "curve, aligned under attack",
    "PAM curve aligned": "curve, aligned, PAM",
    "aligned": "straight line, aligned",
}
"""What the pages call a connection, by what the files call it."""

TASKS = {
    "gpt": "character GPT, Tiny Shakespeare",
    "llama": "character Llama, Python sources",
    "fashion_mnist": "ViT, Fashion-MNIST",
    "cifar10": "ViT, CIFAR-10",
}
"""What the pages call the networks and the data of the measurements with rotations."""


@dataclass(frozen=True)
class Table:
    """A table with a line on how its numbers were made.

    Args:
        header: Names of the columns.
        rows: Cells as text; the first of a row names it.
        note: What is said below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n*{self.note}*\n" if self.note else f"{text}\n"

    def _repr_html_(self) -> str:
        columns = list(zip(*self.rows, strict=True))
        sides = ["left", *(_side(column) for column in columns[1:])]
        head = "".join(_cell("th", name, side) for name, side in zip(self.header, sides, strict=True))
        body = "".join(
            f"<tr>{''.join(_cell('td', cell, side) for cell, side in zip(row, sides, strict=True))}</tr>"
            for row in self.rows
        )
        note = f"<p><em>{html.escape(self.note)}</em></p>" if self.note else ""
        return (
            f'<div class="table-wrapper docutils container"><table class="docutils align-default">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
        )


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib, on white, so that it is read on pages of any colour."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=150, facecolor="white")
        return file.getvalue()


def _side(column: Sequence[str]) -> str:
    """Return on which side the cells of a column begin: numbers on the right."""
    return "right" if all(cell[:1].isdigit() for cell in column if cell) and any(column) else "left"


def _cell(tag: str, text: str, side: str) -> str:
    breaks = "" if tag == "th" or len(text) > _LONG else "; white-space: nowrap"
    return f'<{tag} style="text-align: {side}{breaks}">{html.escape(text)}</{tag}>'


_LONG = 40  # letters of a cell that may be broken


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _machine(found: Mapping[str, Any] | str) -> str:
    """Return hardware, threads and versions in a line, of a file that has it or of a run of a benchmark of speed."""
    if isinstance(found, str):
        line = found
    elif "environment" in found:
        line = found["environment"]
    else:
        threads = f", {found['threads']} threads" if found["device"] == "cpu" else ""
        versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "Python"))
        line = f"{found['hardware']}{threads}; {versions}"
    return re.sub(r"\b1 threads", "1 thread", line)


def _spread(values: Sequence[float | None], form: str = ".3f", scale: float = 1) -> str:
    """Write a mean and, of several values, their standard deviation; ``values`` are these two, or None for none."""
    mean, deviation = values
    return f"{scale * mean:{form}}" + ("" if deviation is None else f" ± {scale * deviation:{form}}")


def _over(values: Sequence[float], form: str = ".3f", scale: float = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return _spread((statistics.mean(values), deviation), form, scale)


def _pairs(seeds: Sequence[Sequence[int]]) -> str:
    return f"seeds {', '.join(f'{a}-{b}' for a, b in seeds)}"


def _comparison(values: Mapping[str, Mapping[str, Sequence[float]]]) -> modeconn.Comparison:
    return modeconn.Comparison({row: dict(columns) for row, columns in values.items()}, num_points=0, num_examples=0)


def _axes(*shape: int, size: tuple[float, float], **settings: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape, **settings)


def _places(ax: Any, names: Sequence[str]) -> None:
    """Name rows from top to bottom."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="x", color=style.NEUTRAL, alpha=0.25, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


# -- connections


def connect(data: str) -> Table:
    """Return what lies on connections of TinyTens."""
    found = _read(f"connect_{data}")
    percent = ["end accuracy", "min accuracy", "mean accuracy", "arc-length mean accuracy"]
    rows = []
    for name, row in found["rows"].items():
        cells = [_spread(row[key], ".1f", 100) for key in percent]
        minutes = row["seconds to fit"][0] / 60
        rows.append([CONNECTIONS[name], *cells, _spread(row["barrier"]), f"{minutes:.1f}" if minutes >= 0.05 else ""])
    each = found.get("curve seeds", 1)
    settings = found["settings"]
    note = (
        f"{found['model']} on {found['data']}, {found['train examples']:,} training and {found['test examples']:,} "
        f"test images; {settings['endpoint_epochs']} epochs for each end, {settings['curve_epochs']} for each curve; "
        f"{len(found['pairs'])} pair{'s' if len(found['pairs']) > 1 else ''} ({_pairs(found['pairs'])}), {each} "
        f"curve{'s' if each > 1 else ''} of each kind between each; {found['points']} points. {_machine(found)}. "
        f"{found.get('note', '')}"
    )
    header = ["", "ends, %", "minimum, %", "mean, %", "arc-length mean, %", "barrier", "minutes to fit"]
    return Table(header, rows, note.strip())


def connect_pairs() -> Picture:
    """Return the lowest accuracy on each connection between TinyTens of CIFAR-10, pair by pair."""
    found = _read("connect_cifar10")
    names = list(found["rows"])
    figure, ax = _axes(size=(6.4, 2.8))
    for place, name in enumerate(names):
        each = [run["min accuracy"] for pair in found["each pair"] for run in pair[f"{name}, each seed"]]
        ax.plot([100 * one for one in each], [place] * len(each), "o", color=style.COLOURS[0], alpha=0.6, markersize=6)
    ends = 100 * found["rows"]["straight"]["end accuracy"][0]
    ax.axvline(ends, color=style.NEUTRAL, linestyle="--", linewidth=1.2)
    ax.annotate("ends", (ends, -0.55), xytext=(4, 0), textcoords="offset points", va="top", color=style.NEUTRAL)
    _places(ax, [CONNECTIONS[name] for name in names])
    figure.supxlabel("lowest accuracy on the connection (%), a dot for each connection", fontsize="medium")
    return Picture(figure)


# -- methods


def methods_digits() -> Table:
    """Return what methods leave on 300 pairs of digit networks."""
    found = _read("compare_digits")
    everything = found["summary"]["all"]
    splits = [name for name in found["summary"] if name != "all"]
    rows = []
    for name, row in everything.items():
        share = found["ratios"]["all"].get(name, {}).get("identity")
        rows.append(
            [
                name,
                *(f"{found['summary'][split][name]['line']['mean']:.4f}" for split in splits),
                f"{row['line']['mean']:.4f} ± {row['line']['std']:.4f}",
                "" if share is None else f"{share[0]:.2%} ({100 * share[1]:.2f}-{100 * share[2]:.2f})",
                f"{row['repaired']['mean']:.4f}",
                f"{row['line accuracy lost']['mean']:.2%}",
                f"{row['seconds']['median']:.3f}",
            ]
        )
    accuracies = found["test accuracy of the networks"].values()
    note = (
        f"{found['model']}; pairs {found['pairs']}; {found['seeds']}; {found['points']} points; networks of "
        f"{100 * min(accuracies):.1f} to {100 * max(accuracies):.1f}%; seconds are medians. {_machine(found)}."
    )
    names = [f"barrier, split {split}" for split in splits]
    header = ["", *names, "all", "of identity (95%)", "repaired", "accuracy lost", "s a pair"]
    return Table(header, rows, note)


def ratios_digits() -> Picture:
    """Return the shares of the barrier that methods leave on digit networks, with intervals."""
    shares = {name: row["identity"] for name, row in _read("compare_digits")["ratios"]["all"].items()}
    return _shares(shares, "share of the unaligned barrier (%), with 95% interval; 300 pairs")


def _shares(shares: Mapping[str, Sequence[float]], label: str, scale: float = 100) -> Picture:
    figure, ax = _axes(size=(6.4, 0.9 + 0.26 * len(shares)))
    for place, (middle, low, high) in enumerate(shares.values()):
        ax.plot([scale * low, scale * high], [place] * 2, color=style.COLOURS[0], linewidth=2)
        ax.plot(scale * middle, place, "o", color=style.COLOURS[0], markersize=6)
    _places(ax, list(shares))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if str(x).lstrip("0.")[:1] in "25" else "")
    figure.supxlabel(label, fontsize="medium")
    return Picture(figure)


def methods(network: str) -> Table:
    """Return what methods leave between networks of real images."""
    found = _read(f"compare_{network}")
    rows = []
    for name, row in found["each pair"].items():
        memory = max(row["peak bytes"]) / 1e6
        rows.append(
            [
                name,
                _over(row["line"]),
                _over(row["line accuracy lost"], ".1f", 100),
                _over(row["repaired"]),
                _over(row["repaired accuracy lost"], ".1f", 100),
                f"{statistics.mean(row['seconds']):.2f}",
                f"{memory:.1f}" if memory >= 0.05 else "",
            ]
        )
    note = (
        f"{found['network']}; {found['data']}; ends of {found['epochs of the endpoints']} epochs; "
        f"{_pairs(found['seeds'])}; {found['points']} points. {_machine(found)}."
    )
    header = ["", "line", "accuracy lost, %", "line, repaired", "accuracy lost, %", "s a pair", "most MB"]
    return Table(header, rows, note)


def balanced() -> Table:
    """Return barriers between networks as they are and with balanced scales."""
    rows = []
    for name, title in (("balanced_digits", "digits"), ("balanced_cifar10", "CIFAR-10")):
        tables = _read(name)["tables"]
        for row in tables["as they are"]:
            cells = [
                cell
                for one in tables.values()
                for cell in (_over(one[row]["line"], ".4f"), _over(one[row]["line accuracy lost"], ".1f", 100))
            ]
            rows.append([f"{title}: {row}", *cells])
    few, many = _read("balanced_digits"), _read("balanced_cifar10")
    num = [len(one["tables"]["as they are"]["identity"]["line"]) for one in (few, many)]
    header = ["", "barrier", "accuracy lost, %", "balanced: barrier", "balanced: accuracy lost, %"]
    return Table(header, rows, f"{num[0]} pairs of digits, {num[1]} of CIFAR-10. {_machine(few)}.")


def refined() -> Table:
    """Return what refinement leaves of the barrier between digit networks."""
    found = _read("pam_digits")
    splits = list(found["each pair"])
    joined = {
        row: {
            column: [value for split in splits for value in found["each pair"][split][row][column]]
            for column in ("line", "seconds")
        }
        for row in found["each pair"][splits[0]]
    }
    everything, rows = _comparison(joined), []
    for name, columns in joined.items():
        share, low, high = everything.ratio(name, "activations")
        each = [statistics.mean(found["each pair"][split][name]["line"]) for split in splits]
        rows.append(
            [
                name,
                *(f"{one:.4f}" for one in each),
                f"{statistics.mean(columns['line']):.4f}",
                f"{share:.2f} ({low:.2f}-{high:.2f})",
                f"{statistics.median(columns['seconds']):.2f}",
            ]
        )
    note = f"{found['model']}; pairs {found['pairs']} of each split. {_machine(found)}."
    header = ["", *(f"split {split}" for split in splits), "all", "of activations (95%)", "s a pair"]
    return Table(header, rows, note)


def refined_fashion_mnist() -> Table:
    """Return what refinement leaves of the loss in the middle between Fashion-MNIST perceptrons."""
    found = _read("pam_fashion_mnist")
    rows = [
        [
            f"{a}-{b}",
            *(f"{one[key]:.3f}" for key in ("naive", "activations", "PAM from identity")),
            f"{one['CPU seconds']:.0f}",
            str(one["num_tried"]),
            str(one["num_accepted"]),
            str(one["num_moved"]),
        ]
        for (a, b), one in zip(found["seeds"], found["each pair"], strict=True)
    ]
    header = [
        "seeds",
        "unaligned",
        "activations",
        "PAM, from no alignment",
        "CPU s",
        "tried",
        "accepted",
        "units moved",
    ]
    return Table(header, rows, f"{found['model']}; {found['method']}. {_machine(found)}.")


# -- learning to align


def deep_align(part: str) -> Table:
    """Return one of the tables of Deep-Align: "One pass", "50 steps of Sinkhorn, by start and its strength", "Refined".

    Ratios are to the best method without a learned aligner, or to the usual start.
    """
    found = _read("deep_align_digits")
    values = found["each pair"][part]
    baseline = {"One pass": "activations", "Refined": "activations, PAM"}.get(part, "weights x1, Sinkhorn 50")
    everything = _comparison({row: {"line": cells} for row, cells in values.items()})
    rows = []
    for name, cells in values.items():
        error = statistics.stdev(cells) / len(cells) ** 0.5
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*everything.ratio(name, baseline))
        rows.append([name, f"{statistics.mean(cells):.4f} ± {error:.4f}", ratio])
    note = f"{found['model']}; {len(next(iter(values.values())))} pairs, {found['pairs']}. {_machine(found)}."
    return Table(["", "barrier ± standard error", f"of “{baseline}” (95%)"], rows, note)


def deep_align_cost() -> Table:
    """Return what fitting an aligner costs, and what laws it keeps."""
    found = _read("deep_align_digits")
    cost, laws = found["throughput"], found["laws"]
    rows = [
        ["seconds of the three fits", ", ".join(f"{one:.0f}" for one in sorted(cost["seconds of each fit"]))],
        ["pairs of training a second, median fit", f"{cost['training pairs a second, median fit']:.0f}"],
        ["milliseconds a pair, one by one", f"{cost['ms a pair, alone']:.1f}"],
        ["the same by weight matching", f"{cost['ms a pair, weight matching']:.1f}"],
        ["relabelled copies found back", laws["copies recovered"]],
        ["the same by the encoder untrained", found["laws, untrained"]["copies recovered"]],
        ["equivariance error in double precision", f"{laws['equivariance error, float64']:.0e}"],
    ]
    return Table(["", "measured"], rows, f"{_machine(found)}.")


def deep_align_shares() -> Picture:
    """Return what aligners leave of the barrier that activation matching leaves."""
    values = _read("deep_align_digits")["each pair"]["One pass"]
    everything = _comparison({row: {"line": cells} for row, cells in values.items()})
    shown = [row for row in values if row not in ("identity", "random", "untrained encoder", "activations")]
    return _shares(
        {row: everything.ratio(row, "activations") for row in shown},
        "barrier, of what activation matching leaves (%), with 95% interval; 100 pairs",
    )


# -- what is found again


def recovery() -> Table:
    """Return the shares of units that methods find again."""
    found = _read("recovery")
    rows = []
    for network, by_method in found["share of units found"].items():
        for name, by_noise in by_method.items():
            rows.append([f"{network}: {name}", *(f"{statistics.mean(cells):.1%}" for cells in by_noise.values())])
    header = ["noise, in standard deviations", *next(iter(next(iter(found["share of units found"].values())).values()))]
    return Table(header, rows, f"{found['seeds']}. {_machine(found)}.")


def recovered_rotations() -> Table:
    """Return how exactly planted rotations are found again."""
    found = _read("recover_rotations")
    rows = [
        [
            name,
            str(len(runs)),
            f"{max(run['error'] for run in runs):.1e}",
            str(max(run["groups"] for run in runs)),
            str(max(run["steps"] for run in runs)),
            f"{statistics.median(run['seconds'] for run in runs):.2f}",
        ]
        for name, runs in found.items()
        if isinstance(runs, list)
    ]
    large = found["large"]
    note = (
        f"A GPT of {large['parameters']:,} weights beside a stranger: discovery {large['discovery seconds']:.1f} s, "
        f"matching {large['matching seconds']:.0f} s in {large['steps']} moves, "
        f"{large['copies of the weights at the peak']:.1f} copies of the weights at the peak. {_machine(found)}."
    )
    header = ["network", "planted", "largest error", "groups", "most moves", "median s"]
    return Table(header, rows, note)


# -- rotations


def kinds() -> Table:
    """Return how many published models have streams of which kind, and why."""
    found = _read("kinds")
    by_reason: dict[tuple[str, str], list[str]] = {}
    tied = {row["model"]: row["found"] for row in found["rows"]}
    for row in found["rows"]:
        before = tied.get(row["model"].removesuffix(" untied"))
        why = row["why"] if row["found"] == before else f"larger than where {row['why']}"
        by_reason.setdefault((row["found"], why), []).append(row["model"].rpartition("/")[2])
    order = ["orthogonal", "orthogonal-ones", "permutation", "fixed"]
    rows = [
        [kind, why, str(len(names)), ", ".join(names)]
        for (kind, why), names in sorted(by_reason.items(), key=lambda one: (order.index(one[0][0]), -len(one[1])))
    ]
    right = sum(row["expected"] == row["found"] for row in found["rows"])
    note = f"{right} of {len(found['rows'])} rows as expected. {_machine(found)}."
    return Table(["largest kind on the stream", "why it is no larger", "rows", "models"], rows, note)


def rotations(task: str) -> Table:
    """Return barriers of transformers, permuted and rotated."""
    found = _read(f"rotations_{task}")
    pairs = found["pairs"]
    naive = [pair["as they are"]["barrier"] for pair in pairs.values()]
    rows = []
    for name in next(iter(pairs.values())):
        each = [pair[name] for pair in pairs.values()]
        shares = [one["barrier"] / whole for one, whole in zip(each, naive, strict=True)]
        seconds = f"{max(one['seconds'] for one in each):.1f}" if "seconds" in each[0] else ""
        rows.append(
            [
                name,
                *(f"{one['barrier']:.3f}" for one in each),
                f"{statistics.mean(shares):.2f}",
                f"{sum(one['barrier'] for one in each) / sum(naive):.2f}",
                f"{statistics.mean(one['middle accuracy'] for one in each):.1%}",
                seconds,
            ]
        )
    ends = statistics.mean(pair["as they are"]["ends"] for pair in pairs.values())
    note = f"{TASKS[task]}; seeds {', '.join(pairs)}; the ends have a loss of {ends:.3f}. {_machine(found)}."
    header = ["barrier", *pairs, "mean of shares", "share of means", "accuracy in the middle", "most s"]
    return Table(header, rows, note)


def rotation_shares() -> Picture:
    """Return the share of the barrier that ways to align transformers leave, pair by pair."""
    tasks = [task for task in TASKS if (RESULTS / f"rotations_{task}.json").exists()]
    figure, axes = _axes(1, len(tasks), size=(10.4, 3.2), sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        pairs = _read(f"rotations_{task}")["pairs"]
        names = [name for name in next(iter(pairs.values())) if name != "as they are"]
        for number, pair in enumerate(pairs.values()):
            shares = [100 * pair[name]["barrier"] / pair["as they are"]["barrier"] for name in names]
            colour, mark = style.COLOURS[number], "osD"[number]
            ax.plot(shares, range(len(names)), mark, color=colour, alpha=0.8, markersize=5)
        ax.axvline(100, color=style.NEUTRAL, linestyle="--", linewidth=1.2)
        ax.set_title(TASKS[task], fontsize="medium")
        _places(ax, names)
        ax.set_xlim(0, 130)
    figure.supxlabel(
        "barrier of the straight line, of that without alignment (%); a mark for each pair", fontsize="medium"
    )
    return Picture(figure)


def learned_rotations(task: str) -> Table:
    """Return barriers of transformers whose rotations are learned, of lines and of curves."""
    found = _read(f"learned_rotations_{task}")
    pairs = found["pairs"]
    naive = [pair["as they are"]["barrier of the line"] for pair in pairs.values()]
    rows = []
    for name in next(iter(pairs.values())):
        each = [pair[name] for pair in pairs.values()]
        shares = {
            path: [one[f"barrier of the {path}"] / whole for one, whole in zip(each, naive, strict=True)]
            for path in ("line", "curve", "curve of 1,000 steps")
            if f"barrier of the {path}" in each[0]
        }
        rows.append(
            [
                name,
                *(f"{share:.3f}" for share in shares["line"]),
                *(f"{statistics.mean(some):.3f}" for some in shares.values()),
                *[""] * (3 - len(shares)),
                f"{min(one['lowest accuracy of the line'] for one in each):.1%}",
                f"{min(one['lowest accuracy of the curve'] for one in each):.1%}",
                f"{max(one['seconds of the alignment'] for one in each):.0f}",
            ]
        )
    ends = [pair["as they are"] for pair in pairs.values()]
    loss, accuracy = (statistics.mean(end[f"{what} of the ends"] for end in ends) for what in ("loss", "accuracy"))
    note = (
        f"{TASKS[task]}; seeds {', '.join(pairs)}; the ends have a loss of {loss:.3f} and an accuracy of "
        f"{accuracy:.1%}. {_machine(found)}; {found['minutes']:.0f} minutes."
    )
    header = ["share of the barrier", *pairs, "mean", "curve", "1,000 steps", "lowest, line", "lowest, curve", "most s"]
    return Table(header, rows, note)


def learned_rotations_along() -> Picture:
    """Return the losses along lines and curves between transformers, mean and spread over pairs."""
    shown = {
        "as they are": "as they are",
        "permutations by weights": "permutations by weights",
        "orthogonal by weights": "rotations by weights",
        "orthogonal, learned 200 steps": "rotations learned for 200 steps",
    }
    figure, axes = _axes(2, len(TASKS), size=(11, 5), sharex=True, sharey="col")
    for column, (task, title) in enumerate(TASKS.items()):
        pairs = _read(f"learned_rotations_{task}")["pairs"]
        for ax, path in zip(axes[:, column], ("line", "curve"), strict=True):
            groups = [[_along(pair[name][f"losses on the {path}"]) for pair in pairs.values()] for name in shown]
            plot.profile(*groups, labels=list(shown.values()), ax=ax)
            ax.set_xlabel("t" if path == "curve" else "")
            ax.set_ylabel(f"loss, {'straight line' if path == 'line' else 'curve'}" if not column else "")
        axes[0, column].set_title(title, fontsize="medium")
    return _with_one_legend(figure, axes.flat)


def _with_one_legend(figure: Figure, axes: Sequence[Any]) -> Picture:
    """Put one legend above axes that all show the same lines."""
    for ax in axes:
        found = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(*found, loc="outside upper center", ncols=4, frameon=False)
    return Picture(figure)


def _along(losses: Sequence[float]) -> modeconn.AlongCurve:
    return modeconn.AlongCurve(torch.linspace(0, 1, len(losses)), {"loss": torch.tensor(losses)})


# -- robust networks


def robust(data: str) -> Table:
    """Return clean and robust barriers and accuracies along connections of robust networks."""
    found = _read(f"robust_{data}")
    strong = found["autoattack"]
    rows = []
    for name, row in found["pgd20"]["rows"].items():
        rows.append(
            [
                CONNECTIONS[name],
                _spread(row["clean barrier"]),
                _spread(row["robust barrier"]),
                _spread(row["lowest clean accuracy"], ".1f", 100),
                _spread(row["lowest robust accuracy"], ".1f", 100),
                _spread(strong["rows"][name]["robust accuracy in the middle"], ".1f", 100),
            ]
        )
    ends, under = found["pgd20"]["rows"]["straight"], strong["rows"]["straight"]["robust accuracy at the ends"]
    cost = [statistics.mean(one[what] for one in found["CPU seconds"]) / 60 for what in ("endpoint", "curve")]
    note = (
        f"{found['model']} on {found['data']}; eps {found['eps']:.4g} in the norm {found['norm']}; ends and curves "
        f"{found['epochs']} epochs against {found['trained against']}; seeds {found['pgd20']['seeds']}. The ends have "
        f"{_spread(ends['clean accuracy at the ends'], '.1f', 100)}% clean, "
        f"{_spread(ends['robust accuracy at the ends'], '.1f', 100)}% under PGD-20 and {_spread(under, '.1f', 100)}% "
        f"under AutoAttack. PGD-20: {found['pgd20']['attack'].partition(', ')[2]}. AutoAttack: "
        f"{strong['attack'].partition(', ')[2]}. {cost[0]:.1f} minutes of processor time for an end, {cost[1]:.1f} for "
        f"a curve. {_machine(found)}."
    )
    header = [
        "",
        "clean barrier",
        "robust barrier",
        "lowest clean, %",
        "lowest under PGD-20, %",
        "AutoAttack, middle, %",
    ]
    return Table(header, rows, note)


def robust_along() -> Picture:
    """Return clean loss and loss under attack along connections of robust networks, mean and spread over pairs."""
    pairs = _read("robust_fashion_mnist")["pgd20"]["each pair"]
    shown = ["straight", "straight aligned", "curve", "curve aligned"]
    figure, axes = _axes(1, 2, size=(8.4, 3.4), sharey=True)
    for ax, row in zip(axes, ("clean", "robust"), strict=True):
        groups = []
        for name in shown:
            each = [pair[name] for pair in pairs]
            groups.append(
                [
                    modeconn.AlongCurve(torch.tensor(one["t"]), {"loss": torch.tensor(one[f"{row} losses"])})
                    for one in each
                ]
            )
        plot.profile(*groups, labels=[CONNECTIONS[name] for name in shown], ax=ax)
        ax.set_xlabel("position on the connection, t")
        ax.set_title("clean examples" if row == "clean" else "under PGD-20", fontsize="medium")
    axes[0].set_ylabel("loss (mean per example)")
    axes[1].set_ylabel("")
    return _with_one_legend(figure, axes)


# -- cost


SPEED = ("curve_step", "evaluate", "plane", "align", "adversarial", "pam_step", "turn_step", "population")
"""The benchmarks of speed whose ratios stand in one table."""


def speed() -> Table:
    """Return the ratios of times that the benchmarks of speed found last."""
    found = [one for name in SPEED for one in _newest(name)]
    rows = [
        [
            one.run["benchmark"],
            one.what,
            ratio,
            f"{row['median']:.3f}" if "median" in row else "",
            "{:.3f} to {:.3f}".format(*row["quartiles"]) if "quartiles" in row else "",
            str(row.get("n", "")),
            f"{row['of best times']:.3f}" if "of best times" in row else "",
            one.machine,
        ]
        for one in found
        for ratio, row in one.values["ratios"].items()
    ]
    return _by_machine(["script", "what ran", "ratio", "median", "quartiles", "n", "of best times"], rows, found)


@dataclass(frozen=True)
class _Measured:
    """One thing that a run of a benchmark of speed measured.

    Args:
        what: Its name.
        values: What was found of it.
        run: The run, with all else that it found.
    """

    what: str
    values: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def machine(self) -> str:
        return _machine(self.run).partition(";")[0]


def _newest(name: str) -> list[_Measured]:
    """Return each thing that a file's runs measured, from the last run that did: runs are added at its end."""
    return list(
        {what: _Measured(what, one, run) for run in _read(name) for what, one in run["measured"].items()}.values()
    )


def _by_machine(
    header: Sequence[str], rows: Sequence[Sequence[str]], found: Sequence[_Measured], about: str = ""
) -> Table:
    """Return a table of rows that end in their machine, which gets a column if there are several, else stands below.

    Args:
        header: Names of the columns, without the machine's.
        rows: The cells, with the machine's.
        found: What the rows are of.
        about: What is said first below.
    """
    machines = {row[-1] for row in rows}
    runs = _runs(found)
    if len(machines) > 1:
        return Table([*header, "on"], rows, _sentences(about, _notes(runs), _versions(runs)))
    below = _sentences(about, _notes(runs), f"{'; '.join(machines)}; {_versions(runs)}")
    return Table(header, [row[:-1] for row in rows], below)


def _runs(found: Sequence[_Measured]) -> list[Mapping[str, Any]]:
    return list({id(one.run): one.run for one in found}.values())


def _sentences(*texts: str) -> str:
    """Write texts that are not empty one after another, each with a full stop."""
    return " ".join(f"{text.removesuffix('.')}." for text in texts if text)


def _notes(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return what runs say of themselves, each once, with whose it is; empty if none says anything."""
    told: dict[str, dict[str, None]] = {}
    for run in runs:
        if run.get("note"):
            machine = _machine(run).partition(";")[0]
            told.setdefault(run["note"], {})[f"{run['benchmark']} ({machine})"] = None
    whose = [f": {', '.join(names)}" if len(runs) > 1 else "" for names in told.values()]
    return _sentences(*(f"{note[0].upper()}{note[1:]}{names}" for note, names in zip(told, whose, strict=True)))


def _versions(runs: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(_machine(run).partition("; ")[2] for run in runs))


def discovery() -> Table:
    """Return what discovery takes, by model."""
    found = _newest("discover")
    rows = [
        [
            one.what,
            f"{one.values['seconds']['export']['median']:.2f}",
            f"{one.values['seconds']['walk']['median']:.3f}",
            _middle(one.values["ratios"]["walk / export"], ".1%"),
            str(one.values["ratios"]["walk / export"]["n"]),
            f"{one.values['MB above']:.0f}",
            str(one.values["nodes"]),
            str(one.values["groups"]),
            f"{one.values['log10 of the group']:,.0f}",
            one.machine,
        ]
        for one in found
    ]
    sizes = ["MB above", "nodes", "groups", "log10 of the group"]
    header = ["model", "export, s", "walk, s", "walk / export", "n", *sizes]
    return _by_machine(header, rows, found, "Medians and quartiles")


def matching() -> Table:
    """Return what weight matching takes beside the products and assignments that it cannot do without."""
    found = _newest("match")
    rows = [
        [
            one.what,
            str(one.values["groups"]),
            *(f"{one.values['seconds'][part]['best']:.3f}" for part in ("match", "bound", "products", "assignments")),
            f"{row['of best times']:.2f}",
            _middle(row, ".2f") if "median" in row else "",
            str(row["n"]),
            f"{one.machine}{', processor time' if one.run['arguments']['cpu'] else ''}",
        ]
        for one in found
        for row in one.values["ratios"].values()
    ]
    times = ["seconds", "bound, s", "products", "assignments", "ratio"]
    header = ["networks", "groups", *times, "median of ratios (quartiles)", "n"]
    return _by_machine(header, rows, found, "Seconds and ratio: best of n rounds")


def threads() -> Table:
    """Return what an attack takes on a busy machine, by how many threads there are and how they wait."""
    found, rows = _newest("threads"), []
    for one in found:
        seconds = one.values["seconds"]
        for name in (name for name in seconds if f"{name}, processor time" in seconds):
            both = [seconds[kind] for kind in (name, f"{name}, processor time")]
            rows.append([name, *(_middle(row, ".1f") for row in both), str(both[0]["n"]), one.what, one.machine])
    header = ["", "seconds", "seconds of processor time", "n", "what ran"]
    return _by_machine(header, rows, found, "Medians and quartiles")


def _middle(row: Mapping[str, Any], form: str) -> str:
    """Write a median, and the quartiles if there are several values."""
    low, high = row["quartiles"]
    return f"{row['median']:{form}}" + (f" ({low:{form}} to {high:{form}})" if row["n"] > 1 else "")


def files() -> Table:
    """Return what verbs on files of a billion weights take."""
    names = {
        "copy": "plain copy",
        "interpolate": "interpolate",
        "difference": "diff",
        "shuffle permutation": "shuffle, permutations",
        "align permutation": "align with what was shuffled",
        "shuffle orthogonal": "shuffle, rotations",
        "align orthogonal": "align with what was rotated",
        "strangers": "align of two strangers, permutations",
    }
    found = {one.what: one for one in _newest("tensor_files")}
    rows = []
    for key, name in names.items():
        one = found[key].values
        distance = one.get("largest relative difference")
        (seconds,) = one["seconds"].values()
        rows.append(
            [
                name,
                f"{found[key].run['weights'] / 1e6:,.0f}",
                f"{seconds['median']:,.1f}",
                str(seconds["n"]),
                f"{one['most bytes'] / 1e9:.2f}" if key != "copy" else "",
                "" if distance is None else "every bit" if distance == 0 else f"{distance:.4f} of a tensor's norm",
                found[key].machine,
            ]
        )
    header = ["", "million weights", "seconds", "n", "most memory, GB", "found back"]
    return _by_machine(header, rows, list(found.values()), "Weights in bfloat16; medians of n runs")


def large_groups() -> Table:
    """Return what one assignment and one Procrustes problem of many units take."""
    found = _newest("large_groups")
    rows = [
        [
            what,
            f"{one.values['units']:,}",
            one.values["similarities"],
            f"{row['median']:,.1f}",
            "{:,.1f} to {:,.1f}".format(*row["quartiles"]) if row["n"] > 1 else "",
            str(row["n"]),
            f"{one.values['bytes'] / 1e9:.1f}",
            one.machine,
        ]
        for one in found
        for what, row in one.values["seconds"].items()
    ]
    return _by_machine(["", "units", "similarities of", "seconds", "quartiles", "n", "GB"], rows, found)


def large_curves() -> Table:
    """Return what a step of a curve between networks of 100 million weights takes, and how much memory the fit."""
    found = [one for name in ("large_curve", "large_curve_h100", "large_curve_h200") for one in _newest(name)]
    rows = []
    for one in found:
        given = one.run["arguments"]
        batch, length = given["batch"]
        row, seconds = one.values["ratios"]["curve / ordinary"], one.values["seconds"]
        rows.append(
            [
                f"{given['dtype']}{', offloaded' if given['offload'] else ''}",
                f"{one.values['weights'] / 1e6:.0f}",
                f"{batch} × {length}",
                f"{one.values['most bytes'] / 1e9:.2f}",
                f"{1e3 * seconds['curve']['median']:.0f}",
                f"{1e3 * seconds['ordinary']['median']:.0f}",
                f"{row['median']:.2f}",
                "{:.2f} to {:.2f}".format(*row["quartiles"]) if "quartiles" in row else "",
                one.machine,
            ]
        )
    sizes = ["control points", "million weights", "batch", "GB"]
    return _by_machine([*sizes, "a step, ms", "ordinary step, ms", "ratio", "quartiles"], rows, found)


def processes() -> Table:
    """Return predicted and measured seconds of a step that several processes share."""
    found, rows = _newest("processes"), []
    for one in found:
        step, predicted = one.values["seconds"]["step"], one.values["predicted seconds"]
        rows.append(
            [
                f"{one.values['weights']:,}",
                str(one.values["processes"]),
                f"{1e3 * predicted:.1f}",
                f"{1e3 * step['median']:.1f}",
                "{:.1f} to {:.1f}".format(*(1e3 * x for x in step["quartiles"])) if "quartiles" in step else "",
                str(step["n"]),
                f"{step['median'] / predicted:.2f}",
                f"{one.run['cores']} cores, {one.machine}",
            ]
        )
    header = ["weights", "processes", "predicted, ms", "measured, ms", "quartiles", "n", "ratio"]
    return _by_machine(header, rows, found)


# -- runs and files that survive


def kills() -> Table:
    """Return what killed commands ended with."""
    found = _read("kills")
    keys = ("runs", "kills", "equal", "other_bits", "failed", "left_behind")
    rows = [[name, *(str(row[key]) for key in keys)] for name, row in found["commands"].items()]
    rows.append(["all", *(str(sum(row[key] for row in found["commands"].values())) for key in keys)])
    note = f"Seed {found['seed']}; {found['minutes']:.0f} minutes. {_machine(found)}."
    return Table(["command", "runs", "kills", "equal bits", "other bits", "failed", "left something"], rows, note)


def _last_of_all(name: str) -> dict[str, Any]:
    """Return the last run of a file that left nothing out."""
    return next(run for run in reversed(_read(name)) if run["arguments"]["only"] is None)


def damage() -> Table:
    """Return how the reading of damaged files ended, by what was read."""
    found = _last_of_all("fuzz")
    groups = {
        "files of modeconn": lambda name: not name.startswith(("info of", "plot of", *_FOREIGN)),
        "the same, by modeconn info": lambda name: name.startswith("info of"),
        "the same, by modeconn plot": lambda name: name.startswith("plot of"),
        "state dicts and data sets": lambda name: name.startswith(_FOREIGN),
        "all": lambda name: True,
    }
    header = list(next(iter(found["endings"].values())))
    rows = []
    for title, belongs in groups.items():
        counts = [row for name, row in found["endings"].items() if belongs(name)]
        rows.append([title, *(f"{sum(row[how] for row in counts):,}" for how in header)])
    num_inputs = sum(sum(row.values()) for row in found["endings"].values())
    about = f"{num_inputs:,} inputs in {found['minutes']:.0f} minutes"
    return Table(["", *header], rows, _sentences(about, _notes([found]), _machine(found)))


_FOREIGN = ("state dict", "cifar10", "mnist", "tiny imagenet")


def published() -> Table:
    """Return how discovery fared on published models, by library."""
    found = _last_of_all("published")
    header = list(dict.fromkeys(how for row in found["libraries"].values() for how in row))
    counts = [{how: row.get(how, 0) for how in header} for row in found["libraries"].values()]
    counts.append({how: sum(row[how] for row in counts) for how in header})
    rows = [
        [library, str(sum(row.values())), *map(str, row.values())]
        for library, row in zip([*found["libraries"], "all"], counts, strict=True)
    ]
    ratios = [one["ratio"] for one in found["models"] if "ratio" in one]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    slowest = max(found["models"], key=lambda one: one.get("seconds", 0))
    about = (
        f"{found['of one path']} of one path (recorded on a run); discovery over two plain exports: median "
        f"{middle:.2f}, quartiles {low:.2f} to {high:.2f}, n={len(ratios)}; slowest discovery: {slowest['model']}, "
        f"{slowest['seconds']:.1f} s"
    )
    return Table(["library", "models", *header], rows, _sentences(about, _notes([found]), _machine(found)))


def versions() -> Table:
    """Return with which versions the tests were tried."""
    rows = []
    for one in _read("versions"):
        known = one.get("versions", {})
        names = [
            known.get(name, one["asked"].get(name, "")) for name in ("python", "torch", "numpy", "scipy", "safetensors")
        ]
        rows.append([*names, one["end"], str(len(one["tests"]))])
    header = ["Python", "torch", "numpy", "scipy", "safetensors", "tests", "files and folders of tests"]
    return Table(header, rows)


# -- on an accelerator


def agreement() -> Table:
    """Return how many checks of an accelerator against the CPU agreed."""
    rows = []
    for name in ("accelerator_h100", "accelerator_h200"):
        found = _read(name)
        checks = found["parts"]["agreement"]
        agreed = sum(one.get("ok") is True for one in checks.values())
        failed = [what for what, one in checks.items() if one.get("ok") is False]
        left = [what for what, one in checks.items() if "left out" in one]
        machine = found["parts"]["environment"]["machine"]["line"]
        rows.append(
            [machine, found["started"], str(agreed), "; ".join(failed), "; ".join(left), f"{found['seconds']:.0f}"]
        )
    return Table(["on", "begun", "agreed", "failed", "left out for time", "seconds in all"], rows)


def accelerator_speed() -> Table:
    """Return what the package costs beside plain torch on an accelerator."""
    found = _read("accelerator_h100")
    rows = []
    for name, one in found["parts"]["speed"].items():
        if "ratio" in one:
            ours, theirs = one["milliseconds"].values()
            low, high = one["quartiles"]
            cells = [
                f"{one['ratio']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{ours:.1f}",
                f"{theirs:.1f}",
                str(one["rounds"]),
            ]
            rows.append([name.removesuffix("_format"), *cells])
    note = f"{found['parts']['environment']['machine']['line']}; begun {found['started']}."
    return Table(["", "ratio", "quartiles", "ours, ms", "plain torch, ms", "n"], rows, note)


def accelerator_training() -> Table:
    """Return what lies on connections of TinyTens that were trained on an accelerator."""
    found = _read("accelerator_h100")["parts"]
    training = dict(found["training"])
    settings = training.pop("settings")
    by_row: dict[str, list[dict[str, Any]]] = {}
    for name, one in training.items():
        if "barrier" in one:
            by_row.setdefault(name.partition(": ")[2], []).append(one)
    rows = [
        [
            CONNECTIONS[name],
            str(len(each)),
            *(
                _over([one[key] for one in each], ".1f", 100)
                for key in ("end accuracy", "min accuracy", "mean accuracy")
            ),
            _over([one["barrier"] for one in each]),
            f"{statistics.mean(60 * one['minutes'] for one in each):.0f}",
        ]
        for name, each in by_row.items()
    ]
    note = (
        f"TinyTen on {settings['data']}, {settings['train']:,} training images; ends of {settings['epochs']} epochs, "
        f"curves of {settings['curve epochs']}, batches of {settings['batch size']}. "
        f"{found['environment']['machine']['line']}."
    )
    header = ["", "pairs", "ends, %", "minimum, %", "mean, %", "barrier", "s to fit"]
    return Table(header, rows, note)
