"""What happened while a curve was learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown

_ENTRIES: dict[str, type] = {"loss": Real, "loss_by_t": list, "turns": dict, "values": dict}


def keep_values(kept: list[dict[str, float]], epoch: int, values: dict[str, float]) -> None:
    """Add what was measured after an epoch, from 1, to that of all before, of which some may have had no callbacks."""
    kept += [{} for _ in range(epoch - 1 - len(kept))]
    kept.append(values)


@dataclass(frozen=True)
class History(Shown):
    """What happened while a curve was learned.

    Args:
        loss: Mean training loss of each epoch, without the weight penalty.
        loss_by_t: The same for ten equal bins of t, one list of ten an epoch; None where no batch fell into a bin.
        seconds: Time of the run, steps of PAM and callbacks included, over all parts of an interrupted run.
        turns: What each step of `PAM` in the permutation did.
        values: What callbacks measured after each epoch, by name; empty if there were none.
        num_processes: How many processes took the steps together, at last.
    """

    loss: list[float] = field(default_factory=list)
    loss_by_t: list[list[float | None]] = field(default_factory=list)
    seconds: float = 0.0
    turns: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, float]] = field(default_factory=list)
    num_processes: int = 1

    def _facts(self) -> dict[str, str]:
        found = {"epochs": str(len(self.loss)), "seconds": f"{self.seconds:.1f}"}
        if self.loss:
            found["training loss, first and last epoch"] = f"{self.loss[0]:.4g}, {self.loss[-1]:.4g}"
        if self.turns:
            found["turns of the refinement"] = str(len(self.turns))
        return found | ({"processes": str(self.num_processes)} if self.num_processes > 1 else {})

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("loss", "loss_by_t", "turns", "values"):
            entries = getattr(self, name)
            if not all(isinstance(entry, _ENTRIES[name]) for entry in entries):
                raise ValueError(f"{name} must hold one {_ENTRIES[name].__name__.lower()} each, got {entries!r:.80}.")
