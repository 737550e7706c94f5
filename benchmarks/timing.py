"""What benchmarks share: their options, rivals timed in turn within one run, and a report of what that found."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import modeconn
from modeconn.tools import writing

Rivals = dict[str, Callable[[], object]]
CPU = torch.device("cpu")


def options_of(text: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark that keeps its runs takes: ``--out``, ``--note``, often ``--rounds``.

    Args:
        text: What the benchmark says of itself.
        rounds: The number of rounds if none is given; None if there are no rounds.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        help_of_rounds = f"how often each is timed (default: {rounds})"
        parser.add_argument("--rounds", type=_rounds, default=rounds, help=help_of_rounds)
    parser.add_argument("--out", type=json_path, help="a .json file to which this run is added")
    parser.add_argument("--note", default="", help="what the file shall say of this run, such as what else was busy")
    return parser


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds; give 1 or more.")
    return int(text)


def writable_path(text: str) -> Path:
    """Return the path of a file that is there or can be made; the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: If it cannot be written to, naming it and the reason.
    """
    try:
        writing.check_writable(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def json_path(text: str) -> Path:
    """Return the path of a file of this benchmark's runs, which is there or can be made; the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: If a run cannot be added to it, or it holds runs of another benchmark.
    """
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .json, which is what is written.")
    path = writable_path(text)
    try:
        runs = _runs(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be added to: {error}") from None
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "benchmark" in run for run in runs):
        raise argparse.ArgumentTypeError(f"{text!r} holds no runs of a benchmark; name another file.")
    for other in {run["benchmark"] for run in runs} - {_benchmark()}:
        raise argparse.ArgumentTypeError(f"{text!r} holds runs of {other}, not of {_benchmark()}; name another file.")
    return path


def entry(options: argparse.Namespace, device: torch.device = CPU) -> dict[str, Any]:
    """Return how the entry of a run begins: benchmark, arguments, what `described` says, and the note, if there is one.

    Paths are no arguments: they are of this machine, and say nothing of what was found.

    Args:
        options: What `options_of` made of the command line.
        device: Where the work is done.
    """
    given = vars(options).items()
    kept = {name: it for name, it in given if name not in ("out", "note") and not isinstance(it, Path)}
    return {
        "benchmark": _benchmark(),
        "arguments": json.loads(json.dumps(kept, default=str)),
        **described(device),
        **({"note": options.note} if options.note else {}),
    }


def add_run(run: dict[str, Any], path: Path) -> None:
    """Add a run to those that a file holds; all or nothing."""
    writing.write_text(json.dumps([*_runs(path), run], indent=1) + "\n", path)


def _runs(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _benchmark() -> str:
    return Path(sys.argv[0]).stem


class Report:
    """What one run of a benchmark found: a table that grows while it runs, and an entry of a JSON file at its end.

    The entry has the benchmark's name, its arguments, hardware, threads, cores, versions and date. Below ``"measured"``
    each thing that was measured has ``"seconds"``, of every rival ``n``, ``median``, ``quartiles`` and ``best``, and
    ``"ratios"``, of every two that were compared ``n``, ``median`` and ``quartiles``, and ``of best times``.

    Args:
        options: What `options_of` made of the command line.
        device: Where the work is done.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device = CPU) -> None:
        self._out = options.out
        self.content: dict[str, Any] = {**entry(options, device), "measured": {}}
        print(environment(device), flush=True)

    def add(
        self,
        what: str,
        seconds: dict[str, list[float]],
        ratios: Sequence[tuple[str, str]] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """Print what was measured of one thing, keep it, and return it.

        Args:
            what: What was measured; no two may have one name.
            seconds: Seconds of each rival in each round.
            ratios: Pairs of rivals, of which the first one's seconds are divided by the second one's, round by round.
            more: What else is to be kept.
        """
        if what in self.content["measured"]:
            raise ValueError(f"{what!r} was measured already; give the second one another name.")
        found = {
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "ratios": {f"{a} / {b}": compared(seconds[a], seconds[b]) for a, b in ratios},
            **more,
        }
        self.content["measured"][what] = found
        print(f"\n{what}\n{_table(found)}", flush=True)
        for name, value in more.items():
            print(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}", flush=True)
        return found

    def write(self, **more: Any) -> None:
        """Add the run, with what else is to be kept of it, to the file that was asked for; all or nothing."""
        self.content |= more
        if self._out is not None:
            add_run(self.content, self._out)


def described(device: torch.device) -> dict[str, Any]:
    """Return kind of device, hardware, threads, cores, versions and date."""
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "modeconn": modeconn.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "Python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
    }


def environment(device: torch.device) -> str:
    """Hardware and versions, one line."""
    about = described(device)
    threads = f", {about['threads']} threads" if device.type == "cpu" else ""
    return f"{about['hardware']}{threads}; torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def interleaved(rivals: Rivals, rounds: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """Seconds of each rival in each round; all run once in every round, in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(rounds + 2):
        for name, run in rivals.items():
            start = synchronised(device)
            run()
            if index >= 2:
                seconds[name].append(synchronised(device) - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return number, median, lower and upper quartile, and the smallest of some numbers."""
    low, middle, high = quartiles(values)
    return {"n": len(values), "median": middle, "quartiles": [low, high], "best": min(values)}


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return n, median and quartiles of the ratios of the rounds, and the ratio of the best times."""
    found = summary([x / y for x, y in zip(ours, theirs, strict=True)])
    del found["best"]
    return {**found, "of best times": min(ours) / min(theirs)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile, between two neighbours in proportion; of one value, itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def synchronised(device: torch.device) -> float:
    """Seconds on the clock once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _table(found: dict[str, Any]) -> str:
    rows = [("", "n", "median", "quartiles", "best")]
    for name, row in found["seconds"].items():
        scale, unit = (1, "s") if row["median"] >= 1 else (1e3, "ms")
        low, middle, high, best = (f"{scale * one:.2f}" for one in (*_three(row), row["best"]))
        rows.append((name, str(row["n"]), f"{middle} {unit}", f"{low} to {high} {unit}", f"{best} {unit}"))
    for name, row in found["ratios"].items():
        low, middle, high, best = (f"{one:.3f}" for one in (*_three(row), row["of best times"]))
        rows.append((name, str(row["n"]), middle, f"{low} to {high}", best))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"  {{:{side}{width}}}" for side, width in zip("<>>>>", widths, strict=True)]
    return "\n".join("".join(forms).format(*row) for row in rows)


def _three(row: dict[str, Any]) -> tuple[float, float, float]:
    low, high = row["quartiles"]
    return low, row["median"], high
