"""What the benchmarks share: rivals timed in turn within one run, and a line on where the run took place."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def environment(device: torch.device) -> str:
    """Hardware and versions, one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{hardware}; torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def interleaved(rivals: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each rival in each round; all run once in every round, in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(rounds + 2):
        for name, run in rivals.items():
            start = synchronised(device)
            run()
            if index >= 2:
                seconds[name].append(synchronised(device) - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios, with their quartiles, and the ratio of the best times, which noise spares."""
    low, middle, high = quartiles(ours, theirs)
    best = min(ours) / min(theirs)
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, n={len(ours)}); of best times {best:.3f}"


def quartiles(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(ours, theirs, strict=True)], n=4)
    return low, middle, high


def synchronised(device: torch.device) -> float:
    """Seconds on the clock once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
