"""What a step that several processes share costs, from its parts, and for more processes and weights than are here.

    python -m benchmarks.processes --out benchmarks/results/processes.json

A step of N processes with P weights of b bytes in M trained control points takes

    pass + update + latency (N - 1) + 2 (N - 1) / N * b M P / bandwidth + 2 (N - 1) hop

seconds: a forward and backward pass and a step of the optimizer, which a process takes alone; a few numbers, gathered
from all before each sum; and one sum of the gradient over a ring, each process sending every byte nearly twice. Pass
and update are measured with one process, latency, bandwidth and hop with two; steps of 1, 2 and 4 processes are
predicted from these and held against steps that were made. Processes on one machine share its cores and its memory:
where they are more than cores, all parts take longer by that factor.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from benchmarks.timing import Report, options_of
from modeconn.curves import Bezier
from modeconn.curves.step import CurveStep
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.tools.processes import together

COUNTS = (1, 2, 4)
WIDTHS = (256, 1024, 2048)
BATCH = 64
SMALL, LARGE = 1 << 10, 1 << 22


def network(width: int, seed: int) -> nn.Module:
    """Return a perceptron of about 3 ``width`` squared weights."""
    torch.manual_seed(seed)
    layers = [nn.Linear(width, width), nn.ReLU()] * 3
    return nn.Sequential(*layers, nn.Linear(width, 10))


def step_of(width: int) -> CurveStep:
    """Return what takes steps on a quadratic curve between two networks."""
    model_a, model_b = network(width, 1), network(width, 2)
    space, curve = WeightSpace(model_a), Bezier(2)
    points = curve.initial_control_points(space.flatten(model_a), space.flatten(model_b))
    recipe = Recipe(optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True))
    return CurveStep(Workspace(model_a, space), curve, points, recipe)


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds that some work takes in each round, after two of warm-up."""
    seconds = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def measure(rank: int, count: int, place: str, folder: str, rounds: int) -> None:
    """Measure the parts of a step and whole steps in one of some processes; the first writes them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=count)
    found: dict[str, Any] = {}
    with together() as them:
        for width in WIDTHS:
            step = step_of(width)
            batch = (torch.rand(BATCH, width), torch.randint(10, (BATCH,)))
            forward, weights = supervised(cross_entropy), [0.25, 0.5, 0.25]

            def whole(step=step, batch=batch, forward=forward, weights=weights) -> None:
                def differentiate() -> list[float]:
                    step.differentiate(batch, weights, forward)
                    return [BATCH, 1.0]

                def summed(numbers: torch.Tensor) -> torch.Tensor:
                    return step.gradient.mul_(float(numbers[them.rank, 0] / numbers[:, 0].sum()))

                them.numbers(differentiate, summed)
                step.update()

            found[f"step {width}"] = timed(whole, rounds)
            found[f"pass {width}"] = timed(partial(step.differentiate, batch, weights, forward), rounds)
            found[f"update {width}"] = timed(step.update, rounds)
            found[f"weights {width}"] = step.gradient.numel()
        found["numbers"] = timed(lambda: them.numbers(lambda: [1.0]), 5 * rounds)
        for size in (SMALL, LARGE):
            buffer = torch.zeros(size)
            found[f"sum {size}"] = timed(lambda buffer=buffer: them.sum(lambda: buffer), rounds)
    if rank == 0:
        Path(folder, f"{count}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def parts_of(measured: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Return latency, hop and bandwidth, from the medians of two processes."""
    latency, small, large = (
        statistics.median(measured[2][name]) for name in ("numbers", f"sum {SMALL}", f"sum {LARGE}")
    )
    hop = max(small - latency, 0.0) / 2
    return {"latency": latency, "hop": hop, "bandwidth": 4 * (LARGE - SMALL) / (large - small)}


def predicted(
    count: int,
    num_bytes: float,
    *,
    seconds: float,
    latency: float,
    hop: float,
    bandwidth: float,
) -> float:
    """Return the seconds of a step of ``count`` processes, see the head of this file.

    Args:
        count: Processes, N.
        num_bytes: Of the gradient of the trained control points, b M P.
        seconds: Of pass and update.
        latency: Seconds to gather a few numbers from one more process.
        hop: Seconds until a message arrives.
        bandwidth: Bytes a second between two processes.
    """
    if count == 1:
        return seconds
    sent = 2 * (count - 1) / count * num_bytes / bandwidth
    return seconds + latency * (count - 1) + sent + 2 * (count - 1) * hop


FURTHER = {
    "25 Gbit Ethernet": {"latency": 2e-5, "hop": 1e-5, "bandwidth": 3e9},
    "400 Gbit InfiniBand": {"latency": 3e-6, "hop": 2e-6, "bandwidth": 5e10},
}
"""What is usual between machines, from data sheets; nothing of it was measured here."""


def main() -> None:
    """Measure with 1, 2 and 4 processes, predict, print, and write what was found."""
    parser = options_of(__doc__, rounds=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(options)
    measured: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            place = str(Path(folder, f"group-{count}"))
            multiprocessing.spawn(measure, (count, place, folder, options.rounds), nprocs=count)
            measured[count] = json.loads(Path(folder, f"{count}.json").read_text())
    parts, cores = parts_of(measured), os.cpu_count() or 1
    for width in WIDTHS:
        num_weights = measured[1][f"weights {width}"]
        alone = sum(statistics.median(measured[1][f"{part} {width}"]) for part in ("pass", "update"))
        for count in COUNTS:
            found = max(1.0, count / cores) * predicted(count, 4 * num_weights, seconds=alone, **parts)
            report.add(
                f"{num_weights:,} weights, {count} process{'es' * (count > 1)}",
                {part: measured[count][f"{part} {width}"] for part in ("step", "pass", "update")},
                weights=num_weights,
                processes=count,
                **{"predicted seconds": found},
            )
    print(
        f"latency {1e6 * parts['latency']:.0f} us, hop {1e6 * parts['hop']:.0f} us, bandwidth "
        f"{parts['bandwidth'] / 1e9:.2f} GB/s"
    )
    further = []
    for name, network_parts in FURTHER.items():
        for num_weights, seconds in ((1e8, 0.1), (7e9, 2.0)):
            for count in (8, 64, 1024):
                found = predicted(count, 2 * num_weights, seconds=seconds, **network_parts)
                further.append({"between": name, "weights": num_weights, "processes": count, "seconds": found})
                print(
                    f"{name}, {num_weights:.0e} weights in half precision, {count} processes, a pass of {seconds} s: "
                    f"{found:.2f} s a step, {found / seconds:.2f} of one process"
                )
    report.write(parts=parts, further=further)


if __name__ == "__main__":
    main()
