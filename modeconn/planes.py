"""The verb that looks at a whole plane of networks, through three of them or along directions."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeconn.connection import Connection
from modeconn.curves.path import Path
from modeconn.curves.span import Span, SpanNetworks, dot
from modeconn.measure.meter import Meter, fetch
from modeconn.measure.metrics import AnyMetric, as_metrics, higher_is_better
from modeconn.measure.plane import Plane
from modeconn.measure.plane_points import Extent, Measuring, OwnExamples, Point, cells_on, chosen_extent, together
from modeconn.network.attack import AdversarialExamples, Attack, is_attack
from modeconn.network.batch_norm import NUM_EXAMPLES
from modeconn.network.batches import check_loader, first_batch, tensors_of
from modeconn.network.loss import Forward, LossFn
from modeconn.network.shares import check_whole, facts_of
from modeconn.network.weights import WeightSpace, named_buffers
from modeconn.tools.door import checked, shortened
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.measurements import Records
from modeconn.tools.measurements import key as record_key
from modeconn.tools.processes import joined, shared
from modeconn.tools.provenance import text_of
from modeconn.tools.rng import seeded

_ON_CURVE = 201  # points of a curve, for its picture


@shared
@checked
def plane(
    networks: Connection | Mapping[str, nn.Module] | Sequence[nn.Module] | nn.Module,
    loader: Iterable[Any],
    *,
    directions: tuple[Tensor, Tensor] | Literal["random"] | None = None,
    num_points: int | tuple[int, int] = 21,
    extent: tuple[float, float, float, float] | None = None,
    times: float = 5.0,
    refine: int = 0,
    attack: Attack | None = None,
    recalibrate: Iterable[Any] | AdversarialExamples | None = None,
    recalibration_examples: int | None = NUM_EXAMPLES,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    metrics: Mapping[str, AnyMetric] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Plane:
    r"""Measure loss, accuracy and other metrics of the networks of a plane through weight space.

    The plane goes through three networks: the ends of a connection and a control point between them, or any three, such
    as a, b and the relabelled b. Its coordinates are orthonormal, so that distances are those of weight space. Batch
    norm is recalibrated at every point, and random numbers are the same at each. Of processes that are a group of
    `torch.distributed`, all must make this call, with the same data; they share the points.

    Args:
        networks: A `Connection`, whose curve is drawn in; three networks of one architecture, by name or in a list (a,
            b and c); or one network with ``directions``.
        loader: Data to measure on.
        directions: For one network: two vectors ``(P,)`` as `WeightSpace.flatten` makes them; or "random", two normal
            ones whose every filter is as long as the network's, and 0 for biases and norms (Li et al., 2018). Default:
            through three networks.
        num_points: How many columns and rows, or both as ``(columns, rows)``, each at least 2.
        extent: Coordinates ``(left, right, bottom, top)``. Default: what holds networks and curve, and on each side as
            much more as the loss stays below the limit, by 10 to 80% of the larger of width and height; along
            directions, of their lengths.
        times: The limit, as a multiple of the largest loss of the networks, of a connection that of its ends: there
            colours end, and the default extent.
        refine: How often cells that the curve passes are halved, 0 to 4; each time adds five points or fewer a cell.
        attack: What attacks the examples anew at each point, ``attack(model, x, y) -> x_adv``, such as `PGD`; inputs
            are then in [0, 1]. Default: none.
        recalibrate: Training data for batch norm, or `AdversarialExamples` of it. Default: that of the connection's
            fit.
        recalibration_examples: How many examples of it to use, None for all.
        loss_fn: Default: that of the connection's fit, or cross entropy.
        forward: ``forward(model, batch) -> loss`` for batches that are no ``(inputs, targets)``, as in
            `Connection.evaluate`; not with ``attack``.
        metrics: Other metrics by name, as in `Connection.evaluate`.
        checkpoint: A file of finished measurements, a line for each point: what is in it is not measured again.
        seed: Of random directions, and of what the attack draws at each point alike.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the three are on one line, networks differ in architecture, a setting is out of range, or batch
            norm needs training data that is neither remembered nor given.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026; Li et al., 2018, https://arxiv.org/abs/1712.09913
    """
    started = time.perf_counter()
    columns, rows = (num_points, num_points) if isinstance(num_points, int) else num_points
    _check_settings(columns, rows, extent, times, refine, attack, forward)
    subject = _subject(networks, directions, seed)
    training = subject.line.training
    if forward is None and loss_fn is None and attack is None:
        forward = training.forward
    loss_fn, device = loss_fn or training.loss_fn, subject.line.space.device
    named = as_metrics(metrics)
    if any(getattr(metric, "end", None) for metric in named.values()):
        raise ValueError("metrics that compare networks with an end of a curve have no meaning on a plane.")
    settings = {"loss_fn": loss_fn, "forward": forward, "metrics": named, "attack": attack, "seed": seed}
    settings["recalibration_examples"] = recalibration_examples
    _check_alike(
        subject, loader, recalibrate, settings, {"num_points": (columns, rows), "extent": extent, "refine": refine}
    )
    with seeded(0, device), Records(checkpoint) as known:
        check_loader(loader) if forward is None else first_batch(loader)
        span = Span(subject.line, subject.third, subject.buffers)
        moved = span.networks(recalibrate, recalibration_examples, forward)
        read = fetch(loader, device)
        own = None if attack is None else OwnExamples(read, attack, seed)
        about = record_key("plane", *_told(subject, read, moved, settings, checkpoint is not None))
        meter = Meter(read if own is None else own, loss_fn, forward, named)
        measuring = Measuring(moved, meter, own, known, lambda p: record_key(about, p), device, progress=progress)
        corners = [(float(x), float(y)) for x, y in span.corners[subject.shown]]
        at_networks = measuring.of(corners, "networks")
        curve, distance = (None, 0.0) if subject.curve is None else _projected(subject.curve, span)
        limit = _limit([values["loss"] for values in at_networks[: subject.num_ends]], times)
        chosen = extent or _chosen(corners, curve, span, subject, measuring, limit)
        x, y = (Extent((chosen[0], chosen[1]), (chosen[2], chosen[3])) if extent else chosen).grid((columns, rows))
        points = [(column, row) for row in y.tolist() for column in x.tolist()]
        grid = together(measuring.of(points, "plane"), (rows, columns))
        added = [] if curve is None or not refine else cells_on(curve, x, y, refine)
        nearer = together(measuring.of(added, "refine"), (len(added),)) if added else {}
    return Plane(
        x,
        y,
        grid,
        networks={name: torch.tensor(at, dtype=torch.float64) for name, at in zip(subject.names, corners, strict=True)},
        own=together(at_networks, (len(corners),)),
        curve=curve,
        curve_distance=distance,
        between=torch.tensor(added, dtype=torch.float64) if added else None,
        between_values=nearer,
        limit=limit,
        times=times,
        num_examples=measuring.num_examples,
        seconds=time.perf_counter() - started,
        higher_is_better=dict(higher_is_better(named)),
        statistics=moved.statistics,
        attack="" if attack is None else text_of(attack),
    )


@dataclass(frozen=True)
class _Subject:
    """What a plane is laid through.

    Args:
        line: Between the first two points, with template, weight space and training data.
        third: The third point, ``(P,)``.
        buffers: Of the three.
        names: Of the networks that are shown.
        shown: Which of the three these are, the first so many.
        num_ends: How many of them are networks whose loss tells which loss is low.
        curve: The path that is drawn in.
    """

    line: Path
    third: Tensor
    buffers: Sequence[Mapping[str, Tensor]]
    names: Sequence[str]
    shown: slice
    num_ends: int
    curve: Path | None = None


def _subject(networks: Any, directions: Any, seed: int) -> _Subject:
    """Return what the plane goes through.

    Raises:
        ValueError: If it is no connection, no three networks and no network with directions.
    """
    if isinstance(networks, nn.Module):
        return _along(networks, directions, seed)
    if directions is not None:
        raise ValueError("directions= is for one network; a plane through three needs none.")
    if isinstance(networks, Connection):
        return _of_connection(networks)
    named = dict(networks) if isinstance(networks, Mapping) else dict(zip("abc", networks, strict=False))
    if len(named) != 3 or len(named) != len(networks) or not all(isinstance(m, nn.Module) for m in named.values()):
        raise ValueError(
            f"networks must be a Connection, three networks, or one with directions=, got {shortened(networks, 80)}."
        )
    if not all(isinstance(name, str) for name in named):
        raise ValueError(f"the three networks need names that are text, got {list(named)}.")
    first, second, third = named.values()
    line = Path.straight_between(first, second)
    theta = WeightSpace(first).flatten(third, name=list(named)[2])
    return _Subject(line, theta, [named_buffers(one) for one in (first, second, third)], list(named), slice(3), 3)


def _of_connection(connection: Connection) -> _Subject:
    path = connection._path
    points = connection.control_points
    if len(points) < 3:
        raise ValueError(
            "a straight line has no plane of its own: pass a connection with a control point between its ends, such as "
            "a Bezier curve, or three networks."
        )
    middle = len(points) // 2
    buffers = [path.buffers_at(0), path.buffers_at(1), path.buffers_at(0.5)]
    line = Path(
        path.template,
        path.straight().curve,
        points[[0, -1]],
        tuple(buffers[:2]),
        space=path.space,
        training=path.training,
        warns=False,
    )
    name = "control point" if len(points) == 3 else f"control point {middle}"
    on_curve = [t for t in path.curve.knots if float(path.curve.basis(t)[middle]) == 1]
    if on_curve:  # a chain passes through its control points, which are networks on it
        name = f"t={on_curve[0]:.3g}"
    return _Subject(line, points[middle], buffers, ["a", "b", name], slice(3), 2, path)


def _along(network: nn.Module, directions: Any, seed: int) -> _Subject:
    """Return the plane along two directions from a network."""
    space = WeightSpace(network)
    start = space.flatten(network, name="the network")
    if isinstance(directions, str) and directions == "random":
        first, second = (_random_direction(network, space, seed + number) for number in (0, 1))
    elif (
        isinstance(directions, (tuple, list))
        and len(directions) == 2
        and all(isinstance(one, Tensor) and one.shape == start.shape for one in directions)
    ):
        first, second = (one.to(start) for one in directions)
    else:
        raise ValueError(
            f'one network needs directions=, "random" or two vectors of {space.num_parameters} weights, got '
            f"directions={directions!r:.80}."
        )
    for number, one in enumerate((first, second)):
        if not bool(one.isfinite().all() and one.norm() > 0):
            raise ValueError(f"directions[{number}] must be finite and not 0, got {shortened(one, 80)}.")
    buffers = named_buffers(network)
    ends = torch.stack([start, start + first])
    line = Path(network, Path.straight_between(network, network).curve, ends, (buffers, buffers), space=space)
    return _Subject(line, start + second, [buffers] * 3, ["network"], slice(1), 1)


def _random_direction(network: nn.Module, space: WeightSpace, seed: int) -> Tensor:
    """Return a random direction whose filters are as long as the network's; 0 for what has no filters."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in space.unflatten(space.flatten(network)).items():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        if weight.ndim < 2:
            found[name] = torch.zeros_like(weight)
            continue
        lengths, own = (x.flatten(1).norm(dim=1).clamp_min(1e-12) for x in (drawn, weight))
        found[name] = drawn * (own / lengths).view(-1, *[1] * (weight.ndim - 1))
    return torch.cat([found[name].reshape(-1) for name in found])


