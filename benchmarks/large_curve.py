"""A quadratic Bezier curve between two networks of 100 million weights: a step beside an ordinary one, and memory.

    python -m benchmarks.large_curve [--dtype bfloat16] [--device cuda] [--offload] [--out results.json]

The networks are tied Llamas of 12 layers, 768 wide. The ordinary step is SGD with momentum on one network: of half
precision with single-precision copies of the weights, which it moves. Memory is the most that a whole call of
`modeconn.fit_curve` takes of the device, beside what Python and the library take before: the networks, control points
and what moves them, activations, the connection. Aims: at most 1.3 times the step, and 4 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import modeconn
from benchmarks.llama import Config, Llama
from benchmarks.timing import Report, interleaved, options_of
from modeconn import Bezier, Recipe
from modeconn.curves.step import CurveStep, stratified_positions
from modeconn.network.loss import supervised
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.tools.memory import peak_memory

LARGE = Config(layers=12, width=768, hidden=2048, heads=12, key_heads=12, tied=True)
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, fused=True)
Batch = tuple[Tensor, Tensor]


def network(seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a network of 100 million weights."""
    torch.manual_seed(seed)
    return Llama(LARGE).to(device, dtype)


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of all tokens."""
    return cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())


def ordinary_step(dtype: torch.dtype, batch: Batch) -> Callable[[], object]:
    """Return a step that moves single-precision copies of the weights, or these themselves."""
    model = network(0, dtype, batch[0].device).train()
    weights = [*model.parameters()]
    masters = weights if dtype is torch.float32 else [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = SGD(masters)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_fn(model(batch[0]), batch[1]).backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
        optimizer.step()
        if masters is not weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)

    return step


def curve_step(dtype: torch.dtype, batch: Batch, *, offload: bool) -> Callable[[], object]:
    """Return a step of a curve."""
    a, b = (network(seed, dtype, batch[0].device) for seed in (0, 1))
    space, curve = WeightSpace(a), Bezier(2)
    points = curve.initial_control_points(space.flatten(a), space.flatten(b))
    step = CurveStep(Workspace(a, space), curve, points, Recipe(optimizer=SGD, weight_decay=0.0, offload=offload))
    weights = iter(curve.basis(torch.cat([stratified_positions(0, block) for block in range(4)])).tolist())
    forward = supervised(loss_fn)
    return lambda: step(batch, next(weights), forward)


def memory(dtype: torch.dtype, batch: Batch, *, offload: bool) -> int | None:
    """Return the most bytes that two networks and a call that fits a curve between them take."""
    with peak_memory(batch[0].device) as peak:
        a, b = (network(seed, dtype, batch[0].device) for seed in (0, 1))
        recipe = Recipe(epochs=2, optimizer=SGD, weight_decay=0.0, offload=offload)
        modeconn.fit_curve(a, b, [batch, batch], align=False, curve=Bezier(2), recipe=recipe, loss_fn=loss_fn)
    return peak.num_bytes


def main() -> None:
    """Measure, print and write what was found."""
    parser = options_of(__doc__, rounds=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--offload", action="store_true", help="keep what moves the curve in the memory of the CPU")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="sequences, and tokens in each")
    options = parser.parse_args()
    report = Report(options, options.device)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    batch = tuple(torch.randint(LARGE.vocabulary, options.batch).to(options.device) for _ in range(2))
    most = memory(dtype, batch, offload=options.offload)
    count = sum(parameter.numel() for parameter in network(0, dtype, torch.device("meta")).parameters())
    rivals = {"ordinary": ordinary_step(dtype, batch), "curve": curve_step(dtype, batch, offload=options.offload)}
    about = f"{count / 1e6:.0f} million weights in {options.dtype}{', offloaded' if options.offload else ''}"
    seconds = interleaved(rivals, options.rounds, options.device)
    report.add(about, seconds, [("curve", "ordinary")], weights=count, **{"most bytes": most})
    report.write()


if __name__ == "__main__":
    main()
