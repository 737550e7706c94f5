"""A metric of a user's own: the expected calibration error, which no mean over batches could give."""

from __future__ import annotations

import pytest
import torch

import modeconn

# -- what the user writes


class CalibrationError:
    """The mean distance of confidence and accuracy over bins of confidence (Guo et al., 2017)."""

    higher_is_better = False

    def __init__(self, num_bins: int = 10) -> None:
        self.num_bins = num_bins
        self.reset()

    def reset(self):
        self.counts, self.confidences, self.rights = torch.zeros(3, self.num_bins, dtype=torch.float64)

    def update(self, outputs, targets):
        confidence, chosen = outputs.softmax(1).max(1)
        place = (confidence * self.num_bins).long().clamp(max=self.num_bins - 1).cpu()
        self.counts.index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
        self.confidences.index_add_(0, place, confidence.double().cpu())
        self.rights.index_add_(0, place, (chosen == targets).double().cpu())

    def compute(self):
        return float((self.confidences - self.rights).abs().sum() / self.counts.sum())


# -- what it can do


def test_it_is_measured_along_a_curve_and_does_not_depend_on_the_batch_size(digits_line, tmp_path):
    a, b, _, test = digits_line
    line = modeconn.Connection.straight_between(a, b)
    profiles = [
        line.evaluate(test.with_(batch_size=size), num_points=3, metrics={"ece": CalibrationError()})
        for size in (500, 33)
    ]
    torch.testing.assert_close(profiles[0].metrics["ece"], profiles[1].metrics["ece"])
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    with torch.no_grad():
        confidence, chosen = a(x).softmax(1).max(1)
    bins = [(confidence >= i / 10) & (confidence < (i + 1) / 10) for i in range(10)]
    gaps = [(confidence[k].double().sum() - (chosen == y)[k].sum()).abs().item() for k in bins]
    assert profiles[0].metrics["ece"][0] == pytest.approx(sum(gaps) / len(x))

    profiles[0].to_json(tmp_path / "p.json")
    read = modeconn.AlongCurve.from_json((tmp_path / "p.json").read_text())
    assert read.barrier_of("ece") == profiles[0].barrier_of("ece") and "ece" in read.to_csv().splitlines()[0]
