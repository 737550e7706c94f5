"""Soundness by mutation: forget one thing that a rule learns, and the proof must notice.

``MODECONN_MUTATIONS=all`` forgets each thing in each network instead of a sample.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeconn import RULES, PermutationSpec, VerificationError
from modeconn.symmetry.discover import Walk, example_for
from modeconn.symmetry.graph import Graph, export
from tests.symmetry_cases import CASES, Case

SAMPLE = None if os.environ.get("MODECONN_MUTATIONS") == "all" else 8


class Forgetful:
    """The walk as rules see it, but for one call of ``unify``, ``fix`` or ``show``, which is dropped."""

    def __init__(self, walk: Walk, count: list[int], dropped: int | None) -> None:
        self._walk, self._count, self._dropped = walk, count, dropped

    def __getattr__(self, name: str) -> Any:
        if name not in ("unify", "fix", "show"):
            return getattr(self._walk, name)

        def call(*args: Any, **kwargs: Any) -> None:
            self._count[0] += 1
            if self._count[0] - 1 != self._dropped:
                getattr(self._walk, name)(*args, **kwargs)

        return call


def discover_without(
    case_model: torch.nn.Module, graphs: list[Graph], dropped: int | None
) -> tuple[PermutationSpec, int]:
    count = [0]

    def forgetful(rule: Callable[..., Any]) -> Callable[..., Any]:
        return lambda walk, *args, **kwargs: rule(Forgetful(walk, count, dropped), *args, **kwargs)

    walk = Walk(case_model, {op: forgetful(rule) for op, rule in RULES.items()})
    for graph in graphs:
        walk.run(graph)
    return walk.finish(), count[0]


def signature(spec: PermutationSpec) -> list[tuple]:
    return sorted((group.shape, group.places) for group in spec.groups)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whatever_a_rule_forgets_is_harmless_or_noticed(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    example = example_for(model, inputs)
    graphs = [export(model, example, training=mode) for mode in (False, True)]
    right, total = discover_without(model, graphs, None)
    assert right.verify(model, inputs) < 1e-10
    chosen = range(total) if SAMPLE is None else random.Random(0).sample(range(total), min(SAMPLE, total))
    for dropped in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong, _ = discover_without(model, graphs, dropped)
        if signature(wrong) == signature(right):
            continue  # another rule says the same, or nothing rests on it
        with pytest.raises(VerificationError):
            wrong.verify(model, inputs)
            pytest.fail(f"call {dropped} of {total} was dropped, and nobody noticed", pytrace=False)
