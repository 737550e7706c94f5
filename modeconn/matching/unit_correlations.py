"""How the units of two networks correlate, each of one with each of the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from modeconn.matching.alignment import Symmetry, find_spec
from modeconn.matching.statistics import collect
from modeconn.network.shares import check_whole
from modeconn.network.weights import device_of
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import checked
from modeconn.tools.rng import seeded


@checked
def unit_correlations(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    num_examples: int | None = 2_048,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
) -> dict[str, Tensor]:
    """Return Pearson's correlation of each unit of a with each unit of b, group by group, over data.

    With the relabelled b of an alignment, units that were paired stand on the diagonal. One group is drawn by
    `modeconn.plot.unit_correlation`.

    Args:
        model_a: The first network.
        model_b: The second, of the same architecture.
        loader: Data, in batches whose inputs the networks take.
        num_examples: How many examples to use, the first ones; None for all.
        spec: The groups; default: those that `modeconn.discover` finds in a.
        example_input: What ``model_a(...)`` takes, for discovery; default: the first batch.

    Returns:
        By the name of the group ``(N, N)``, float64 on the CPU, in [-1, 1]; row i is unit i of a. Units that never
        change have 0. Of units in blocks, such as heads, all are there, one block after the other. Groups that no
        operator reads by itself are left out.

    Raises:
        ValueError: If networks differ in architecture, or data does not fit.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, or None, got num_examples={num_examples}.")
    check_whole(loader)
    with seeded(0, device_of(model_a)):
        found = find_spec(model_a, loader, Symmetry(spec, example_input))
        found.check_model(model_b)
        pair = [found.prepared(model) if found.prepares else model for model in (model_a, model_b)]
        moments = collect(found, *pair, loader, num_examples_at_most=num_examples, before_activation=False)
        return {name: one.correlation().clamp(-1, 1).cpu() for name, one in moments.items()}
