"""Neuron alignment: units that respond alike to the same inputs take the same place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeconn.matching.assignment import match_groups
from modeconn.matching.method import Match, check_data, correlations
from modeconn.matching.statistics import Moments, collect
from modeconn.network.attack import Attack, is_attack
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.checks import check_integers
from modeconn.tools.door import check_settings, shown
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn


@dataclass(frozen=True)
class ActivationMatching(Shown):
    r"""Match units by their activations on training data (Tatro et al., 2020).

    For each group the relabelling maximises :math:`\sum_i \operatorname{corr}(X_a[i], X_b[\pi(i)])`, exactly, over all
    images and places. A group that is read in several tensors (a residual stream) is matched on the pooled moments of
    all of them. Groups that rotate their units are matched by orthogonal Procrustes problems on covariances (with
    "cosine" and "inner_product" on products that are not centred). Both networks run once over the data, in eval mode,
    without augmentation.

    Args:
        num_examples: How many training examples to use, from the beginning of one pass; None for the whole loader.
        pre_activation: Read units before their elementwise nonlinearity instead of after it.
        statistic: "correlation" (Pearson's); "cosine", not centred; or "inner_product", which minimises
            :math:`\sum_i \|X_a[i] - X_b[\pi(i)]\|^2`, the Wasserstein-2 distance between the two layers' units.
        adversary: An attack, such as `PGD(8 / 255, 2 / 255, 5)`: units are then compared on adversarial examples, each
            network's own, for both from the same random numbers. The loader must yield ``(inputs, targets)``.

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439; Li et al., 2016, https://arxiv.org/abs/1511.07543

    Raises:
        ValueError: If a setting is out of range.
    """

    num_examples: int | None = 10_000
    pre_activation: bool = False
    statistic: Literal["correlation", "cosine", "inner_product"] = "correlation"
    adversary: Attack | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_examples")
        if self.num_examples is not None and self.num_examples < 2:
            raise ValueError(f"num_examples must be at least 2, or None, got num_examples={self.num_examples}.")
        if self.statistic not in ("correlation", "cosine", "inner_product"):
            raise ValueError(
                f"statistic must be 'correlation', 'cosine' or 'inner_product', got statistic={self.statistic!r}."
            )
        if not (self.adversary is None or is_attack(self.adversary)):
            raise ValueError(
                f"adversary must be an attack, such as PGD(...), got {shown('adversary', self.adversary)}."
            )

    @property
    def needs_data(self) -> str:
        """The message shown where no loader is given."""
        return "ActivationMatching compares activations, so it needs data: pass loader=, or use WeightMatching()."

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
    ) -> Match:
        """Return the relabelling of b; ``loader`` yields training data."""
        check_data(self, loader)
        moments = collect(
            spec,
            model_a,
            model_b,
            loader,
            num_examples_at_most=self.num_examples,
            before_activation=self.pre_activation,
            adversary=self.adversary,
        )
        similarities = {name: self._similarity(m, rotates=spec[name].rotates) for name, m in moments.items()}
        permutation = match_groups(spec, similarities)
        _warn_of_unread(spec, similarities)
        return Match(permutation, correlations(moments, permutation), constant_units(moments))

    def _similarity(self, moments: Moments, *, rotates: bool) -> Tensor:
        statistic = _OF_ROTATIONS[self.statistic] if rotates else self.statistic
        similarity = getattr(moments, statistic)()
        if not bool(torch.isfinite(similarity).all()):
            raise ValueError("activations are NaN or infinite on this data; check the endpoints' weights and inputs.")
        return similarity if rotates else break_ties(similarity, moments)


_OF_ROTATIONS = {"correlation": "covariance", "cosine": "inner_product", "inner_product": "inner_product"}
"""What is compared where units are rotated: they have no scales of their own, by which a correlation divides."""


def _warn_of_unread(spec: PermutationSpec, read: Collection[str]) -> None:
    """Warn of groups of which no tensor tells anything: neither they nor what lies inside them are read anywhere."""
    told = set(read) | {name for group in spec.groups if group.name in read for name, _ in group.parents}
    unread = [f"{group.name!r} ({group.size} units)" for group in spec.groups if group.name not in told]
    if unread:
        warn(
            f"activations say nothing of {', '.join(unread)}, which no operator of the graph reads by itself, as a "
            f"lower layer of a stacked recurrent network, or only for entries that values choose, others in each "
            f"network; they stay as they are. "
            f"WeightMatching(start=ActivationMatching()) matches them by their weights."
        )


def break_ties(similarity: Tensor, moments: Moments) -> Tensor:
    """Add to each entry what is at the level of its rounding and so decides between equals only.

    Units that never change stay where they are. Units that respond to the same single image are all perfectly
    correlated: those of equal spread are paired.
    """
    constant_a, constant_b = moments.constant()
    log_a, log_b = (v.clamp(min=1e-300).log() for v in moments.variances())
    spread = (log_a[:, None] - log_b[None, :]).abs().clamp(max=1)
    spread = torch.where(constant_a[:, None] | constant_b[None, :], 1.0, spread)
    stay = torch.diag((constant_a | constant_b).double())
    return similarity - 1e-6 * similarity.abs() * spread + 1e-9 * similarity.abs().max() * stay


def constant_units(moments: dict[str, Moments]) -> dict[str, tuple[int, int]]:
    """Count the units of a and of b that never change, by group."""
    return {name: tuple(int(c.sum()) for c in m.constant()) for name, m in moments.items()}
