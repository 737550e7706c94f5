"""Find the relabellings of hidden units that leave a model's function as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modeconn.symmetry.explore import explore
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.rules import RULES
from modeconn.symmetry.spec import PermutationSpec
from modeconn.symmetry.walk import Rule
from modeconn.tools.door import checked
from modeconn.tools.progress import bars
from modeconn.tools.warn import warn


class UnknownOperatorWarning(UserWarning):
    """An operator without a rule: everything it touches stays fixed."""


@checked
def discover(
    model: nn.Module,
    example_input: Any = None,
    *,
    rules: Mapping[Any, Rule] = RULES,
    freeze: Sequence[str] = (),
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    progress: bool = False,
) -> PermutationSpec:
    """Find every group of hidden units of a model that may be relabelled without changing its function.

    The model is exported in eval and in train mode (`torch.export`; nothing is computed, no weights are copied) and
    both graphs are walked with one rule per operator. No rule looks at a module's class or name. Where export cannot
    follow values, the model is run once on the example and what it does is recorded.

    Args:
        model: Any module; it is not changed. One that `torch.export` can follow may be on the meta device.
        example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            Default: ``model.example_input()``, where the model has that method. The result holds for any batch size,
            unless `PermutationSpec.fixed_batch` says why it is for those of the example's size.
        rules: Rule by operator; extend with ``{**RULES, torch.ops.mylib.scan.default: my_rule}``.
        freeze: Names of parameters or buffers, or patterns such as ``"blocks.0.*"``, all of whose axes stay fixed.
            A buffer, or a tensor that is a plain attribute, of whole numbers by which units are read is otherwise a
            part of the architecture: networks with another one are refused. If it is frozen, the units that it tells
            apart stay in place instead.
        outputs: Which of the model's outputs have to stay as they are: names (``"logits"``), positions in a tuple, or a
            function of what the model returns (``lambda o: o.logits``). Default: all of them. What nothing reads, such
            as a cache or hidden states, often fixes most of a model; what is computed for it alone may then change.
        symmetries: The largest kind of group that is looked for. "permutation" reorders units. "orthogonal" also
            rotates them where nothing but linear layers and norms read them, as in the residual streams of most
            transformers and inside of attention heads; gains that can be folded (`modeconn.fold_gains`) count as ones,
            and dropout as off, so that a rotated network equals the first in eval mode only.
        untie: Give tied weights, such as a head that is the embedding, a tensor for each of their names: the groups are
            those of the network that `modeconn.fold_gains` and `modeconn.align` then make, with more parameters.
        progress: Whether to show a progress bar where it takes more than a second.

    Returns:
        The groups and where each of them appears.

    Raises:
        ValueError: If there is no example input, the model does not run on it or cannot be exported, or a pattern in
            ``freeze`` matches nothing, or ``symmetries`` is no kind that is known.

    Warns:
        UserWarning: If `torch.export` cannot follow the model, because its values steer what it does: one run on the
            example is then recorded in its place, and the groups hold for the path that it takes. If only eval mode can
            be followed, or outputs but the first keep hidden units fixed.
        UnknownOperatorWarning: Once for each operator without a rule, with its place and what it costs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> discover(net, torch.zeros(2, 4))
        PermutationSpec(1 group, 8 units)
          0  8 units  0.weight[0]  0.bias[0]  2.weight[1]
    """
    with bars(progress):
        spec = PermutationSpec.of(explore(model, example_input, rules, freeze, outputs, symmetries, untie))
    if spec.outputs.are_all and spec.costs_of_outputs:
        names = ", ".join(map(repr, spec.costs_of_outputs))
        warn(
            f"the outputs {names}, which come after the first, keep {sum(spec.costs_of_outputs.values())} hidden units "
            f"where they are. If nothing reads them, pass outputs=, such as the name of the output that counts."
        )
    for unknown in spec.unknown:
        warn(f"no symmetry rule for {unknown}. Pass rules={{**RULES, ...}}.", UnknownOperatorWarning)
    return spec