def _projected(path: Path, span: Span) -> tuple[Tensor, float]:
    """Return points of a curve in a plane, ``(N, 2)``, and how far it is away from the plane at most.

    A curve is a weighted sum of its control points, and so is what it has beside the plane.
    """
    places, beside = zip(*(span.place(point) for point in path.control_points), strict=True)
    weights = path.curve.basis(torch.linspace(0, 1, _ON_CURVE, dtype=torch.float64, device="cpu")).double().cpu()
    gram = torch.tensor([[dot(p, q) for q in beside] for p in beside], dtype=torch.float64, device="cpu")
    distance = ((weights @ gram) * weights).sum(1).clamp(min=0).max().sqrt()
    return weights @ torch.tensor(places, dtype=torch.float64, device="cpu"), float(distance)


def _limit(losses: Sequence[float], times: float) -> float | None:
    """Return a multiple of the largest finite loss; None if none is above 0, of which a multiple means nothing."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return times * max(finite) if finite and max(finite) > 0 else None


def _chosen(
    corners: Sequence[Point],
    curve: Tensor | None,
    span: Span,
    subject: _Subject,
    measuring: Measuring,
    limit: float | None,
) -> Extent:
    drawn = [] if curve is None else [(float(x), float(y)) for x, y in curve]
    held = Extent.around([*corners, *drawn])
    every = Extent.around([(float(x), float(y)) for x, y in span.corners])
    width = max(every.x[1] - every.x[0], every.y[1] - every.y[0])  # one for both: distances are of one kind
    return chosen_extent(held, width, measuring, limit)


def _check_settings(columns: int, rows: int, extent: Any, times: float, refine: int, attack: Any, forward: Any) -> None:
    """Raise a ValueError if a setting is out of range."""
    if columns < 2 or rows < 2:
        raise ValueError(f"num_points must be at least 2 in both directions, got num_points=({columns}, {rows}).")
    is_extent = extent is None or (len(extent) == 4 and extent[0] < extent[1] and extent[2] < extent[3])
    if not is_extent or (extent is not None and not all(abs(one) < torch.finfo(torch.float32).max for one in extent)):
        raise ValueError(f"extent must be (left, right, bottom, top), finite, each pair rising, got extent={extent}.")
    if attack is not None and not is_attack(attack):
        raise ValueError(
            f"attack must be called as attack(model, x, y), such as PGD(...), got {shortened(attack, 80)}."
        )
    if not times > 1:
        raise ValueError(f"times must be more than 1, got times={times}.")
    if not 0 <= refine <= 4:
        raise ValueError(f"refine must be from 0 to 4, got refine={refine}.")
    if attack is not None and forward is not None:
        raise ValueError("attack= needs batches of inputs and targets, which forward= is not for. Leave one out.")


def _told(subject: _Subject, read: Any, moved: SpanNetworks, settings: Mapping[str, Any], is_kept: bool) -> list[Any]:
    """Return what tells the measurements of a plane from others; nothing where they are not kept."""
    if not is_kept:
        return []
    calibration = moved.calibration
    own = isinstance(calibration, AdversarialExamples)
    places = [*subject.line.control_points, subject.third, *(x for one in subject.buffers for x in one.values())]
    return [
        digest(places),
        digest(subject.line.template),
        digest([tensor for batch in read for tensor in tensors_of(batch)]),
        digest([tensor for batch in (calibration.loader if own else calibration) for tensor in tensors_of(batch)]),
        identify(replace(calibration, loader=())) if own else "",
        identify(moved.forward),
        *(identify(value) for value in settings.values()),
    ]


def _check_alike(
    subject: _Subject, loader: Any, recalibrate: Any, settings: Mapping[str, Any], shape: Mapping[str, Any]
) -> None:
    """Raise a ValueError unless all processes that share the points measure the same."""
    them = joined()
    if them.size == 1:
        return
    check_whole(loader)
    with seeded(0, subject.line.space.device):
        plain = recalibrate.loader if isinstance(recalibrate, AdversarialExamples) else recalibrate
        facts = facts_of(loader, is_measured=True) | facts_of(plain, name="recalibrate", is_measured=True)
        how = {"adversary": replace(recalibrate, loader=()) if isinstance(recalibrate, AdversarialExamples) else None}
        texts = {name: identify(value) for name, value in {**settings, **shape, **how}.items()}
        them.agree({**texts, "networks": digest([*subject.line.control_points, subject.third]), **facts})
