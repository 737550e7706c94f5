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

import argparse
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

from benchmarks.timing import environment
from modeconn.curves import Bezier
from modeconn.curves.step import CurveStep
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.tools.processes import together

COUNTS = (1, 2, 4)
WIDTHS = (256, 1024, 2048)
BATCH = 64
ROUNDS = 40
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


def median(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the median of the seconds that some work takes, after two rounds of warm-up."""
    seconds = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def measure(rank: int, count: int, place: str, folder: str) -> None:
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

            found[f"step {width}"] = median(whole)
            found[f"pass {width}"] = median(partial(step.differentiate, batch, weights, forward))
            found[f"update {width}"] = median(step.update)
            found[f"weights {width}"] = step.gradient.numel()
        found["numbers"] = median(lambda: them.numbers(lambda: [1.0]), 200)
        for size in (SMALL, LARGE):
            buffer = torch.zeros(size)
            found[f"sum {size}"] = median(lambda buffer=buffer: them.sum(lambda: buffer))
    if rank == 0:
        Path(folder, f"{count}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def parts_of(measured: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return latency, hop and bandwidth, from two processes."""
    two = measured[2]
    hop = max(two[f"sum {SMALL}"] - two["numbers"], 0.0) / 2
    seconds = two[f"sum {LARGE}"] - two[f"sum {SMALL}"]
    return {"latency": two["numbers"], "hop": hop, "bandwidth": 4 * (LARGE - SMALL) / seconds}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            place = str(Path(folder, f"group-{count}"))
            multiprocessing.spawn(measure, (count, place, folder), nprocs=count)
            measured[count] = json.loads(Path(folder, f"{count}.json").read_text())
    parts, cores = parts_of(measured), os.cpu_count() or 1
    rows = []
    for width in WIDTHS:
        alone = measured[1][f"pass {width}"] + measured[1][f"update {width}"]
        for count in COUNTS:
            crowd = max(1.0, count / cores)
            found = crowd * predicted(count, 4 * measured[1][f"weights {width}"], seconds=alone, **parts)
            rows.append(
                {
                    "weights": measured[1][f"weights {width}"],
                    "processes": count,
                    "predicted": found,
                    "measured": measured[count][f"step {width}"],
                }
            )
            row = rows[-1]
            print(
                f"{row['weights']:>12,} weights, {count} processes: predicted {1e3 * found:7.2f} ms, measured "
                f"{1e3 * row['measured']:7.2f} ms, {row['measured'] / found:.2f} of it"
            )
    print(
        f"latency {1e6 * parts['latency']:.0f} us, hop {1e6 * parts['hop']:.0f} us, bandwidth "
        f"{parts['bandwidth'] / 1e9:.2f} GB/s; {cores} cores; {environment(torch.device('cpu'))}"
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
    if arguments.out:
        about = {"environment": environment(torch.device("cpu")), "cores": cores, "parts": parts}
        found = {**about, "measured": measured, "rows": rows, "further": further}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
