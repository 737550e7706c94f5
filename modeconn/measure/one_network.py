"""Loss, accuracy and other metrics of one network, by what measures networks along a curve."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from modeconn.measure.measurable import check_alike
from modeconn.measure.meter import Meter, fetch
from modeconn.measure.metrics import Against, AnyMetric, as_metrics
from modeconn.measure.profile import Profile, profile_along
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import NUM_EXAMPLES, but_for, calibration_batches, check_limit, norm_layers
from modeconn.network.batch_norm import recalibrate as recalibrate_statistics
from modeconn.network.batches import check_loader, first_batch, num_examples
from modeconn.network.copies import copy_of
from modeconn.network.loss import Forward, LossFn, cross_entropy
from modeconn.network.shares import check_whole
from modeconn.network.weights import check_eval_mode, device_of
from modeconn.tools.callbacks import Callbacks
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import digest
from modeconn.tools.processes import shared
from modeconn.tools.rng import seeded


@shared
@checked
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    recalibrate: Iterable[Any] | AdversarialExamples | None = None,
    recalibration_examples: int | None = NUM_EXAMPLES,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    metrics: Mapping[str, AnyMetric] | None = None,
) -> Profile:
    """Measure loss, accuracy and other metrics of one network, as `Connection.evaluate` does along a curve.

    Layers of batch norm have the running statistics that the network came with, unless there is ``recalibrate``. The
    network and the caller's random state are left as they were. Of processes that are a group of `torch.distributed`,
    all must make this call, with the same data.

    Args:
        model: A network in eval mode.
        loader: Data to measure on, ``(inputs, targets)`` batches.
        recalibrate: Training data on which batch norm is recalibrated, in a copy; or `AdversarialExamples` of it.
        recalibration_examples: How many examples of it to use, None for all.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, for batches that are no ``(inputs, targets)``. Metrics
            and accuracy need it to return ``(loss, outputs, targets)``.
        metrics: Other metrics by name, see `Connection.evaluate`; none that compare with an end of a curve.

    Returns:
        A profile of one point, at t = 0.

    Raises:
        ValueError: If the model is in train mode, the loader is empty, can be read only once or has targets outside the
            classes, or a metric is none, has the name of another quantity, computes more than one number, or compares
            with an end of a curve.

    Example:
        >>> from modeconn import data, models
        >>> train, test = data.load("digits")
        >>> profile = evaluate(models.mlp(64, (8,), 10, mean=train.mean()).eval(), test)
        >>> profile.num_examples, profile.loss.shape
        (500, torch.Size([1]))
    """
    started, named, device = time.perf_counter(), metrics_of_one(metrics), device_of(model)
    check_eval_mode(model)
    check_limit(recalibration_examples)
    settings = {"recalibration_examples": recalibration_examples, "forward": forward, "metrics": named}
    check_alike(
        loader, recalibrate, {**settings, "loss_fn": loss_fn}, lambda: {"the digest of model": digest(model)}, device
    )
    with seeded(0, device):
        check_loader(loader) if forward is None else first_batch(loader)
        measured = _OneNetwork(model, recalibrate, recalibration_examples, forward)
        meter = Meter(fetch(loader, device), loss_fn, forward, named)
        how = {"started": started, "device": device, "callbacks": Callbacks(), "progress": False}
        return profile_along(measured, meter, [0.0], None, **how)


def metrics_of_one(metrics: Mapping[str, AnyMetric] | None) -> dict[str, AnyMetric]:
    """Return metrics of one network by name, functions made metrics.

    Raises:
        ValueError: If a name is taken, or something is no metric, or compares a network with an end of its curve.
    """
    named = as_metrics(metrics)
    for name, metric in named.items():
        if isinstance(metric, Against):
            raise ValueError(
                f"metric {name!r} compares with end {metric.end!r} of a curve, and one network has none. Leave it out, "
                f"or measure a connection."
            )
    return named


class _OneNetwork:
    """One network in the place of those along a curve, see `modeconn.measure.profile.Networks`."""

    ends_have_their_own = False

    def __init__(self, model: nn.Module, recalibrate: Any, limit: int | None, forward: Forward | None) -> None:
        self._model, self.statistics = model, ""
        if not norm_layers(model):
            return
        self.statistics = "those that the network came with"
        if recalibrate is None:
            return
        check_whole(recalibrate, name="recalibrate")
        calibration = calibration_batches(recalibrate, device_of(model), limit=limit, name="recalibrate")
        self._model = copy_of(model)
        missed = but_for(recalibrate_statistics(self._model, calibration, forward=forward))
        if isinstance(calibration, AdversarialExamples):
            self.statistics = f"norm layers recalibrated on the network's own adversarial examples{missed}"
        else:
            count = sum(map(num_examples, calibration))
            self.statistics = f"norm layers recalibrated on {count:,} training examples{missed}"

    def __call__(self, t: float) -> nn.Module:
        return self._model

    def as_it_came(self, end: int) -> nn.Module:
        return self._model
